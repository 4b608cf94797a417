"""Layers whose per-sample gradient is small beside their activations: it is formed, used and forgotten.

A convolution with few channels has far fewer weights than positions. Its gradient for each of n samples is one grouped
convolution with n groups, and so is the derivative of what is made of it.

``n`` samples, ``T`` positions, ``I`` inputs, ``O`` outputs, ``P`` stored coordinates.
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from lightning_eff.synthesis.features.patches import Geometry
from lightning_eff.synthesis.features.uses import Backend, LayerUse, Part, Pull


class BlockUse(LayerUse):
    """Per-sample gradients written out.

    Args:
        names: Names of the blocks.
        sizes: Coordinates of each block.
        matrix: ``(n, P)`` gradients, block after block.
    """

    def __init__(self, names: Sequence[str], sizes: Sequence[int], matrix: Tensor) -> None:
        super().__init__(names)
        self.sizes = tuple(sizes)
        self.matrix = matrix

    def square_norms(self) -> Tensor:
        """Return ``(n,)`` squared norms of the gradients."""
        return self.matrix.square().sum(1)

    def double(self) -> Self:
        """Return a copy with the gradients in float64, the same numbers: they are not worked out again."""
        other = copy.copy(self)
        other.matrix = self.matrix.double()
        return other

    def per_sample(self) -> Tensor:
        """Return the gradients, ``(n, P)``."""
        return self.matrix

    def gram(self, other: LayerUse) -> Tensor:
        """Return ``(n, n2)`` inner products of gradients."""
        return self.matrix @ other.per_sample().mT

    def add_sums(self, weights: Tensor, parts: Sequence[Part], sums: Mapping[str, Tensor]) -> None:
        """Add the weighted gradients of each part to its class."""
        for part in parts:
            rows = slice(part.start, part.stop)
            total = weights[rows] @ self.matrix[rows]
            for name, piece in zip(self.names, torch.split(total, list(self.sizes)), strict=True):
                sums[name][part.label].view(-1).add_(piece)

    def pull(
        self, weights: Tensor, parts: Sequence[Part], target: Mapping[str, Tensor], backend: Backend, derive: bool
    ) -> Pull:
        """Work out the terms from the sum of each part, and keep their derivative by it."""
        cross, square, by_weight = [], [], []
        self._residuals: list[tuple[Part, Tensor]] = []
        for part in parts:
            rows = slice(part.start, part.stop)
            total = weights[rows] @ self.matrix[rows]
            wanted = torch.cat([target[name][part.label].flatten() for name in self.names])
            cross.append(torch.dot(total, wanted))
            square.append(torch.dot(total, total))
            if derive:
                residual = total.mul_(2 * part.repel).add_(wanted, alpha=part.attract)
                by_weight.append(self.matrix[rows] @ residual)
                self._residuals.append((part, residual))
        return Pull(torch.stack(cross), torch.stack(square), torch.cat(by_weight) if derive else None)

    def gradients(self, weights: Tensor, by_square_norm: Tensor) -> tuple[Tensor, ...]:
        """Return the derivatives, by way of that by the gradients."""
        by_matrix = self.matrix * (2 * by_square_norm)[:, None]
        for part, residual in self._residuals:
            rows = slice(part.start, part.stop)
            by_matrix[rows].addr_(weights[rows], residual)
        return self.pull_back(by_matrix)

    def pull_back(self, by_matrix: Tensor) -> tuple[Tensor, ...]:
        """Return the derivative with respect to what the gradients were made of, given that by the gradients."""
        return (by_matrix,)


class FactorBlockUse(BlockUse):
    """Gradients formed from a layer's delta and input."""

    @abstractmethod
    def pull_back(self, by_matrix: Tensor) -> tuple[Tensor, ...]:
        """Return the derivatives by delta and by the input."""


