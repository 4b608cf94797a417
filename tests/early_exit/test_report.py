"""Thresholds and reports at the end of training and test."""

from __future__ import annotations

import csv
import json
import math
import os
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from exits_on_digits import backbone, data, fixed_loader, module, state, trainer
from helpers import run_ddp
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_eff.early_exit.attaching.costs import ExitCosts
from lightning_eff.early_exit.calibration import Calibration, calibrate, fit_temperatures, replay
from lightning_eff.early_exit.callbacks import PhaseEarlyStopping
from lightning_eff.early_exit.evaluation.curve import CurveResult
from lightning_eff.early_exit.evaluation.recording import exits_of
from lightning_eff.early_exit.inference.policies import policy_from, score
from lightning_eff.early_exit.module import EarlyExitModule
from lightning_eff.early_exit.report import ExitReport, ThresholdCalibration
from lightning_eff.models import SmallCNN

pytestmark = pytest.mark.filterwarnings("ignore:thresholds of single exits are likely to over-fit")

quick = partial(trainer, max_epochs=1)
FAST = partial(torch.optim.AdamW, lr=1e-2)


def joint(**options: Any) -> EarlyExitModule:
    return module(**{"regime": "joint", "optimizer": FAST, **options})


def outputs(net: EarlyExitModule, loader: DataLoader[Any], batches: int | None = None) -> tuple[list[Tensor], Tensor]:
    """Logits of all outputs in evaluation mode, and labels."""
    training = net.training
    net.eval()
    pairs = list(loader)[:batches]
    with torch.no_grad():
        logits = [torch.cat(output) for output in zip(*(net.network(x) for x, _ in pairs), strict=True)]
    net.train(training)
    return logits, torch.cat([y for _, y in pairs])


def scores_of(policy: str, logits: list[Tensor], temperatures: list[float]) -> Tensor:
    scores, memory = [], None
    for k, output in enumerate(logits[:-1]):
        values, memory = score(policy_from(policy), output, k, memory, temperatures[k])
        scores.append(values)
    return torch.stack(scores)


# Thresholds


@pytest.mark.parametrize("policy", ["max_prob", "entropy"])
def test_thresholds_are_those_of_the_validation_data(policy: str) -> None:
    net, callback = joint(policy=policy), ThresholdCalibration(budget=0.7)
    val = fixed_loader(batches=5)
    quick(callback).fit(net, fixed_loader(), val)
    logits, target = outputs(net, val, batches=2)  # limit_val_batches
    correct = torch.stack([output.argmax(1) == target for output in logits])
    found = calibrate(scores_of(policy, logits, [1.0] * 3), correct, net.network.costs.fractions(), budget=0.7)
    assert callback.calibration is not None
    assert callback.calibration.thresholds == found.thresholds
    assert callback.calibration.accuracy == found.accuracy
    assert net.network.score_thresholds.tolist() == list(found.thresholds)
    answer = net.network.predict(torch.cat([x for x, _ in list(val)[:2]]))
    assert torch.bincount(answer.exit_index, minlength=3).tolist() == [round(32 * rate) for rate in found.exit_rate]


def test_all_validation_loaders_count_as_far_as_the_limits_go() -> None:
    net, callback = joint(), ThresholdCalibration(max_drop=0.1, method="uniform")
    quick(callback).fit(net, fixed_loader(), [fixed_loader(3), fixed_loader(1)])
    logits, target = outputs(net, fixed_loader(3), batches=2)
    again, more = outputs(net, fixed_loader(1))
    correct = torch.stack([torch.cat([a, b]).argmax(1) for a, b in zip(logits, again, strict=True)])
    assert callback.calibration is not None
    right = (correct == torch.cat([target, more])).sum(1)
    assert callback.calibration.accuracy >= right[-1] / 48 - 0.1 - 1e-6
    assert round(48 * callback.calibration.accuracy) == pytest.approx(48 * callback.calibration.accuracy)


def test_temperatures_are_fitted_before_thresholds() -> None:
    net, callback = joint(), ThresholdCalibration(budget=0.7, temperature=True)
    val = fixed_loader(batches=2)
    quick(callback).fit(net, fixed_loader(), val)
    logits, target = outputs(net, val)
    fitted = fit_temperatures(logits, target)
    assert not torch.equal(fitted, torch.ones(3))
    torch.testing.assert_close(net.network.temperatures, fitted)
    scores = scores_of("max_prob", logits, net.network.temperatures.tolist())
    assert callback.calibration is not None
    left_at = replay(scores, callback.calibration.thresholds)
    assert callback.calibration.exit_rate == tuple((left_at == k).sum().item() / 32 for k in range(3))


