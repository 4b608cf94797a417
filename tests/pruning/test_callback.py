"""What every pruning callback owes its user, shown with the smallest ranking rule."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from magnitude import Magnitude, Net, digits, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_eff.batch import BatchKeys
from lightning_eff.pruning import Accuracy, Allocation, Calibration, Layers, Schedule, Scores, Scoring
from lightning_eff.surgery import BudgetError, ChannelGraph, load_pruned
from lightning_eff.surgery.structure import is_prunable, structure_of

TRAIN, VAL = digits()
QUIET = {"verbose": False}


def fit(callback: pl.Callback | None = None, model: Net | None = None, *others: pl.Callback, **options: Any) -> Net:
    model = model or Net()
    torch.manual_seed(0)
    ckpt_path = options.pop("ckpt_path", None)
    chosen = [c for c in (callback, *others) if c is not None]
    trainer(*chosen, **options).fit(model, TRAIN, VAL, ckpt_path=ckpt_path)
    return model


def test_half_of_every_layer_goes_and_training_continues() -> None:
    callback = Magnitude(0.5, schedule=Schedule(start=1), **QUIET)
    model = fit(callback, max_epochs=6)
    assert [model.body[i].out_channels for i in (0, 4, 7)] == [4, 8, 8]
    assert model.head.in_features == 8 * 4
    stages = {stage.name: stage for stage in callback.report.stages}
    assert list(stages) == ["dense", "pruned, step 1", "fine-tuned"]
    assert stages["fine-tuned"].value > stages["pruned, step 1"].value + 0.3
    assert stages["fine-tuned"].params == sum(p.numel() for p in model.parameters())


def test_kept_channels_are_the_best_scored_and_plan_counts_in_original_channels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Net()
    dense = copy.deepcopy(model)
    callback = Magnitude(0.5, dirpath=tmp_path, **QUIET)
    trainer(callback, max_epochs=0).fit(model, TRAIN, VAL)
    assert callback.report is None  # no epoch, no step
    trainer(callback, max_epochs=1, limit_train_batches=0).fit(model, TRAIN, VAL)
    fit(callback, model, max_epochs=1)
    norms = dense.body[0].weight.flatten(1).norm(1, dim=1)
    assert callback.plan.keep["body.0"] == tuple(sorted(norms.argsort(descending=True)[:4].tolist()))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "course.csv", "course.json", "course.md", "layers.csv", "layers.json", "layers.md", "plan.json", "pruned.ckpt",
        "scores", "scores.png",
    ]  # fmt: skip


def test_given_plan_is_followed_without_scoring(tmp_path: Path) -> None:
    first = fit(Magnitude(0.5, dirpath=tmp_path, **QUIET))

    class NoScoring(Magnitude):
        def score(self, scoring: Scoring) -> Any:
            raise AssertionError("scored although a plan was given")

    second = fit(NoScoring(plan=tmp_path / "plan.json", **QUIET))
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_straight_run_equals_interrupted_and_resumed_run(optimizer: str, tmp_path: Path) -> None:
    def callback() -> Magnitude:
        return Magnitude(0.75, schedule=Schedule(start=1, steps=3), **QUIET)

    straight = fit(callback(), Net(optimizer=optimizer), max_epochs=6)
    saved = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    fit(callback(), Net(optimizer=optimizer), saved, max_epochs=6, enable_checkpointing=True)
    for epoch in (0, 2, 4):  # before the first step, between two, after the last
        path = tmp_path / f"epoch={epoch}.ckpt"
        resumed = fit(callback(), Net(optimizer=optimizer), max_epochs=6, ckpt_path=path)
        for key, value in straight.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[key]), (epoch, key)


def test_every_load_path_takes_every_checkpoint_of_the_run(tmp_path: Path) -> None:
    saved = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    model = fit(Magnitude(0.75, schedule=Schedule(start=1, steps=2), **QUIET), None, saved, max_epochs=3,
                enable_checkpointing=True)  # fmt: skip
    x = next(iter(VAL))[0]
    for epoch in (0, 1, 2):  # dense, wider than now, as now
        path = tmp_path / f"epoch={epoch}.ckpt"
        expected = load_pruned(Net, path).eval()(x)
        assert torch.equal(Net.load_from_checkpoint(path, weights_only=True).eval()(x), expected)
        for start in (Net(), copy.deepcopy(model)):
            for weights_only in (True, False):
                run = trainer()
                run.validate(start, VAL, ckpt_path=path, verbose=False, weights_only=weights_only)
                run.test(start, VAL, ckpt_path=path, verbose=False, weights_only=weights_only)
                outputs = run.predict(start, VAL, ckpt_path=path, weights_only=weights_only)
                assert torch.equal(outputs[0], expected)
    assert load_pruned(Net, path).body[0].out_channels == 2


def test_weights_only_checkpoint_loads(tmp_path: Path) -> None:
    saved = ModelCheckpoint(tmp_path, save_weights_only=True, filename="slim")
    model = fit(Magnitude(0.5, **QUIET), None, saved, enable_checkpointing=True)
    x = next(iter(VAL))[0]
    assert torch.equal(load_pruned(Net, tmp_path / "slim.ckpt").eval()(x), model.eval()(x))


def test_checkpoint_saved_after_the_fit_loads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, run = Net(), trainer(Magnitude(0.5, **QUIET))
    run.fit(model, TRAIN, VAL)
    run.save_checkpoint(tmp_path / "after.ckpt")
    x = next(iter(VAL))[0]
    assert torch.equal(load_pruned(Net, tmp_path / "after.ckpt").eval()(x), model.eval()(x))


def test_measuring_and_scoring_do_not_change_a_run() -> None:
    class Looking(Magnitude):
        def one(self, scoring: Scoring, name: str) -> Scores:
            torch.rand(3)
            return super().one(scoring, name)

    plain = fit(None, Net(dropout=0.5), max_epochs=3)
    watched = fit(Looking(0.0, schedule=Schedule(start=1), **QUIET), Net(dropout=0.5), max_epochs=3)
    for key, value in plain.state_dict().items():
        assert torch.equal(value, watched.state_dict()[key]), key


def test_frozen_layers_stay_frozen_and_unchanged() -> None:
    torch.manual_seed(0)
    model = Net()
    model.body[4].requires_grad_(False)
    before = model.body[4].weight.detach().clone()
    callback = Magnitude(0.5, **QUIET)
    fit(callback, model)
    assert not model.body[4].weight.requires_grad
    rows, columns = callback.plan.keep["body.4"], callback.plan.keep["body.0"]
    assert torch.equal(model.body[4].weight, before[list(rows)][:, list(columns)])


@pytest.mark.parametrize("physical", ["at_end", "never"])
def test_masked_training_ends_in_the_masked_network(physical: str) -> None:
    callback = Magnitude(0.5, schedule=Schedule(start=1, steps=2, physical=physical), **QUIET)
    cut = fit(Magnitude(0.5, schedule=Schedule(start=1, steps=2), **QUIET), max_epochs=4)
    model = fit(callback, max_epochs=4)
    assert not any(module._forward_pre_hooks for module in model.modules())
    if physical == "at_end":
        assert [m.shape for m in model.parameters()] == [m.shape for m in cut.parameters()]
        assert callback.report.stages[-1].macs < callback.report.stages[0].macs
    else:
        assert model.body[0].out_channels == 8
        assert (model.body[4].weight.abs().sum((0, 2, 3)) == 0).sum() == 4
    fine_tuned, masked = callback.report.stages[-1], callback.report.stages[-2]
    assert fine_tuned.value > masked.value


@pytest.mark.parametrize("physical", ["at_end", "never"])
def test_masked_run_resumes_and_tests_masked(physical: str, tmp_path: Path) -> None:
    def callback() -> Magnitude:
        return Magnitude(0.5, schedule=Schedule(start=1, steps=2, physical=physical), **QUIET)

    saved = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    straight = fit(callback(), None, saved, max_epochs=4, enable_checkpointing=True)
    resumed = fit(callback(), max_epochs=4, ckpt_path=tmp_path / "epoch=1.ckpt")
    for key, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    masked = trainer(callback()).predict(Net(), VAL, ckpt_path=tmp_path / "epoch=3.ckpt")
    if physical == "at_end":
        whole = trainer().predict(Net(), VAL, ckpt_path=tmp_path / "epoch=3.ckpt")
        assert not torch.allclose(masked[0], whole[0])
    straight.eval()
    with torch.no_grad():
        assert torch.allclose(straight(next(iter(VAL))[0]), masked[0], atol=1e-5)


@pytest.mark.parametrize("averaging", ["ema", "swa"])
def test_averaged_weights_follow_the_cut(averaging: str) -> None:
    def other() -> pl.Callback:
        if averaging == "ema":
            return EMAWeightAveraging(decay=0.9)
        return StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=2)

    callback = Magnitude(0.5, schedule=Schedule(start=1), **QUIET)
    model = fit(other(), None, callback, max_epochs=4)
    assert model.body[0].out_channels == 4
    x, y = VAL.dataset.tensors
    with torch.no_grad():
        accuracy = float((model.eval()(x).argmax(1) == y).double().mean())
    assert callback.report.stages[-1].value == pytest.approx(accuracy)  # of the averaged weights that are left
    with pytest.raises(MisconfigurationException, match="must come before Magnitude"):
        fit(Magnitude(0.5, **QUIET), None, other())


def test_averaged_run_resumes_with_its_shapes(tmp_path: Path) -> None:
    def callbacks() -> tuple[pl.Callback, ...]:
        return Magnitude(0.5, schedule=Schedule(start=1), **QUIET), EMAWeightAveraging(decay=0.9)

    first, average = callbacks()
    saved = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    straight = fit(average, None, first, saved, max_epochs=4, enable_checkpointing=True)
    again, average = callbacks()
    resumed = fit(average, None, again, max_epochs=4, ckpt_path=tmp_path / "epoch=2.ckpt")
    for key, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


@pytest.mark.parametrize(
    "options", [{"precision": "bf16-mixed"}, {"accumulate_grad_batches": 3}, {"val_check_interval": 3}]
)
def test_composes_with_trainer_features(options: dict[str, Any]) -> None:
    model = fit(Magnitude(0.5, schedule=Schedule(start=1, steps=2), **QUIET), max_epochs=4, **options)
    assert model.body[0].out_channels == 4


def test_compiled_module_is_pruned_and_goes_on() -> None:
    torch.manual_seed(0)
    model = Net()
    callback = Magnitude(0.5, schedule=Schedule(start=1), **QUIET)
    trainer(callback, max_epochs=3).fit(torch.compile(model, backend="eager"), TRAIN, VAL)
    assert model.body[0].out_channels == 4
    reference = fit(Magnitude(0.5, schedule=Schedule(start=1), **QUIET), max_epochs=3)
    for a, b in zip(model.state_dict().values(), reference.state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


class DictNet(Net):
    """Batches are dicts and there is no example input."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return super().training_step((batch["image"], batch["label"]), batch_idx)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        super().validation_step((batch["image"], batch["label"]), batch_idx)


