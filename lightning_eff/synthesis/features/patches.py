"""Convolutions with fixed weights: their patches, and the two linear maps they are.

Automatic differentiation of a convolution's backward also works out a derivative by the weight, which nobody asks for
here; and on a CPU a convolution of very few input channels is several times faster as a product with its patches. So a
layer's call is replaced by the linear map itself, whose derivative is the adjoint map, whose derivative is the map.

``n`` samples, ``T`` positions of the output, ``I`` input and ``O`` output channels.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

FEW_INPUTS = 64
"""Numbers in a patch up to which a CPU is faster with patches."""


class Geometry(NamedTuple):
    """Where a convolution reads."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def patches_are_faster(self, weight_shape: Sequence[int], device: torch.device) -> bool:
        """Whether to work on patches, for a weight ``(O, I / groups, *kernel)``."""
        return device.type == "cpu" and self.groups == 1 and torch.Size(weight_shape[1:]).numel() <= FEW_INPUTS

    def patches(self, x: Tensor) -> Tensor:
        """Return the patches ``(n, I * kernel, T)`` of ``x`` ``(n, I, *space)``; of one group."""
        dims = len(self.kernel)
        view = F.pad(x, [size for pad in reversed(self.padding) for size in (pad, pad)])
        for axis in range(dims):
            span = (self.kernel[axis] - 1) * self.dilation[axis] + 1
            view = view.unfold(2 + axis, span, self.stride[axis])[..., :: self.dilation[axis]]
        order = [0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims)]
        return view.permute(order).reshape(len(x), x.shape[1] * torch.Size(self.kernel).numel(), -1)

    def fold(self, columns: Tensor, space: Sequence[int], inputs: Sequence[int]) -> Tensor:
        """Add patches ``(n, I * kernel, T)`` up where they were read: the adjoint of :meth:`patches`.

        Args:
            columns: The patches.
            space: Size of the convolution's output, without samples and channels.
            inputs: Size of its input, alike.
        """
        n, channels = len(columns), columns.shape[1] // torch.Size(self.kernel).numel()
        patches = columns.reshape(n, channels, -1, *space)
        whole = [size + 2 * pad for size, pad in zip(inputs, self.padding, strict=True)]
        padded = columns.new_zeros(n, channels, *whole)
        for index, offset in enumerate(itertools.product(*map(range, self.kernel))):
            window = tuple(
                slice(at * d, at * d + (size - 1) * s + 1, s)
                for at, d, s, size in zip(offset, self.dilation, self.stride, space, strict=True)
            )
            padded[:, :, *window] += patches[:, :, index]
        inner = tuple(slice(p, p + size) for p, size in zip(self.padding, inputs, strict=True))
        return padded[:, :, *inner]


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Return the convolution of ``x``; differentiable in ``x`` any number of times, not in ``weight`` and ``bias``."""
    result: Tensor = _Convolution.apply(x, weight, bias, geometry)
    return result


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        ctx.shape, ctx.geometry, ctx.weight = x.shape, geometry, weight
        _, stride, padding, dilation, groups = geometry
        if not geometry.patches_are_faster(weight.shape, x.device):
            # one layout from here on: mixed ones are slow in everything elementwise
            given = x.contiguous() if x.device.type == "cpu" else x
            still = [0] * len(stride)
            result: Tensor = torch.ops.aten.convolution(
                given, weight, bias, stride, padding, dilation, False, still, groups
            )
            return result
        sizes = zip(x.shape[2:], *geometry[:4], strict=True)
        space = [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in sizes]
        rows = geometry.patches(x).mT @ weight.flatten(1).mT
        if bias is not None:
            rows += bias
        return torch.unflatten(rows, 1, space).movedim(-1, 1)  # channels last, which pooling is fast on

    @staticmethod
    def backward(ctx: Any, by_result: Tensor) -> Any:
        return _Adjoint.apply(by_result, ctx.weight, ctx.geometry, ctx.shape), None, None, None


class _Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, by_result: Tensor, weight: Tensor, geometry: Geometry, shape: torch.Size) -> Tensor:
        ctx.geometry, ctx.weight = geometry, weight
        if geometry.patches_are_faster(weight.shape, weight.device):
            columns = weight.flatten(1).mT @ by_result.flatten(2)
            return geometry.fold(columns, by_result.shape[2:], shape[2:])
        _, stride, padding, dilation, groups = geometry
        result: Tensor = torch.ops.aten.convolution_backward(
            by_result,
            by_result.new_empty(shape),
            weight,
            None,
            stride,
            padding,
            dilation,
            False,
            [0] * len(stride),
            groups,
            [True, False, False],
        )[0]
        return result

    @staticmethod
    def backward(ctx: Any, by_adjoint: Tensor) -> Any:
        return _Convolution.apply(by_adjoint, ctx.weight, None, ctx.geometry), None, None, None
