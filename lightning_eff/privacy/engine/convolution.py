"""Convolutions in one, two and three dimensions.

The gradients of m samples are one grouped convolution's weight gradient, with the samples folded into the groups. Or
the input is unfolded into one patch a position, after which a convolution is a linear layer with T positions.

Shapes: ``n`` samples of ``k`` images each (k = 1 but for layers that work on several images of one sample), ``C``
input and ``O`` output channels, ``R`` and ``J`` of them selected, ``g`` groups, ``S`` and ``L`` input and output sizes.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_eff.privacy.engine.recording import Recorder, rule
from lightning_eff.privacy.engine.tuning import Tuner
from lightning_eff.privacy.engine.uses import Part, block, cut, masked_, wide
from lightning_eff.privacy.engine.weights import Gradients, WeightUse, scaled_pair


@rule(F.conv1d, F.conv2d, F.conv3d)
def record_convolution(
    recorder: Recorder,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Any:
    """Record ``input [n, C, *S]`` with ``weight [O, C / g, *K]``."""
    spatial = weight.ndim - 2
    if input.ndim == spatial + 1:
        # one image without a batch dimension
        output = record_convolution(recorder, input.unsqueeze(0), weight, bias, stride, padding, dilation, groups)
        return output.squeeze(0)
    stride, dilation = _each(stride, spatial), _each(dilation, spatial)
    input = recorder.cast(input)
    if isinstance(padding, str):
        input, padding = _padded(input, padding, weight.shape[2:], dilation)
    padding = _each(padding, spatial)
    function = (F.conv1d, F.conv2d, F.conv3d)[spatial - 1]
    output = function(
        input, recorder.detached(weight), recorder.detached(bias), list(stride), list(padding), list(dilation), groups
    )
    parts = recorder.part(weight), recorder.part(bias)
    name = next((part.name for part in parts if part is not None), None)
    if name is None:
        return output
    use = ConvolutionUse(
        *parts, recorder.split(input, name), output.shape[2:], stride, padding, dilation, groups, recorder.tuner
    )
    return recorder.tap(output, use)


class ConvolutionUse(WeightUse):
    """A call of a convolution.

    Args:
        weight: ``[O, C / g, *K]``, None if frozen or dropped.
        bias: ``[O]``, None if frozen or dropped.
        inputs: ``[n, k, C, *S]``; the gradient that comes is ``[n * k, O, *L]``.
        output_size: L.
        stride: by dimension, as padding and dilation.
        padding: zeros on either side.
        dilation: of the kernel.
        groups: g.
        tuner: chooses.
    """

    def __init__(
        self,
        weight: Part | None,
        bias: Part | None,
        inputs: Tensor,
        output_size: Sequence[int],
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        groups: int,
        tuner: Tuner,
    ) -> None:
        samples = inputs.size(0)
        # with groups, rows and columns are cut out of the gradient instead
        self._cut = groups == 1
        if weight is not None and self._cut and weight.selection.columns is not None:
            inputs = cut(inputs, 2, weight.selection.columns)
        super().__init__(weight, bias, inputs, samples, tuner)
        self._output_size = tuple(output_size)
        self._images = inputs.size(1)
        self._geometry = (stride, padding, dilation)
        self._groups = groups

    @property
    def positions(self) -> int:
        """T, those of all images of a sample."""
        return self._images * math.prod(self._output_size)

    @property
    def key(self) -> tuple[Hashable, ...]:
        """The geometry as well."""
        return (*super().key, self._geometry, self._groups, self.inputs.shape[1:])

    def receive(self, gradient: Tensor) -> None:
        """Keep the selected rows, ``[n, k, R, *L]``."""
        gradient = gradient.view(self.samples, self._images, *gradient.shape[1:])
        kept = gradient
        if self._weight is not None and self._cut and self.selection.rows is not None:
            kept = cut(gradient, 2, self.selection.rows)
        self.keep(kept, None if self._bias is None else wide(gradient).transpose(1, 2).flatten(2).sum(2))

    def gradient_methods(self) -> dict[str, Gradients]:
        """Fold, or unfold and multiply."""
        if not self._cut:
            return {"fold": self.fold}
        return {"fold": self.fold, "product": self.product, "product of rows": self.product_of_rows}

    def unfolded(self, samples: slice) -> tuple[Tensor, Tensor] | None:
        """Return patches ``[m, k * L, J * K]`` and gradients ``[m, k * L, R]``."""
        if not self._cut:
            return None
        inputs, gradient = wide(self.inputs[samples]), wide(self.gradient[samples])
        patches = self._patches(inputs.flatten(0, 1))
        if self._images == 1:
            return patches.mT, gradient.reshape(len(gradient), -1, self.positions).mT
        patches = patches.view(*inputs.shape[:2], -1, self.positions // self._images)
        return patches.transpose(2, 3).flatten(1, 2), gradient.flatten(3).transpose(2, 3).flatten(1, 2)

    def product_of_rows(self, samples: slice, out: Tensor | None) -> Tensor:
        """As the product, of patches that are copied with the positions first: faster for large kernels."""
        inputs, gradient = wide(self.inputs[samples]), wide(self.gradient[samples])
        patches = self._patches(inputs.flatten(0, 1), rows=True)
        patches = patches.view(len(inputs), self.positions, -1)
        return self.multiplied(patches, gradient.flatten(3).transpose(2, 3).flatten(1, 2), out)

    def fold(self, samples: slice, out: Tensor | None = None) -> Tensor:
        """Make m samples groups of one convolution: gradients ``[m, *block]``."""
        inputs, gradient = wide(self.inputs[samples]), wide(self.gradient[samples])
        many = len(inputs)
        # [m, k, C, ...] -> [k, m * C, ...]
        inputs, gradient = (side.transpose(0, 1).flatten(1, 2) for side in (inputs, gradient))
        gradients = self._weight_gradient(inputs, gradient, many * self._groups)
        gradients = gradients.view(many, -1, *gradients.shape[1:])
        return gradients if self._cut else self._block(gradients)

    def weight_sum(self, factors: Tensor) -> Tensor:
        """The convolution's own weight gradient, of scaled gradients."""
        inputs, gradient = scaled_pair(factors, self.inputs, self.gradient)
        total = self._weight_gradient(inputs.flatten(0, 1), gradient.flatten(0, 1), self._groups)
        return masked_(total, self.selection) if self._cut else self._block(total.unsqueeze(0)).squeeze(0)

    def _block(self, gradients: Tensor) -> Tensor:
        return block(gradients, self.selection)

    def _weight_gradient(self, inputs: Tensor, gradient: Tensor, groups: int) -> Tensor:
        """Return ``[channels of gradient, channels of inputs / groups, *K]``."""
        stride, padding, dilation = self._geometry
        kernel = self.selection.shape[2:]
        shape = (gradient.size(1), inputs.size(1) // groups, *kernel)
        # only its shape is read
        weight = inputs.new_empty(1).expand(shape)
        gradients: tuple[Tensor | None, ...] = torch.ops.aten.convolution_backward(
            gradient,
            inputs,
            weight,
            None,
            stride,
            padding,
            dilation,
            False,
            [0] * len(kernel),
            groups,
            [False, True, False],
        )
        total = gradients[1]
        assert total is not None
        return total

    def _patches(self, images: Tensor, rows: bool = False) -> Tensor:
        """Copy what each position sees, ``[images, J * K, L]``, or ``[images, L, J * K]`` in rows."""
        stride, padding, dilation = self._geometry
        images = F.pad(images, [side for size in reversed(padding) for side in (size, size)]).contiguous()
        batch, channel, *steps = images.stride()
        kernel = (images.size(1), *self.selection.shape[2:])
        within = (channel, *(step * apart for step, apart in zip(steps, dilation, strict=True)))
        between = tuple(step * apart for step, apart in zip(steps, stride, strict=True))
        positions = math.prod(self._output_size)
        if rows:
            windows = images.as_strided((len(images), *self._output_size, *kernel), (batch, *between, *within))
            return windows.reshape(len(images), positions, -1)
        windows = images.as_strided((len(images), *kernel, *self._output_size), (batch, *within, *between))
        return windows.reshape(len(images), -1, positions)


def _each(value: int | Sequence[int], dimensions: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * dimensions
    return tuple(value) * dimensions if len(value) == 1 else tuple(value)


def _padded(
    input: Tensor, padding: str, kernel: Sequence[int], dilation: Sequence[int]
) -> tuple[Tensor, tuple[int, ...]]:
    """Turn ``"valid"`` and ``"same"`` into numbers; pad at once where the two sides differ."""
    if padding == "valid":
        return input, (0,) * len(kernel)
    totals = [apart * (size - 1) for size, apart in zip(kernel, dilation, strict=True)]
    if all(total % 2 == 0 for total in totals):
        return input, tuple(total // 2 for total in totals)
    sides = [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
    return F.pad(input, sides), (0,) * len(kernel)
