"""Shapley pruning end to end: better than chance, the same from Python and YAML, safe to resume."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from magnitude import Net, digits, trainer

from lightning_eff.data import DigitsDataModule
from lightning_eff.models import ImageClassifier, SmallCNN
from lightning_eff.pruning import (
    Allocation,
    Calibration,
    ChannelGame,
    GameOptions,
    Layers,
    Samples,
    Schedule,
    ShapleyPruningCallback,
)
from lightning_eff.shapley import (
    ExactShapley,
    GreedyBackward,
    LeaveOneOut,
    PermutationShapley,
    RegressionShapley,
    ShapleyEstimator,
    ShapleyWarning,
    StopRule,
    StratifiedShapley,
    TopKShapley,
    UnbiasedKernelShapley,
)
from lightning_eff.surgery import ChannelGraph, PruningPlan, apply_plan

TRAIN, VAL = digits(1280)
FEW = PermutationShapley(walks=4, depth="matched")


@pytest.fixture(scope="module")
def trained() -> Net:
    model = Net(width=16)
    trainer(max_epochs=8).fit(model, TRAIN, VAL)
    return model


def test_shapley_ranking_beats_random_ranking_before_fine_tuning() -> None:
    # Ranked on validation images, judged on test images; half of a layer goes, one layer at a time. More than
    # five points is asked for. (examples/benchmarks/ranking_quality.py measures it.)
    data = DigitsDataModule()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = ImageClassifier(SmallCNN(width=16), lr=3e-3)
        trainer(max_epochs=5).fit(model, data)
    (x, y), (test_x, test_y) = (
        tuple(torch.cat(part) for part in zip(*loader, strict=True))
        for loader in (data.val_dataloader(), data.test_dataloader())
    )
    graph = ChannelGraph.from_model(model, x[:2])
    samples = Samples.collect([(x, y)], 128, lambda batch: batch)

    def accuracy(scores: torch.Tensor) -> float:
        small = copy.deepcopy(model)
        apply_plan(small, PruningPlan.from_scores(graph, {name: scores}, {name: size // 2}), x[:2], verify=False)
        with torch.no_grad():
            return float((small.eval()(test_x).argmax(1) == test_y).double().mean())

    gains = []
    generator = torch.Generator().manual_seed(0)
    for name in graph.prunable:
        size = graph.groups[name].size
        values = PermutationShapley(8).estimate(ChannelGame(model, graph, name, samples), generator=0)
        drawn = [accuracy(torch.rand(size, generator=generator)) for _ in range(5)]
        gains.append(accuracy(values.values) - sum(drawn) / len(drawn))
    assert sum(gains) / len(gains) > 0.05


def test_scores_are_the_shapley_values_of_the_channel_game(trained: Net) -> None:
    model = copy.deepcopy(trained)
    callback = ShapleyPruningCallback(
        0.5, estimator=ExactShapley(depth=2), layers=Layers(include=["body.0"]), calibration=Calibration(samples=64),
        verbose=False,
    )  # fmt: skip
    small = Net(width=6)
    trainer(max_epochs=2).fit(small, TRAIN, VAL)
    model = copy.deepcopy(small)
    graph = ChannelGraph.from_model(model, VAL.dataset.tensors[0][:2])
    samples = Samples.collect(VAL, 64, lambda batch: batch)
    expected = ExactShapley(depth=2).estimate(ChannelGame(model, graph, "body.0", samples)).values
    trainer(callback, max_epochs=1).fit(small, TRAIN, VAL)
    scores, kept = callback._record.scores["body.0"]
    assert torch.allclose(scores.values, expected)
    removed = [c for c in range(6) if c not in kept]
    assert len(kept) == 3
    assert expected[list(kept)].min() >= expected[removed].max()


@pytest.mark.parametrize("mode", ["uniform", "global", "budget"])
def test_every_allocation_meets_the_target(mode: str, trained: Net) -> None:
    model = copy.deepcopy(trained)
    callback = ShapleyPruningCallback(
        0.5, allocation=Allocation(mode=mode, target="macs"), estimator=FEW, calibration=Calibration(samples=64),
        value="neg_loss", verbose=False,
    )  # fmt: skip
    trainer(callback, max_epochs=1).fit(model, TRAIN, VAL)
    first, last = callback.report.stages[0], callback.report.stages[-1]
    assert 0.4 < last.macs / first.macs <= 0.5


def test_accelerated_and_plain_evaluation_choose_the_same_channels(trained: Net) -> None:
    plans = []
    for accelerate in ("prefix", "off"):
        callback = ShapleyPruningCallback(
            0.5, estimator=FEW, game=GameOptions(accelerate=accelerate), calibration=Calibration(samples=64),
            verbose=False,
        )  # fmt: skip
        trainer(callback, max_epochs=1).fit(copy.deepcopy(trained), TRAIN, VAL)
        plans.append(callback.plan.keep)
    assert plans[0] == plans[1]


@pytest.mark.parametrize("removal", ["remove", "pre_norm", "mean"])
def test_every_kind_of_removal_prunes(removal: str, trained: Net) -> None:
    callback = ShapleyPruningCallback(
        0.25, estimator=LeaveOneOut(), game=GameOptions(removal=removal), calibration=Calibration(samples=64),
        verbose=False,
    )  # fmt: skip
    model = copy.deepcopy(trained)
    trainer(callback, max_epochs=1).fit(model, TRAIN, VAL)
    assert model.body[0].out_channels == 12


def test_matched_depth_of_half_the_layer_needs_at_most_half_a_full_walk() -> None:
    callback = ShapleyPruningCallback(estimator=PermutationShapley(walks=32, depth="matched"))
    assert callback._estimator(64, 32) == PermutationShapley(walks=32, depth=32)
    assert callback._estimator(64, 32).cost(64) <= 0.52 * PermutationShapley(walks=32).cost(64)


def test_auto_is_exact_where_the_budget_allows_it_and_regression_beyond() -> None:
    callback = ShapleyPruningCallback()
    assert isinstance(callback._estimator(7, 4), ExactShapley)
    assert callback._estimator(8, 4) == RegressionShapley(160)
    limited = ShapleyPruningCallback(stop=StopRule(max_evals=100))
    assert limited._estimator(7, 4) == RegressionShapley(100)
    assert ShapleyPruningCallback(budget=2**10)._estimator(10, 4) == ExactShapley()
    assert ShapleyPruningCallback(budget="auto")._estimator(10, 4) == ExactShapley()
    assert ShapleyPruningCallback(budget="auto")._estimator(64, 4) == ShapleyPruningCallback()._estimator(64, 4)


def test_a_budget_too_small_for_a_layer_is_told_before_training(trained: Net) -> None:
    callback = ShapleyPruningCallback(budget=12, calibration=Calibration(samples=64), verbose=False)
    with pytest.raises(ValueError, match=r"body\.\d: .*the budget is 12"):
        trainer(callback, max_epochs=1).fit(copy.deepcopy(trained), TRAIN, VAL)


def test_a_limit_too_small_for_the_estimator_is_told_before_training(trained: Net) -> None:
    callback = ShapleyPruningCallback(
        estimator=PermutationShapley(), stop=StopRule(max_evals=3), calibration=Calibration(samples=64), verbose=False
    )
    with pytest.raises(ValueError, match=r"body\.\d: .*the budget is 3"):
        trainer(callback, max_epochs=1).fit(copy.deepcopy(trained), TRAIN, VAL)


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (ExactShapley(max_players=4), "max_players=4 allows 16"),
        (ExactShapley(depth=1000), "depth must lie in"),
        (RegressionShapley(20), "the budget is 20"),
        (TopKShapley(1000), "k must lie in"),
    ],
    ids=["exact", "depth", "regression", "top k"],
)
def test_an_estimator_that_does_not_suit_a_layer_is_told_before_training(trained, estimator, message) -> None:
    callback = ShapleyPruningCallback(
        estimator=estimator, schedule=Schedule(start=1), calibration=Calibration(samples=64), verbose=False
    )
    model = copy.deepcopy(trained)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        trainer(callback, max_epochs=2).fit(model, TRAIN, VAL)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_layer_that_keeps_all_channels_is_not_held_against_the_estimator(trained) -> None:
    sizes = {f"body.{i}": trained.body[i].out_channels for i in (0, 4)}
    smallest = min(sizes, key=sizes.get)
    assert sizes[smallest] < max(sizes.values())  # the estimator would refuse the larger layer
    callback = ShapleyPruningCallback(
        {smallest: sizes[smallest] - 2}, estimator=TopKShapley(sizes[smallest] - 1, budget=2 * sizes[smallest] + 8),
        stop=StopRule(max_evals=2 * sizes[smallest] + 8), calibration=Calibration(samples=64), verbose=False,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ShapleyWarning)
        trainer(callback, max_epochs=1).fit(copy.deepcopy(trained), TRAIN, VAL)
    assert callback.plan is not None


def test_a_time_limit_ends_the_estimate_not_the_training(trained: Net) -> None:
    callback = ShapleyPruningCallback(
        0.25, budget="2000n", stop=StopRule(max_seconds=1e-6), calibration=Calibration(samples=64),
        layers=Layers(include=["body.0"]), verbose=False,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ShapleyWarning)
        trainer(callback, max_epochs=1).fit(copy.deepcopy(trained), TRAIN, VAL)
    assert callback.plan is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "n20"}, "budget must be"),
        ({"estimator": "exact"}, "estimator must be"),
        ({"estimator": GreedyBackward(), "allocation": Allocation(mode="global")}, "places, not values"),
    ],
)
def test_bad_estimators_and_budgets_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShapleyPruningCallback(**options)


@pytest.mark.parametrize(
    "estimator",
    [RegressionShapley("4n"), StratifiedShapley("4n"), UnbiasedKernelShapley("4n"), TopKShapley(8, budget="4n"),
     GreedyBackward()],
    ids=lambda estimator: type(estimator).__name__,
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*no error bar")
def test_every_estimator_can_rank_the_channels(trained: Net, estimator: ShapleyEstimator) -> None:
    callback = ShapleyPruningCallback(
        0.5, estimator=estimator, calibration=Calibration(samples=64), layers=Layers(include=["body.4"]), verbose=False
    )
    model = copy.deepcopy(trained)
    before = model.body[4].out_channels
    trainer(callback, max_epochs=1).fit(model, TRAIN, VAL)
    assert model.body[4].out_channels == before // 2


def test_stop_rule_limits_the_evaluations_of_a_layer(trained: Net) -> None:
    callback = ShapleyPruningCallback(
        0.5, estimator=PermutationShapley(64), stop=StopRule(max_evals=100), calibration=Calibration(samples=64),
        layers=Layers(include=["body.4"]), verbose=False,
    )  # fmt: skip
    trainer(callback, max_epochs=1).fit(copy.deepcopy(trained), TRAIN, VAL)
    assert callback.plan is not None


def test_report_shows_and_writes_what_was_done(trained: Net, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    callback = ShapleyPruningCallback(
        0.5, estimator=FEW, calibration=Calibration(samples=64), dirpath=tmp_path, schedule=Schedule(steps=2)
    )
    model = copy.deepcopy(trained)
    trainer(callback, max_epochs=3).fit(model, TRAIN, VAL)
    shown = capsys.readouterr().out
    for text in ("body.0", "whole network", "dense", "pruned, step 2", "fine-tuned", "latency"):
        assert text in shown
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["sizes"]["body.0"] == 16
    assert len(plan["keep"]["body.0"]) == 8
    assert plan["meta"]["settings"]["technique"] == "shapley"
    layers = json.loads((tmp_path / "layers.json").read_text())
    assert layers[-1]["now"] == sum(p.numel() for p in model.parameters())
    assert (tmp_path / "scores.png").stat().st_size > 5_000


def test_plain_torch_model_without_a_trainer() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 12), torch.nn.ReLU(), torch.nn.Linear(12, 10))
    x, y = VAL.dataset.tensors
    batches = [(x.flatten(1)[:128], y[:128]), (x.flatten(1)[128:], y[128:])]
    graph = ChannelGraph.from_model(net, batches[0][0][:2])
    game = ChannelGame(net, graph, "0", Samples.collect(batches, 256, lambda batch: batch), value="neg_loss")
    result = PermutationShapley(walks=8).estimate(game, generator=0)
    apply_plan(net, PruningPlan.from_scores(graph, {"0": result.values}, {"0": 6}), batches[0][0][:2], graph=graph)
    assert net[0].out_features == 6


def test_bad_game_options_are_refused() -> None:
    with pytest.raises(ValueError, match="groups must be a whole number >= 1"):
        GameOptions(groups=0)
    with pytest.raises(ValueError, match="max_memory_mb"):
        GameOptions(max_memory_mb=-1)


def test_a_layer_that_carries_no_signal_is_ranked_by_weight_norm() -> None:
    model = Net(width=6)
    norms = model.body[0].weight.detach().flatten(1).norm(dim=1)
    callback = ShapleyPruningCallback(
        {"body.0": 3}, estimator=LeaveOneOut(), value=lambda outputs, target: torch.zeros(len(target)),
        calibration=Calibration(samples=64), verbose=False,
    )  # fmt: skip
    with pytest.warns(UserWarning, match=r"body\.0: .*no signal"):
        trainer(callback, max_epochs=1).fit(model, TRAIN, VAL)
    scores, kept = callback._record.scores["body.0"]
    assert scores.values.count_nonzero() == 0
    assert sorted(kept) == sorted(norms.topk(3).indices.tolist())
