"""Figures of fits and of plans; after those of arXiv 2402.07871.

Every function returns a figure for `reporting.save_figure`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lightning_eff.arguments import check_number
from lightning_eff.moe.scaling.laws import FineGrainedMoELaw, ScalingLaw
from lightning_eff.moe.scaling.plan import Plan, readable
from lightning_eff.moe.scaling.planner import ComputePlanner
from lightning_eff.moe.scaling.result import FitResult
from lightning_eff.reporting import HIGHLIGHT, KEPT, REFERENCE, SERIES, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SMALL = 8  # points, of legends
_MOST_ENTRIES = 20  # of a legend
_MARKERS = "osD^vPX<>*h"
_LAWS_DRAWN = 60  # resampled laws a band of optima is taken from: each needs a plan a budget
_BAND_POINTS = 15


def fit_figure(fit: FitResult, ci: float = 0.8) -> Figure:
    """Predicted against measured losses, coloured by granularity, and what is left between them.

    Args:
        fit: the fit.
        ci: band of the resampled laws, in (0, 1), drawn as bars where there are any.
    """
    figure, axes = new_figure(1, 2, width=8.4, height=3.8)
    agree, left = axes[0]
    runs, granularity = fit.runs, _granularities(fit)
    predicted = fit.predict(runs.n_total, runs.n_tokens, granularity, ci)
    for number, value in enumerate(np.unique(granularity)):
        at = granularity == value
        style: dict[str, Any] = {
            "color": SERIES[number % len(SERIES)],
            "marker": _MARKERS[number % len(_MARKERS)],
            "linestyle": "none",
            "markersize": 4,
        }
        agree.plot(runs.loss[at], predicted.loss[at], label=f"G = {value:g}", **style)
        left.plot(runs.loss[at], (runs.loss - predicted.loss)[at], **style)
    if np.isfinite(predicted.low).all():
        ends = [(edge - predicted.loss) for edge in (predicted.low, predicted.high)]
        order = np.argsort(runs.loss, kind="stable")
        left.vlines(
            runs.loss[order], ends[0][order], ends[1][order], color=REFERENCE, linewidth=1, alpha=0.6, zorder=0,
            label=f"{ci:.0%} of resampled laws",
        )  # fmt: skip
        left.legend(frameon=False, fontsize=_SMALL)
    span = [float(min(runs.loss.min(), predicted.loss.min())), float(max(runs.loss.max(), predicted.loss.max()))]
    agree.plot(span, span, color="black", linewidth=0.8, linestyle="--")
    left.axhline(0, color="black", linewidth=0.8, linestyle="--")
    agree.set(xlabel="measured loss [nats a token]", ylabel="predicted loss [nats a token]")
    agree.set_title(f"RMSE {fit.rmse:.4f}, {len(runs)} runs")
    left.set(xlabel="measured loss [nats a token]", ylabel="measured - predicted [nats a token]")
    if len(np.unique(granularity)) > 1:
        agree.legend(frameon=False, fontsize=_SMALL)
    return figure


def tells_granularity(fit: FitResult) -> bool:
    """Whether :func:`granularity_figure` has something to show: two runs differ in granularity and in nothing else."""
    if not isinstance(fit.law, FineGrainedMoELaw):
        return False
    pairs = np.stack([fit.runs.n_total, fit.runs.n_tokens])
    return len(np.unique(np.vstack([pairs, _granularities(fit)]), axis=1).T) > len(np.unique(pairs, axis=1).T)


def granularity_figure(fit: FitResult) -> Figure:
    """What granularity does: the part of the loss that depends on it, a line for each size and number of tokens.

    Raises:
        ValueError: the fit is of a law without granularity, or no two runs differ in nothing else.
    """
    from matplotlib.lines import Line2D

    law, runs = fit.law, fit.runs
    if not isinstance(law, FineGrainedMoELaw):
        raise ValueError("expected a fit of a law with granularity, law='fine_grained'")
    granularity = _granularities(fit)
    sizes, tokens = np.unique(runs.n_total).tolist(), np.unique(runs.n_tokens).tolist()
    figure, axes = new_figure(width=6.4, height=4.4)
    axis, shown = axes[0, 0], set()
    for size, n_total in enumerate(sizes):
        colour = SERIES[size % len(SERIES)]
        for data, n_tokens in enumerate(tokens):
            at = (runs.n_total == n_total) & (runs.n_tokens == n_tokens)
            if len(np.unique(granularity[at])) < 2:
                continue
            # measured loss less what the law says of size and tokens alone
            rest = runs.loss[at] - (law.c + law.a / n_total**law.alpha + law.b / n_tokens**law.beta)
            marker = _MARKERS[data % len(_MARKERS)]
            points = {"color": colour, "marker": marker, "markersize": 4, "linestyle": "none"}
            axis.plot(granularity[at][rest > 0], rest[rest > 0], **points)
            shown |= {(n_total, None, colour, ""), (None, n_tokens, "black", marker)}
        g = np.geomspace(granularity.min(), granularity.max(), 20)
        axis.plot(g, law.g * g**-law.gamma / n_total**law.alpha, color=colour, linewidth=1)
    if not shown:
        raise ValueError("no two runs of one size and number of tokens differ in granularity")
    axis.set(xscale="log", yscale="log", xlabel="granularity G")
    axis.set_ylabel("loss above that of endless granularity\n[nats a token]")
    axis.set_xticks(ticks := np.unique(granularity).tolist(), [f"{tick:g}" for tick in ticks])
    axis.set_xticks([], minor=True)
    _plain_ticks(axis)
    axis.set_title("What granularity does; lines: the law")
    entries = sorted(shown, key=lambda entry: (entry[0] is None, entry[0] or entry[1]))
    labels = [f"N = {readable('', n)}" if n else f"D = {readable('', d)}" for n, d, _, _ in entries]
    handles = [Line2D([], [], color=c, marker=m, linestyle="none" if m else "-") for _, _, c, m in entries]
    if len(entries) <= _MOST_ENTRIES:
        axis.legend(handles, labels, frameon=False, fontsize=7, ncols=2)
    return figure


def frontier_figure(
    planner: ComputePlanner,
    f_min: float,
    f_max: float,
    *,
    baseline: ScalingLaw | None = None,
    laws: Iterable[ScalingLaw] = (),
    ci: float = 0.8,
    mark: Plan | None = None,
) -> Figure:
    """Optimal loss over the budget, coloured by the best granularity; beside it the network and tokens it takes.

    Args:
        planner: the planner.
        f_min: least budget, FLOPs, > 0.
        f_max: greatest budget, FLOPs.
        baseline: a law to compare with, dense networks for instance, drawn dashed.
        laws: laws of resampled runs, ``FitResult.laws()``, for a band.
        ci: share of them inside of the band, in (0, 1).
        mark: a plan to point at.
    """
    from matplotlib.lines import Line2D

    figure, axes = new_figure(1, 2, width=9.0, height=4.0)
    loss, sizes = axes[0]
    table = planner.frontier(f_min, f_max, 200)
    flops, granularity = table.column("flops"), table.column("granularity")
    few, every = np.geomspace(f_min, f_max, _BAND_POINTS), list(laws)[:_LAWS_DRAWN]
    if every:
        low, high = np.transpose([planner.intervals(budget, every, ci)["loss"] for budget in few.tolist()])
        loss.fill_between(few, low, high, color=REFERENCE, alpha=0.3, linewidth=0, label=f"{ci:.0%} of resampled laws")
    for axis, column in ((loss, "loss"), (sizes, "n_active")):
        for number, value in enumerate(values := np.unique(granularity)):
            at = np.flatnonzero(granularity == value)
            at = np.append(at, at[-1] + 1) if at[-1] + 1 < len(flops) else at  # so that the curve has no gaps
            colour = SERIES[number % len(SERIES)] if len(values) > 1 else KEPT
            single = "optimum" if column == "loss" else "active parameters"
            label = f"G = {value:g}" if len(values) > 1 else single
            axis.plot(flops[at], table.column(column)[at], color=colour, linewidth=2, label=label)
    sizes.plot(flops, table.column("n_tokens"), color="black", linewidth=1.4, linestyle="-.", label="tokens D")
    if baseline is not None:
        other = ComputePlanner(baseline, aspect=planner.aspect, c_f=planner.c_f, c_r=planner.c_r)
        dense = other.frontier(f_min, f_max, 50)
        style: dict[str, Any] = {"color": REFERENCE, "linestyle": "--", "linewidth": 1.4}
        loss.plot(dense.column("flops"), dense.column("loss"), label=_named(baseline), **style)
        sizes.plot(dense.column("flops"), dense.column("n_active"), label=f"{_named(baseline)}, active", **style)
    if mark is not None:
        loss.plot([mark.flops], [mark.loss], color=HIGHLIGHT, marker="*", markersize=13, linestyle="none", zorder=5)
    _shade_fitted(loss, planner.law, f_min, f_max)
    loss.set(xscale="log", xlabel="training FLOPs", ylabel="loss [nats a token]")
    sizes.set(xscale="log", yscale="log", xlabel="training FLOPs", ylabel="active parameters, tokens")
    figure.suptitle("Compute-optimal training")
    loss.legend(frameon=False, fontsize=_SMALL)
    handles, labels = sizes.get_legend_handles_labels()
    kept = [i for i, label in enumerate(labels) if not label.startswith("G =")]
    handles, labels = [handles[i] for i in kept], [labels[i] for i in kept]
    if len(values) > 1:
        handles, labels = [Line2D([], [], color=SERIES[0], linewidth=2), *handles], ["active parameters, by G", *labels]
    sizes.legend(handles, labels, frameon=False, fontsize=_SMALL)
    return figure


def overhead_figure(
    planner: ComputePlanner, f_min: float, f_max: float, baselines: Sequence[ScalingLaw | float]
) -> Figure:
    """How many times the FLOPs baselines need for the loss of the optimum, over the budget.

    Args:
        planner: the planner.
        f_min: least budget, FLOPs, > 0.
        f_max: greatest budget, FLOPs.
        baselines: laws (dense networks), and granularities the planner's own law is held at.
    """
    figure, axes = new_figure(width=6.0, height=3.8)
    axis = axes[0, 0]
    budgets = np.geomspace(f_min, f_max, 40)
    for number, baseline in enumerate(baselines):
        factor = np.array([planner.savings(budget, baseline) for budget in budgets.tolist()])
        law = isinstance(baseline, ScalingLaw)
        colour = REFERENCE if law else SERIES[number % len(SERIES)]
        label = _named(baseline) if isinstance(baseline, ScalingLaw) else f"G = {baseline:g}"
        axis.plot(budgets, np.where(np.isfinite(factor), factor, np.nan), color=colour, linewidth=1.8, label=label)
    _shade_fitted(axis, planner.law, f_min, f_max)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_title("What others need for the loss of the optimum")
    axis.set(
        xscale="log", yscale="log", xlabel="training FLOPs of the optimum", ylabel="times its FLOPs for the same loss"
    )
    _plain_ticks(axis)
    axis.legend(frameon=False, fontsize=_SMALL)
    return figure


def isoflops_figure(
    planner: ComputePlanner, budgets: Sequence[float], granularity: float | None = None, span: float = 8.0
) -> Figure:
    """Loss over active parameters at constant budgets, with the optimum of each.

    Args:
        planner: the planner.
        budgets: FLOPs, one curve each.
        granularity: None takes the best at every point.
        span: how many times smaller and larger than the optimum the curves go, > 1.
    """
    check_number("span", span, above=1)
    figure, axes = new_figure(width=6.0, height=4.0)
    axis = axes[0, 0]
    for number, budget in enumerate(budgets):
        best = planner.optimal(budget, granularity)
        sizes = best.n_active * np.geomspace(1 / span, span, 61)
        losses = [planner.at_size(budget, size, granularity).loss for size in sizes.tolist()]
        colour = SERIES[number % len(SERIES)]
        axis.plot(sizes, losses, color=colour, label=f"{budget:.3g} FLOPs")
        axis.plot([best.n_active], [best.loss], color=HIGHLIGHT, marker="*", markersize=10, linestyle="none", zorder=5)
    axis.set(xscale="log", xlabel="active parameters", ylabel="loss [nats a token]")
    axis.set_title("Equal budgets; stars: optima" + ("" if granularity is None else f"; G = {granularity:g}"))
    axis.legend(frameon=False, fontsize=_SMALL)
    return figure


def _granularities(fit: FitResult) -> NDArray[np.float64]:
    return np.ones(len(fit.runs)) if fit.runs.granularity is None else fit.runs.granularity


def _named(law: ScalingLaw) -> str:
    return "dense" if law.expansion_rate == 1 else law.source or "baseline"


def _shade_fitted(axis: Any, law: ScalingLaw, f_min: float, f_max: float) -> None:
    if law.fitted_flops is None:
        return
    low, high = max(f_min, law.fitted_flops[0]), min(f_max, law.fitted_flops[1])
    if low < high:
        axis.axvspan(low, high, color=KEPT, alpha=0.08, linewidth=0, label="budgets of the fitted runs")


def _plain_ticks(axis: Any) -> None:
    """2, 3, 5 on a logarithmic axis that spans less than a decade or two, where powers of ten would be lonely."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