class DictSet(torch.utils.data.Dataset):
    def __init__(self, loader: DataLoader) -> None:
        self.data = loader.dataset

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"image": self.data[i][0], "label": self.data[i][1]}


def test_dict_batches_work_with_batch_keys_and_fail_clearly_without() -> None:
    loaders = [DataLoader(DictSet(loader), 64) for loader in (TRAIN, VAL)]
    with pytest.raises(TypeError, match=r"keys \['image', 'label'\].*split_batch=.*BatchKeys"):
        trainer(Magnitude(0.5, **QUIET)).fit(DictNet(), *loaders)
    model = DictNet()
    trainer(Magnitude(0.5, split_batch=BatchKeys("image", "label"), **QUIET)).fit(model, *loaders)
    assert model.body[0].out_channels == 4


def test_without_validation_loader_training_data_is_used_and_said() -> None:
    class NoVal(Net):
        validation_step = None

    callback = Magnitude(0.5, **QUIET)
    model = NoVal()
    with pytest.warns(UserWarning, match="no validation loader"):
        trainer(callback).fit(model, TRAIN)
    assert model.body[0].out_channels == 4
    assert "training data" in str(callback.report)


def test_outputs_in_a_dict_need_to_be_named() -> None:
    class Wrapped(Net):
        def forward(self, x: Tensor) -> Any:
            return {"logits": super().forward(x)}

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0])["logits"], batch[1])

        def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
            pass

    with pytest.raises(TypeError, match=r"\['logits'\].*Accuracy\(output="):
        trainer(Magnitude(0.5, **QUIET)).fit(Wrapped(), TRAIN, VAL)
    model = Wrapped()
    trainer(Magnitude(0.5, value=Accuracy("logits"), **QUIET)).fit(model, TRAIN, VAL)
    assert model.body[0].out_channels == 4


