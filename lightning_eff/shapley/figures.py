"""Figures of Shapley values, of rankings against the oracle and of estimators against each other.

Every function returns a figure for `reporting.save_figure`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_eff.reporting import HIGHLIGHT, KEPT, REFERENCE, REMOVED, SERIES, new_figure
from lightning_eff.shapley.result import ShapleyResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lightning_eff.shapley.diagnostics import ConvergenceCurve, CostBenefit
    from lightning_eff.shapley.oracle import RankReport

_MARKERS = "osD^vPX<>*h"  # eleven, so that with eight colours no two of 88 series look alike
_QUARTILES = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
_SMALL = 8  # points, of legends
_FEW = 40  # bars with a label each; more stand without gaps


def values_figure(result: ShapleyResult, kept: Tensor | Sequence[int] | None = None) -> Figure:
    """Bars of the values, highest first, with 95 % intervals; removed players in another colour.

    Args:
        result: values of a scalar game, or of one component (`result.select(d)`).
        kept: players that stay: bool `[n]`, or their indices; None colours all alike.

    Raises:
        ValueError: vector values, a player without value, or players that do not exist.
    """
    from matplotlib.patches import Patch

    order, n = result.rank(), len(result.values)
    stays = torch.ones(n, dtype=torch.bool) if kept is None else _mask(kept, n)
    figure, axes = new_figure(width=max(3.2, min(6.4, 0.3 * n + 1.6)), height=3.2)
    axis = axes[0, 0]
    values, half = result.values[order].tolist(), (result.interval()[1] - result.values)[order]
    colours = [KEPT if stay else REMOVED for stay in stays[order].tolist()]
    axis.bar(range(n), values, width=0.8 if n <= _FEW else 1.0, color=colours)
    if bool((half > 0).any()):
        axis.errorbar(
            range(n),
            values,
            yerr=half.nan_to_num(posinf=0).tolist(),
            fmt="none",
            ecolor="black",
            elinewidth=0.8,
            capsize=2 if n <= _FEW else 0,
            label="95 % interval",
        )
    axis.grid(False, axis="x")
    axis.axhline(0, color="black", linewidth=0.6)
    axis.set(ylabel="Shapley value" if result.depth == n else f"partial value, depth {result.depth}")
    axis.set_title(f"{n} players, {result.n_evals:,} evaluations")
    if n <= _FEW:
        names = _names(result.names, n)
        long = max(map(len, names)) > 3
        axis.set_xticks(range(n), [names[player] for player in order.tolist()], rotation=45 if long else 0)
        axis.set_xlabel("player, best first")
    else:
        axis.set_xlabel(f"place among {n} players")
    colours_told = [] if kept is None else [Patch(color=KEPT, label="kept"), Patch(color=REMOVED, label="removed")]
    handles = [*colours_told, *axis.get_legend_handles_labels()[0]]
    if handles:
        axis.legend(handles=handles, frameon=False, fontsize=_SMALL)
    return figure


def histogram_figure(results: Mapping[str, ShapleyResult], columns: int = 4) -> Figure:
    """Histograms of the values of several games (layers of a network), one panel each, on a common scale.

    Args:
        results: values of scalar games, by name.
        columns: most panels side by side.

    Raises:
        ValueError: no results, or one that cannot be ranked.
    """
    if not results:
        raise ValueError("histogram_figure needs at least one result")
    for result in results.values():
        result.rank()  # raises where there is no single number for every player
    every = torch.cat([result.values for result in results.values()])
    low, high = float(every.min()), float(every.max())
    margin = 0.02 * (high - low) or 0.5
    edges = torch.linspace(low - margin, high + margin, 25).tolist()
    across = min(columns, len(results))
    rows = -(-len(results) // across)
    figure, axes = new_figure(rows, across, width=max(3.2, 2.2 * across), height=1.9 * rows + 0.3)
    for place, (axis, (name, result)) in enumerate(zip(axes.flat, results.items(), strict=False)):
        axis.hist(result.values.tolist(), bins=edges, color=KEPT)
        axis.axvline(float(result.values.mean()), color=HIGHLIGHT, linewidth=1.2, linestyle="--", label="mean")
        axis.set_title(f"{name} ({len(result.values)})", fontsize=9)
        axis.locator_params(axis="y", integer=True)
        axis.set_xlabel("Shapley value" if place >= len(results) - across else "")
        axis.set_ylabel("players" if place % across == 0 else "")
    for axis in axes.flat[len(results) :]:
        axis.set_visible(False)
    axes.flat[0].legend(frameon=False, fontsize=_SMALL)
    return figure


def ranks_figure(report: RankReport) -> Figure:
    """Value of the kept set and overlap with the oracle sets, each against the number of players kept."""
    figure, axes = new_figure(1, 2, width=8.4, height=3.8)
    value, overlap = axes[0]
    n = report.oracle.n_players
    kept = range(1, n + 1)
    oracle: dict[str, Any] = {"color": "black", "linewidth": 1.4, "linestyle": "--", "zorder": 10}
    whole = report.oracle.game.values[-1].item()
    value.plot(kept, [*report.oracle.values.tolist(), whole], label="oracle sets", **oracle)
    overlap.plot(kept, [1.0] * n, **oracle)
    count = len(report.rankings)
    for number, (name, quality) in enumerate(report.rankings.items()):
        behind = (count - number) / count  # rankings often coincide: those behind show as a rim
        style = {**_style(number), "markersize": 3.5 + 5 * behind, "linewidth": 1 + 2.5 * behind}
        value.plot(kept, [*quality.values.tolist(), whole], label=name, **style)
        share = quality.hits / torch.arange(1, n)
        overlap.plot(kept, [*share.tolist(), 1.0], **style)
    overlap.plot(kept, [k / n for k in kept], color=REFERENCE, linestyle=":", label="expected by chance")
    figure.suptitle("Rankings against the oracle")
    value.set(xlabel="players kept", ylabel="value of the kept set")
    overlap.set(xlabel="players kept, k", ylabel="share of the oracle set among the first k", ylim=(-0.03, 1.05))
    for axis in (value, overlap):
        axis.locator_params(axis="x", integer=True)
    _legend_below(figure, len(report.rankings) + 2)
    return figure


def convergence_figure(curve: ConvergenceCurve, players: Sequence[int] | None = None) -> Figure:
    """Value with a band of one standard error for each player, against evaluations."""
    n = curve.values.shape[1]
    if players is None:
        players = curve.values[-1].nan_to_num(-torch.inf).argsort(descending=True, stable=True)[:8].tolist()
    if not all(0 <= player < n for player in players):
        raise ValueError(f"players must lie in 0..{n - 1}, got {list(players)}")
    figure, axes = new_figure(width=5.6, height=3.6)
    axis, spent = axes[0, 0], curve.evaluations.tolist()
    names = _names(curve.names, n)
    for number, player in enumerate(players):
        values, stderr = curve.values[:, player], curve.stderr[:, player]
        style = _style(number)
        axis.plot(spent, values.tolist(), label=names[player], **style)
        band = stderr.where(stderr.isfinite(), torch.nan)
        axis.fill_between(spent, (values - band).tolist(), (values + band).tolist(), color=style["color"], alpha=0.15)
    _evaluations(axis, spent)
    axis.set(ylabel="value \N{PLUS-MINUS SIGN} standard error", title="Convergence")
    figure.legend(title="player", loc="outside right upper", frameon=False, fontsize=_SMALL, title_fontsize=_SMALL)
    return figure


def cost_benefit_figure(comparison: CostBenefit) -> Figure:
    """Relative squared error and Spearman correlation against evaluations, a line an estimator.

    Errors below 1e-12 are rounding, above 10 those of something else than Shapley values: neither is shown.
    """
    figure, axes = new_figure(1, 2, width=8.8, height=4.2)
    names = list(dict.fromkeys(cell.estimator for cell in comparison.cells))
    for number, name in enumerate(names):
        cells = [cell for cell in comparison.cells if cell.estimator == name]
        spent = [float(cell.evaluations.double().median()) for cell in cells]
        error, spearman = (
            torch.stack([torch.quantile(sample, _QUARTILES) for sample in samples])
            for samples in ([cell.error for cell in cells], [cell.spearman for cell in cells])
        )
        style = _style(number)
        for axis, quartiles in zip(axes[0], (error.where(error > 1e-12, torch.nan), spearman), strict=True):
            low, middle, high = quartiles.T.tolist()
            axis.plot(spent, middle, label=name if axis is axes[0, 0] else None, **style)
            axis.fill_between(spent, low, high, color=style["color"], alpha=0.15, linewidth=0)
    for axis in axes[0]:
        _evaluations(axis, [float(cell.evaluations.double().median()) for cell in comparison.cells])
    axes[0, 0].set_yscale("log")
    axes[0, 0].set_ylim(top=min(10.0, axes[0, 0].get_ylim()[1]))
    axes[0, 0].set_ylabel("|estimate - exact|\N{SUPERSCRIPT TWO} / |exact|\N{SUPERSCRIPT TWO}")
    axes[0, 1].set_ylabel("Spearman correlation with exact values")
    figure.suptitle("What estimators make of evaluations: medians, and bands between quartiles")
    _legend_below(figure, len(names))
    return figure


def _evaluations(axis: Axes, spent: Sequence[float]) -> None:
    """A logarithmic axis with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_xscale("log")
    axis.set_xlabel("evaluations")
    wide = max(spent) > 300 * min(spent)
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:,.0f}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def _style(number: int) -> dict[str, Any]:
    return {
        "color": SERIES[number % len(SERIES)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "markersize": 4.5,
        "markeredgecolor": "black",
        "markeredgewidth": 0.4,
        "linewidth": 1.3,
    }


def _legend_below(figure: Figure, entries: int) -> None:
    figure.legend(loc="outside lower center", ncols=min(4, entries), frameon=False, fontsize=_SMALL)


def _names(names: list[str] | None, n: int) -> list[str]:
    return names or [str(player) for player in range(n)]


def _mask(kept: Tensor | Sequence[int], n: int) -> Tensor:
    members = torch.as_tensor(kept)
    if members.dtype == torch.bool and members.shape == (n,):
        return members
    members = members if members.numel() else members.long()  # an empty list makes a float tensor
    inside = all(0 <= player < n for player in members.tolist())
    if members.dtype == torch.bool or members.is_floating_point() or not inside:
        raise ValueError(f"kept must be bool [{n}] or indices in 0..{n - 1}, got {members.tolist()}")
    mask = torch.zeros(n, dtype=torch.bool)
    mask[members.long()] = True
    return mask
