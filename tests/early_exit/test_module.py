"""EarlyExitModule: what each phase trains and leaves alone, what is logged, and what is refused."""

from __future__ import annotations

import copy
import math
import signal
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from exits_on_digits import EXITS, Diary, backbone, data, fixed_loader, images, module, same, state, trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR
from torch.utils.data import DataLoader

from lightning_eff.batch import BatchKeys
from lightning_eff.early_exit.attaching.costs import ExitCosts
from lightning_eff.early_exit.evaluation.curve import EarlyExitCurve
from lightning_eff.early_exit.module import EarlyExitModule
from lightning_eff.early_exit.options import NetworkOptions
from lightning_eff.early_exit.training.in_trainer import first_batch
from lightning_eff.early_exit.training.losses import ExitLosses
from lightning_eff.early_exit.training.phases import Phase

HEAVY = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.5)


def part(states: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in states.items() if key.startswith(name)}


# What phases train


def test_disjoint_training_leaves_the_backbone_bit_identical_in_its_second_phase() -> None:
    net, diary = module(regime="disjoint", optimizer=HEAVY), Diary()
    trainer(diary).fit(net, data())
    before, after = diary.states[2], state(net.network)
    assert any("running_mean" in name for name in part(before, "backbone"))
    assert same(part(before, "backbone"), part(after, "backbone"))
    assert not any(torch.equal(before[name], after[name]) for name in part(after, "heads"))


def test_a_phase_that_trains_the_backbone_leaves_heads_alone_even_with_weight_decay() -> None:
    net, diary = module(regime="mixed", optimizer=HEAVY), Diary()
    trainer(diary).fit(net, data())
    assert same(part(diary.states[0], "heads"), part(diary.states[2], "heads"))
    moved = [name for name, parameter in net.network.named_parameters() if name.startswith("backbone")]
    assert not any(torch.equal(diary.states[0][name], diary.states[2][name]) for name in moved)


def test_joint_training_moves_every_parameter() -> None:
    net, diary = module(regime="joint"), Diary()
    trainer(diary, max_epochs=1).fit(net, data())
    assert not any(torch.equal(diary.states[0][name], value) for name, value in net.network.named_parameters())


def test_mixed_training_in_one_fit_equals_two_fits() -> None:
    example, loader = images(), fixed_loader()
    whole = module(regime="mixed", example_input=example)
    first = EarlyExitModule(copy.deepcopy(whole.network.backbone), EXITS, 10, regime=[Phase("backbone")])
    first.network.build(example)
    first.load_state_dict(whole.state_dict())
    second = module(regime=[Phase("all")], example_input=example)
    trainer(max_epochs=4).fit(whole, loader, loader)
    trainer(max_epochs=2).fit(first, loader, loader)
    second.load_state_dict(first.state_dict())
    trainer(max_epochs=2).fit(second, loader, loader)
    assert same(state(whole.network), state(second.network))


def test_a_backbone_that_was_thawed_stands_still_again_in_a_later_phase() -> None:
    class Watch(pl.Callback):
        """Sets training mode after every step, by which the official code frees the backbone."""

        seen: list[tuple[str, bool, bool]] = []

        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            pl_module.train()
            inner = pl_module.network.backbone
            modes = {one.training for one in inner.modules()}
            grads = {parameter.requires_grad for parameter in inner.parameters()}
            assert len(modes) == len(grads) == 1
            self.seen.append((pl_module.phase.train, modes.pop(), grads.pop()))

    watch = Watch()
    regime = [Phase("heads", 1), Phase("backbone", 1), Phase("all", 1), Phase("heads", 2)]
    trainer(watch, max_epochs=5).fit(module(regime=regime), data())
    still, free = ("heads", False, False), True
    assert watch.seen == [still] * 3 + [("backbone", free, free)] * 3 + [("all", free, free)] * 3 + [still] * 6