def test_exits_that_count_agreement_are_never_disabled_but_put_out_of_reach() -> None:
    # a disabled exit would not count, and later ones would leave at other samples than was told
    net, callback = joint(policy="patience"), ThresholdCalibration(target_accuracy=1.0)
    val = fixed_loader(batches=2)
    with pytest.warns(UserWarning, match="out of reach"):
        quick(callback).fit(net, fixed_loader(), val)
    assert callback.calibration is not None
    assert all(limit < math.inf for limit in callback.calibration.thresholds)
    answer = net.network.predict(torch.cat([x for x, _ in val]))
    rates = torch.bincount(answer.exit_index, minlength=3) / 32
    assert rates.tolist() == list(callback.calibration.exit_rate)
    assert callback.calibration.exit_rate[0] == 0


def test_heads_of_disabled_exits_are_not_in_the_cost() -> None:
    # of 32 samples one exit at most takes 20
    net, callback = joint(example_input=torch.zeros(2, 1, 8, 8)), ThresholdCalibration(max_drop=0, min_exit_samples=20)
    net.network.costs = ExitCosts((1.0, 2.0, 4.0), (1.0, 1.0), "given")
    quick(callback).fit(net, fixed_loader(), fixed_loader())
    assert callback.calibration is not None
    enabled = [limit < math.inf for limit in callback.calibration.thresholds]
    assert not all(enabled)
    costs = net.network.costs.fractions(enabled)
    told = sum(rate * cost for rate, cost in zip(callback.calibration.exit_rate, costs, strict=True))
    assert callback.calibration.cost == pytest.approx(told)


def test_nothing_but_thresholds_changes() -> None:
    plain = joint()
    quick().fit(plain, fixed_loader(), fixed_loader())
    calibrated = joint()
    seen: dict[str, Any] = {}

    class Watch(pl.Callback):
        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            seen[f"{len(seen)}"] = (trainer.state.stage, torch.get_rng_state(), pl_module.training)

    callbacks = [Watch(), ThresholdCalibration(budget=0.7), Watch()]
    quick(*callbacks).fit(calibrated, fixed_loader(), fixed_loader())
    for name, value in plain.network.state_dict().items():
        assert name == "score_thresholds" or torch.equal(value, calibrated.network.state_dict()[name]), name
    (stage, generator, mode), (stage_after, generator_after, mode_after) = seen.values()
    assert (stage, mode) == (stage_after, mode_after)
    assert torch.equal(generator, generator_after)


def test_data_is_read_as_in_validation() -> None:
    stages = []

    class Augmenting(EarlyExitModule):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            stages.append(self.trainer.state.stage.value)
            return batch

    net = Augmenting(backbone(), ["layers.pool2"], 10, regime="joint", example_input=torch.zeros(2, 1, 8, 8))
    quick(ThresholdCalibration(budget=0.9), limit_train_batches=1, limit_val_batches=1).fit(
        net, fixed_loader(), fixed_loader()
    )
    assert stages == ["train", "validate", "validate"]


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "one of budget, target_accuracy and max_drop"),
        ({"budget": 0.5, "max_drop": 0.1}, "one of budget, target_accuracy and max_drop"),
        ({"budget": -1}, "budget must be > 0"),
        ({"budget": 1, "method": "best"}, "got 'best'"),
        ({"budget": 1, "min_exit_samples": -3}, "got -3"),
    ],
)
def test_goals_are_checked_when_the_callback_is_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ThresholdCalibration(**options)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
@pytest.mark.parametrize("limit", [None, 0])
def test_a_fit_without_validation_data_is_refused_before_training(limit: int | None) -> None:
    net = joint(example_input=torch.zeros(2, 1, 8, 8))
    before = state(net)
    run = quick(ThresholdCalibration(budget=0.5), **({} if limit is None else {"limit_val_batches": limit}))
    with pytest.raises(ValueError, match="needs validation data"):
        run.fit(net, fixed_loader(), None if limit is None else fixed_loader())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


@pytest.mark.parametrize("callback", [ThresholdCalibration(budget=0.5), ExitReport("unused")])
def test_modules_without_exits_are_refused(callback: pl.Callback) -> None:
    with pytest.raises(ValueError, match="works on an EarlyExitModule, got a BoringModel"):
        quick(callback).fit(BoringModel())


