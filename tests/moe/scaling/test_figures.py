"""Figures show what they say: colours, bands, legends, labels."""

from dataclasses import replace

import numpy as np
import pytest
from helpers import EXAMPLES, run_here
from paper_runs import paper_runs

from lightning_eff.moe.scaling import ChinchillaLaw, ComputePlanner, FineGrainedMoELaw, FitResult, fit_scaling_law
from lightning_eff.moe.scaling.figures import (
    fit_figure,
    frontier_figure,
    granularity_figure,
    isoflops_figure,
    overhead_figure,
)
from lightning_eff.reporting import save_figure

PAPER = FineGrainedMoELaw.paper()


@pytest.fixture(scope="module")
def fit() -> FitResult:
    return fit_scaling_law(paper_runs(noise=3e-3), fixed={"c": 0.472}, bootstrap=20)


def labels(axis) -> list[str]:
    legend = axis.get_legend()
    return [] if legend is None else [text.get_text() for text in legend.get_texts()]


def test_fit_shows_every_run_and_the_band(fit: FitResult) -> None:
    figure = fit.figures()["fit"]
    agree, left = figure.axes
    assert agree.get_title() == f"RMSE {fit.rmse:.4f}, 78 runs"
    assert labels(agree) == ["G = 1", "G = 2", "G = 4", "G = 8", "G = 16"]
    assert sum(len(line.get_xdata()) for line in agree.lines) == 78 + 2
    assert labels(left) == ["80% of resampled laws"]


def test_fit_without_granularity_and_bootstrap() -> None:
    runs = {name: column for name, column in paper_runs().items() if name in ("n_total", "n_tokens", "loss")}
    figure = fit_figure(fit_scaling_law(runs, "chinchilla", bootstrap=0))
    assert [labels(axis) for axis in figure.axes] == [[], []]


def test_granularity_draws_a_line_a_size(fit: FitResult) -> None:
    axis = granularity_figure(fit).axes[0]
    assert labels(axis)[:2] == ["N = 135M", "N = 304M"]
    assert labels(axis)[-1] == "D = 130B"
    with pytest.raises(ValueError, match="law with granularity"):
        granularity_figure(replace(fit, law=ChinchillaLaw.paper_dense()))
    lonely = fit.runs.take(np.unique(np.stack([fit.runs.n_total, fit.runs.n_tokens]), axis=1, return_index=True)[1])
    with pytest.raises(ValueError, match="differ in granularity"):
        granularity_figure(replace(fit, runs=lonely))
    assert "granularity" in fit.figures()
    assert "granularity" not in replace(fit, runs=lonely).figures()


@pytest.mark.filterwarnings("ignore:.*times outside of the runs")
def test_frontier_is_coloured_by_granularity_beside_the_dense_line(fit: FitResult, tmp_path) -> None:
    planner = ComputePlanner(PAPER)
    figure = frontier_figure(
        planner, 1e17, 1e22, baseline=ChinchillaLaw.paper_dense(), laws=fit.laws(), mark=planner.optimal(1e20)
    )
    loss, sizes = figure.axes
    told = ["80% of resampled laws", "G = 8", "G = 16", "G = 32", "dense", "budgets of the fitted runs"]
    assert labels(loss) == told
    assert labels(sizes) == ["active parameters, by G", "tokens D", "dense, active"]
    assert save_figure(figure, tmp_path / "frontier.svg").exists()
    bare = frontier_figure(ComputePlanner(ChinchillaLaw.chinchilla2022()), 1e17, 1e22)
    assert [labels(axis) for axis in bare.axes] == [["optimum"], ["active parameters", "tokens D"]]


def test_overhead_is_what_the_planner_saves() -> None:
    planner = ComputePlanner(PAPER)
    axis = overhead_figure(planner, 1e18, 1e20, [ChinchillaLaw.paper_dense(), 1]).axes[0]
    assert labels(axis)[:2] == ["dense", "G = 1"]
    assert axis.lines[0].get_ydata()[-1] == pytest.approx(planner.savings(1e20, ChinchillaLaw.paper_dense()))


def test_isoflop_curves_are_lowest_at_the_optimum() -> None:
    axis = isoflops_figure(ComputePlanner(PAPER), [1e18, 1e19], granularity=8).axes[0]
    curve, star = axis.lines[:2]
    assert min(curve.get_ydata()) == pytest.approx(star.get_ydata()[0], abs=1e-9)
    assert labels(axis) == ["1e+18 FLOPs", "1e+19 FLOPs"]
    with pytest.raises(ValueError, match="span must be > 1"):
        isoflops_figure(ComputePlanner(PAPER), [1e18], span=1)


def test_example_plans_with_runs(tmp_path, capsys) -> None:
    columns = paper_runs(noise=1e-3)
    rows = [",".join(columns), *(",".join(map(repr, map(float, row))) for row in zip(*columns.values(), strict=True))]
    (tmp_path / "runs.csv").write_text("\n".join(rows) + "\n")
    runs, out = str(tmp_path / "runs.csv"), str(tmp_path / "plan")
    run_here(EXAMPLES / "compute_plan.py", "--fast", "--n-active", "1e8", "--runs", runs, "--out", out)
    assert "Resampled fits" in capsys.readouterr().out
    assert (tmp_path / "plan" / "fit.json").exists()
