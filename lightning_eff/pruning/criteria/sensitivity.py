"""Empirical sensitivity (Provable Filter Pruning, arXiv 1911.07412): how large a part of a sum a channel ever is.

Of every output of the layers that read channel j, at every patch p of every sample, the share
``w_ij . a_j(p) / sum_k w_ik . a_k(p)``; the score is the largest one. Weights and inputs are split into positive and
negative parts, so that all terms of a sum have one sign and a share lies in [0, 1]; the largest over the four sums.

Shapes: ``B`` samples, ``E`` input channels of a layer, ``O`` its outputs, ``G`` its groups, ``R`` parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_eff.batch import SplitBatch, call_model
from lightning_eff.batch import split_batch as split_pair
from lightning_eff.pruning.borrowing import borrowed
from lightning_eff.pruning.criteria.reduction import Reduction, reduced
from lightning_eff.pruning.criteria.registry import Needs, check_needs, register_criterion
from lightning_eff.pruning.settings import check_choices
from lightning_eff.surgery import ChannelGraph, ChannelGroup

_NOISE = 1e-6  # sums below this part of the largest one are rounding and count as zero
_CHUNK = 2**22  # terms that are held at a time


@register_criterion("es")
@dataclass(frozen=True)
class EmpiricalSensitivity:
    """The largest share that a channel has in any output of its readers, in [0, 1]; 0/0 counts as 0.

    Attributes:
        reduction: over the layers that read the channels; ``"max"`` as over their outputs.
        split_batch: ``batch -> (inputs, target)``; None takes that of the call.
    """

    reduction: Reduction = "max"
    split_batch: SplitBatch | None = None

    needs: ClassVar[Needs] = Needs(data=True)

    def __post_init__(self) -> None:
        """Check the choice."""
        check_choices(self)

    def __call__(
        self, model: nn.Module, graph: ChannelGraph, batches: Sequence[Any], loss_fn: Any = None
    ) -> dict[str, Tensor]:
        """Scores float64 ``[C]`` of every prunable group.

        Raises:
            ValueError: there is no batch.
        """
        check_needs(self, batches, loss_fn)
        split = self.split_batch or split_pair
        readers = [_Reader(model, graph.groups[name], path) for name in graph.prunable for path in _paths(graph, name)]
        with borrowed(model), torch.no_grad(), ExitStack() as hooks:
            for reader in readers:
                handle = reader.layer.register_forward_pre_hook(reader.watch, with_kwargs=True)
                hooks.callback(handle.remove)
            for batch in batches:
                call_model(model, split(batch)[0])
        scores = {}
        for name in graph.prunable:
            layers = [(reader.channels, reader.largest) for reader in readers if reader.group.name == name]
            scores[name] = reduced(layers, graph.groups[name].size, self.reduction)
        return scores


class _Reader:
    """One layer that reads channels of a group, and the largest shares seen of them."""

    def __init__(self, model: nn.Module, group: ChannelGroup, path: str) -> None:
        members = [m for m in group.consumers if m.path == path]
        self.group, self.layer = group, model.get_submodule(path)
        self._index, root = torch.cat([m.index for m in members]), torch.cat([m.root for m in members])
        self.channels, self._part = torch.unique(root, return_inverse=True)
        self.largest = torch.zeros(len(self.channels), dtype=torch.float64)

    def watch(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        shares = largest_shares(self.layer, x, self._index.to(x.device), self._part.to(x.device))
        self.largest = torch.maximum(self.largest, shares.cpu().double())


def largest_shares(layer: nn.Module, x: Tensor, index: Tensor, part: Tensor) -> Tensor:
    """Largest share of each part of a layer's inputs in any of its outputs, patches and samples.

    Args:
        layer: a convolution, transposed convolution or linear layer.
        x: its input.
        index: input channels that belong to a part, int64 ``[E]``.
        part: the part each belongs to, int64 ``[E]``, 0 .. R - 1.

    Returns:
        ``[R]``, in [0, 1].
    """
    reader = _Sums(layer)
    x = reader.inputs(x)
    order = part.argsort(stable=True)
    index, part = index[order], part[order]
    counts = part.bincount().tolist()
    per_channel = reader.all(reader.weight.abs(), x[:1].abs())[0, 0].numel()  # terms of one channel and sample
    samples = max(1, _CHUNK // (max(counts) * per_channel))
    parts = max(1, _CHUNK // (samples * max(counts) * per_channel))
    largest = torch.zeros(len(counts), dtype=x.dtype, device=x.device)
    for rows, weight_sign, input_sign in product(torch.split(x, samples), (1, -1), (1, -1)):
        weight, values = (weight_sign * reader.weight).relu(), (input_sign * rows).relu()
        if not bool(values.any()) or not bool(weight.any()):
            continue
        sums = reader.all(weight, values)
        sums = torch.where(sums > _NOISE * sums.max(), sums, torch.inf)  # 0/0 counts as 0
        start = 0
        for first in range(0, len(counts), parts):
            stop = start + sum(counts[first : first + parts])
            channels = index[start:stop]
            keys = torch.stack([part[start:stop], channels // reader.weight.shape[1]])  # (part, group of the layer)
            (parts_of, groups_of), position = torch.unique(keys, dim=1, return_inverse=True)
            terms = reader.each(weight, values, channels)
            joined = terms.new_zeros(len(terms), len(parts_of), *terms.shape[2:]).index_add_(1, position, terms)
            share = (joined / sums[:, groups_of]).amax((0, 2, 3))
            largest.scatter_reduce_(0, parts_of, share, "amax")
            start = stop
    return largest.clamp(max=1)


class _Sums:
    """A layer as sums over its input channels, whatever its kind; biases left out.

    ``weight`` is ``[G, E / G, O / G, *kernel]``; a linear layer is a convolution over one position.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer
        weight = layer.get_parameter("weight").detach()
        if not isinstance(layer, _ConvNd):
            weight = weight[..., None]
        groups = layer.groups if isinstance(layer, _ConvNd) else 1
        blocks = weight.reshape(groups, -1, *weight.shape[1:])
        self.weight = blocks if isinstance(layer, _ConvTransposeNd) else blocks.transpose(1, 2)

    def inputs(self, x: Tensor) -> Tensor:
        """``[B, E, *positions]``, padded where the layer does not pad with zeros."""
        if not isinstance(self._layer, _ConvNd):
            return x.detach().reshape(-1, x.shape[-1], 1)
        x = x.detach()
        if x.ndim < self._layer.weight.ndim:
            x = x[None]  # a single sample
        if self._layer.padding_mode != "zeros":
            x = F.pad(x, self._layer._reversed_padding_repeated_twice, mode=self._layer.padding_mode)
        return x

    def all(self, weight: Tensor, x: Tensor) -> Tensor:
        """Sums over all inputs of an output: ``[B, G, O / G, patches]``."""
        return self._apply(weight, x)

    def each(self, weight: Tensor, x: Tensor, channels: Tensor) -> Tensor:
        """What each of the ``channels`` adds to the outputs of its group: ``[B, channels, O / G, patches]``."""
        return self._apply(weight.flatten(0, 1)[channels][:, None], x[:, channels])

    def _apply(self, weight: Tensor, x: Tensor) -> Tensor:
        groups = len(weight)
        layer: Any = self._layer
        rank = weight.ndim - 3
        if not isinstance(self._layer, _ConvNd):
            out = F.conv1d(x, weight.transpose(1, 2).flatten(0, 1), groups=groups)
        elif isinstance(self._layer, _ConvTransposeNd):
            transposed = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
            out = transposed(
                x, weight.flatten(0, 1), None, layer.stride, layer.padding, layer.output_padding, groups, layer.dilation
            )
        else:
            convolve = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
            padding = layer.padding if layer.padding_mode == "zeros" else 0
            out = convolve(x, weight.transpose(1, 2).flatten(0, 1), None, layer.stride, padding, layer.dilation, groups)
        return out.reshape(len(out), groups, out.shape[1] // groups, -1)


def _paths(graph: ChannelGraph, name: str) -> list[str]:
    return list(dict.fromkeys(m.path for m in graph.groups[name].consumers))
