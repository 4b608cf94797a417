"""Criteria are compared on the same ground, and differences that may be chance are called so."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from searched import Untouched, likeness, small
from torch import Tensor, nn

from lightning_eff.pruning.criteria import Random, importance
from lightning_eff.pruning.random_channel import ComparisonReport, compare_criteria, random_search, sample_configs
from lightning_eff.pruning.random_channel.comparison import bootstrap_interval
from lightning_eff.pruning.repair import Repair
from lightning_eff.surgery import ChannelGraph


def report(scores: dict[str, list[float]], after: dict[str, list[float]] | None = None, mode: Any = "max") -> Any:
    before = torch.tensor(list(scores.values()), dtype=torch.float64)
    k, n = before.shape
    return ComparisonReport(
        criteria=list(scores),
        before=before,
        after=None if after is None else torch.tensor([after[name] for name in scores], dtype=torch.float64),
        errors=torch.zeros(k, n),
        seconds=[0.0] * k,
        configs=torch.ones(n, 3, dtype=torch.int64),
        mode=mode,
        dense_score=1.0,
        macs=torch.full((n,), 0.5),
    )


def compare(criteria: Any, n: int = 6, **options: Any) -> ComparisonReport:
    model, graph, batches = small()
    given = {"score_fn": likeness(model, batches), "configs": sample_configs(graph, n, 0.5), "progress": False}
    return compare_criteria(model, graph, criteria, batches=batches, **{**given, **options})


def test_a_criterion_compared_with_itself_differs_by_exactly_zero() -> None:
    found = compare({"one": "l1", "two": "l1"})
    pair = found.difference("one", "two")
    assert (pair.mean, pair.low, pair.high, pair.win_rate) == (0, 0, 0, 0.5)
    assert found.verdict.startswith("No clear winner: one and two come first")


def test_scores_are_those_of_a_search_with_the_same_configurations() -> None:
    model, graph, batches = small()
    score, configs = likeness(model, batches), sample_configs(graph, 4, 0.5)
    found = compare(["l1", "l2"], configs=configs, repair=Repair("gram", bn_samples=0))
    for row, criterion in zip(found.before, ("l1", "l2"), strict=True):
        search = random_search(
            model, graph, batches=batches, score_fn=score, configs=configs, criterion=criterion, top_k=0,
            progress=False,
        )  # fmt: skip
        assert row.tolist() == pytest.approx([c.score for c in search.candidates], rel=1e-6)
        assert found.dense_score == search.dense_score


def test_the_opposite_of_a_good_criterion_loses_clearly() -> None:
    def good(model: nn.Module, graph: Any, batches: Any, loss_fn: Any) -> dict[str, Tensor]:
        return importance(model, graph, "l2")

    def bad(model: nn.Module, graph: Any, batches: Any, loss_fn: Any) -> dict[str, Tensor]:
        return {name: -scores for name, scores in importance(model, graph, "l2").items()}

    model, graph, batches = small()
    with torch.no_grad():  # channels of very different weight
        for name in graph.prunable:
            graph_weight = model.get_submodule(name).get_parameter("weight")
            scale = torch.linspace(0.01, 1, len(graph_weight)).reshape(-1, *[1] * (graph_weight.ndim - 1))
            graph_weight *= scale
            model.get_submodule(name.replace("conv", "norm")).get_parameter("bias").mul_(scale.flatten())
            model.get_submodule(name.replace("conv", "norm")).get_parameter("weight").mul_(scale.flatten())
    found = compare_criteria(
        model,
        graph,
        {"bad": bad, "good": good},
        configs=sample_configs(graph, 10, 0.3),
        batches=batches,
        score_fn=likeness(model, batches),
        repair=Repair("none", bn_samples=0),
        progress=False,
    )
    assert found.order == ["good", "bad"]
    assert found.difference("good", "bad").low > 0
    assert found.verdict.startswith("good is better than bad, the next best")


def test_only_copies_are_fine_tuned_and_always_with_the_same_random_numbers() -> None:
    model, graph, batches = small()
    untouched, numbers, sizes = Untouched(model), [], []

    def fine_tune(smaller: nn.Module) -> float:
        assert smaller is not model
        assert smaller.training == model.training
        numbers.append(torch.rand(1).item())
        sizes.append(sum(p.numel() for p in smaller.parameters()))
        loss = nn.functional.cross_entropy(smaller(batches[0][0]), batches[0][1])
        before = loss.item()
        loss.backward()
        torch.optim.SGD(smaller.parameters(), 0.01).step()
        return before

    configs = sample_configs(graph, 3, 0.5)
    found = compare_criteria(
        model,
        graph,
        ["random", "l1"],
        configs=configs,
        batches=batches,
        score_fn=likeness(model, batches),
        fine_tune=fine_tune,
        progress=False,
    )
    untouched.check()
    assert len(set(numbers)) == 1
    assert sizes == graph.params(configs).tolist() * 2
    assert found.after is not None
    assert torch.equal(found.scores, found.after)
    assert found.difference("l1", "random", after=False) != found.difference("l1", "random")
    assert {"best before", "best after"} <= {column.name for column in found.table("criteria").columns}


@pytest.mark.parametrize("n", [10, 40])
def test_intervals_are_those_of_scipy_expanded_for_few_values(n: int) -> None:
    values = torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64) + 0.3
    plain = scipy.stats.bootstrap(
        (values.numpy(),), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    mean, wider = float(values.mean()), {10: 2.262 / 1.960 * math.sqrt(10 / 9), 40: 2.023 / 1.960 * math.sqrt(40 / 39)}
    expected = [mean + wider[n] * (bound - mean) for bound in (plain.low, plain.high)]
    low, high = bootstrap_interval(values)
    assert (low, high) == pytest.approx(expected, abs=0.06 * float(values.std()) / math.sqrt(n))
    assert bootstrap_interval(values) == (low, high)


@pytest.mark.parametrize("n", [4, 10])
def test_intervals_cover_the_mean_of_few_values(n: int) -> None:
    drawn = torch.randn(300, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    covered = [low <= 0 <= high for low, high in map(bootstrap_interval, drawn)]
    assert 0.9 <= sum(covered) / 300 <= 0.99  # 0.84 and 0.89 without the expansion


def test_chance_draws_anew_for_every_configuration() -> None:
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
    graph = ChannelGraph.from_model(model, x[:2])
    configs = torch.tensor([[6, 3]] * 8)  # one configuration again and again: only the draw differs
    kept: list[float] = []

    def score(smaller: nn.Module) -> float:
        kept.append(float(smaller[0].weight.sum()))
        return 0.0 + len(kept)

    none = Repair("none", bn_samples=0)
    options = {"configs": configs, "batches": [(x, None)], "score_fn": score, "repair": none, "progress": False}
    compare_criteria(model, graph, ["random", "l1"], **options)
    by_lot, by_norm = kept[1:9], kept[9:]
    assert len(set(by_lot)) > 4
    assert len(set(by_norm)) == 1
    kept.clear()
    compare_criteria(model, graph, {"one draw": Random(seed=3)}, **options)
    assert len(set(kept[1:])) == 1


def test_intervals_of_one_value_and_of_equal_values() -> None:
    assert bootstrap_interval(torch.tensor([0.3])) == (-math.inf, math.inf)
    assert bootstrap_interval(torch.full((5,), 0.25)) == (0.25, 0.25)


def test_wins_count_by_what_is_better_and_ties_half() -> None:
    scores = {"a": [0.5, 0.6, 0.7, 0.8], "b": [0.4, 0.6, 0.8, 0.7]}
    assert report(scores).difference("a", "b").win_rate == 0.625
    assert report(scores, mode="min").difference("a", "b").win_rate == 0.375
    assert report(scores).difference("a", "b").mean == pytest.approx(0.025)


def test_order_verdict_and_chance_follow_the_scores_after_fine_tuning() -> None:
    before = {"random": [0.1, 0.2, 0.3], "x": [0.5, 0.6, 0.7], "y": [0.4, 0.5, 0.6]}
    after = {"random": [0.70, 0.71, 0.72], "x": [0.80, 0.81, 0.79], "y": [0.81, 0.80, 0.80]}
    found = report(before, after)
    assert found.order == ["y", "x", "random"]
    assert found.verdict.startswith("No clear winner: y and x")
    assert found.verdict.endswith("Better than random: y, x.")
    assert report(before).verdict.startswith("x is better than y, the next best, on this network (+0.1000")
    assert report(before, mode="min").order == ["random", "y", "x"]
    assert report(before, mode="min").verdict.endswith("Better than random: none for sure.")


def test_a_configuration_without_score_for_one_criterion_counts_for_none() -> None:
    found = report({"a": [0.5, math.nan, 0.7], "b": [0.4, 0.9, 0.6]})
    assert found.usable.tolist() == [True, False, True]
    assert found.difference("a", "b").mean == pytest.approx(0.1)
    assert "2 of 3 configurations" in str(found.table("criteria"))
    best = {row[0]: row[1] for row in found.table("criteria").rows}
    assert best == {"a": 0.7, "b": 0.6}


def test_pairs_are_told_against_the_best_and_against_random() -> None:
    rows = report({"random": [0.1, 0.2], "x": [0.5, 0.6], "y": [0.4, 0.6]}).table("paired").rows
    assert [row[:2] for row in rows] == [("y", "x"), ("random", "x"), ("x", "random"), ("y", "random")]


def test_tables_and_figure_are_written(tmp_path: Path) -> None:
    found = report({"random": [0.1, 0.2], "x": [0.5, 0.6], "y": [0.4, 0.6]})
    assert {path.name for path in found.write(tmp_path)} == {
        *(f"{stem}.{suffix}" for stem in ("criteria", "paired", "scores") for suffix in ("csv", "json")),
        "criteria.md",
        "paired.md",
        "criteria.png",
    }
    first, second, _ = (tmp_path / "scores.csv").read_text().splitlines()
    assert first == "configuration,MACs kept,random,x,y"
    assert second == "0,0.5,0.1,0.5,0.4"


@pytest.mark.parametrize(
    ("criteria", "options", "message"),
    [
        ([], {}, "expected criteria and configurations, got 0 and 6"),
        (["l7"], {}, "criterion must be one of .* got 'l7'"),
        (["l1", "taylor"], {}, "criterion 'taylor' needs a loss"),
        (["l1"], {"mode": "best"}, "mode must be one of max, min, got 'best'"),
        (["l1"], {"score_fn": lambda m: math.nan}, "no configuration has a finite score for every criterion"),
    ],
)
def test_bad_arguments_are_told(criteria: list[str], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare(criteria, **options)


def test_unknown_names_and_missing_fine_tuning_are_told() -> None:
    found = report({"a": [0.5, 0.7], "b": [0.4, 0.6]})
    with pytest.raises(ValueError, match="criterion must be one of a, b, got 'c'"):
        found.difference("c", "a")
    with pytest.raises(ValueError, match="no scores after fine-tuning"):
        found.difference("a", "b", after=True)