class PositionBlockUse(FactorBlockUse):
    """A dense layer at many positions: delta ``(n, T, O)`` and a ``(n, T, I)``."""

    def __init__(self, names: Sequence[str], delta: Tensor, a: Tensor) -> None:
        self.delta, self.a = delta, a
        outputs, inputs = delta.shape[2], a.shape[2]
        # in this order, as libraries are slow with a narrow left factor that is transposed
        matrix = (a.mT @ delta).mT.flatten(1)
        sizes = [outputs * inputs]
        if len(names) == 2:
            matrix = torch.cat([matrix, delta.sum(1)], 1)
            sizes.append(outputs)
        super().__init__(names, sizes, matrix)

    def pull_back(self, by_matrix: Tensor) -> tuple[Tensor, ...]:
        """Return the derivatives by delta and by the input."""
        weight = torch.unflatten(by_matrix[:, : self.sizes[0]], 1, (self.delta.shape[2], self.a.shape[2]))
        by_delta = self.a @ weight.mT
        if len(self.sizes) == 2:
            by_delta += by_matrix[:, None, self.sizes[0] :]
        return by_delta, (weight.mT @ self.delta.mT).mT


class PatchBlockUse(PositionBlockUse):
    """A convolution of few input channels: a dense layer on its patches.

    Args:
        names: Name of the weight and, where there is one, of the bias.
        geometry: Where the layer reads.
        delta: ``(n, O, *space)``.
        a: ``(n, I, *space)``.
    """

    def __init__(self, names: Sequence[str], geometry: Geometry, delta: Tensor, a: Tensor) -> None:
        self._geometry, self._space, self._inputs = geometry, delta.shape[2:], a.shape[2:]
        super().__init__(names, delta.flatten(2).mT, geometry.patches(a).mT)

    def pull_back(self, by_matrix: Tensor) -> tuple[Tensor, ...]:
        """Return the derivatives by delta and by the input."""
        by_delta, by_patches = super().pull_back(by_matrix)
        by_a = self._geometry.fold(by_patches.mT, self._space, self._inputs)
        return torch.unflatten(by_delta, 1, self._space).movedim(-1, 1), by_a


class ConvolutionBlockUse(FactorBlockUse):
    """A convolution in 1, 2 or 3 dimensions, of any stride, padding, dilation and number of groups.

    Args:
        names: Name of the weight and, where there is one, of the bias.
        weight_shape: ``(O, I / groups, *kernel)``.
        geometry: Where the layer reads.
        delta: ``(n, O, *space)``.
        a: ``(n, I, *space)``.
    """

    def __init__(
        self, names: Sequence[str], weight_shape: torch.Size, geometry: Geometry, delta: Tensor, a: Tensor
    ) -> None:
        self.delta, self.a, self.weight_shape = delta, a, weight_shape
        n, (_, stride, padding, dilation, groups) = len(a), geometry
        # one long sample whose groups are the samples, each with the layer's groups
        self._delta = delta.reshape(1, -1, *delta.shape[2:])
        self._a = a.reshape(1, -1, *a.shape[2:])
        self._settings = (stride, padding, dilation, False, [0] * len(stride), n * groups)
        like = a.new_empty(1).expand(n * weight_shape[0], *weight_shape[1:])
        matrix = torch.ops.aten.convolution_backward(
            self._delta, self._a, like, None, *self._settings, [False, True, False]
        )[1].reshape(n, -1)
        sizes = [math.prod(weight_shape)]
        if len(names) == 2:
            matrix = torch.cat([matrix, delta.flatten(2).sum(2)], 1)
            sizes.append(weight_shape[0])
        super().__init__(names, sizes, matrix)

    def pull_back(self, by_matrix: Tensor) -> tuple[Tensor, ...]:
        """Return the derivatives by delta and by the input."""
        stride, padding, dilation, _, _, groups = self._settings
        weight = by_matrix[:, : self.sizes[0]].reshape(-1, *self.weight_shape[1:])
        bias = by_matrix[:, self.sizes[0] :].reshape(-1) if len(self.sizes) == 2 else None
        by_delta = torch.ops.aten.convolution(
            self._a, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups
        )
        by_a = torch.ops.aten.convolution_backward(
            self._delta, self._a, weight, None, *self._settings, [True, False, False]
        )[0]
        return by_delta.reshape(self.delta.shape), by_a.reshape(self.a.shape)
