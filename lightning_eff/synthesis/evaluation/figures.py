"""Figures of a synthetic table beside the real one."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_eff.reporting import HIGHLIGHT, KEPT, REFERENCE, new_figure
from lightning_eff.synthesis.evaluation.marginals import Cells
from lightning_eff.synthesis.evaluation.nearest import NearestRecords
from lightning_eff.synthesis.tables.columns import CategoricalColumn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ACROSS = 3
_NAMED = 8  # cells that get a name each; more would overlap


def marginals_figure(cells: Cells, real: Tensor, synthetic: Tensor) -> Figure:
    """Share of rows in each cell of each column, real and synthetic.

    Args:
        cells: What was counted.
        real: Counts of real rows ``[W, W]``.
        synthetic: Counts of synthetic rows ``[W, W]``.
    """
    down = math.ceil(len(cells.names) / _ACROSS)
    figure, axes = new_figure(down, _ACROSS, width=9.6, height=1.9 * down + 0.4)
    tv = cells.single(real, synthetic)
    for index, (name, where, panel) in enumerate(zip(cells.names, cells.slices, axes.flat, strict=False)):
        shares = [
            counts.diagonal()[where].numpy() / counts.diagonal()[where].sum().item() for counts in (real, synthetic)
        ]
        at = np.arange(len(shares[0]))
        panel.bar(at, shares[0], width=0.9, color=REFERENCE, alpha=0.55, label="real")
        panel.plot(at, shares[1], "o", color=KEPT, markersize=3.5, label="synthetic")
        panel.set_title(f"{name}   TV {tv[index]:.3f}", loc="left")
        labels = cells.labels(index)
        named = at if len(at) <= _NAMED else at[:: math.ceil(len(at) / _NAMED)]
        # an interval is named by its lower edge, which is where its bar begins
        numeric = not isinstance(cells.columns[index], CategoricalColumn)
        flags = len(getattr(cells.columns[index], "flags", ())) if numeric else 0
        ticks = [i for i in named if i < len(at) - flags] + list(range(len(at) - flags, len(at)))
        shift = [0.5 if numeric and i < len(at) - flags else 0.0 for i in ticks]
        panel.set_xticks([i - s for i, s in zip(ticks, shift, strict=True)], [_short(labels[i]) for i in ticks])
        if any(len(_short(labels[i])) > 4 for i in ticks):
            panel.tick_params(axis="x", labelrotation=30)
            for text in panel.get_xticklabels():
                text.set_horizontalalignment("right")
        panel.grid(visible=False, axis="x")
        panel.set_ylim(0, None)
    for panel in axes.flat[len(cells.names) :]:
        panel.set_visible(False)
    axes.flat[0].legend(frameon=False, fontsize=8)
    for row in axes:
        row[0].set_ylabel("share of rows")
    return figure


def pairs_figure(names: tuple[str, ...], tv: Tensor, real: NDArray[Any], synthetic: NDArray[Any]) -> Figure:
    """Total variation of every pair of columns, and what the synthetic table changes in their association.

    Args:
        names: Of the d columns.
        tv: Total variation ``[d, d]``, single columns on the diagonal.
        real: Associations of the real table ``[d, d]``.
        synthetic: Those of the synthetic one ``[d, d]``.
    """
    size = 0.3 * len(names)
    figure, axes = new_figure(1, 2, width=4.8 + 2 * size, height=1.5 + size)
    difference = synthetic - real
    reach = max(0.05, float(np.abs(difference).max()))
    panels = (
        ("total variation of pairs\n(diagonal: columns)", tv.numpy(), "viridis", (0.0, max(0.05, float(tv.max())))),
        ("association,\nsynthetic minus real", difference, "RdBu_r", (-reach, reach)),
    )
    for panel, (title, values, colours, (least, most)) in zip(axes[0], panels, strict=True):
        image = panel.imshow(values, cmap=colours, vmin=least, vmax=most)
        figure.colorbar(image, ax=panel, shrink=0.8)
        panel.set_title(title)
        panel.set_xticks(range(len(names)), names, rotation=90)
        panel.set_yticks(range(len(names)), names)
        panel.grid(visible=False)
    return figure


def nearest_figure(nearest: NearestRecords) -> Figure:
    """Share of rows whose nearest record lies within a distance, for the three kinds of pairs."""
    figure, axes = new_figure(width=5.6, height=3.4)
    sides = (
        ("synthetic to training record", nearest.to_train, KEPT, "-"),
        ("synthetic to other record", nearest.to_holdout, HIGHLIGHT, "--"),
        ("other record to training record", nearest.between, REFERENCE, ":"),
    )
    for name, distance, colour, style in sides:
        axes[0, 0].ecdf(distance, color=colour, linestyle=style, label=name)
    axes[0, 0].set_title("How near synthetic rows come to records")
    axes[0, 0].set_xlabel("distance to the nearest record (mean over columns)")
    axes[0, 0].set_ylabel("share of rows within")
    axes[0, 0].legend(frameon=False, loc="lower right")
    return figure


def _short(label: str) -> str:
    return label if len(label) <= 13 else f"{label[:12]}…"