@pytest.mark.parametrize("batches", [[(1, 3)], [(4, 3), (2, 3)]])
def test_samples_of_one_class_are_refused_and_thresholds_stay(batches: list[tuple[int, int]]) -> None:
    net, callback = joint(thresholds=0.9), ThresholdCalibration(budget=0.5)
    val = DataLoader([(torch.randn(n, 1, 8, 8), torch.full((n,), label)) for n, label in batches], batch_size=None)
    with pytest.raises(ValueError, match=f"got {sum(n for n, _ in batches)} of class 3; thresholds are left"):
        quick(callback).fit(net, fixed_loader(), val)
    assert net.network.thresholds == pytest.approx([0.9, 0.9])
    assert callback.calibration is None


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([ThresholdCalibration(budget=1), PhaseEarlyStopping()], "put ThresholdCalibration behind PhaseEarlyStopping"),
        ([ThresholdCalibration(budget=1), WeightAveraging()], "put ThresholdCalibration behind WeightAveraging"),
        ([ExitReport("unused"), ThresholdCalibration(budget=1)], "put ExitReport behind ThresholdCalibration"),
        ([ExitReport("unused"), PhaseEarlyStopping()], "put ExitReport behind PhaseEarlyStopping"),
    ],
)
def test_callbacks_that_would_change_weights_later_are_refused(callbacks: list[pl.Callback], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quick(*callbacks).fit(joint(example_input=torch.zeros(2, 1, 8, 8)), data())


# Checkpoints and tests


def test_results_travel_in_checkpoints(tmp_path: Path) -> None:
    net, callback = joint(), ThresholdCalibration(budget=0.7)
    run = quick(callback)
    run.fit(net, fixed_loader(), fixed_loader())
    run.save_checkpoint(tmp_path / "end.ckpt")
    held = torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"]
    (saved,) = [value for name, value in held.items() if "ThresholdCalibration" in name]
    assert Calibration.from_dict(saved["calibration"]) == callback.calibration
    other = ThresholdCalibration(budget=0.7)
    other.load_state_dict(saved)
    assert other.calibration == callback.calibration
    again = EarlyExitModule.load_from_checkpoint(tmp_path / "end.ckpt", backbone=SmallCNN(width=4), optimizer=FAST)
    assert again.network.thresholds == net.network.thresholds


def test_weights_that_come_without_thresholds_are_calibrated_before_the_test(tmp_path: Path) -> None:
    net, callback = joint(), ThresholdCalibration(budget=0.7)
    run = trainer(callback, ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1), max_epochs=2)
    run.fit(net, fixed_loader(), fixed_loader())
    at_the_end = net.network.thresholds
    run.test(net, fixed_loader(), ckpt_path=str(tmp_path / "epoch=0.ckpt"), verbose=False)
    assert callback.calibration is not None
    logits, _ = outputs(net, fixed_loader(), batches=2)
    left_at = replay(scores_of("max_prob", logits, [1.0] * 3), net.network.score_thresholds)
    assert callback.calibration.exit_rate == tuple((left_at == k).sum().item() / 32 for k in range(3))
    assert net.network.thresholds != at_the_end
    assert run.callback_metrics["test/exit_rate0"] + run.callback_metrics["test/exit_rate1"] > 0


@pytest.mark.parametrize("again", [True, False])
def test_thresholds_from_before_the_fit_are_calibrated_before_the_test_too(again: bool, tmp_path: Path) -> None:
    net, callback = joint(thresholds=0.9), ThresholdCalibration(budget=0.7)
    run = trainer(callback, ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1), max_epochs=2)
    run.fit(net, data())
    if not again:
        net, callback = joint(), ThresholdCalibration(budget=0.7)
        run = quick(callback)
    run.test(net, data(), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    assert callback.calibration is not None
    assert net.network.score_thresholds.tolist() == pytest.approx(callback.calibration.thresholds)
    assert net.network.thresholds != pytest.approx([0.9, 0.9])


def test_a_checkpoint_with_the_thresholds_found_is_written_at_the_end(tmp_path: Path) -> None:
    net, callback = joint(), ThresholdCalibration(budget=0.7, dirpath=tmp_path / "run")
    quick(callback, ModelCheckpoint(tmp_path)).fit(net, fixed_loader(), fixed_loader())
    path = tmp_path / "run" / "calibrated.ckpt"
    assert "optimizer_states" not in torch.load(path, weights_only=True)
    loaded = EarlyExitModule.load_from_checkpoint(path, backbone=backbone(), optimizer=FAST)
    assert callback.calibration is not None
    assert loaded.network.score_thresholds.tolist() == list(callback.calibration.thresholds)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in state(net).items())


