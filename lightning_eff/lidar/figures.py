"""Figures of lidar lines: their values, where they look, what is left of a frame, and what that costs.

Every function returns a figure for `reporting.save_figure`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_eff.lidar.evaluation import ALL, NONE, OPTIMUM, RANDOM, LineEvaluation, Row
from lightning_eff.lidar.frames import Frame
from lightning_eff.lidar.report import LineSelection, in_order
from lightning_eff.reporting import HIGHLIGHT, KEPT, REFERENCE, SERIES, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LEFT = "#BFBFBF"  # of lines and points that go: the eye is to rest on those that stay
_DEPTHS = "viridis"  # near is dark: it stands out
_MARKERS = "osD^vPX<>*h"
_UNSEEN, _NO_CANDIDATE = "not in the image", "no candidates"
_HATCHES = {_UNSEEN: "///", _NO_CANDIDATE: "..."}
_FAINT: dict[str, dict[str, Any]] = {
    _UNSEEN: {"color": "#999999", "linewidth": 0.8, "linestyle": ":"},
    _NO_CANDIDATE: {"color": "#AAAAAA", "linewidth": 0.7, "linestyle": "--"},
}
_WIDE = 5  # times the smallest error, beyond which errors are drawn on a logarithmic scale
_SENSOR = 1.73  # metres above the ground, of KITTI's car


def values_figure(selection: LineSelection, k: int | None = None) -> Figure:
    """Bars of the values from the top line to the lowest, with two standard errors; below, the lines of every k.

    Args:
        selection: values and selected lines.
        k: whose lines are coloured; the smallest if None.

    Raises:
        KeyError: nothing was selected for `k`.
    """
    from matplotlib.patches import Patch

    sizes = sorted(selection.selected)
    k = sizes[0] if k is None else k
    kept = set(selection.selected[k])
    figure, axes = new_figure(2, 1, width=8.0, height=3.6 + 0.18 * len(sizes))
    bars, strip = axes[:, 0]
    grid = bars.get_gridspec()
    grid.set_height_ratios([3.0, 0.25 + 0.18 * len(sizes)])
    colours = [KEPT if line in kept else _LEFT for line in selection.lines]
    errors = (2 * selection.se).nan_to_num(posinf=0).tolist()
    bars.bar(selection.lines, selection.values.tolist(), width=0.85, color=colours)
    if max(errors, default=0) > 0:
        bars.errorbar(
            selection.lines, selection.values.tolist(), yerr=errors, fmt="none", ecolor="black", elinewidth=0.8
        )
    bars.axhline(0, color="black", linewidth=0.6)
    bars.set(xlim=(-1, selection.num_lines), ylabel=_value(selection))
    bars.grid(False, axis="x")
    bars.set_title("Values of lines, with two standard errors")
    handles = [
        Patch(color=KEPT, label=f"selected, k = {k} ({selection.rules.get(k, 'given')})"),
        Patch(color=_LEFT, label="others"),
    ]
    handles += [Patch(**style) for style in _shade_others(bars, selection)]
    bars.legend(handles=handles, fontsize=8, loc="upper right", framealpha=0.9, edgecolor="none")
    for row, size in enumerate(reversed(sizes)):
        lines = selection.selected[size]
        strip.scatter(lines, [row] * len(lines), marker="s", s=14, color=KEPT if size == k else "#7FB7D8")
    strip.set(
        xlim=(-1, selection.num_lines),
        ylim=(len(sizes) - 0.5, -0.5),
        xlabel="line, from the highest elevation down" + _elevation_note(selection),
    )
    strip.set_yticks(range(len(sizes)), [f"k = {size}" for size in reversed(sizes)])
    strip.grid(False)
    return figure


def elevation_figure(selection: LineSelection, k: int | None = None, reach: float = 60.0) -> Figure:
    """The lines from the side: where each meets flat ground, selected ones in colour.

    Args:
        selection: with known elevations.
        k: whose lines are coloured; the smallest if None.
        reach: how far is drawn, in metres.

    Raises:
        ValueError: elevations are not known.
    """
    if selection.elevations is None:
        raise ValueError("expected elevations of the lines, got none: give the selector elevations=table.elevations")
    from matplotlib.lines import Line2D

    sizes = sorted(selection.selected)
    k = sizes[0] if k is None else k
    kept, others = set(selection.selected[k]), _others(selection)
    figure, axes = new_figure(width=8.0, height=3.0)
    axis = axes[0, 0]
    for line, elevation in enumerate(selection.elevations):
        slope = math.tan(math.radians(elevation))
        end = min(reach, -_SENSOR / slope) if slope < 0 else reach
        style: dict[str, Any] = {"color": _LEFT, "linewidth": 0.7, "zorder": 2}
        if line in kept:
            style = {"color": KEPT, "linewidth": 1.3, "zorder": 3}
        for label, lines in others.items():
            if line in lines and line not in kept:
                style = {**_FAINT[label], "zorder": 1}
        axis.plot([0, end], [_SENSOR, _SENSOR + end * slope], **style)
    axis.axhline(0, color="black", linewidth=1.0)
    axis.plot(0, _SENSOR, "o", color="black", markersize=5, zorder=4, clip_on=False)
    axis.set(
        xlim=(0, reach),
        ylim=(-0.15, max(2.6, _SENSOR + reach * math.tan(math.radians(max(selection.elevations))) + 0.2)),
        xlabel="distance on flat ground [m]",
        ylabel="height [m]",
    )
    handles = [
        Line2D([], [], color=KEPT, linewidth=1.3, label=f"selected, k = {k}"),
        Line2D([], [], color=_LEFT, linewidth=0.7, label="other candidates"),
        *(Line2D([], [], label=label, **_FAINT[label]) for label, lines in others.items() if lines),
    ]
    axis.legend(handles=handles, frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0.02, 1.0))
    axis.set_title("Lines from the side")
    axis.grid(False)
    return figure


def points_figure(frame: Frame, kept: Iterable[int], *, size: float | None = None) -> Figure:
    """The image in pale grey with the points of the kept lines, coloured by depth, and those of all others in grey.

    Args:
        frame: the frame.
        kept: lines of the sensor.
        size: area of a point, in square points; by default a pixel's or a little more.
    """
    depth, line = frame.sparse[0].cpu(), frame.line_idx[0].long().cpu()
    stays = torch.isin(line, torch.tensor(list(kept), dtype=torch.int64)) & (depth > 0)
    height, width = depth.shape
    figure, axes = new_figure(width=9.0, height=8.4 * height / width + 0.35)
    axis = axes[0, 0]
    size = max(1.0, (500 / width) ** 2) if size is None else size
    far = float(depth[stays].quantile(0.98)) if bool(stays.any()) else 1.0
    axis.imshow(_image(frame.rgb).mean(2).numpy(), cmap="gray", vmin=-1.2, vmax=1.0, interpolation="nearest")
    rows, columns = ((depth > 0) & ~stays).nonzero(as_tuple=True)
    axis.scatter(columns.numpy(), rows.numpy(), s=0.5 * size, color="#808080", linewidths=0)
    rows, columns = stays.nonzero(as_tuple=True)
    points = axis.scatter(
        columns.numpy(),
        rows.numpy(),
        s=1.6 * size,
        c=depth[stays].numpy(),
        cmap=_DEPTHS,
        vmin=0,
        vmax=far,
        linewidths=0,
    )
    if bool(stays.any()):
        figure.colorbar(points, ax=axis, label="depth [m]", pad=0.01, aspect=12, extend="max")
    dropped = int((depth > 0).sum() - stays.sum())
    axis.set_title(f"frame {frame.id}: {int(stays.sum()):,} points kept, {dropped:,} dropped (grey)")
    axis.set_axis_off()
    return figure


def errors_figure(evaluation: LineEvaluation) -> Figure:
    """RMSE against the number of lines, for every rule; all lines and no lidar as levels, random draws as a band."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure, axes = new_figure(width=6.8, height=4.2)
    axis = axes[0, 0]
    rules: dict[str, list[Row]] = {}
    for row in evaluation.rows:
        if row.k is not None:
            rules.setdefault(row.rule, []).append(row)
    number = 0
    for rule, rows in rules.items():
        rows = sorted(rows, key=lambda row: row.k or 0)
        k, rmse = [row.k for row in rows], [row.errors["rmse"] for row in rows]
        if rule == RANDOM:
            spread = [row.spread or 0.0 for row in rows]
            low, high = ([e + sign * s for e, s in zip(rmse, spread, strict=True)] for sign in (-1, 1))
            axis.fill_between(k, low, high, color=REFERENCE, alpha=0.25, linewidth=0)
            axis.plot(k, rmse, color=REFERENCE, linewidth=1.2, label="random, +- 1 SD")
        elif rule == OPTIMUM:
            axis.plot(k, rmse, color="black", linestyle="--", marker=".", linewidth=1.2, label=OPTIMUM)
        else:
            axis.plot(
                k,
                rmse,
                color=SERIES[number % len(SERIES)],
                marker=_MARKERS[number % len(_MARKERS)],
                markersize=5,
                linewidth=1.4,
                label=rule,
            )
            number += 1
    for rule, style in ((ALL, "-."), (NONE, ":")):
        levels = [row.errors["rmse"] for row in evaluation.rows if row.rule == rule]
        for level in levels:
            axis.axhline(level, color="black", linestyle=style, linewidth=0.9, label=rule)
    sizes = sorted({row.k for row in evaluation.rows if row.k})
    if sizes and sizes[-1] > 4 * sizes[0]:
        axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [str(k) for k in sizes])
    axis.minorticks_off()
    errors = [row.errors["rmse"] for row in evaluation.rows]
    if min(errors) > 0 and max(errors) > _WIDE * min(errors):
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_minor_formatter(NullFormatter())
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axis.set(xlabel="lines kept, k", ylabel="RMSE [mm]")
    axis.set_title(f"Error of completed depth, {evaluation.frames} frames ({evaluation.stage})")
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return figure


