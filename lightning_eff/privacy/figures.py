"""Pictures of private training: what it spends, what it reaches, the tension between two rates, what takes part."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lightning_eff.accounting import PrivacyEvent, PrivacyLedger, subsampled_epsilon
from lightning_eff.privacy.selection.selected import Selection
from lightning_eff.reporting import HIGHLIGHT, KEPT, REFERENCE, SERIES, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def epsilon_figure(ledger: PrivacyLedger, *, points: int = 25) -> Figure:
    """Epsilon against steps, at the ledger's delta.

    Args:
        ledger: what was recorded.
        points: how often epsilon is evaluated along the way, >= 1.

    Raises:
        ValueError: nothing was recorded.
    """
    history, whole = ledger.history, ledger.steps
    if not whole:
        raise ValueError("the ledger holds no step: there is nothing to draw")
    ends = {0, whole, *(round(whole * point / points) for point in range(1, points))}
    phase = 0
    for event in history:  # the first step with new settings spends most
        ends |= {phase, phase + 1}
        phase += event.steps
    steps = sorted(ends)
    epsilons = [subsampled_epsilon(_first(history, step), ledger.delta, ledger.accountant) for step in steps]
    figure, ((axis,),) = new_figure()
    axis.plot(steps, epsilons, color=KEPT)
    if ledger.max_epsilon is not None:
        axis.axhline(ledger.max_epsilon, color=REFERENCE, linestyle="--", label="max_epsilon")
        axis.legend(frameon=False)
    axis.set(xlabel="optimizer steps", ylabel=f"epsilon at delta {ledger.delta:g}", xlim=(0, whole))
    axis.set_ylim(bottom=0)
    axis.set_title(f"Privacy spent: epsilon {epsilons[-1]:.3g} after {whole:,} steps")
    return figure


def _first(history: Sequence[PrivacyEvent], steps: int) -> list[PrivacyEvent]:
    """The first steps of a history."""
    taken = []
    for event in history:
        part = min(steps, event.steps)
        if part:
            taken.append(PrivacyEvent(event.noise_multiplier, event.sample_rate, part, event.label))
        steps -= part
    return taken


def accuracy_figure(
    runs: Mapping[str, Sequence[tuple[float, float]]],
    *,
    chance: float | None = None,
    delta: float | None = None,
    metric: str = "accuracy",
) -> Figure:
    """Accuracy against epsilon, a line for each run.

    Args:
        runs: by name, ``(epsilon, accuracy)`` in any order, at least one.
        chance: accuracy of guessing, drawn as a line.
        delta: for the label.
        metric: what the vertical axis shows.
    """
    figure, ((axis,),) = new_figure()
    for colour, (name, points) in zip(_colours(len(runs)), runs.items(), strict=True):
        epsilons, accuracies = zip(*sorted(points), strict=True)
        axis.plot(epsilons, accuracies, "o-", markersize=3, color=colour, label=name)
    if chance is not None:
        axis.axhline(chance, color=REFERENCE, linestyle="--", label="chance")
    at = "" if delta is None else f" at delta {delta:g}"
    axis.set(xlabel=f"epsilon spent{at}", ylabel=metric, title=f"{metric.capitalize()} that a privacy budget buys")
    axis.legend(frameon=False)
    return figure


def tension_figure(
    amounts: Sequence[float],
    drop_rates: Sequence[float],
    accuracies: Sequence[Sequence[float]],
    *,
    title: str = "Tension between pre-pruning and gradient dropping",
    metric: str = "accuracy",
) -> Figure:
    """Heat map of accuracy over two rates; the best cell is framed.

    Args:
        amounts: parts of the coordinates that pre-pruning takes, the rows.
        drop_rates: rates of gradient dropping, the columns.
        accuracies: ``[len(amounts)][len(drop_rates)]``; NaN where nothing was run.
        title: of the figure.
        metric: what the colour shows.

    Raises:
        ValueError: the accuracies are no such table.
    """
    if len(accuracies) != len(amounts) or any(len(row) != len(drop_rates) for row in accuracies):
        raise ValueError(
            f"expected accuracies as {len(amounts)} rows of {len(drop_rates)}, got rows of "
            f"{[len(row) for row in accuracies]}"
        )
    from matplotlib.patches import Rectangle

    width, height = 2.2 + 0.8 * len(drop_rates), 1.5 + 0.55 * len(amounts)
    figure, ((axis,),) = new_figure(width=max(4.8, width), height=max(3.0, height))
    image = axis.imshow(accuracies, aspect="auto", cmap="cividis")
    axis.grid(visible=False)
    axis.set_xticks(range(len(drop_rates)), [f"{rate:g}" for rate in drop_rates])
    axis.set_yticks(range(len(amounts)), [f"{rate:g}" for rate in amounts])
    axis.set(xlabel="drop rate", ylabel="amount pruned before", title=title)
    cells = {
        (row, column): value
        for row, values in enumerate(accuracies)
        for column, value in enumerate(values)
        if not math.isnan(value)
    }
    middle = (min(cells.values()) + max(cells.values())) / 2 if cells else 0.0
    for (row, column), value in cells.items():
        axis.text(column, row, f"{value:.3f}", ha="center", va="center", color="black" if value > middle else "white")
    if cells:
        row, column = max(cells, key=lambda cell: cells[cell])
        frame = Rectangle((column - 0.47, row - 0.46), 0.94, 0.92, fill=False, edgecolor=HIGHLIGHT, linewidth=2.5)
        axis.add_patch(frame)
    figure.colorbar(image, ax=axis, label=metric)
    return figure


def kept_share_figure(selections: Mapping[str, Selection], kept: Mapping[str, Selection] | None = None) -> Figure:
    """Bars of the share of each tensor that takes part in a step, and of what pre-pruning left.

    Args:
        selections: by parameter name, what a step trains.
        kept: by parameter name, what is left to choose from; parameters that are not named are whole.

    Raises:
        ValueError: there is no parameter.
    """
    if not selections:
        raise ValueError("there is no selection: draw it while training runs, or from SelectionPlan.at(step)")
    names = list(selections)
    figure, ((axis,),) = new_figure(height=1.2 + 0.24 * len(names))
    places = range(len(names))
    sizes = [math.prod(selections[name].shape) for name in names]
    if kept:
        left = [kept[name].count / size if name in kept else 1.0 for name, size in zip(names, sizes, strict=True)]
        axis.barh(places, left, color=REFERENCE, alpha=0.5, label="left by pre-pruning")
    shares = [selections[name].count / size for name, size in zip(names, sizes, strict=True)]
    axis.barh(places, shares, height=0.5 if kept else 0.8, color=KEPT, label="trained in this step")
    axis.set_yticks(places, [f"{name}  ({size:,})" for name, size in zip(names, sizes, strict=True)])
    axis.set_ylim(len(names) - 0.4, -0.6)
    whole = sum(selections[name].count for name in names) / sum(sizes)
    axis.set(xlim=(0, 1), xlabel="share of coordinates", title=f"What a step trains: {whole:.1%} of all")
    if kept:
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def _colours(count: int) -> list[str]:
    return [SERIES[index % len(SERIES)] for index in range(count)]
