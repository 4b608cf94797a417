"""Pictures of a search show what they say."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from matplotlib.colors import to_hex

from lightning_eff.pruning.random_channel import (
    Candidate,
    Candidates,
    ComparisonReport,
    candidates_figure,
    comparison_figure,
    ratio_figure,
)
from lightning_eff.pruning.random_channel.figures import front
from lightning_eff.reporting import KEPT, REFERENCE, save_figure


def candidate(number: int, macs: int, score: float, kept: int = 4, stage: str = "ranked") -> Candidate:
    return Candidate(number, {"a": kept, "b": 8 - kept}, macs, 10 * macs, score, 0.1, 0.2, stage)


def found(mode: str = "max") -> Candidates:
    ranked = [
        candidate(0, 50, 0.6),
        candidate(1, 49, 0.5, 2),
        candidate(2, 51, 0.8, 6),
        candidate(3, 52, 0.7, 1),
        candidate(4, 48, math.nan),
    ]
    finals = [candidate(2, 51, 0.81, 6, "final"), candidate(3, 52, 0.83, 1, "final")]
    dense = {"ranked": 0.9, "final": 0.95}
    return Candidates([*ranked, *finals], mode, {"a": 8, "b": 8}, 100, 1000, dense)  # type: ignore[arg-type]


def test_front_holds_what_nothing_cheaper_beats() -> None:
    assert [c.number for c in front(found().candidates[:5], "max")] == [1, 0, 2]
    assert [c.number for c in front(found().candidates[:5], "min")] == [1]


def test_all_scored_candidates_are_points_and_best_uniform_and_dense_are_marked() -> None:
    figure = candidates_figure(found())
    axis = figure.axes[0]
    points = {c.get_label(): c.get_offsets().tolist() for c in axis.collections}
    assert points["candidates (4)"] == [[50, 0.6], [49, 0.5], [51, 0.8], [52, 0.7]]
    assert points["finalists (2)"] == [[51, 0.81], [52, 0.83]]
    assert points["uniform"] == [[50, 0.6]]
    assert points["best: 0.83"] == [[52, 0.83]]
    lines = {line.get_label(): line for line in axis.lines}
    assert list(lines["front"].get_xdata()) == [49, 50, 51]
    assert set(lines) == {"front", "dense, as candidates: 0.9", "dense, as finalists: 0.95"}
    assert list(lines["dense, as finalists: 0.95"].get_ydata()) == [0.95, 0.95]


def test_ratios_of_the_best_and_of_the_uniform_candidate_are_lines() -> None:
    axis = ratio_figure(found(), 2).axes[0]
    lines = {line.get_label(): list(line.get_ydata()) for line in axis.lines}
    assert lines["best"] == [12.5, 87.5]
    assert lines["uniform"] == [50, 50]
    assert len(axis.lines) == 4
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["a", "b"]


def test_no_candidate_asked_for_is_told() -> None:
    with pytest.raises(ValueError, match="count must be a whole number >= 1, got 0"):
        ratio_figure(found(), 0)


def comparison() -> ComparisonReport:
    generator = torch.Generator().manual_seed(0)
    luck = torch.randn(20, generator=generator, dtype=torch.float64) * 0.02
    noise = torch.randn(3, 20, generator=generator, dtype=torch.float64) * 0.002
    before = 0.8 + luck + torch.tensor([0.0, 0.0, 0.01], dtype=torch.float64)[:, None] + noise
    names = ["random", "l1", "taylor"]
    zeros = torch.zeros(3, 20)
    return ComparisonReport(
        names, before, None, zeros, [0.0] * 3, torch.ones(20, 2, dtype=torch.int64), "max", 0.9, zeros[0]
    )


def test_intervals_that_hold_zero_are_grey_and_the_others_coloured() -> None:
    report = comparison()
    scores, gains = comparison_figure(report).axes
    assert [tick.get_text() for tick in scores.get_yticklabels()] == report.order
    colours = {round(float(line.get_ydata()[0])): to_hex(line.get_color()).upper() for line in gains.lines[:-1]}
    assert colours[report.order.index("taylor")] == KEPT
    assert colours[report.order.index("l1")] == REFERENCE
    pair = report.difference("taylor", "random")
    line = next(one for one in gains.lines if round(float(one.get_ydata()[0])) == report.order.index("taylor"))
    assert list(line.get_xdata()) == [pair.low, pair.high]


def test_figures_are_written(tmp_path: Path) -> None:
    for number, figure in enumerate(
        (candidates_figure(found()), ratio_figure(found("min"), 10), comparison_figure(comparison()))
    ):
        assert save_figure(figure, tmp_path / f"{number}.png").stat().st_size > 5_000


def test_a_single_candidate_makes_figures_too(tmp_path: Path) -> None:
    one = Candidates([candidate(0, 50, 0.6)], "max", {"a": 8, "b": 8}, 100, 1000)
    save_figure(candidates_figure(one), tmp_path / "a.png")
    save_figure(ratio_figure(one), tmp_path / "b.png")
