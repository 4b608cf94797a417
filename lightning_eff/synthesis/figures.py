"""Figures of a release and of the training on it; all from released or generated values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_eff.reporting import HIGHLIGHT, KEPT, REFERENCE, REMOVED, new_figure
from lightning_eff.synthesis.embedding import MeanEmbedding
from lightning_eff.synthesis.signal import noise_scale, signal_to_noise, usable_classes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def loss_figure(steps: Sequence[int], losses: Sequence[float], noise_floor: float | None = None) -> Figure:
    """Draw the squared discrepancy by step, with what the noise of the release alone would leave of it.

    Args:
        steps: Step numbers, ascending, at least one.
        losses: ``train/mmd2`` of each.
        noise_floor: See :func:`~lightning_eff.synthesis.signal.noise_floor`.
    """
    figure, axes = new_figure(height=3.2)
    axis = axes[0, 0]
    values = torch.tensor(losses, dtype=torch.float64)
    axis.plot(steps, values.tolist(), color=KEPT, linewidth=0.8, alpha=0.45, label="each step")
    window = max(1, len(values) // 25)
    if window > 1:  # a mean over the steps up to this one, shorter at the beginning
        total = torch.cat([values.new_zeros(1), values.cumsum(0)])
        end = torch.arange(1, len(values) + 1)
        start = (end - window).clamp(min=0)
        axis.plot(steps, ((total[end] - total[start]) / (end - start)).tolist(), color=KEPT, label=f"mean of {window}")
    if noise_floor:
        axis.axhline(noise_floor, color=REFERENCE, linestyle="--", linewidth=1, label="noise of the release")
    positive = values[values > 0]
    if len(positive) == len(values):
        axis.set_yscale("log")
    axis.set_xlabel("step")
    axis.set_ylabel("squared discrepancy (train/mmd2)")
    axis.set_title("Training on the release")
    axis.legend()
    return figure


def signal_figure(embedding: MeanEmbedding, class_names: Sequence[str] | None = None) -> Figure:
    """Draw for each class the estimated norm of its sum over that of the noise; 1 is where both are equal.

    Args:
        embedding: A release.
        class_names: In the order of the classes.
    """
    ratio, usable = signal_to_noise(embedding).cpu(), usable_classes(embedding).cpu()
    names = list(class_names or map(str, range(embedding.num_classes)))
    figure, axes = new_figure(height=max(1.8, 0.8 + 0.26 * len(names)))
    axis = axes[0, 0]
    if noise_scale(embedding):
        axis.barh(names, ratio.tolist(), color=[KEPT if use else REMOVED for use in usable.tolist()])
        for place, (value, use) in enumerate(zip(ratio.tolist(), usable.tolist(), strict=True)):
            axis.text(value, place, f" {value:.3g}" + ("" if use else "  too few records"), va="center", fontsize=8)
        axis.axvline(1.0, color=HIGHLIGHT, linewidth=1)
        axis.set_title(
            "left of the line the noise is larger: little of such a class is learned", loc="left", fontsize=9
        )
        axis.margins(x=0.15)
        axis.set_xlabel("signal to noise of the class sum (estimated)")
    else:
        axis.barh(names, embedding.counts.tolist(), color=REMOVED)
        axis.set_xlabel("records; no noise was added: NOT PRIVATE")
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.set_ylabel("class")
    return figure


def images_figure(x: Tensor, y: Tensor, *, per_class: int = 10, class_names: Sequence[str] | None = None) -> Figure:
    """Draw images, a row a class; values are clamped to [0, 1], or to [-1, 1] where some are negative.

    Args:
        x: Images ``[n, channels, height, width]`` with 1 or 3 channels, or ``[n, height, width]``.
        y: Classes ``[n]``.
        per_class: Images of each class, >= 1.
        class_names: In the order of the classes.

    Raises:
        ValueError: ``x`` has another shape.
    """
    x = x.detach().cpu().float()
    x = x.unsqueeze(1) if x.ndim == 3 else x
    if x.ndim != 4 or x.size(1) not in (1, 3):
        raise ValueError(f"expected images [n, 1 or 3, height, width], got a tensor {list(x.shape)}")
    low = -1.0 if bool((x < 0).any()) else 0.0
    x = ((x.clamp(low, 1.0) - low) / (1.0 - low)).permute(0, 2, 3, 1)
    classes = sorted(set(y.tolist()))
    height, width, channels = x.shape[1:]
    gap = max(1, height // 14)
    sheet = torch.ones(len(classes) * (height + gap) - gap, per_class * (width + gap) - gap, channels)
    for row, c in enumerate(classes):
        for column, image in enumerate(x[(y == c).cpu()][:per_class]):
            top, left = row * (height + gap), column * (width + gap)
            sheet[top : top + height, left : left + width] = image
    size = 6.4 * sheet.size(0) / sheet.size(1)
    figure, axes = new_figure(height=min(max(size, 0.8), 20.0))
    axis = axes[0, 0]
    axis.imshow(
        (sheet.squeeze(2) if channels == 1 else sheet).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest"
    )
    axis.grid(visible=False)
    axis.set_xticks([])
    names = [class_names[c] if class_names else str(c) for c in classes]
    axis.set_yticks([row * (height + gap) + (height - 1) / 2 for row in range(len(classes))], names)
    axis.tick_params(length=0)
    axis.set_ylabel("class")
    axis.set_title(f"Images, {per_class} of each class")
    for side in ("left", "bottom"):
        axis.spines[side].set_visible(False)
    return figure