def test_submodule_alone_is_pruned() -> None:
    callback = Magnitude(0.5, layers=Layers(submodule="body"), value=lambda out, y: out.flatten(1).mean(1), **QUIET)
    model = fit(callback)
    assert set(callback.plan.keep) == {"0", "4"}  # the last layer of the body reaches its output
    assert model.body[7].out_channels == 16


class Generators(pl.Callback):
    """Note the state of the global generator before the step and after its failure."""

    def __init__(self) -> None:
        self.states: list[Tensor] = []

    def on_train_epoch_start(self, *_: object) -> None:
        self.states.append(torch.get_rng_state())

    on_exception = on_train_epoch_start


def test_failing_scoring_leaves_model_modes_generators_and_hooks_alone() -> None:
    class Failing(Magnitude):
        def score(self, scoring: Scoring) -> Any:
            torch.rand(5)
            raise KeyboardInterrupt if self.interrupt else RuntimeError("out of luck")

    for interrupt in (False, True):
        torch.manual_seed(0)
        model = Net()
        state = {key: value.clone() for key, value in model.state_dict().items()}
        modes = [module.training for module in model.modules()]
        callback = Failing(0.5, **QUIET)
        callback.interrupt = interrupt
        watch = Generators()
        with pytest.raises(SystemExit if interrupt else RuntimeError):
            trainer(watch, callback, num_sanity_val_steps=0).fit(model, TRAIN, VAL)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert [module.training for module in model.modules()] == modes
        assert torch.equal(*watch.states)
        assert not any(module._forward_pre_hooks or "forward" in vars(module) for module in model.modules())
        assert not is_prunable(Net)