def frames_figure(selection: LineSelection, k: int | None = None, most: int = 60) -> Figure:
    """Values of every line in every frame, one row a frame; lines selected for all frames are marked below.

    Args:
        selection: with values of frames.
        k: whose lines are marked; the smallest if None.
        most: most frames shown, evenly taken.

    Raises:
        ValueError: there are no values of frames.
    """
    if not selection.per_frame:
        raise ValueError("expected values of single frames, got none")
    ids = in_order(selection.per_frame)
    ids = [ids[place] for place in torch.linspace(0, len(ids) - 1, min(most, len(ids))).round().long().tolist()]
    table = torch.stack([selection.per_frame[frame] for frame in ids])
    limit = float(table.abs().quantile(0.98)) or 1.0
    figure, axes = new_figure(width=8.0, height=1.6 + 0.16 * len(ids))
    axis = axes[0, 0]
    first, last = selection.lines[0], selection.lines[-1]
    dense = torch.full((len(ids), last - first + 1), math.nan)
    dense[:, torch.tensor(selection.lines) - first] = table.float()
    extent = (first - 0.5, last + 0.5, len(ids) - 0.5, -0.5)
    image = axis.imshow(
        dense.numpy(), cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest", extent=extent
    )
    figure.colorbar(image, ax=axis, label=_value(selection), pad=0.01, extend="both")
    k = min(selection.selected) if k is None else k
    kept = selection.selected[k]
    axis.plot(kept, [len(ids) - 0.5] * len(kept), "^", color=HIGHLIGHT, markersize=6, clip_on=False, zorder=5)
    axis.set_title(f"Values by frame; triangles: selected for all, k = {k}")
    axis.set_xlabel("line, from the highest elevation down", labelpad=8)
    if len(ids) <= 24:
        axis.set_yticks(range(len(ids)), [_short(str(frame)) for frame in ids])
        axis.set_ylabel("frame")
    else:
        axis.set_ylabel(f"{len(ids)} of {len(selection.per_frame)} frames")
    axis.grid(False)
    return figure


