"""The layers whose gradients are known in closed form: dense layers and convolutions.

``n`` samples, ``T`` positions, ``I`` inputs, ``O`` outputs.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_eff.synthesis.features.blocks import ConvolutionBlockUse, PositionBlockUse
from lightning_eff.synthesis.features.uses import ConstantRowUse, LayerUse, RowUse

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


class Layer(ABC):
    """One module that is called once in a pass.

    Args:
        path: Its name in the network.
        module: The module.
    """

    def __init__(self, path: str, module: nn.Module) -> None:
        self.path = path
        dot = f"{path}." if path else ""
        self.shapes = {f"{dot}{name}": tuple(parameter.shape) for name, parameter in module.named_parameters()}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of its blocks."""
        return tuple(self.shapes)

    @abstractmethod
    def use(self, delta: Tensor | None, a: Tensor) -> LayerUse:
        """Describe one call: ``delta`` is the derivative by its output, ``a`` its input."""

    @abstractmethod
    def sample_floats(self, delta: Sequence[int], a: Sequence[int]) -> int:
        """Return how many numbers a sample needs beyond activations, for shapes without the sample axis."""


class LinearLayer(Layer):
    """``nn.Linear``, applied at one position or at several."""

    def __init__(self, path: str, module: nn.Linear) -> None:
        super().__init__(path, module)
        self.weight_shape = module.weight.shape

    def use(self, delta: Tensor | None, a: Tensor) -> LayerUse:
        assert delta is not None
        n, (outputs, inputs) = len(a), self.weight_shape
        rows, deltas = a.reshape(n, -1, inputs), delta.reshape(n, -1, outputs)
        form = PositionBlockUse if _blocks_are_smaller(rows.shape[1], outputs * inputs) else RowUse
        return form(self.names, deltas, rows)

    def sample_floats(self, delta: Sequence[int], a: Sequence[int]) -> int:
        positions = math.prod(a) // self.weight_shape[1]
        return min(positions**2, self.weight_shape.numel()) if positions > 1 else 0


class CollapsedLayer(Layer):
    """The dense layer that ends the network: K equal rows [a; 1], kept as one of them times sqrt(K).

    Args:
        path: Its name in the network.
        module: The layer.
        collapse: Whether to keep one row instead of K.
        drop_bias: Whether to leave the constant coordinate of the bias out.
    """

    def __init__(self, path: str, module: nn.Linear, collapse: bool, drop_bias: bool) -> None:
        super().__init__(path, module)
        outputs, inputs = module.weight.shape
        self._rows, self._value = (1, math.sqrt(outputs)) if collapse else (outputs, 1.0)
        weight, *bias = self.shapes
        self.shapes = {weight: (self._rows, inputs)}
        if bias and not drop_bias:
            self.shapes[bias[0]] = (self._rows,)

    def use(self, delta: Tensor | None, a: Tensor) -> LayerUse:
        return ConstantRowUse(self.names, a.new_full((len(a), 1, self._rows), self._value), a[:, None])

    def sample_floats(self, delta: Sequence[int], a: Sequence[int]) -> int:
        return 0


class ConvolutionLayer(Layer):
    """``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d`` of any stride, dilation and groups, padded with zeros alike."""

    def __init__(self, path: str, module: Convolution) -> None:
        super().__init__(path, module)
        self.weight_shape = module.weight.shape
        self.settings = module.stride, _padding(module)[0], module.dilation
        self.groups = module.groups

    def use(self, delta: Tensor | None, a: Tensor) -> LayerUse:
        assert delta is not None
        if self._by_blocks(delta.shape[2:]):
            return ConvolutionBlockUse(self.names, self.weight_shape, delta, a, *self.settings, self.groups)
        return UnfoldedUse(self.names, self.weight_shape, delta, a, *self.settings)

    def sample_floats(self, delta: Sequence[int], a: Sequence[int]) -> int:
        if self._by_blocks(delta[1:]):
            return self.weight_shape.numel()
        positions = math.prod(delta[1:])
        return positions * (math.prod(self.weight_shape[1:]) + 2 * positions)

    def _by_blocks(self, space: Sequence[int]) -> bool:
        return self.groups > 1 or _blocks_are_smaller(math.prod(space), self.weight_shape.numel())


class UnfoldedUse(RowUse):
    """A convolution as a dense layer on its patches, for few positions and many channels.

    Args:
        names: Name of the weight and, where there is one, of the bias.
        weight_shape: ``(O, I, *kernel)``.
        delta: ``(n, O, *space)``.
        a: ``(n, I, *space)``.
        stride: As in the layer, one number a dimension.
        padding: Zeros on both sides, one number a dimension.
        dilation: As in the layer.
    """

    def __init__(
        self,
        names: Sequence[str],
        weight_shape: torch.Size,
        delta: Tensor,
        a: Tensor,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
    ) -> None:
        self._kernel, self._stride, self._padding, self._dilation = weight_shape[2:], stride, padding, dilation
        self._delta_shape, self._a_shape = delta.shape, a.shape
        dims = len(self._kernel)
        patches = F.pad(a, [size for pad in reversed(padding) for size in (pad, pad)])
        self._padded_shape = patches.shape
        for axis in range(dims):
            span = (self._kernel[axis] - 1) * dilation[axis] + 1
            patches = patches.unfold(2 + axis, span, stride[axis])[..., :: dilation[axis]]
        # (n, I, *space, *kernel) -> (n, T, I * kernel)
        order = [0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims)]
        rows = patches.permute(order).reshape(len(a), -1, weight_shape[1:].numel())
        super().__init__(names, delta.flatten(2).mT.contiguous(), rows)

    def gradients(self, weights: Tensor, by_square_norm: Tensor) -> tuple[Tensor, ...]:
        by_delta, by_rows = super().gradients(weights, by_square_norm)
        space = self._delta_shape[2:]
        patches = by_rows.view(len(by_rows), *space, self._a_shape[1], *self._kernel)
        padded = by_rows.new_zeros(len(by_rows), *self._padded_shape[2:], self._a_shape[1])
        for offset in itertools.product(*map(range, self._kernel)):
            window = [
                slice(at * d, at * d + (size - 1) * s + 1, s)
                for at, d, s, size in zip(offset, self._dilation, self._stride, space, strict=True)
            ]
            padded[(slice(None), *window)] += patches[(..., *offset)]
        inner = [slice(p, p + size) for p, size in zip(self._padding, self._a_shape[2:], strict=True)]
        return by_delta.mT.reshape(self._delta_shape), padded[(slice(None), *inner)].movedim(-1, 1)


def closed_form(path: str, module: nn.Module) -> Layer | None:
    """Return the layer's description, or ``None`` where its gradient is not known in closed form."""
    if type(module) is nn.Linear:
        return LinearLayer(path, module)
    if isinstance(module, Convolution) and type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        before, after = _padding(module)
        if module.padding_mode == "zeros" and before == after:
            return ConvolutionLayer(path, module)
    return None


def _padding(module: Convolution) -> tuple[list[int], list[int]]:
    """Return padding before and behind each dimension, also of ``padding="same"``."""
    around = list(module._reversed_padding_repeated_twice)
    return around[-2::-2], around[::-2]


def _blocks_are_smaller(positions: int, weights: int) -> bool:
    """Whether a per-sample gradient is smaller than the T x T Gram matrices that can replace it."""
    return positions > 1 and weights <= positions * positions