class Interrupted(Magnitude):
    """Note what is scored, and fail at the third group."""

    def __init__(self, scored: list[str], *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.scored = scored

    def one(self, scoring: Scoring, name: str) -> Scores:
        self.scored.append(name)
        if len(self.scored) == 3:
            raise RuntimeError("power cut")
        return super().one(scoring, name)


def test_interrupted_scoring_goes_on_with_the_next_layer(tmp_path: Path) -> None:
    scored: list[str] = []
    with pytest.raises(RuntimeError, match="power cut"):
        fit(Interrupted(scored, 0.5, dirpath=tmp_path, **QUIET))
    model = fit(Interrupted(scored, 0.5, dirpath=tmp_path, **QUIET))
    assert scored == ["body.0", "body.4", "body.7", "body.7"]
    reference = fit(Magnitude(0.5, **QUIET))
    for a, b in zip(model.state_dict().values(), reference.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_second_fit_prunes_a_new_network_but_not_the_same_one_again() -> None:
    callback = Magnitude(0.5, **QUIET)
    model = fit(callback)
    trainer(callback, max_epochs=1).fit(model, TRAIN, VAL)
    assert model.body[0].out_channels == 4
    assert fit(callback).body[0].out_channels == 4


@pytest.mark.parametrize("target", ["channels", "params", "macs"])
@pytest.mark.parametrize("mode", ["uniform", "global"])
def test_amount_of_the_target_is_met(mode: Any, target: Any) -> None:
    callback = Magnitude(0.6, allocation=Allocation(mode=mode, target=target), **QUIET)
    fit(callback)
    first, last = callback.report.stages[0], callback.report.stages[-1]
    if target == "channels":
        sizes = callback.report.graph.sizes
        kept = sum(sizes[name] for name in ("body.0", "body.4", "body.7")) / 40
        assert kept == pytest.approx(0.4, abs=0.08)
    else:
        ratio = getattr(last, target) / getattr(first, target)
        assert 0.3 < ratio <= 0.4


def test_amounts_per_layer_are_kept_counts_or_fractions() -> None:
    model = fit(Magnitude({"body.0": 3, "body.4": 0.25}, **QUIET))
    assert [model.body[i].out_channels for i in (0, 4, 7)] == [3, 4, 16]


def test_round_to_and_min_keep_hold() -> None:
    model = fit(Magnitude(0.5, allocation=Allocation(round_to=3, min_keep=0.6), **QUIET))
    assert [model.body[i].out_channels for i in (0, 4, 7)] == [6, 12, 12]


def test_layers_are_chosen_by_name() -> None:
    model = fit(Magnitude(0.5, layers=Layers(include=["body.*"], exclude=["body.4"]), **QUIET))
    assert [model.body[i].out_channels for i in (0, 4, 7)] == [4, 16, 8]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"amount": 1.2}, r"amount must lie in \[0, 1\) \(fraction removed\), got 1.2"),
        ({"amount": -0.1}, "fraction removed"),
        ({"amount": "0.5"}, r"amount must lie in \[0, 1\) \(fraction removed\), got '0.5'"),
        ({"amount": float("nan")}, r"\(fraction removed\), got nan"),
        ({"seed": -1}, "seed must be a whole number >= 0, got -1"),
        ({"seed": 1.5}, "seed must be a whole number >= 0, got 1.5"),
        ({"amount": {}}, "at least one layer"),
        ({"plan": "plan.json", "schedule": Schedule(steps=2)}, "a given plan is applied in one step, got .*steps=2"),
        ({"amount": {"body.0": 0}}, "channels kept"),
        ({"amount": {"body.0": 1.5}}, "fraction kept"),
        ({"value": "speed"}, 'expected value "accuracy"'),
        ({"amount": 0.95}, "above allocation.max_ratio 0.9"),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Magnitude(**arguments)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Schedule(steps=0), "steps must be a whole number >= 1, got 0"),
        (lambda: Schedule(steps=2.5), "steps must be a whole number >= 1, got 2.5"),
        (lambda: Schedule(every_n_epochs=float("nan")), "every_n_epochs must be a whole number >= 1, got nan"),
        (lambda: Allocation(round_to=1.5), "round_to must be a whole number >= 1, got 1.5"),
        (lambda: Allocation(min_keep="2"), "min_keep must be a count >= 1 or a fraction .* got '2'"),
        (lambda: Allocation(max_ratio="0.9"), r"max_ratio must lie in \(0, 1\], got '0.9'"),
        (lambda: Calibration(samples=True), "calibration samples must be a whole number >= 1, got True"),
        (lambda: Schedule(start=-1), "start must be a whole number >= 0, got -1"),
        (lambda: Schedule(shape="cubik"), "shape must be one of cubic, linear, geometric, got 'cubik'"),
        (lambda: Schedule(physical="imediate"), "physical must be one of"),
        (lambda: Allocation(mode="unifrom"), "mode must be one of"),
        (lambda: Allocation(target="flops"), "target must be one of"),
        (lambda: Layers(coupled="al"), "coupled must be one of"),
        (lambda: Calibration(source="test"), "source must be one of"),
        (lambda: Calibration("val", 64, BatchKeys()), "loader must give batches.*got a BatchKeys; .*split_batch="),
        (lambda: Allocation(max_ratio=0), "max_ratio"),
        (lambda: Allocation(min_keep=0), "min_keep"),
        (lambda: Allocation(round_to=0), "round_to"),
        (lambda: Calibration(samples=0), "samples"),
    ],
)
def test_bad_settings_are_refused_at_once(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"amount": {"body.99": 3}}, KeyError, "body.0"),
        ({"amount": {"body.0": 9}}, ValueError, "keeps 9 channels but the layer has 8"),
        ({"amount": {"head": 5}}, ValueError, "feeds only the network's output"),
        ({"layers": Layers(exclude=["nose"])}, KeyError, "close names"),
        ({"amount": 0.95, "allocation": Allocation(target="macs", max_ratio=0.5)}, BudgetError, "max_ratio=0.5"),
        ({"layers": Layers(include=["head"])}, ValueError, "nothing to prune"),
        ({"value": lambda out, y: out.mean()}, ValueError, r"one value per sample \[64\]"),
    ],
)
def test_what_the_model_does_not_have_is_refused_before_training(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = Net()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(error, match=message):
        trainer(Magnitude(**{**QUIET, **arguments}), num_sanity_val_steps=0).fit(model, TRAIN, VAL)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert structure_of(model) is None


def test_scores_that_are_not_numbers_are_refused() -> None:
    class Nan(Magnitude):
        def one(self, scoring: Scoring, name: str) -> Scores:
            return Scores(torch.full((scoring.graph.groups[name].size,), torch.nan))

    with pytest.raises(ValueError, match=r"body\.0: the scores of channels .* are not numbers"):
        fit(Nan(0.5, **QUIET))


def test_empty_calibration_loader_is_refused() -> None:
    empty = DataLoader(torch.utils.data.TensorDataset(torch.zeros(0, 1, 8, 8), torch.zeros(0)), 4)
    with pytest.raises(ValueError, match="no batch"):
        fit(Magnitude(0.5, calibration=Calibration(loader=empty), **QUIET))


def test_sharded_strategies_are_refused_before_any_work() -> None:
    from unittest.mock import Mock

    from lightning.pytorch.strategies import FSDPStrategy

    fake = Mock(strategy=FSDPStrategy())
    with pytest.raises(MisconfigurationException, match="load_pruned"):
        Magnitude(0.5).setup(fake, Net(), "fit")


def test_spawned_processes_are_refused_with_the_way_out() -> None:
    with pytest.raises(Exception, match='Use strategy="ddp"'):
        trainer(Magnitude(0.5, **QUIET), strategy="ddp_fork", devices=2).fit(Net(), TRAIN, VAL)


def test_logged_names_begin_with_the_room(tmp_path: Path) -> None:
    logger = pl.loggers.CSVLogger(tmp_path)
    fit(Magnitude(0.5, **QUIET), max_epochs=1, logger=logger)
    columns = set((Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0].split(","))
    names = ("macs", "params", "macs_ratio", "params_ratio", "value_before", "value_after")
    assert {f"pruning/{name}" for name in names} <= columns


def test_steps_that_never_came_are_told() -> None:
    callback = Magnitude(0.5, schedule=Schedule(start=9), **QUIET)
    with pytest.warns(UserWarning, match=r"0 of 1 steps ran; the next one is due at epoch 9"):
        fit(callback)
    assert callback.report is None


def test_fewer_samples_than_asked_for_are_used_and_said() -> None:
    callback = Magnitude(0.5, calibration=Calibration(samples=1000), **QUIET)
    fit(callback)
    assert "256 samples, all there are of 1000 asked for" in str(callback.report)
    assert "the whole validation set" in str(callback.report)


def test_masks_hold_in_averaged_weights_too() -> None:
    callback = Magnitude(0.5, schedule=Schedule(start=1, physical="never"), **QUIET)
    model = fit(EMAWeightAveraging(decay=0.9), None, callback, max_epochs=3)
    assert (model.body[4].weight.abs().sum((0, 2, 3)) == 0).sum() == 4


def test_validation_step_without_a_loader_takes_training_data() -> None:
    model = Net()
    with pytest.warns(UserWarning, match="no validation loader"), pytest.warns(UserWarning, match="Skipping val loop"):
        trainer(Magnitude(0.5, **QUIET)).fit(model, TRAIN)
    assert model.body[0].out_channels == 4


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self) -> Any:
        return iter(VAL.dataset)


