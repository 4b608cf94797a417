"""Checkpoints of EarlyExitModule: a run that stops anywhere goes on as if it had not, and files load in other ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from exits_on_digits import EXITS, Diary, backbone, data, images, module, same, state, trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn

from lightning_eff.early_exit.attaching.heads import Head
from lightning_eff.early_exit.inference.policies import Custom, Entropy, MaxProb, Policy
from lightning_eff.early_exit.module import EarlyExitModule
from lightning_eff.early_exit.training.losses import ExitLosses
from lightning_eff.early_exit.training.phases import Phase

COSINE = {"class_path": "torch.optim.lr_scheduler.CosineAnnealingLR", "init_args": {"T_max": None}}
BATCHES = 3


def each_epoch(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)


def each_batch(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)


def short_set() -> Any:
    """Digits of which a training epoch has three batches: what a limit cuts off cannot be resumed in the middle."""
    return data(batch_size=359)


def fit(regime: Any, *callbacks: pl.Callback, path: Path | None = None, **options: Any) -> tuple[Any, pl.Trainer]:
    net = module(regime=regime, lr_scheduler=COSINE)
    running = trainer(*callbacks, **{"limit_train_batches": None, "limit_val_batches": 1, **options})
    running.fit(net, short_set(), ckpt_path=path)
    return net, running


@pytest.mark.parametrize("regime", ["mixed", "disjoint"])
def test_a_run_resumed_after_any_epoch_ends_bit_identical(regime: str, tmp_path: Path) -> None:
    whole, _ = fit(regime, diary := Diary(), each_epoch(tmp_path))
    for epoch in range(3):
        again = Diary()
        resumed, _ = fit(regime, again, path=tmp_path / f"epoch={epoch}.ckpt")
        assert again.batches == diary.batches[BATCHES * (epoch + 1) :]
        assert same(state(whole), state(resumed))


@pytest.mark.parametrize("regime", ["mixed", "disjoint"])
def test_a_run_resumed_after_any_batch_ends_bit_identical(regime: str, tmp_path: Path) -> None:
    whole, _ = fit(regime, diary := Diary(), each_batch(tmp_path))
    for step in (5, 6, 7):  # before, at and behind the last batch of the first phase
        again = Diary()
        resumed, running = fit(regime, again, path=tmp_path / f"step={step}.ckpt")
        assert [one[1:] for one in again.batches] == [one[1:] for one in diary.batches[step:]]
        assert same(state(whole), state(resumed))
        assert running.global_step == 12


def test_a_schedule_of_steps_does_not_keep_loaders_from_going_on_where_they_were(tmp_path: Path) -> None:
    schedule = {"scheduler": COSINE, "interval": "step"}
    runs = [module(lr_scheduler=schedule), module(lr_scheduler=schedule)]
    trainer(each_batch(tmp_path), limit_train_batches=None).fit(runs[0], short_set())
    trainer(limit_train_batches=None).fit(runs[1], short_set(), ckpt_path=tmp_path / "step=8.ckpt")
    assert same(state(runs[0]), state(runs[1]))


def test_a_run_of_steps_goes_on_in_its_phase(tmp_path: Path) -> None:
    limits = {"max_epochs": -1, "max_steps": 8}
    whole, _ = fit("mixed", diary := Diary(), each_batch(tmp_path), **limits)
    for step in (3, 4, 5):
        resumed, _ = fit("mixed", again := Diary(), path=tmp_path / f"step={step}.ckpt", **limits)
        assert [one[1:] for one in again.batches] == [one[1:] for one in diary.batches[step:]]
        assert same(state(whole), state(resumed))


def test_a_phase_that_was_to_end_early_ends_in_the_resumed_run(tmp_path: Path) -> None:
    class Impatient(pl.Callback):
        def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == 0:
                pl_module.next_phase()

    _, running = fit("mixed", diary := Diary(), Impatient(), each_epoch(tmp_path))
    assert [trained for _, trained, *_ in diary.batches] == ["b"] * 3 + ["bh"] * 6
    assert running.current_epoch == 3
    for epoch in (0, 1):
        fit("mixed", again := Diary(), path=tmp_path / f"epoch={epoch}.ckpt")
        assert again.batches == diary.batches[BATCHES * (epoch + 1) :]


def test_more_epochs_may_be_given_to_the_last_phase(tmp_path: Path) -> None:
    fit("mixed", each_epoch(tmp_path))
    _, running = fit("mixed", diary := Diary(), path=tmp_path / "epoch=3.ckpt", max_epochs=6)
    assert running.current_epoch == 6
    assert [trained for _, trained, *_ in diary.batches] == ["bh"] * 6


def test_another_regime_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    fit("mixed", each_epoch(tmp_path))
    net = module(regime="disjoint")
    before = state(net.network.backbone)
    with pytest.raises(ValueError, match=r"in the phases \[backbone: a share, all: a share\], this module has"):
        trainer().fit(net, short_set(), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert same(before, state(net.network.backbone))
    with pytest.raises(ValueError, match="backbone: 2, all: a share"):
        trainer().fit(module(regime=[Phase("backbone", 2), Phase("all")]), data(), ckpt_path=tmp_path / "epoch=1.ckpt")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"phase_split": 0.25}, "with phase_split=0.5, this module has 0.25"),
        ({"start_phase": 1}, "with start_phase=0, this module has 1"),
    ],
)
def test_other_beginnings_and_shares_of_phases_are_refused(options: Any, told: str, tmp_path: Path) -> None:
    trainer(each_epoch(tmp_path), max_epochs=2).fit(module(), short_set())
    with pytest.raises(ValueError, match=told):
        trainer().fit(module(**options), short_set(), ckpt_path=tmp_path / "epoch=0.ckpt")
    with pytest.warns(UserWarning, match="of phase 1 of 2, which trains the backbone alone: its heads are not trained"):
        trainer().test(module(**options), short_set(), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)


def test_averaged_weights_are_resumed_over_the_change_of_phases(tmp_path: Path) -> None:
    def ema() -> EMAWeightAveraging:
        return EMAWeightAveraging(decay=0.5)

    with pytest.warns(UserWarning, match="WeightAveraging doesn't support sharding"):
        whole, _ = fit("mixed", ema(), each_epoch(tmp_path))
    with pytest.warns(UserWarning, match="WeightAveraging doesn't support sharding"):
        resumed, _ = fit("mixed", ema(), path=tmp_path / "epoch=1.ckpt")
    assert same(state(whole), state(resumed))


# Other ways to load


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[EarlyExitModule, Path]:
    folder = tmp_path_factory.mktemp("trained")
    losses = ExitLosses("increasing", distill="last")
    net = module(regime=[Phase("backbone", 1), Phase("all", 1, loss_weights=[1.0, 1.0, 2.0])], losses=losses)
    running = trainer(ModelCheckpoint(folder, filename="last"), max_epochs=2)
    running.fit(net, data())
    net.network.set_thresholds([0.5, None])
    running.save_checkpoint(folder / "last.ckpt")
    return net, folder / "last.ckpt"


def test_checkpoints_hold_plain_python_and_tensors(trained: tuple[EarlyExitModule, Path]) -> None:
    checkpoint = torch.load(trained[1], weights_only=True)
    hparams = checkpoint["hyper_parameters"]
    assert hparams["exits"] == EXITS
    assert hparams["regime"][1]["loss_weights"] == [1.0, 1.0, 2.0]
    assert hparams["losses"]["distill"] == "last"
    assert "backbone" not in hparams
    assert checkpoint["lightning_eff.early_exit"]["clock"]["index"] == 1


def test_a_checkpoint_loads_with_a_new_backbone_and_no_data(trained: tuple[EarlyExitModule, Path]) -> None:
    net, path = trained
    loaded = EarlyExitModule.load_from_checkpoint(path, backbone=backbone())
    assert same(state(net), state(loaded))
    assert loaded.network.thresholds == net.network.thresholds == [0.5, None]
    assert loaded.network.costs == net.network.costs
    assert loaded.phase.train == "all"
    assert loaded.losses == net.losses
    assert [phase.loss_weights for phase in loaded.phases] == [None, [1.0, 1.0, 2.0]]
    assert torch.equal(net.network.predict(images()).logits, loaded.network.predict(images()).logits)


def test_a_module_whose_exits_are_not_built_is_tested_from_a_checkpoint(trained: tuple[EarlyExitModule, Path]) -> None:
    net, path = trained
    regime = [Phase("backbone", 1), Phase("all", 1, loss_weights=[1.0, 1.0, 2.0])]
    losses = ExitLosses("increasing", distill="last")
    expected = trainer().test(net, data(), verbose=False)[0]
    found = trainer().test(module(regime=regime, losses=losses), data(), ckpt_path=path, verbose=False)[0]
    assert found == pytest.approx(expected, nan_ok=True)


def test_a_fit_of_a_loaded_module_begins_with_its_first_phase(trained: tuple[EarlyExitModule, Path]) -> None:
    loaded = EarlyExitModule.load_from_checkpoint(trained[1], backbone=backbone())
    trainer(diary := Diary(), max_epochs=2, limit_train_batches=1).fit(loaded, data())
    assert [part for _, part, *_ in diary.batches] == ["b", "bh"]


def test_kinds_of_heads_and_named_policies_are_written_by_name() -> None:
    made = module(exits={EXITS[0]: Head("pool"), EXITS[1]: "conv"})
    assert made.hparams["exits"] == {EXITS[0]: "pool", EXITS[1]: "conv"}
    assert "head" not in module(head=Head("mlp", layers=2)).hparams
    assert module(policy=Entropy(normalized=True)).hparams["policy"] == "normalized_entropy"
    assert "policy" not in module(policy=lambda logits, k, state: (logits.amax(1), state)).hparams


def highest_logit(logits: Tensor, exit_index: int, state: Any) -> tuple[Tensor, Any]:
    return logits.amax(1), state


class Squared(MaxProb):
    """Thresholds are squares of probabilities."""

    name = "squared"

    def __call__(self, logits: Tensor, exit_index: int, state: Any) -> tuple[Tensor, Any]:
        return logits.softmax(-1).amax(-1) ** 2, state


@pytest.mark.parametrize("policy", [Squared(), Custom(highest_logit, low=-5.0, high=5.0)])
def test_a_policy_of_ones_own_is_taken(policy: Policy) -> None:
    net = module(regime="joint", policy=policy)
    assert net.network.policy is policy
    assert "policy" not in net.hparams
    trainer(max_epochs=1).fit(net, data())


def saved(net: EarlyExitModule, path: Path) -> Path:
    running = trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=0)
    running.fit(net, data())
    running.save_checkpoint(path)
    return path


def test_thresholds_of_another_policy_are_refused(tmp_path: Path) -> None:
    path = saved(module(regime="joint", policy=highest_logit, thresholds=3.0), tmp_path / "own.ckpt")
    told = "thresholds of the policy 'highest_logit', this module has the policy 'max_prob'"
    with pytest.raises(ValueError, match=told):
        EarlyExitModule.load_from_checkpoint(path, backbone=backbone())
    with pytest.raises(ValueError, match=told):
        trainer().test(module(regime="joint"), data(), ckpt_path=path)
    loaded = EarlyExitModule.load_from_checkpoint(path, backbone=backbone(), policy=highest_logit)
    assert loaded.network.thresholds == [3.0, 3.0]


def test_disabled_exits_can_be_given_another_policy(tmp_path: Path) -> None:
    path = saved(module(regime="joint"), tmp_path / "off.ckpt")
    loaded = EarlyExitModule.load_from_checkpoint(path, backbone=backbone(), policy="entropy")
    assert loaded.network.thresholds == [None, None]


def test_what_a_checkpoint_cannot_hold_and_nobody_hands_over_is_told(tmp_path: Path) -> None:
    given = {
        "regime": [Phase("all", optimizer=torch.optim.SGD)],
        "optimizer": torch.optim.Adam,
        "losses": ExitLosses(criterion=nn.CrossEntropyLoss()),
        "policy": highest_logit,
    }
    path = saved(module(**given), tmp_path / "own.ckpt")
    told = "policy, optimizer, losses.criterion: not plain data"
    with pytest.warns(UserWarning, match=rf"regime\.0\.optimizer, {told}") as warned:
        EarlyExitModule.load_from_checkpoint(path, backbone=backbone())
    assert len(warned) == 1
    rest = {name: value for name, value in given.items() if name != "optimizer"}
    with pytest.warns(UserWarning, match="^optimizer: not plain data"):
        EarlyExitModule.load_from_checkpoint(path, backbone=backbone(), **rest)
    EarlyExitModule.load_from_checkpoint(path, backbone=backbone(), **given)


@pytest.mark.parametrize("exits", [["layers.pool2", "layers.relu5"], ["layers.pool2"]])
@pytest.mark.parametrize("built", [True, False])
def test_other_exits_are_told_and_the_backbone_can_be_loaded_alone(
    exits: list[str], built: bool, trained: tuple[EarlyExitModule, Path]
) -> None:
    net, path = trained
    options = {"backbone": backbone(), "exits": exits, "example_input": images() if built else None}
    with pytest.raises(ValueError, match=r"missing here are \['layers.pool4'\]"):
        EarlyExitModule.load_from_checkpoint(path, **options)
    with pytest.warns(UserWarning, match="Found keys that are in the model state dict but not in the checkpoint"):
        loaded = EarlyExitModule.load_from_checkpoint(path, **options, strict=False)
    assert same(state(net.network.backbone), state(loaded.network.backbone))


def test_other_heads_are_told(trained: tuple[EarlyExitModule, Path]) -> None:
    with pytest.raises(ValueError, match=r"heads differ: network.heads.0.*is missing in the checkpoint"):
        EarlyExitModule.load_from_checkpoint(trained[1], backbone=backbone(), head=Head("mlp", layers=2))


def test_weights_of_another_origin_load_too(trained: tuple[EarlyExitModule, Path]) -> None:
    net, _ = trained
    plain = module(example_input=images())
    plain.load_state_dict(net.state_dict())
    assert same(state(net), state(plain))
    assert plain.phase_index == 0


def test_a_checkpoint_of_another_version_is_refused(trained: tuple[EarlyExitModule, Path], tmp_path: Path) -> None:
    checkpoint = torch.load(trained[1], weights_only=True)
    checkpoint["lightning_eff.early_exit"]["version"] = 99
    torch.save(checkpoint, tmp_path / "new.ckpt")
    with pytest.raises(ValueError, match="in version 1, got 99"):
        EarlyExitModule.load_from_checkpoint(tmp_path / "new.ckpt", backbone=backbone())


def test_a_criterion_moves_and_is_saved_with_the_module() -> None:
    net = module(losses=ExitLosses(criterion=nn.CrossEntropyLoss(weight=torch.arange(10.0))))
    assert "criterion.weight" in net.state_dict()