def test_a_test_calibrates_on_the_validation_data_of_its_datamodule() -> None:
    net, callback = joint(), ThresholdCalibration(budget=0.7)
    run = quick(callback)
    run.test(net, data(), verbose=False)
    assert callback.calibration is not None
    source = data()
    source.setup("validate")
    logits, _ = outputs(net, source.val_dataloader(), batches=2)
    left_at = replay(scores_of("max_prob", logits, [1.0] * 3), net.network.score_thresholds)
    assert callback.calibration.exit_rate == tuple((left_at == k).sum().item() / 128 for k in range(3))
    found = callback.calibration
    run.test(net, data(), verbose=False)
    assert callback.calibration is found  # exits are enabled by now


def test_thresholds_somebody_has_set_are_tested_as_they_are() -> None:
    net, callback = joint(), ThresholdCalibration(budget=0.7)
    run = quick(callback)
    run.fit(net, fixed_loader(), fixed_loader())
    net.network.set_thresholds(0.5)
    run.test(net, fixed_loader(), verbose=False)
    assert net.network.thresholds == [0.5, 0.5]


def test_weights_without_thresholds_and_data_are_warned_about() -> None:
    with pytest.warns(UserWarning, match="no validation data to calibrate them on"):
        quick(ThresholdCalibration(budget=0.7)).test(joint(), fixed_loader(), verbose=False)


def test_calibration_follows_restored_weights() -> None:
    net, callback = joint(), ThresholdCalibration(budget=0.7)
    trainer(PhaseEarlyStopping(patience=1), callback, max_epochs=3).fit(net, fixed_loader(), fixed_loader())
    logits, _ = outputs(net, fixed_loader(), batches=2)
    left_at = replay(scores_of("max_prob", logits, [1.0] * 3), net.network.score_thresholds)
    assert callback.calibration is not None
    assert callback.calibration.exit_rate == tuple((left_at == k).sum().item() / 32 for k in range(3))


PROCESSES = """
import os, sys
import torch
from exits_on_digits import fixed_loader, module, trainer
from lightning_eff.early_exit.report import ExitReport, ThresholdCalibration

devices, batches = int(os.environ["DEVICES"]), int(sys.argv[1])
strategy = {"strategy": "ddp", "devices": devices} if devices > 1 else {}
net = module(regime="joint", example_input=torch.ones(2, 1, 8, 8))
callback = ThresholdCalibration(budget=0.7, temperature=sys.argv[2] == "temperature")
# weights stand still, so that one process and two calibrate the same network
run = trainer(callback, ExitReport("of%d" % devices), max_epochs=1, limit_val_batches=1.0, **strategy)
net.optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.0)
for layer in net.network.backbone.modules():
    layer.momentum = 0.0
run.fit(net, fixed_loader(), fixed_loader(batches))
torch.save({"thresholds": net.network.score_thresholds, "temperatures": net.network.temperatures,
            "result": callback.calibration.to_dict()}, "of%d_rank%d.pt" % (devices, run.global_rank))
"""


@pytest.mark.parametrize("temperature", ["temperature", pytest.param("none", marks=pytest.mark.slow)])
def test_two_processes_end_with_the_thresholds_of_one(
    temperature: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])}
    run_ddp(PROCESSES, tmp_path, "4", temperature, env=beside)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEVICES", "1")
    monkeypatch.setattr("sys.argv", ["", "4", temperature])
    exec(PROCESSES, {})
    first, second, alone = (
        torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("of2_rank0", "of2_rank1", "of1_rank0")
    )
    assert first["result"] == second["result"]
    for name in ("thresholds", "temperatures"):
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], alone[name])  # sums over samples in another order
    assert first["result"]["exit_rate"] == alone["result"]["exit_rate"]
    two, one = (rows(tmp_path / folder / "val" / "exits.csv") for folder in ("of2", "of1"))
    assert sorted((row["exit"], row["prediction"]) for row in two) == sorted(
        (row["exit"], row["prediction"]) for row in one
    )
    assert len(two) == 64


# Reports


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


@pytest.mark.parametrize("verbose", [True, False])
def test_table_of_outputs_is_printed_if_wanted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verbose: bool
) -> None:
    trainer(ExitReport(tmp_path, verbose=verbose)).fit(joint(thresholds=0.4), fixed_loader(), fixed_loader())
    assert ("right of them %" in capsys.readouterr().out) == verbose