def convergence_figure(selection: LineSelection) -> Figure:
    """Largest standard error, and how much of the selection stayed, against forwards, round by round."""
    figure, axes = new_figure(1, 2, width=7.6, height=3.0)
    error, stability = axes[0]
    told = [one for one in selection.rounds if math.isfinite(one.max_se)]
    error.plot([one.forwards for one in told], [one.max_se for one in told], "o-", color=KEPT)
    top = 1.1 * max((one.max_se for one in told), default=1.0) or 1.0
    error.set(xlabel="forwards", ylabel=_value(selection, "largest standard error"), ylim=(0, top))
    later = [one for one in selection.rounds if one.stability is not None]
    stability.plot([one.forwards for one in later], [one.stability for one in later], "o-", color=KEPT)
    stability.set_xlim(error.get_xlim())
    stability.set(xlabel="forwards", ylabel="overlap with the round before", ylim=(-0.03, 1.05))
    figure.suptitle("How sure values and selection became")
    for axis in (error, stability):
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.locator_params(axis="x", nbins=5)
    return figure


def completion_figure(frame: Frame, sparse: Tensor, dense: Tensor, *, max_depth: float | None = None) -> Figure:
    """Three images: sparse depth that is left, the completion, and its error where the truth is known.

    Args:
        frame: the frame.
        sparse: `[1, H, W]` in metres, 0 = none.
        dense: `[1, H, W]` in metres.
        max_depth: end of the colour scale in metres; that of the truth if None.
    """
    truth = frame.gt[0].cpu()
    sparse, dense = sparse[0].cpu(), dense[0].detach().cpu()
    known = truth > 0
    height, width = truth.shape
    figure, axes = new_figure(3, 1, width=7.0, height=3 * (6.0 * height / width + 0.35))
    limit = max_depth or (float(truth[known].quantile(0.98)) if bool(known.any()) else float(dense.max()))
    rows, columns = (sparse > 0).nonzero(as_tuple=True)
    points, filled, missed = axes[:, 0]
    points.imshow(torch.full((height, width, 3), 0.97).numpy(), interpolation="nearest")
    shown = points.scatter(
        columns.numpy(),
        rows.numpy(),
        c=sparse[sparse > 0].numpy(),
        s=2.5,
        cmap=_DEPTHS,
        vmin=0,
        vmax=limit,
        linewidths=0,
    )
    figure.colorbar(shown, ax=points, label="depth [m]", aspect=10, pad=0.01)
    points.set_title(f"frame {frame.id}: {len(rows):,} points left")
    image = filled.imshow(dense.numpy(), cmap=_DEPTHS, vmin=0, vmax=limit, interpolation="nearest")
    figure.colorbar(image, ax=filled, label="depth [m]", aspect=10, pad=0.01)
    filled.set_title("completed depth")
    error = torch.where(known, (dense - truth).abs(), math.nan)
    rmse = 1000 * float((dense - truth)[known].square().mean().sqrt()) if bool(known.any()) else math.nan
    reach = float(error[known].quantile(0.95)) if bool(known.any()) else 1.0
    image = missed.imshow(error.numpy(), cmap="magma_r", vmin=0, vmax=reach or 1.0, interpolation="nearest")
    figure.colorbar(image, ax=missed, label="error [m]", aspect=10, pad=0.01, extend="max")
    missed.set_title(f"absolute error, RMSE {rmse:,.0f} mm")
    for axis in (points, filled, missed):
        axis.set_axis_off()
    return figure


