"""Pictures of importance switches: concentrations with the cut, how sure it is, shares, and what channels look like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_eff.batch import call_model, take
from lightning_eff.pruning.dirichlet.posterior import DirichletPosterior
from lightning_eff.pruning.report import FEW, short_name
from lightning_eff.reporting import KEPT, REFERENCE, REMOVED, new_figure
from lightning_eff.surgery.state import quiet_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Posteriors = Mapping[str, DirichletPosterior]
Kept = Mapping[str, Sequence[int]]


def posterior_figure(posteriors: Posteriors, kept: Kept, *, level: float = 0.9, groups: int = 12) -> Figure:
    """Expected switches of each layer, best first, with intervals and the line of the cut.

    Args:
        posteriors: of each layer.
        kept: channels that stay, of each layer; of a layer that is not named all stay.
        level: probability of the intervals, in (0, 1).
        groups: most layers shown.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    names = list(posteriors)[:groups]
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure, axes = new_figure(lines, columns, width=3.6 * columns, height=2.6 * lines + 0.4)
    for axis, name in zip(axes.flat, names, strict=False):
        posterior = posteriors[name]
        order = posterior.rank()
        stays = set(kept.get(name, order))
        low, high = (bound[order].tolist() for bound in posterior.interval(level))
        x = range(len(order))
        axis.bar(x, posterior.mean[order].tolist(), width=1.0, color=[KEPT if c in stays else REMOVED for c in order])
        if len(order) <= FEW:
            axis.vlines(x, low, high, color="black", linewidth=0.8)
        else:
            axis.fill_between(x, low, high, step="mid", color="black", alpha=0.2, linewidth=0)
        if len(stays) < len(order):
            axis.axvline(len(stays) - 0.5, color="black", linestyle="--", linewidth=1)
        axis.set_title(f"{short_name(name)}: {len(stays)} of {len(order)} kept")
        axis.set_xlabel("channel, best first")
        axis.set_ylabel("share of the layer")
        axis.set_ylim(bottom=0)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    _hide_rest(axes, len(names))
    if len(names) < len(posteriors):
        figure.suptitle(f"the first {len(names)} of {len(posteriors)} layers", fontsize=10)
    figure.legend(
        handles=[
            Patch(color=KEPT, label="kept"),
            Patch(color=REMOVED, label="removed"),
            Line2D([], [], color="black", linewidth=0.8, label=f"{level:.0%} interval"),
            Line2D([], [], color="black", linestyle="--", linewidth=1, label="cut"),
        ],
        loc="outside lower center",
        ncols=4,
        frameon=False,
    )
    return figure


def cut_figure(posteriors: Posteriors, kept: Kept) -> Figure:
    """Probability, for each layer, that the last channel kept matters more than the first one removed."""
    sure = {name: posterior.prob_at_cut(kept[name]) for name, posterior in posteriors.items() if name in kept}
    sure = {name: value for name, value in sure.items() if value == value}
    figure, axes = new_figure(width=6.4, height=1.3 + 0.24 * len(sure))
    axis = axes[0, 0]
    axis.barh(range(len(sure)), list(sure.values()), color=KEPT)
    axis.axvline(0.5, color=REFERENCE, linestyle="--", linewidth=1)
    axis.annotate("chance", (0.5, 1.01), xycoords=("data", "axes fraction"), ha="center", color=REFERENCE, fontsize=8)
    axis.set_yticks(range(len(sure)), [short_name(name) for name in sure])
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    axis.set_xlabel("P(last channel kept > first channel removed)")
    axis.set_ylabel("layer")
    axis.set_title("How sure the cut is", pad=16)
    axis.grid(axis="y", visible=False)
    return figure


