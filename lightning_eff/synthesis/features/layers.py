"""The layers whose gradients are known in closed form: dense layers and convolutions.

``n`` samples, ``T`` positions, ``I`` inputs, ``O`` outputs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from lightning_eff.synthesis.features.blocks import ConvolutionBlockUse, PatchBlockUse, PositionBlockUse
from lightning_eff.synthesis.features.patches import Geometry, convolve
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
        """Return how many numbers a sample needs beyond those of dense layers, for shapes without the sample axis."""


class LinearLayer(Layer):
    """``nn.Linear``, applied at one position or at several."""

    def __init__(self, path: str, module: nn.Linear) -> None:
        super().__init__(path, module)
        self.weight_shape = module.weight.shape

    def use(self, delta: Tensor | None, a: Tensor) -> LayerUse:
        """Describe one call."""
        assert delta is not None
        n, (outputs, inputs) = len(a), self.weight_shape
        rows, deltas = a.reshape(n, -1, inputs), delta.reshape(n, -1, outputs)
        form = PositionBlockUse if _blocks_are_smaller(rows.shape[1], outputs * inputs) else RowUse
        return form(self.names, deltas, rows)

    def sample_floats(self, delta: Sequence[int], a: Sequence[int]) -> int:
        """Return how many numbers a sample needs."""
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
        """Describe one call."""
        return ConstantRowUse(self.names, a.new_full((len(a), 1, self._rows), self._value), a[:, None])

    def sample_floats(self, delta: Sequence[int], a: Sequence[int]) -> int:
        """Return how many numbers a sample needs."""
        return 0


class ConvolutionLayer(Layer):
    """``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d`` of any stride, dilation and groups, padded with zeros alike."""

    def __init__(self, path: str, module: Convolution) -> None:
        super().__init__(path, module)
        self.weight_shape = module.weight.shape
        padding = tuple(_padding(module)[0])
        self.geometry = Geometry(module.kernel_size, module.stride, padding, module.dilation, module.groups)

    def run(self, module: nn.Module, input: Tensor) -> Tensor:
        """Do what the module does; the name of the argument is that of the module."""
        assert isinstance(module, Convolution)
        return convolve(input, module.weight, module.bias, self.geometry)

    def use(self, delta: Tensor | None, a: Tensor) -> LayerUse:
        """Describe one call."""
        assert delta is not None
        if not self._by_blocks(delta.shape[2:]):
            return UnfoldedUse(self.names, self.geometry, delta, a)
        if self.geometry.patches_are_faster(self.weight_shape, a.device):
            return PatchBlockUse(self.names, self.geometry, delta, a)
        return ConvolutionBlockUse(self.names, self.weight_shape, self.geometry, delta, a)

    def sample_floats(self, delta: Sequence[int], a: Sequence[int]) -> int:
        """Return how many numbers a sample needs."""
        activations = math.prod(delta) + math.prod(a)
        if self._by_blocks(delta[1:]):
            return activations + self.weight_shape.numel()
        positions = math.prod(delta[1:])
        return activations + positions * (math.prod(self.weight_shape[1:]) + 2 * positions)

    def _by_blocks(self, space: Sequence[int]) -> bool:
        return self.geometry.groups > 1 or _blocks_are_smaller(math.prod(space), self.weight_shape.numel())


class UnfoldedUse(RowUse):
    """A convolution as a dense layer on its patches, for few positions and many channels.

    Args:
        names: Name of the weight and, where there is one, of the bias.
        geometry: Where the layer reads.
        delta: ``(n, O, *space)``.
        a: ``(n, I, *space)``.
    """

    def __init__(self, names: Sequence[str], geometry: Geometry, delta: Tensor, a: Tensor) -> None:
        self._geometry, self._delta_shape, self._a_shape = geometry, delta.shape, a.shape
        super().__init__(names, delta.flatten(2).mT.contiguous(), geometry.patches(a).mT.contiguous())

    def gradients(self, weights: Tensor, by_square_norm: Tensor) -> tuple[Tensor, ...]:
        """Return the derivatives by delta and by the input."""
        by_delta, by_rows = super().gradients(weights, by_square_norm)
        by_a = self._geometry.fold(by_rows.mT, self._delta_shape[2:], self._a_shape[2:])
        return by_delta.mT.reshape(self._delta_shape), by_a


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