def _others(selection: LineSelection) -> dict[str, list[int]]:
    """The lines that are no candidates: those that no frame shows, and those left out though frames show them."""
    null = set(selection.null_lines)
    others = [line for line in range(selection.num_lines) if line not in set(selection.lines)]
    return {
        _UNSEEN: [line for line in others if line in null],
        _NO_CANDIDATE: [line for line in others if line not in null],
    }


def _shade_others(axis: Axes, selection: LineSelection) -> list[dict[str, Any]]:
    """Grey out the lines that are no candidates; how each kind of them there is looks in a legend."""
    styles = []
    for label, lines in _others(selection).items():
        style: dict[str, Any] = {"facecolor": "#EEEEEE", "hatch": _HATCHES[label], "edgecolor": "#CCCCCC"}
        for line in lines:
            axis.axvspan(line - 0.5, line + 0.5, linewidth=0, **style)
        if lines:
            styles.append({**style, "label": label})
    return styles


def _elevation_note(selection: LineSelection) -> str:
    if selection.elevations is None:
        return ""
    return f" ({selection.elevations[0]:.1f} to {selection.elevations[-1]:.1f} degrees)"


def _value(selection: LineSelection, what: str = "Shapley value") -> str:
    return f"{what} [{selection.unit}]" if selection.unit else what


def _image(rgb: Tensor) -> Tensor:
    """`[3 or 1, H, W]`, in [0, 1] or normalised, as `[H, W, 3]` in [0, 1]."""
    image = rgb.detach().float().cpu().expand(3, -1, -1)
    low, high = float(image.min()), float(image.max())
    if low < 0 or high > 1:
        image = (image - low) / max(high - low, 1e-6)
    return image.permute(1, 2, 0)


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"\N{HORIZONTAL ELLIPSIS}{name[-23:]}"