def test_reports_tell_what_the_network_does(tmp_path: Path) -> None:
    net = joint(thresholds=0.4)
    run = trainer(ExitReport(tmp_path), max_epochs=2)
    val, test = fixed_loader(batches=2), fixed_loader(batches=1)
    run.fit(net, fixed_loader(), val)
    run.test(net, test, verbose=False)
    common = {"curve.json", "thresholds.json", "exits.csv", "curve.png", "exits.png", "reliability.png", "samples.png"}
    tables = {f"{name}.{suffix}" for name in ("budgets", "outputs") for suffix in ("md", "csv", "json")}
    tables.add("exits.json")
    assert {path.name for path in (tmp_path / "val").iterdir()} == {*common, *tables, "history.png"}
    assert {path.name for path in (tmp_path / "test").iterdir()} == {*common, *tables}

    inputs, target = (torch.cat(parts) for parts in zip(*val, strict=True))
    answer = net.network.predict(inputs)
    exits = rows(tmp_path / "val" / "exits.csv")
    assert [int(row["sample"]) for row in exits] == list(range(32))
    assert [int(row["exit"]) for row in exits] == answer.exit_index.tolist()
    assert [int(row["prediction"]) for row in exits] == answer.logits.argmax(1).tolist()
    assert [float(row["confidence"]) for row in exits] == pytest.approx(answer.confidence.tolist(), abs=1e-5)

    curve = CurveResult.from_dict(json.loads((tmp_path / "test" / "curve.json").read_text()))
    logits, labels = outputs(net, test)
    assert curve.head_accuracy == [(output.argmax(1) == labels).double().mean().item() for output in logits]
    told = json.loads((tmp_path / "val" / "thresholds.json").read_text())
    assert told["thresholds"] == pytest.approx([0.4, 0.4])
    assert told["accuracy"] == (answer.logits.argmax(1) == target).double().mean().item()
    last = rows(tmp_path / "val" / "outputs.csv")[-1]
    assert float(last["leave %"]) == pytest.approx(100 * (answer.exit_index == 2).double().mean().item())


def test_disabled_exits_and_those_that_always_fire_are_valid_json(tmp_path: Path) -> None:
    net = joint(thresholds=[None, -math.inf])
    quick(ExitReport(tmp_path)).test(net, fixed_loader(), verbose=False)
    text = (tmp_path / "test" / "thresholds.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["thresholds"] == [None, "-inf"]
    assert rows(tmp_path / "test" / "outputs.csv")[0]["threshold (max_prob)"] == "off"


def test_inputs_that_are_no_images_are_not_drawn(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    loader = DataLoader([(torch.randn(4), i % 3) for i in range(12)], batch_size=5)  # the last batch is short
    module = EarlyExitModule(net, ["0"], 3, regime="joint", thresholds=0.4)
    quick(ExitReport(tmp_path)).fit(module, loader, loader)
    assert not (tmp_path / "val" / "samples.png").exists()
    assert len(rows(tmp_path / "val" / "exits.csv")) == 10  # limit_val_batches=2


def test_the_course_of_training_is_told_by_phases_and_survives_a_checkpoint(tmp_path: Path) -> None:
    report = ExitReport(tmp_path)
    trainer(report, max_epochs=2).fit(module(regime="mixed"), data())
    course = report.state_dict()
    assert course["phases"] == ["backbone", "all"]
    assert [sorted(epoch) for epoch in course["history"]] == [["final"], ["exit 0", "exit 1", "final"]]
    other = ExitReport(tmp_path)
    other.load_state_dict(json.loads(json.dumps(course)))
    assert other.state_dict() == course


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
def test_reports_without_validation_data_are_warned_about(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="ExitReport reports on validation data, of which there is none"):
        quick(ExitReport(tmp_path)).fit(joint(), fixed_loader())
    assert not list(tmp_path.iterdir())


def test_budgets_of_reports_are_checked() -> None:
    with pytest.raises(ValueError, match=r"expected budgets in .* got \[0\]"):
        ExitReport("unused", budgets=[0])


@pytest.mark.parametrize(
    "make",
    [lambda: ThresholdCalibration(budget=50), lambda: ExitReport("unused", [50.0]), lambda: joint(budgets=[0.0])],
)
def test_percent_are_not_taken_for_fractions(make: Any) -> None:
    with pytest.raises(ValueError, match="not 50"):
        make()


def test_exits_whose_costs_nobody_knows_are_asked_for_them() -> None:
    net = joint(example_input=torch.zeros(2, 1, 8, 8))
    net.network._costs.known = None  # as where no operation could be counted
    with pytest.raises(ValueError, match=r"ExitReport needs the costs of the exits: give the module cost=\[\.\.\.\]"):
        exits_of(net, "ExitReport")
