"""Pictures of many explorations: metric against pixels, where views lie, how large they are.

Every function returns a figure for ``reporting.save_figure``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_eff.glimpse.evaluation import PolicyCurve
from lightning_eff.glimpse.exploration import Trajectory
from lightning_eff.reporting import HIGHLIGHT, KEPT, REFERENCE, SERIES, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKERS = "osD^vP<>X*"
_MOST_COLUMNS = 7


def curve_figure(
    curves: Sequence[PolicyCurve],
    *,
    learned: str = "learned",
    stopping: Sequence[tuple[float, float, float]] = (),
    references: Mapping[str, tuple[float, float]] | None = None,
) -> Figure:
    """Draw the metric against pixels captured, a line a policy.

    Args:
        curves: Of one metric. Curves of the same policy, e.g. of several seeds, become their mean with a band from the
            lowest to the highest.
        learned: Name of the policy that is drawn on top of the others.
        stopping: Threshold, pixel % and metric of early stopping, as ``stopping_curve`` gives them.
        references: Single points by name: pixel % and metric.

    Raises:
        ValueError: There are no curves, or their metrics differ.
    """
    metrics = {curve.metric for curve in curves}
    if len(metrics) != 1:
        raise ValueError(f"expected curves of one metric, got {sorted(metrics)}")
    names = list(dict.fromkeys(curve.policy for curve in curves))
    others = [colour for colour in SERIES if colour not in (KEPT, "#F0E442")]  # yellow cannot be seen on white
    figure, axes = new_figure(width=6.8, height=4.2)
    axis = axes[0, 0]
    for number, name in enumerate(sorted(names, key=lambda name: name == learned)):
        group = [curve for curve in curves if curve.policy == name]
        values, percent = (
            torch.tensor([getattr(curve, part) for curve in group], dtype=torch.float64)
            for part in ("values", "pixel_percent")
        )
        again = number >= len(others)  # of colours
        style: dict[str, Any] = {"color": others[number % len(others)], "linewidth": 1.2, "markersize": 4}
        style["linestyle"] = "--" if again else "-"
        if name == learned:
            style = {"color": KEPT, "linewidth": 2.2, "markersize": 5, "zorder": 4}
        across = percent.mean(0).tolist()
        marker = _MARKERS[number % len(_MARKERS)]
        label = name.replace("_", " ") + (f" ({len(group)} seeds)" if len(group) > 1 else "")
        axis.plot(across, values.mean(0).tolist(), marker=marker, label=label, **style)
        if len(group) > 1:
            low, high = values.amin(0).tolist(), values.amax(0).tolist()
            axis.fill_between(across, low, high, color=style["color"], alpha=0.2, linewidth=0)
    if stopping:
        _, percents, reached = zip(*sorted(stopping), strict=True)
        axis.plot(percents, reached, color=HIGHLIGHT, linestyle="--", marker=".", label="stops when sure", zorder=5)
    for number, (name, (percent_, value)) in enumerate((references or {}).items()):
        axis.plot(percent_, value, _MARKERS[number], color=REFERENCE, markersize=6, label=name, zorder=5)
    better = "higher" if curves[0].higher_is_better else "lower"
    axis.set_title("What looking pays")
    axis.set_xlabel("pixels captured [% of the scene]")
    axis.set_ylabel(f"{curves[0].metric.replace('_', ' ')} ({better} is better)")
    axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def coverage_figure(trajectory: Trajectory, most: int = _MOST_COLUMNS) -> Figure:
    """Draw for each glimpse which share of its views covers each place of the scene.

    Args:
        trajectory: Of a data set.
        most: Glimpses shown; the first ones, and the last.
    """
    count = trajectory.config.num_glimpses
    shown = list(range(count)) if count <= most else [*range(most - 1), count - 1]
    height, width = trajectory.config.scene
    tall = 2.0 * min(1.5, height / width) + 0.6
    figure, axes = new_figure(1, len(shown), width=2.0 * len(shown) + 0.7, height=tall)
    drawn = None
    for axis, t in zip(axes[0], shown, strict=True):
        active = trajectory.taken > t
        share = coverage(trajectory.views[active, t], trajectory.config.scene)
        drawn = axis.imshow(share.numpy(), cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
        left = "" if bool(active.all()) else f"\n{int(active.sum())} of {len(active)} images"
        axis.set_title(f"glimpse {t + 1}{left}", fontsize=9)
        axis.set(xticks=[], yticks=[])
        axis.grid(False)
    assert drawn is not None
    figure.colorbar(drawn, ax=list(axes[0]), label="share of views", shrink=0.9)
    return figure


def scale_figure(trajectory: Trajectory, bins: int = 20, most: int = _MOST_COLUMNS) -> Figure:
    """Draw the histogram of fields of view of each glimpse.

    Args:
        trajectory: Of a data set.
        bins: From the smallest field of view to the largest, >= 1.
        most: Glimpses shown; the first ones, and the last.
    """
    config = trajectory.config
    shown = list(range(config.num_glimpses))
    shown = shown if len(shown) <= most else [*shown[: most - 1], shown[-1]]
    low, high = float(config.camera_size), float(config.max_view)
    figure, axes = new_figure(len(shown), 1, width=5.6, height=0.8 + 0.75 * len(shown))
    for axis, t in zip(axes[:, 0], shown, strict=True):
        sides = trajectory.views[trajectory.taken > t, t, 2]
        heights = torch.histc(sides, bins, low, high) / max(1, len(sides))
        wide = (high - low) / bins
        places = [low + wide * (i + 0.5) for i in range(bins)]
        axis.bar(places, heights.tolist(), width=0.92 * wide if wide else 1.0, color=KEPT)
        if len(sides):
            axis.axvline(float(sides.mean()), color=HIGHLIGHT, linewidth=1.5)
        axis.set(xlim=(low - wide / 2, high + wide / 2), ylim=(0, 1), yticks=[0, 1])
        axis.set_ylabel(str(t + 1), rotation=0, labelpad=10)
        if axis is not axes[-1, 0]:
            axis.tick_params(labelbottom=False)
    axes[-1, 0].set_xlabel("field of view [pixels a side]; the line is the mean")
    figure.suptitle("How far each glimpse zooms")
    figure.supylabel("share of images, by glimpse", fontsize=9)
    return figure


def coverage(views: Tensor, scene: tuple[int, int]) -> Tensor:
    """Return the share of views [n, 3] that cover each pixel of a scene [H, W]; 0 where there are no views."""
    if not len(views):
        return torch.zeros(scene)
    rows, columns = (torch.arange(side) + 0.5 for side in scene)
    end = views[:, :2] + views[:, 2:]
    down = ((rows >= views[:, :1]) & (rows < end[:, :1])).float()
    across = ((columns >= views[:, 1:2]) & (columns < end[:, 1:])).float()
    return down.T @ across / len(views)