def test_what_the_user_froze_stays_frozen_and_is_given_back_as_found() -> None:
    net = module(regime="disjoint")
    net.network.backbone.layers.conv1.requires_grad_(False)
    net.network.backbone.layers.norm2.eval()
    flags = [parameter.requires_grad for parameter in net.network.backbone.parameters()]
    modes = [one.training for one in net.network.backbone.modules()]
    before = state(net.network)
    with pytest.warns(UserWarning, match=r"Found 1 module\(s\) in eval mode"):
        trainer().fit(net, data())
    for name in ("conv1.weight", "norm2.running_mean"):
        assert torch.equal(before[f"backbone.layers.{name}"], net.network.backbone.state_dict()[f"layers.{name}"])
    assert flags == [parameter.requires_grad for parameter in net.network.backbone.parameters()]
    assert all(parameter.requires_grad for parameter in net.network.heads.parameters())
    assert modes == [one.training for one in net.network.backbone.modules()]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_what_was_frozen_is_given_back_when_a_fit_breaks_off(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # Lightning switches Ctrl-C off for good

    class Fail(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            if pl_module.phase.train == "heads":
                assert not any(parameter.requires_grad for parameter in pl_module.network.backbone.parameters())
                raise error

    net = module(regime="disjoint")
    net.network.backbone.layers.conv1.weight.requires_grad_(False)
    modes = [one.training for one in net.network.backbone.modules()]
    running = trainer(Fail(), ModelCheckpoint(tmp_path, save_last=True))
    callbacks = list(running.callbacks)
    with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
        running.fit(net, data())
    still = {name for name, parameter in net.named_parameters() if not parameter.requires_grad}
    assert still == {"network.backbone.layers.conv1.weight"}
    assert modes == [one.training for one in net.network.backbone.modules()]
    assert running.callbacks == callbacks
    held = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    assert [name.split("{")[0] for name in held] == ["ModelCheckpoint"]
    again = Diary()
    trainer(again, limit_train_batches=1).fit(net, data())
    assert [trained for _, trained, *_ in again.batches] == ["b", "b", "h", "h"]


def test_a_phase_without_anything_to_train_is_refused() -> None:
    net = module(regime="mixed")
    net.network.backbone.requires_grad_(False)
    with pytest.raises(ValueError, match="phase 'backbone' has nothing to train"):
        trainer().fit(net, data())


def test_a_head_of_weight_zero_is_not_trained() -> None:
    net, diary = module(regime="joint", losses=ExitLosses([0.0, 1.0, 1.0]), optimizer=torch.optim.SGD), Diary()
    running = trainer(diary, max_epochs=1)
    running.fit(net, data())
    first = part(diary.states[0], "heads.0")
    assert same(first, part(state(net.network), "heads.0"))
    assert running.callback_metrics["train/loss_exit0"] > 0


def test_equilibrium_changes_the_gradients_of_the_backbone_and_not_those_of_the_heads() -> None:
    grads = []
    for scaling in ("none", "equilibrium"):
        net = module(losses=ExitLosses([1.0, 1.0, 1.0], scaling), example_input=images())
        loss, _ = net._loss(Phase("all"), net(images()), torch.arange(8))
        loss.backward()
        grads.append({name: parameter.grad for name, parameter in net.network.named_parameters()})
    plain, balanced = grads
    for name in part(plain, "heads"):
        assert torch.equal(plain[name], balanced[name])
    stem = "backbone.layers.conv1.weight"
    assert (plain[stem] - balanced[stem]).abs().max() > 0.1 * plain[stem].abs().max()


def test_heads_alone_can_learn_from_the_final_output() -> None:
    losses = ExitLosses(distill="last", distill_temperature=4.0)
    net, diary = module(regime="disjoint", losses=losses), Diary()
    trainer(diary).fit(net, data())
    assert same(part(diary.states[2], "backbone"), part(state(net.network), "backbone"))
    assert not same(part(diary.states[2], "heads"), part(state(net.network), "heads"))


@pytest.mark.parametrize("distill", [None, "next"])
def test_heads_are_trained_without_running_what_is_behind_them(distill: Any) -> None:
    ran: list[str] = []
    net = module(backbone=backbone(), exits=["layers.pool2"], regime="disjoint", losses=ExitLosses(distill=distill))
    net.network.backbone.layers.conv5.register_forward_hook(lambda *_: ran.append(net.phase.train))
    trainer(diary := Diary(), max_epochs=2, limit_val_batches=0).fit(net, data())
    assert [trained for _, trained, *_ in diary.batches] == ["b"] * 3 + ["h"] * 3
    assert ran.count("backbone") >= 3
    assert ran.count("heads") == (3 if distill else 0)  # the final output teaches the head


# Optimizers and schedules


def test_every_phase_begins_with_its_own_optimizer_and_schedule() -> None:
    diary = Diary()
    cosine = {"class_path": "torch.optim.lr_scheduler.CosineAnnealingLR", "init_args": {"T_max": None}}
    regime = [
        Phase("backbone", 2, partial(torch.optim.SGD, lr=0.1), partial(CosineAnnealingLR, T_max=None)),
        Phase("all", 4, lr_scheduler=cosine),
    ]
    options = {"optimizer": partial(torch.optim.AdamW, lr=0.01), "regime": regime}
    trainer(diary, max_epochs=6, limit_train_batches=1).fit(module(**options), data())
    assert [name for *_, name in diary.batches] == ["SGD"] * 2 + ["AdamW"] * 4
    assert [trained for _, trained, *_ in diary.batches] == ["b"] * 2 + ["bh"] * 4
    rates = [0.1 * (1 + math.cos(math.pi * e / 2)) / 2 for e in range(2)]
    rates += [0.01 * (1 + math.cos(math.pi * e / 4)) / 2 for e in range(4)]
    assert [rate for _, _, rate, _ in diary.batches] == pytest.approx(rates)


def test_a_schedule_of_steps_counts_optimizer_steps_of_the_phase() -> None:
    made: list[int] = []

    def one_cycle(optimizer: torch.optim.Optimizer, total_steps: int) -> OneCycleLR:
        made.append(total_steps)
        return OneCycleLR(optimizer, 0.1, total_steps)

    net = module(lr_scheduler=partial(one_cycle, total_steps=None))
    trainer(limit_train_batches=5, accumulate_grad_batches=2, max_epochs=3).fit(net, data())
    assert made == [2 * 3, 1 * 3]


def test_phases_of_steps_where_the_trainer_has_only_steps() -> None:
    made: list[int] = []

    def cosine(optimizer: torch.optim.Optimizer, T_max: int) -> CosineAnnealingLR:
        made.append(T_max)
        return CosineAnnealingLR(optimizer, T_max)

    diary, net = Diary(), module(lr_scheduler=partial(cosine, T_max=None), phase_split=0.4)
    trainer(diary, max_epochs=-1, max_steps=10).fit(net, data())
    assert [trained for _, trained, *_ in diary.batches] == ["b"] * 4 + ["bh"] * 6
    assert made == [2, 2]  # epochs of three steps


def test_phases_tell_the_trainer_how_long_to_fit_where_it_was_not_told() -> None:
    running = trainer(max_epochs=-1)
    running.fit(module(regime=[Phase("backbone", 1), Phase("all", 2)]), data())
    assert running.current_epoch == 3
    running = trainer(max_epochs=None)
    with pytest.warns(UserWarning, match="Setting it to 1000 epochs"):
        running.fit(module(regime=[Phase("backbone", 1), Phase("all", 1)]), data())
    assert running.current_epoch == 2


def test_other_sums_than_max_epochs_are_told() -> None:
    regime = [Phase("backbone", 2), Phase("all", 1)]
    running = trainer(max_epochs=4)
    with pytest.warns(UserWarning, match="the last one is extended by 1"):
        running.fit(module(regime=regime), data())
    assert running.current_epoch == 4
    with pytest.warns(UserWarning, match="too few for the phases, which get: backbone 2, all 0"):
        trainer(max_epochs=2).fit(module(regime=regime), data())


def test_a_trained_backbone_skips_the_first_phase() -> None:
    diary = Diary()
    trainer(diary, max_epochs=1).fit(module(regime="mixed", start_phase=1), data())
    assert [trained for _, trained, *_ in diary.batches] == ["bh"] * 3


def test_a_second_fit_begins_anew_and_a_longer_one_goes_on() -> None:
    net, diary = module(), Diary()
    running = trainer(diary, limit_train_batches=1)
    running.fit(net, data())
    running.fit_loop.max_epochs = 6
    running.fit(net, data())
    again = Diary()
    trainer(again, limit_train_batches=1).fit(net, data())
    assert [trained for _, trained, *_ in diary.batches] == ["b", "b", "bh", "bh", "bh", "bh"]
    assert [trained for _, trained, *_ in again.batches] == ["b", "b", "bh", "bh"]


def test_weights_of_the_losses_follow_the_epochs_of_the_phase() -> None:
    asked: list[tuple[int, int]] = []

    def weights(epoch: int, epochs: int, costs: list[float]) -> list[float]:
        assert len(costs) == 3
        asked.append((epoch, epochs))
        return [1.0, 1.0, 1.0]

    net = module(losses=ExitLosses(weights))
    trainer(limit_train_batches=1, limit_val_batches=0, max_epochs=5, check_val_every_n_epoch=100).fit(net, data())
    assert asked[0] == (1, 1)  # whether they can be used, before any work
    assert asked[1:] == [(1, 3), (2, 3), (3, 3)]


# What is logged


def test_names_that_are_logged_in_each_phase() -> None:
    class Names(pl.Callback):
        at: dict[int, set[str]] = {}

        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
            self.at[trainer.current_epoch] = set(trainer.callback_metrics)
            trainer.callback_metrics.clear()

    for regime, late in (("mixed", "final"), ("disjoint", "exit1")):
        names = Names()
        trainer(names, max_epochs=2).fit(module(regime=regime), data())
        assert names.at[0] == {"train/loss", "train/loss_final", "early_exit/phase", "val/loss", "val/accuracy_final"}
        in_val = {"loss", "accuracy", "cost", "auc", "exit_rate0", "exit_rate1", "exit_rate_final"}
        in_val |= {"accuracy_exit0", "accuracy_exit1", "accuracy_final"}
        in_val |= {f"accuracy@{budget}" for budget in ("25", "50", "75", "100", "max")}
        assert names.at[1] >= {f"val/{name}" for name in in_val} | {
            f"train/loss_{late}",
            "train/loss_exit0",
            "early_exit/phase",
        }
        assert names.at[1] - names.at[0] >= {f"val/{name}" for name in in_val - {"loss", "accuracy_final"}}


@pytest.mark.parametrize("policy", ["max_prob", "patience"])
def test_validation_tells_what_predict_does(policy: str) -> None:
    thresholds = {"max_prob": [0.13, None], "patience": [None, 0.0]}[policy]
    net = module(regime="joint", policy=policy, thresholds=thresholds)
    running = trainer(max_epochs=2, limit_train_batches=1.0, limit_val_batches=1.0)
    source = data(batch_size=50)
    running.fit(net, source)
    logged = running.callback_metrics
    x, y = (torch.stack(side) for side in zip(*(source.val_set[i] for i in range(len(source.val_set))), strict=True))
    answer = net.network.predict(x)
    assert 0.05 < (answer.exit_index < 2).float().mean() <= 1
    assert logged["val/accuracy"].item() == pytest.approx((answer.logits.argmax(1) == y).float().mean().item())
    fractions = torch.tensor(net.network.costs.fractions([one is not None for one in thresholds]))
    assert logged["val/cost"].item() == pytest.approx(fractions[answer.exit_index].mean().item(), rel=1e-5)
    for k in range(2):
        assert logged[f"val/exit_rate{k}"].item() == pytest.approx((answer.exit_index == k).float().mean().item())


def test_accuracies_at_budgets_are_those_of_the_curve() -> None:
    net = module(regime="joint", budgets=(0.6, 1.2))
    net.network.build(images())
    net.network.temperatures[:] = torch.tensor([2.0, 0.5, 1.0])
    running, source = trainer(limit_test_batches=1.0), data()
    logged = running.test(net, source, verbose=False)[0]
    curve = EarlyExitCurve(net.network.costs.fractions())
    net.eval()
    for x, y in source.test_dataloader():
        with torch.no_grad():
            curve.update([z / t for z, t in zip(net(x), net.network.temperatures, strict=True)], y)
    result = curve.compute()
    assert net.curves["test"].to_dict() == result.to_dict()
    assert logged["test/accuracy@60"] == pytest.approx(result.at_budget(0.6), nan_ok=True)
    assert logged["test/accuracy@120"] == pytest.approx(result.at_budget(1.2))
    assert logged["test/accuracy@max"] == pytest.approx(max(result.accuracy))
    assert logged["test/auc"] == pytest.approx(result.auc())
    assert [logged[f"test/accuracy_{name}"] for name in ("exit0", "exit1", "final")] == pytest.approx(
        result.head_accuracy
    )


def test_a_phase_that_trains_the_backbone_says_nothing_of_heads_but_a_test_does() -> None:
    net = module(regime=[Phase("backbone")])
    running = trainer(max_epochs=1)
    running.fit(net, data())
    assert "val/accuracy_exit0" not in running.callback_metrics
    assert "test/accuracy_exit0" in running.test(net, data(), verbose=False)[0]


def test_several_validation_loaders_are_one_set() -> None:
    source = data()
    source.setup()
    parts = [torch.utils.data.Subset(source.val_set, range(a, b)) for a, b in ((0, 100), (100, 360))]
    halves = [DataLoader(one, 60) for one in parts]
    net = module(example_input=images())
    both = trainer(limit_test_batches=1.0).test(net, halves, verbose=False)[0]
    whole = trainer(limit_test_batches=1.0).test(net, source.val_dataloader(), verbose=False)[0]
    assert both == pytest.approx(whole, nan_ok=True)


def test_costs_may_be_given_or_measured_in_time() -> None:
    given = module(cost=[1.0, 3.0, 4.0], example_input=images())
    assert given.network.costs.fractions() == [0.25, 0.75, 1.0]
    timed = module(regime="joint", cost="latency", example_input=images())
    assert timed.network.costs.unit == "s"
    trainer(max_epochs=1).fit(timed, data())
    assert isinstance(timed.network.costs, ExitCosts)


def test_rare_options_reach_the_network_and_its_checkpoints(tmp_path: Path) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = backbone()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"input": x, "answer": self.inner(x)}

    def answer(output: dict[str, Tensor]) -> Tensor:
        return output["answer"]

    exits = [f"inner.{name}" for name in EXITS]
    options = NetworkOptions(clone_features=True, compact_min_fraction=0.25, output_fn=answer)
    net = module(backbone=Wrapped(), exits=exits, regime="joint", network_options=options)
    running = trainer(max_epochs=1)
    running.fit(net, data())
    running.save_checkpoint(tmp_path / "last.ckpt")
    assert net.network._clone == {0, 1}
    with pytest.warns(UserWarning, match="^network_options.output_fn: not plain data"):
        loaded = EarlyExitModule.load_from_checkpoint(tmp_path / "last.ckpt", backbone=Wrapped())
    assert net.network.compact_min_fraction == loaded.network.compact_min_fraction == 0.25
    assert loaded.network._clone == {0, 1}


def test_costs_that_cannot_be_are_told_and_not_passed_over() -> None:
    net = module(regime="joint", example_input=images())
    net.network.costs = ExitCosts((0.0, 0.5, 1.0), (0.0, 0.0), "given")
    with pytest.raises(ValueError, match="expected a cost > 0"):
        trainer(max_epochs=1).fit(net, data())


# Batches


class Keyed(torch.utils.data.Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        return {"images": torch.randn(1, 8, 8, generator=generator), "label": index % 10, "name": str(index)}


def test_dict_batches_are_taken_apart_by_their_keys() -> None:
    class ByKeyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = backbone()

        def forward(self, images: Tensor) -> Tensor:
            return self.inner(images)

    for keys, net in (("images", backbone()), (["images"], ByKeyword())):
        prefix = "" if keys == "images" else "inner."
        split = BatchKeys(keys, "label")
        made = module(backbone=net, exits=[prefix + name for name in EXITS], split_batch=split)
        running, loader = trainer(max_epochs=2), DataLoader(Keyed(), 8)
        running.fit(made, loader, loader)
        assert running.callback_metrics["val/accuracy"] >= 0
        assert running.predict(made, loader)[0].logits.shape == (8, 10)


def test_predictions_are_those_of_the_network() -> None:
    net, source = module(thresholds=0.0, example_input=images()), data()
    source.setup()
    x = torch.cat([x for x, _ in source.predict_dataloader()])
    net.network.set_thresholds(net.network.predict(x).confidence.median().item())
    answers = trainer().predict(net, source)
    expected = net.network.predict(x)
    assert torch.equal(torch.cat([one.exit_index for one in answers]), expected.exit_index)
    assert len(set(expected.exit_index.tolist())) > 1
    inputs_alone = trainer().predict(net, DataLoader(images(20), 5))
    assert torch.equal(torch.cat([one.exit_index for one in inputs_alone]), net.network.predict(images(20)).exit_index)


def test_processes_that_share_parameters_do_not_stop_early(monkeypatch: pytest.MonkeyPatch) -> None:
    net, running = module(thresholds=0.0, example_input=images()), trainer()
    expected = running.predict(net, DataLoader(images(20), 5))
    running = trainer()
    monkeypatch.setattr(type(running.strategy), "restore_checkpoint_after_setup", True)
    monkeypatch.setattr(net.network, "predict", None)
    for one, other in zip(running.predict(net, DataLoader(images(20), 5)), expected, strict=True):
        assert torch.equal(one.exit_index, other.exit_index)
        torch.testing.assert_close(one.logits, other.logits)


def test_batches_of_one_and_short_last_batches_work() -> None:
    source = data()
    source.setup()
    few = DataLoader(torch.utils.data.Subset(source.train_set, range(9)), 4)
    trainer(max_epochs=2, limit_val_batches=3).fit(module(), few, DataLoader(few.dataset, 1))


def test_building_exits_from_the_trainers_data_leaves_the_random_generators_alone() -> None:
    class Peek(pl.Callback):
        unchanged = False

        def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
            before = torch.get_rng_state()
            x, _ = first_batch(trainer, pl_module)
            assert x.shape == (64, 1, 8, 8)
            self.unchanged = torch.equal(before, torch.get_rng_state())

    peek, source = Peek(), data()
    source.setup()
    shuffled = DataLoader(source.train_set, 64, shuffle=True)
    trainer(peek, max_epochs=1).fit(module(regime="joint"), shuffled, source.val_dataloader())
    assert peek.unchanged


def test_without_any_batch_the_exits_cannot_be_built() -> None:
    with pytest.raises(ValueError, match="give the module example_input"):
        trainer().test(module(), DataLoader(Keyed(), 8, sampler=[]))


# What is refused, and what is told


def test_monitors_that_the_first_phase_does_not_log_are_told_before_training() -> None:
    watching = ModelCheckpoint(monitor="val/accuracy@50", mode="max")
    with pytest.raises(ValueError, match=r"val/accuracy@50.* logged in phases that train heads \('all'\)"):
        trainer(watching).fit(module(), data())
    trainer(ModelCheckpoint(monitor="val/accuracy@50", mode="max"), max_epochs=1).fit(module(regime="joint"), data())
    with pytest.warns(UserWarning, match="the best may be weights whose heads were never trained"):
        trainer(ModelCheckpoint(monitor="val/accuracy_final", mode="max"), max_epochs=2).fit(module(), data())


def test_plain_early_stopping_of_several_phases_is_warned_about() -> None:
    with pytest.warns(UserWarning, match="PhaseEarlyStopping ends the phase"):
        trainer(EarlyStopping("val/loss"), max_epochs=2).fit(module(), data())
    trainer(EarlyStopping("val/loss"), max_epochs=1).fit(module(regime="joint"), data())


def test_strategies_that_shard_are_refused_for_several_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    running = trainer()
    monkeypatch.setattr(type(running.strategy), "restore_checkpoint_after_setup", True)
    with pytest.raises(pl.utilities.exceptions.MisconfigurationException, match="Train one phase a fit"):
        running.fit(module(), data())
    running = trainer(max_epochs=1)
    running.fit(module(regime="joint"), data())


class Spoilt(nn.Module):
    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(logits, target)
        return loss / 0 if Spoilt.calls() in Spoilt.bad else loss

    count, bad = 0, (1, 4)

    @classmethod
    def calls(cls) -> int:
        cls.count += 1
        return (cls.count - 1) % 3


def test_a_loss_that_is_no_number_is_told_with_its_head_and_phase() -> None:
    Spoilt.count, Spoilt.bad = 0, (1,)
    net = module(regime="joint", losses=ExitLosses(criterion=Spoilt()))
    with pytest.warns(UserWarning, match=r"loss of exit1 is not finite in phase 0 \(all\), epoch 0"):
        trainer(max_epochs=1, limit_val_batches=0).fit(net, data())
    Spoilt.count = 0
    net = module(regime="joint", losses=ExitLosses(criterion=Spoilt()))
    with pytest.raises(ValueError, match=r"loss of exit1 is not finite in phase 0 \(all\)"):
        trainer(max_epochs=1, limit_val_batches=0, detect_anomaly=True).fit(net, data())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"regime": "half"}, "regime must be one of mixed, joint, disjoint, or a list of phases, got 'half'"),
        ({"phase_split": 1.5}, r"phase_split must lie in \[0, 1\]"),
        ({"start_phase": 2}, "start_phase must be a whole number from 0 to 1, got 2"),
        ({"budgets": (0.0,)}, "expected budgets in"),
        ({"cost": "joules"}, "'flops', 'latency' or a list"),
        ({"cost": [1.0, 2.0]}, r"3 costs that are finite and > 0, one an output, got \[1.0, 2.0\]"),
        ({"cost": [0.0, 0.5, 1.0]}, "3 costs that are finite and > 0"),
        ({"cost": [0.5, -1.0, 1.0]}, "3 costs that are finite and > 0"),
        ({"cost": [0.5, math.nan, 1.0]}, "3 costs that are finite and > 0"),
        ({"cost": [0.5, 1.0, math.inf]}, "3 costs that are finite and > 0"),
        ({"lr_scheduler": {"class_path": "NoSuchLR"}}, "no schedule 'NoSuchLR'"),
        ({"exits": []}, "number of exits"),
        ({"engine": "none"}, "engine"),
    ],
)
def test_arguments_out_of_range_are_refused_at_once(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        module(**options)


def test_weights_of_another_number_are_refused_before_training() -> None:
    with pytest.raises(ValueError, match="expected 3 loss weights"):
        trainer().fit(module(losses=ExitLosses([1.0, 1.0])), data())
