"""Criteria that look at weights alone: chance, norms, distance from the geometric median, scale of a norm.

The filter of channel j is row j of the layer that produces it, without bias; of a transposed convolution, what leads
to output j. Where one channel is several rows (grouped layers), its filter is all of them together.

Sources: norms, arXiv 1608.08710; geometric median (FPGM), arXiv 1811.00250; scale of a norm, arXiv 1708.06519.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from lightning_eff.pruning.criteria.reduction import Reduction, reduced
from lightning_eff.pruning.criteria.registry import Needs, register_criterion
from lightning_eff.pruning.settings import check_choices
from lightning_eff.surgery import ChannelGraph, ChannelGroup
from lightning_eff.surgery.counting import CHANNEL_NORMS


@register_criterion("random")
@dataclass(frozen=True)
class Random:
    """A number from U(0, 1) for every channel: what any other criterion has to beat.

    Attributes:
        seed: of the numbers; None takes that of the call.
    """

    seed: int | None = None

    needs: ClassVar[Needs] = Needs()

    def __call__(self, model: nn.Module, graph: ChannelGraph, batches: Any = (), loss_fn: Any = None) -> dict[str, Any]:
        """Scores float64 ``[C]`` of every prunable group."""
        generator = torch.Generator().manual_seed(self.seed or 0)
        return {
            name: torch.rand(graph.groups[name].size, generator=generator, dtype=torch.float64)
            for name in graph.prunable
        }


@dataclass(frozen=True)
class FilterCriterion(ABC):
    """A score of every filter of a layer; brought together over the layers that produce a group.

    Attributes:
        reduction: over producers; see :func:`~lightning_eff.pruning.criteria.reduction.reduced`.
    """

    reduction: Reduction = "mean"

    needs: ClassVar[Needs] = Needs()

    def __post_init__(self) -> None:
        """Check the choice."""
        check_choices(self)

    @abstractmethod
    def score(self, filters: Tensor) -> Tensor:
        """Score filters, float64 ``[C, K]`` -> ``[C]``."""

    def __call__(self, model: nn.Module, graph: ChannelGraph, batches: Any = (), loss_fn: Any = None) -> dict[str, Any]:
        """Scores float64 ``[C]`` of every prunable group."""
        scores = {}
        for name in graph.prunable:
            group = graph.groups[name]
            layers = [(channels, self.score(rows)) for channels, rows in filters(model, group)]
            scores[name] = reduced(layers, group.size, self.reduction)
        return scores


@register_criterion("l1")
@dataclass(frozen=True)
class L1(FilterCriterion):
    """``sum_k |w_jk|``."""

    def score(self, filters: Tensor) -> Tensor:
        """As :meth:`FilterCriterion.score`."""
        return filters.abs().sum(1)


@register_criterion("l2")
@dataclass(frozen=True)
class L2(FilterCriterion):
    """``sqrt(sum_k w_jk^2)``."""

    def score(self, filters: Tensor) -> Tensor:
        """As :meth:`FilterCriterion.score`."""
        return filters.square().sum(1).sqrt()


@register_criterion("gm")
@dataclass(frozen=True)
class GeometricMedian(FilterCriterion):
    """``sum_i ||w_j - w_i||_2``: small near the geometric median, where other filters can stand in."""

    def score(self, filters: Tensor) -> Tensor:
        """As :meth:`FilterCriterion.score`."""
        return torch.cdist(filters, filters).sum(1)


@register_criterion("bn_scale")
@dataclass(frozen=True)
class NormScale:
    """``|gamma_j|`` of the norms that the channels pass.

    Attributes:
        reduction: over several norms; see :func:`~lightning_eff.pruning.criteria.reduction.reduced`.
    """

    reduction: Reduction = "mean"

    needs: ClassVar[Needs] = Needs()

    def __post_init__(self) -> None:
        """Check the choice."""
        check_choices(self)

    def __call__(self, model: nn.Module, graph: ChannelGraph, batches: Any = (), loss_fn: Any = None) -> dict[str, Any]:
        """Scores float64 ``[C]`` of every prunable group.

        Raises:
            ValueError: channels of a group pass no norm with a weight for each of them.
        """
        scores, without = {}, []
        for name in graph.prunable:
            group = graph.groups[name]
            scores[name] = reduced(_norm_scales(model, group), group.size, self.reduction)
            if scores[name].isnan().any():
                without.append(name)
        if without:
            raise ValueError(
                f"criterion 'bn_scale' needs a norm with weights on all channels, which {', '.join(without)} do not "
                "pass: exclude these layers or take another criterion"
            )
        return scores


def filters(model: nn.Module, group: ChannelGroup) -> list[tuple[Tensor, Tensor]]:
    """Return for every producer its channels, int64 ``[C]``, and their filters, float64 ``[C, K]``."""
    found = []
    for path in group.producers:
        members = [m for m in group.members if m.path == path and m.axis == "out"]
        if members:
            index, root = torch.cat([m.index for m in members]), torch.cat([m.root for m in members])
            found.append(_by_channel(_rows(model.get_submodule(path))[index], root))
    return found


def _rows(layer: nn.Module) -> Tensor:
    """Weights that produce each output, float64 ``[outputs, K]``."""
    weight = layer.get_parameter("weight").detach().cpu().double()
    if isinstance(layer, _ConvTransposeNd):  # [inputs, outputs / groups, ...]
        blocks = weight.reshape(layer.groups, -1, *weight.shape[1:])
        weight = blocks.transpose(1, 2).flatten(0, 1)
    return weight.flatten(1)


def _by_channel(rows: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """Put the rows of one channel beside each other, zeros where a channel has fewer than others."""
    order = root.argsort(stable=True)
    channels, position, counts = torch.unique_consecutive(root[order], return_inverse=True, return_counts=True)
    slot = torch.arange(len(root)) - (counts.cumsum(0) - counts)[position]
    together = rows.new_zeros(len(channels), int(counts.max()), rows.shape[1])
    together[position, slot] = rows[order]
    return channels, together.flatten(1)


def _norm_scales(model: nn.Module, group: ChannelGroup) -> Sequence[tuple[Tensor, Tensor]]:
    modules = dict(model.named_modules(remove_duplicate=False))
    found = []
    for m in group.members:
        norm = modules.get(m.path)
        if isinstance(norm, CHANNEL_NORMS) and not isinstance(norm, nn.PReLU) and m.axis == "out":
            weight = getattr(norm, "weight", None)
            if weight is not None and weight.ndim == 1:
                scale = weight.detach().cpu().double().abs()[m.index]
                found.append(_by_channel(scale[:, None], m.root))
    return [(channels, scale.mean(1)) for channels, scale in found]
