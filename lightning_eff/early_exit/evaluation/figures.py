"""Pictures of early exit: accuracy against cost, who leaves where, how honest scores are, training of the exits.

Shapes: ``N`` samples, ``E`` exits, ``K = E + 1`` outputs, the last the backbone's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error

from lightning_eff.early_exit.evaluation.curve import BUDGETS
from lightning_eff.early_exit.evaluation.tables import Runs, seeds_of
from lightning_eff.reporting import KEPT, REFERENCE, REMOVED, SERIES, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 4


def output_labels(outputs: int) -> list[str]:
    """``exit 0 .. exit E-1`` and ``final``."""
    return [*(f"exit {k}" for k in range(outputs - 1)), "final"]


def curve_figure(runs: Runs, *, budgets: Sequence[float] = BUDGETS, cost: str = "FLOPs") -> Figure:
    """Accuracy against mean cost, a line a method.

    Several seeds of a method are a line of their means, threshold by threshold, within a band of one standard
    deviation. Dots are outputs at which all samples leave; a cross is the plain backbone, without heads.

    Args:
        runs: curves of each method, one a seed, over equally many thresholds.
        budgets: fractions of the plain backbone's cost that are marked; those beyond the curves are left out.
        cost: what costs are fractions of.

    Raises:
        ValueError: no method, or one whose curves are none or of different lengths.
    """
    from matplotlib.lines import Line2D

    listed = seeds_of(runs)
    figure, axes = new_figure(width=6.4, height=4.2)
    axis = axes[0, 0]
    for i, (name, curves) in enumerate(listed.items()):
        if len({(len(curve.cost), len(curve.costs)) for curve in curves}) > 1:
            raise ValueError(f"expected curves of {name!r} over equally many thresholds and outputs")
        color = SERIES[i % len(SERIES)]
        cost_mean, _ = _over_seeds([curve.cost for curve in curves])
        mean, std = _over_seeds([curve.accuracy for curve in curves])
        heads, _ = _over_seeds([curve.head_accuracy for curve in curves])
        places, _ = _over_seeds([curve.costs for curve in curves])
        axis.plot(cost_mean, mean, color=color, label=name, linewidth=1.5)
        if len(curves) > 1:
            axis.fill_between(cost_mean, mean - std, mean + std, color=color, alpha=0.2, linewidth=0)
        axis.plot(places, heads, "o", color=color, markersize=5)
        axis.plot([1.0], [heads[-1]], "x", color=color, markersize=8, markeredgewidth=2, zorder=3)
    low, high = axis.get_xlim()
    for budget in budgets:
        if low < budget < high:
            axis.axvline(budget, color=REFERENCE, linestyle=":", linewidth=1, zorder=0)
    axis.set_xlim(low, high)
    _percent(axis.xaxis)
    _percent(axis.yaxis)
    axis.set_xlabel(f"mean cost of a sample, % of the backbone's {cost}")
    axis.set_ylabel("accuracy, %")
    axis.set_title("Accuracy against cost")
    marks = [
        Line2D([], [], color="black", marker="o", linestyle="", markersize=5, label="one output alone"),
        Line2D([], [], color="black", marker="x", linestyle="", markersize=8, markeredgewidth=2, label="backbone"),
        Line2D([], [], color=REFERENCE, linestyle=":", linewidth=1, label="budgets"),
    ]
    lines = axis.get_legend_handles_labels()[0]
    axis.legend(handles=[*lines, *marks], loc="lower right", frameon=False, fontsize=8)
    return figure


def exit_figure(exit_index: Tensor, correct: Tensor, outputs: int) -> Figure:
    """Share of the samples that leave at each output, right and wrong ones.

    Args:
        exit_index: ``[N]``, output of each sample, in ``0 .. K - 1``.
        correct: ``[N]`` bool, whether the answer given there is right.
        outputs: ``K``.
    """
    samples = len(exit_index)
    correct = correct.bool().cpu()
    exit_index = exit_index.cpu()
    right = torch.bincount(exit_index[correct], minlength=outputs).double() / samples
    wrong = torch.bincount(exit_index[~correct], minlength=outputs).double() / samples
    figure, axes = new_figure(width=1.6 + 0.8 * outputs, height=3.2)
    axis = axes[0, 0]
    x = range(outputs)
    axis.bar(x, right.tolist(), color=KEPT, label="right")
    axis.bar(x, wrong.tolist(), bottom=right.tolist(), color=REMOVED, label="wrong")
    for k, (good, all_here) in enumerate(zip(right.tolist(), (right + wrong).tolist(), strict=True)):
        if all_here:
            text = f"{good / all_here:.1%}\nright"
            axis.annotate(text, (k, all_here), (0, 2), textcoords="offset points", ha="center", fontsize=7)
    axis.set_xticks(x, output_labels(outputs))
    axis.margins(y=0.18)
    _percent(axis.yaxis)
    axis.set_xlabel("output")
    axis.set_ylabel("samples, %")
    axis.set_title("Where samples leave")
    axis.grid(axis="x", visible=False)
    axis.legend(frameon=False)
    return figure


def reliability_figure(confidence: Tensor, correct: Tensor, *, bins: int = 15) -> Figure:
    """Share of right answers against the highest probability, for each output; on the diagonal scores are honest.

    Narrow bars stand for few samples; the error is the expected calibration error.

    Args:
        confidence: ``[K, N]``, highest probability, in [0, 1].
        correct: ``[K, N]`` bool.
        bins: of equal width, >= 1.
    """
    outputs = len(confidence)
    columns = min(COLUMNS, outputs)
    lines = -(-outputs // columns)
    figure, axes = new_figure(lines, columns, width=2.3 * columns + 0.4, height=2.4 * lines + 0.3)
    for k, (axis, name) in enumerate(zip(axes.flat, output_labels(outputs), strict=False)):
        sure, right = confidence[k].float().cpu().contiguous(), correct[k].cpu()
        which = (sure * bins).long().clamp(max=bins - 1)
        counts = torch.bincount(which, minlength=bins).double()
        rate = torch.bincount(which, weights=right.double(), minlength=bins) / counts
        share = counts / counts.max()
        centers = (torch.arange(bins) + 0.5) / bins
        filled = counts > 0
        x, height, width = (values[filled].tolist() for values in (centers, rate, share.sqrt() / bins))
        axis.bar(x, height, width=width, color=KEPT)
        axis.plot([0, 1], [0, 1], color=REFERENCE, linestyle="--", linewidth=1)
        error = binary_calibration_error(sure, right.long(), n_bins=bins, norm="l1").item()
        axis.set_title(f"{name}: error {error:.3f}")
        axis.set_xlim(0, 1)
        axis.set_ylim(0, 1)
        axis.set_aspect("equal")
        if k % columns == 0:
            axis.set_ylabel("share right")
        if k + columns >= outputs:
            axis.set_xlabel("highest probability")
    for axis in axes.flat[outputs:]:
        axis.set_visible(False)
    return figure


def samples_figure(
    images: Tensor,
    exit_index: Tensor,
    confidence: Tensor,
    prediction: Tensor,
    target: Tensor,
    outputs: int,
    *,
    classes: Sequence[str] | None = None,
    count: int = 8,
) -> Figure:
    """The samples that leave first and surest, and those that leave last and least sure; wrong answers are marked.

    Args:
        images: ``[N, C, H, W]`` with one or three channels, or ``[N, H, W]``; scaled each by its own extremes.
        exit_index: ``[N]``, output each sample leaves at.
        confidence: ``[N]``, score there.
        prediction: ``[N]``, answer there.
        target: ``[N]``, labels.
        outputs: ``K``.
        classes: names of the classes; numbers if left out.
        count: samples in each of the two rows, >= 1; fewer where there are fewer.

    Raises:
        ValueError: the samples are no images.
    """
    if images.ndim == 3:
        images = images[:, None]
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"expected images [N, 1 or 3, H, W] or [N, H, W], got {list(images.shape)}")
    where, sure = exit_index.tolist(), confidence.tolist()
    order = sorted(range(len(where)), key=lambda i: (where[i], -sure[i]))
    count = min(count, len(order))
    figure, axes = new_figure(2, count, width=1.1 * count + 0.6, height=3.1)
    names = output_labels(outputs)
    for row, (text, chosen) in enumerate((("earliest", order[:count]), ("latest", order[: -count - 1 : -1]))):
        axes[row, 0].set_ylabel(text)
        for axis, i in zip(axes[row], chosen, strict=True):
            axis.imshow(_as_image(images[i]), cmap="gray")
            said, meant = (
                str(int(label)) if classes is None else classes[int(label)] for label in (prediction[i], target[i])
            )
            right = said == meant
            answer = said if right else f"{said}\nnot {meant}"
            axis.set_title(f"{names[where[i]]}\n{answer}", fontsize=7, color="black" if right else REMOVED)
            axis.set_xticks([])
            axis.set_yticks([])
            axis.grid(visible=False)
            for spine in axis.spines.values():
                spine.set_visible(False)
    return figure


def history_figure(accuracy: Sequence[Mapping[str, float]], phases: Sequence[str] = ()) -> Figure:
    """Accuracy of each output over epochs, a vertical line where a phase begins.

    Args:
        accuracy: of each epoch, by output; an output may be missing from some epochs.
        phases: name of the phase of each epoch; none if left out.
    """
    from matplotlib.ticker import MaxNLocator

    names = list(dict.fromkeys(name for epoch in accuracy for name in epoch))
    names.sort(key=lambda name: name == "final")
    figure, axes = new_figure(width=6.4, height=3.6)
    axis = axes[0, 0]
    for i, name in enumerate(names):
        values = [epoch.get(name, float("nan")) for epoch in accuracy]
        color = "black" if name == "final" else SERIES[i % len(SERIES)]
        axis.plot(range(1, len(values) + 1), values, color=color, label=name, marker="o", markersize=3)
    for i, phase in enumerate(phases):
        if i == 0 or phase != phases[i - 1]:
            if i:
                axis.axvline(i + 0.5, color=REFERENCE, linestyle="--", linewidth=1)
            place = ((i + 0.55) if i else 1, 1.01)
            axis.annotate(phase, place, xycoords=("data", "axes fraction"), color=REFERENCE, fontsize=8)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    _percent(axis.yaxis)
    axis.set_xlabel("epoch")
    axis.set_ylabel("validation accuracy, %")
    axis.set_title("Training of the outputs", pad=16)
    axis.legend(frameon=False, fontsize=8)
    return figure


def _over_seeds(values: Sequence[Sequence[float]]) -> tuple[Any, Any]:
    """Mean and standard deviation, by position, as arrays."""
    table = torch.tensor(values, dtype=torch.float64)
    return table.mean(0).numpy(), table.std(0, correction=min(1, len(values) - 1)).numpy()


def _percent(axis: Any) -> None:
    axis.set_major_formatter(lambda value, position: f"{100 * value:.6g}")


def _as_image(image: Tensor) -> Any:
    image = image.detach().float().cpu()
    low, high = image.amin(), image.amax()
    return ((image - low) / (high - low).clamp(min=1e-12)).permute(1, 2, 0).numpy()