def test_loader_without_a_length_serves_for_calibration() -> None:
    model = Net()
    trainer(Magnitude(0.5, **QUIET)).fit(model, TRAIN, DataLoader(Stream(), 64))
    assert model.body[0].out_channels == 4


def test_scores_of_another_value_function_are_not_taken_up(tmp_path: Path) -> None:
    scored: list[str] = []
    with pytest.raises(RuntimeError, match="power cut"):
        fit(Interrupted(scored, 0.5, dirpath=tmp_path, **QUIET))
    fit(Interrupted(scored, 0.5, dirpath=tmp_path, value="neg_loss", **QUIET))
    assert scored[3:] == ["body.0", "body.4", "body.7"]
    assert not list((tmp_path / "scores").iterdir())  # a step that is done leaves no scores behind


def test_what_cannot_work_is_told_before_the_first_epoch() -> None:
    with pytest.raises(BudgetError):
        fit(Magnitude(0.99, allocation=Allocation(target="macs", max_ratio=0.5), schedule=Schedule(start=5), **QUIET))
    with pytest.raises(KeyError, match="close names"):
        fit(Magnitude(0.5, layers=Layers(exclude=["nose"]), schedule=Schedule(start=5), **QUIET))


def test_final_checkpoint_holds_the_small_network_also_after_masked_training(tmp_path: Path) -> None:
    model = fit(Magnitude(0.5, schedule=Schedule(physical="at_end"), dirpath=tmp_path, **QUIET))
    assert torch.load(tmp_path / "pruned.ckpt", weights_only=True)["state_dict"]["body.0.weight"].shape[0] == 4
    small = load_pruned(Net, tmp_path / "pruned.ckpt")
    assert small.body[0].out_channels == 4
    x = next(iter(VAL))[0]
    assert torch.equal(small.eval()(x), model.eval()(x))


def test_masked_channels_stay_masked_when_less_is_asked_for_later() -> None:
    class Less(Magnitude):
        def decide(self, trainer: pl.Trainer, pl_module: pl.LightningModule, graph: ChannelGraph, step: int) -> Any:
            if step:
                self._counts = replace(self._counts, amount={"body.0": 7, "body.4": 15, "body.7": 15})
            return super().decide(trainer, pl_module, graph, step)

    model = fit(Less(0.5, schedule=Schedule(steps=2, physical="at_end"), **QUIET), max_epochs=3)
    assert model.body[0].out_channels == 5  # cubic: 0.4375 of eight channels go in the first of two steps
