"""Pictures of the analyses: gradient shares over training, ranks, information, losses between and around networks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from lightning_eff.early_exit.analysis.connectivity import LinearPath, LossPlane
from lightning_eff.early_exit.analysis.dominance import Dominance
from lightning_eff.early_exit.analysis.information import LayerInformation
from lightning_eff.reporting import HIGHLIGHT, REFERENCE, SERIES, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_LINES = ("-", "--", ":", "-.")
_SMALL = 8


def dominance_figure(
    history: Mapping[int, Dominance], *, switches: Sequence[int] = (), groups: Sequence[str] | None = None
) -> Figure:
    """Heat map of epoch and output for every group of parameters; blue pulls along, red against, grey is not known.

    Colours end at -1 and 1; shares beyond, where outputs work against each other, have the colour of the end.

    Args:
        history: what was measured, by epoch; the same groups and outputs each time.
        switches: epochs at whose start a new phase began; drawn as lines.
        groups: those shown; None shows all.

    Raises:
        ValueError: nothing was measured, groups or outputs change, or a group was not measured.
    """
    if not history:
        raise ValueError("dominance_figure needs at least one epoch")
    epochs = sorted(history)
    first = history[epochs[0]]
    for epoch in epochs:
        one = history[epoch]
        if (one.groups, one.outputs, one.measure) != (first.groups, first.outputs, first.measure):
            raise ValueError(
                f"expected the groups, outputs and measure of epoch {epochs[0]} in every epoch, but epoch {epoch} has "
                f"{one.groups}, {one.outputs} and {one.measure!r}"
            )
    shown = first.groups if groups is None else tuple(groups)
    if not shown or not set(shown) <= set(first.groups):
        raise ValueError(f"expected groups among {list(first.groups)}, got {list(shown)}")
    values = torch.stack([history[epoch].values for epoch in epochs], -1)  # [G, K, epochs]
    beyond = bool((values.nan_to_num().abs() > 1 + 1e-6).any())
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    height = (0.6 + 0.2 * len(first.outputs)) * rows + 1.0
    figure, axes = new_figure(rows, columns, width=3.0 * columns + 1.2, height=height)
    image: Any = None
    for place, (axis, name) in enumerate(zip(axes.flat, shown, strict=False)):
        axis.set_facecolor(REFERENCE)
        image = axis.imshow(
            values[first.groups.index(name)].numpy(),
            aspect="auto",
            interpolation="nearest",
            cmap="RdBu",
            vmin=-1,
            vmax=1,
        )
        for switch in switches:
            before = sum(epoch < switch for epoch in epochs)
            axis.axvline(before - 0.5, color="black", linestyle="--", linewidth=1)
        axis.set_title(f"gradient of {_short(name)}", fontsize=9)
        axis.set_yticks(range(len(first.outputs)), [_short(output) for output in first.outputs])
        axis.tick_params(axis="y", labelleft=place % columns == 0)
        ticks = _spread(len(epochs), 6)
        axis.set_xticks(ticks, [str(epochs[tick]) for tick in ticks])
        axis.set_xlabel("epoch" if place >= len(shown) - columns else "")
        axis.set_ylabel("output" if place % columns == 0 else "")
        axis.grid(visible=False)
    _hide_rest(axes, len(shown))
    labels = {"share": "share of the gradient", "cosine": "cosine with the gradient", "norm": "share of the norms"}
    ends = "both" if beyond else "neither"
    _colour_bar(figure, image, axes, labels.get(first.measure, first.measure), aspect=25, extend=ends)
    return figure


def rank_figure(
    ranks: Mapping[str, Mapping[str, float]], *, ylabel: str = "numerical rank", log: bool = False
) -> Figure:
    """Rank per layer, a line for every run.

    Args:
        ranks: of each run (a regime, a seed): rank by layer, as :func:`layer_ranks` gives it.
        ylabel: what the rank is.
        log: whether ranks are on a logarithmic axis.

    Raises:
        ValueError: no run, or runs whose layers differ.
    """
    layers = _common({name: tuple(one) for name, one in ranks.items()}, "rank_figure")
    figure, axes = new_figure(width=max(4.0, 1.6 + 0.55 * len(layers)), height=3.4)
    axis = axes[0, 0]
    for number, (name, one) in enumerate(ranks.items()):
        axis.plot(range(len(layers)), list(one.values()), label=name, **_style(number))
    _layers(axis, layers)
    if log:
        axis.set_yscale("log")
    else:
        axis.set_ylim(bottom=0)
    axis.set(xlabel="layer", ylabel=ylabel, title="Rank of features")
    axis.legend(frameon=False, fontsize=_SMALL)
    return figure


def information_figure(information: Mapping[str, LayerInformation]) -> Figure:
    """What each layer knows of the input (band between the bounds) and each output of the label, a line a run.

    Args:
        information: of each run, on the same layers.

    Raises:
        ValueError: no run, or runs whose layers differ.
    """
    layers = _common({name: one.layers for name, one in information.items()}, "information_figure")
    figure, axes = new_figure(1, 2, width=max(7.0, 2.8 + 1.1 * len(layers)), height=3.4)
    inputs, labels = axes[0]
    x = range(len(layers))
    for number, (name, one) in enumerate(information.items()):
        style = _style(number)
        lower, upper = ([getattr(bounds, side) for bounds in one.features] for side in ("lower", "upper"))
        inputs.fill_between(x, lower, upper, color=style["color"], alpha=0.2, linewidth=0)
        for side in (lower, upper):
            inputs.plot(x, side, **{**style, "markersize": 3})
        labels.plot(x, one.predictions, label=name, **style)
    for samples in sorted({one.samples for one in information.values()}):
        inputs.axhline(math.log(samples), color=REFERENCE, linestyle="--", linewidth=1)
        inputs.annotate(
            f"ln {samples:,}",
            (0.01, math.log(samples)),
            xycoords=("axes fraction", "data"),
            va="bottom",
            color=REFERENCE,
            fontsize=_SMALL,
        )
    for axis in (inputs, labels):
        _layers(axis, layers)
        axis.set_ylim(bottom=0)
    inputs.set_ylim(top=1.1 * max(inputs.get_ylim()[1], 1e-3))
    for axis, title in ((inputs, "I(input; feature with noise), bounds"), (labels, "I(prediction; label)")):
        axis.set_xlabel("layer")
        axis.set_ylabel("nats")
        axis.set_title(title, fontsize=9)
    labels.legend(frameon=False, fontsize=_SMALL)
    return figure


def path_figure(path: LinearPath) -> Figure:
    """Loss and accuracy of every output along the path; the dotted chord shows where the barrier begins."""
    figure, axes = new_figure(1, 2, width=7.6, height=3.6)
    loss, accuracy = axes[0]
    positions = path.positions.tolist()
    for k, name in enumerate(path.outputs):
        style = {**_style(k), "markersize": 3.5}
        label = f"{_short(name)}: {float(path.barrier[k]):.2f}"
        loss.plot(positions, path.loss[:, k].tolist(), label=label, **style)
        ends = [float(path.loss[0, k]), float(path.loss[-1, k])]
        loss.plot([0, 1], ends, color=style["color"], linestyle=":", linewidth=1)
        accuracy.plot(positions, path.accuracy[:, k].tolist(), **style)
    figure.suptitle("On the straight line between two networks")
    loss.set(ylabel="loss")
    accuracy.set(ylabel="accuracy")
    accuracy.set_ylim(-0.02, 1.02)
    for axis in (loss, accuracy):
        axis.set_xlabel("position between A and B")
        axis.set_xticks([0, 0.25, 0.5, 0.75, 1], ["A", "0.25", "0.5", "0.75", "B"])
    figure.legend(
        title="output: barrier",
        loc="outside lower center",
        ncols=min(4, len(path.outputs)),
        frameon=False,
        fontsize=_SMALL,
        title_fontsize=_SMALL,
    )
    return figure


def plane_figure(plane: LossPlane, outputs: Sequence[int] | None = None, *, levels: int = 14) -> Figure:
    """Contours of the loss of each output around the network, which is the star.

    Args:
        plane: what was measured.
        outputs: numbers of the outputs shown, -1 is the backbone's own; None shows all.
        levels: contours, at equal ratios of the loss; the same in all panels.

    Raises:
        ValueError: no output, or one that is not there.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    count = len(plane.outputs)
    chosen = list(range(count)) if outputs is None else list(outputs)
    if not chosen or not all(-count <= k < count for k in chosen):
        raise ValueError(f"expected outputs in {-count}..{count - 1}, got {chosen}")
    loss = plane.loss[..., chosen]
    positive = loss[loss.isfinite() & (loss > 0)]
    if not positive.numel():
        raise ValueError("expected losses above zero somewhere on the plane, got none that are finite")
    low, high = float(positive.min()), float(positive.max())
    high = max(high, low * 1.01)
    edges = torch.logspace(math.log10(low), math.log10(high), levels + 1, dtype=torch.float64).tolist()
    across = min(4, len(chosen))
    rows = -(-len(chosen) // across)
    figure, axes = new_figure(rows, across, width=2.5 * across + 1.6, height=2.5 * rows + 0.5)
    where = plane.positions.numpy()
    drawn: Any = None
    for place, (axis, k) in enumerate(zip(axes.flat, chosen, strict=False)):
        # the first axis of the loss is the first direction: horizontal
        surface = plane.loss[..., k].clamp(min=low, max=high).nan_to_num(high).T.numpy()
        drawn = axis.contourf(where, where, surface, levels=edges, norm=LogNorm(low, high), cmap="viridis")
        axis.contour(where, where, surface, levels=edges, colors="white", linewidths=0.4, alpha=0.7)
        axis.plot([0], [0], marker="*", color=HIGHLIGHT, markeredgecolor="white", markersize=11)
        axis.set_title(_short(plane.outputs[k]), fontsize=9)
        axis.set_aspect("equal")
        axis.grid(visible=False)
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_locator(MaxNLocator(5))
        axis.set_xlabel("first direction" if place >= len(chosen) - across else "")
        axis.set_ylabel("second direction" if place % across == 0 else "")
    _hide_rest(axes, len(chosen))
    bar = _colour_bar(figure, drawn, axes, "loss", ticks=edges[:: max(1, levels // 7)])
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    return figure


def _common(layers: Mapping[str, tuple[str, ...]], what: str) -> tuple[str, ...]:
    """The layers all runs have."""
    if not layers:
        raise ValueError(f"{what} needs at least one run")
    first = next(iter(layers.values()))
    for name, one in layers.items():
        if one != first:
            raise ValueError(f"expected runs on the same layers {list(first)}, but {name!r} has {list(one)}")
    return first


def _colour_bar(figure: Figure, drawn: Any, axes: Any, label: str, **options: Any) -> Any:
    bar = figure.colorbar(drawn, ax=axes, shrink=0.9, **options)
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=_SMALL)
    return bar


def _layers(axis: Axes, layers: Sequence[str]) -> None:
    names = [_short(name) for name in layers]
    long = max(map(len, names)) > 7
    axis.set_xticks(
        range(len(names)), names, rotation=35 if long else 0, ha="right" if long else "center", rotation_mode="anchor"
    )
    axis.set_xlim(-0.3, len(names) - 0.7)


def _short(name: str) -> str:
    return name if len(name) <= 16 else f"\N{HORIZONTAL ELLIPSIS}{name[-15:]}"


def _spread(count: int, most: int) -> list[int]:
    step = max(1, -(-count // most))
    return list(range(0, count, step))


def _style(number: int) -> dict[str, Any]:
    return {
        "color": SERIES[number % len(SERIES)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "linestyle": _LINES[number // len(SERIES) % len(_LINES)],
        "markersize": 5,
        "linewidth": 1.4,
    }


def _hide_rest(axes: Any, used: int) -> None:
    for axis in axes.flat[used:]:
        axis.set_visible(False)
