"""One style of figures, made without pyplot; no setting of matplotlib is changed.

Colours: M. Okabe, K. Ito, Color Universal Design, 2008 (told apart by colour-blind readers).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_eff.documents import whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colours by what they say, then those of equal rank in the order in which axes use them.
KEPT = "#0072B2"  # blue: what stays
REMOVED = "#D55E00"  # vermilion: what goes
REFERENCE = "#7F7F7F"  # grey: what the rest is compared with; the dense network, a baseline, chance
HIGHLIGHT = "#CC79A7"  # purple: the one to look at; the point chosen, the best candidate
SERIES = (KEPT, "#E69F00", "#009E73", HIGHLIGHT, "#56B4E9", REMOVED, "#F0E442", "#000000")

# fmt: off
_STYLE: dict[Any, Any] = {
    "font.size": 9, "axes.titlesize": 10, "axes.labelsize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8,
    "figure.titlesize": 10, "legend.fontsize": 8, "legend.frameon": False,
    "axes.axisbelow": True, "axes.grid": True, "grid.alpha": 0.3, "grid.linewidth": 0.6,
    "axes.spines.right": False, "axes.spines.top": False, "figure.facecolor": "white",
    "axes.prop_cycle": f"cycler(color={list(SERIES)})",
}
# fmt: on


def new_figure(rows: int = 1, cols: int = 1, *, width: float = 6.4, height: float = 4.0) -> tuple[Figure, Any]:
    """Make a figure with axes in the package's style.

    Args:
        rows: Rows of axes, >= 1.
        cols: Columns of axes, >= 1.
        width: Of the whole figure, in inches, > 0.
        height: Of the whole figure, in inches, > 0.

    Returns:
        The figure, and its axes as an array ``[rows, cols]``.

    Raises:
        ValueError: An argument lies outside its range.
    """
    if rows < 1 or cols < 1 or width <= 0 or height <= 0:
        raise ValueError(f"expected rows, cols >= 1 and width, height > 0, got {rows}, {cols}, {width}, {height}")
    from matplotlib import rc_context
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    class StyledFigure(Figure):
        """What is added to the axes later has the style, too."""

        def colorbar(self, *args: Any, **kwargs: Any) -> Any:
            with rc_context(_STYLE):
                return super().colorbar(*args, **kwargs)

        def legend(self, *args: Any, **kwargs: Any) -> Any:
            with rc_context(_STYLE):
                return super().legend(*args, **kwargs)

        def suptitle(self, *args: Any, **kwargs: Any) -> Any:
            with rc_context(_STYLE):
                return super().suptitle(*args, **kwargs)

    class StyledAxes(Axes):
        """Its legend has the style, too."""

        def legend(self, *args: Any, **kwargs: Any) -> Any:
            with rc_context(_STYLE):
                return super().legend(*args, **kwargs)

    with rc_context(_STYLE):
        figure = StyledFigure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        return figure, figure.subplots(rows, cols, squeeze=False, subplot_kw={"axes_class": StyledAxes})


def save_figure(figure: Figure, path: str | Path, *, dpi: int = 150) -> Path:
    """Write a figure in the format the suffix names, e.g. ``.png``, ``.pdf`` or ``.svg``; folders are made.

    Raises:
        ValueError: matplotlib knows no such format.
    """
    from matplotlib import rc_context

    path, known = Path(path), figure.canvas.get_supported_filetypes()
    if path.suffix[1:] not in known:
        raise ValueError(f"expected a file name that ends in one of {', '.join(sorted(known))}, got {path.name!r}")
    with rc_context(_STYLE), whole_file(path) as beside:
        figure.savefig(beside, dpi=dpi, format=path.suffix[1:])
    return path