def share_figure(posteriors: Posteriors) -> Figure:
    """Layers times sorted channels: shares ``C * mean``, where 1 is an average channel of its layer."""
    widest = max(len(posterior.mean) for posterior in posteriors.values())
    shares = torch.full((len(posteriors), widest), torch.nan)
    for row, posterior in enumerate(posteriors.values()):
        shares[row, : len(posterior.mean)] = posterior.relative.sort(descending=True).values
    figure, axes = new_figure(width=6.8, height=1.8 + 0.24 * len(posteriors))
    axis = axes[0, 0]
    low, most = float(shares.nan_to_num(1).min()), float(shares.nan_to_num(1).max())
    image = axis.imshow(
        shares.numpy(),
        aspect="auto",
        interpolation="nearest",
        cmap="viridis",
        vmin=min(low, 0.99),
        vmax=max(most, 1.01),
    )
    axis.set_yticks(range(len(posteriors)), [short_name(name) for name in posteriors])
    axis.set_xlabel("channel, best first")
    axis.set_ylabel("layer")
    axis.set_title("Expected importance of channels")
    axis.grid(visible=False)
    figure.colorbar(image, ax=axis, label="share, 1 = average")
    return figure


def feature_figure(
    model: nn.Module, layer: str, inputs: Any, posterior: DirichletPosterior, *, count: int = 3
) -> Figure:
    """The filters of a convolution and what they make of one image: highest channels above, lowest below.

    Args:
        model: the network before the cut; nothing about it changes.
        layer: path of a ``Conv2d`` whose output channels are those of ``posterior``; best the first of the network.
        inputs: a batch as the model takes it; its first sample is shown.
        posterior: of the layer.
        count: channels shown of either end, >= 1; fewer where the layer has fewer.

    Raises:
        ValueError: the layer is no 2-D convolution, or the posterior is of another number of channels.
    """
    convolution = model.get_submodule(layer)
    if not isinstance(convolution, nn.Conv2d) or convolution.out_channels != len(posterior.mean):
        raise ValueError(
            f"expected a Conv2d with {len(posterior.mean)} output channels at {layer!r}, got {convolution}"
        )
    seen: list[tuple[Tensor, Tensor]] = []
    handle = convolution.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    try:
        with quiet_model(model), torch.no_grad():
            call_model(model, take(inputs, slice(0, 1)))
    finally:
        handle.remove()
    image, maps = (tensor[0].detach().float().cpu() for tensor in seen[0])
    order, filters = posterior.rank(), convolution.weight.detach().float().cpu()
    count = min(count, len(order) // 2)
    figure, axes = new_figure(4, count + 1, width=1.7 * (count + 1), height=6.6)
    mean = posterior.relative
    limit = float(filters.abs().max() if filters.shape[1] == 3 else filters.mean(1).abs().max())
    for half, channels in enumerate((order[:count], order[-count:])):
        for column, channel in enumerate(channels, start=1):
            top, bottom = axes[2 * half, column], axes[2 * half + 1, column]
            top.imshow(_as_image(filters[channel], limit), cmap="RdBu_r", vmin=-limit, vmax=limit)
            bottom.imshow(maps[channel].numpy(), cmap="gray")
            top.set_title(f"{channel}: {float(mean[channel]):.2f}")
        for row, text in ((2 * half, "filters"), (2 * half + 1, "feature maps")):
            axes[row, 0].text(1.0, 0.5, f"{('highest', 'lowest')[half]}\n{text}", ha="right", va="center", fontsize=9)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.grid(visible=False)
        for spine in axis.spines.values():
            spine.set_visible(False)
    corner = axes[1, 0]
    corner.texts[0].remove()
    corner.imshow(_as_image(image, float(image.abs().max())), cmap="gray")
    corner.set_title("highest\nfeature maps", fontsize=9)
    corner.set_xlabel("of this input", fontsize=9)
    figure.suptitle(f"{short_name(layer)}: share of channel, 1 = average", fontsize=10)
    return figure


def _as_image(values: Tensor, limit: float) -> Any:
    """Three channels as colours from -limit to limit, any other number as their mean."""
    if values.shape[0] == 3:
        return (values.permute(1, 2, 0) / (2 * max(limit, 1e-12)) + 0.5).clamp(0, 1).numpy()
    return values.mean(0).numpy()


def _hide_rest(axes: Any, used: int) -> None:
    for axis in axes.flat[used:]:
        axis.set_visible(False)
