"""Parameters that meet the samples outside of any layer: class tokens, positions, scales, biases.

A parameter that an elementwise operation broadcasts over the samples is the same as one copy of it a sample: the
gradient of each copy is the sample's gradient. Where a tensor is spread over the samples beforehand
(``class_token.expand(n, -1, -1)``), so are the copies.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_eff.privacy.engine.derived import EXPANSIONS
from lightning_eff.privacy.engine.recording import RULES, Recorder
from lightning_eff.privacy.engine.uses import GradientUse, LayerUse, Part, block, wide

_NAMES = ("add", "sub", "subtract", "mul", "multiply", "div", "divide", "true_divide", "pow", "maximum", "minimum")
_OPERATORS = ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "pow", "rpow")
_ELEMENTWISE = {
    *(getattr(torch, name) for name in (*_NAMES, "rsub", "where", "lerp", "addcmul", "addcdiv", "hypot", "atan2")),
    *(getattr(Tensor, name) for name in (*_NAMES, "where", "lerp", "addcmul", "addcdiv")),
    *(getattr(Tensor, f"{name}_") for name in ("add", "sub", "mul", "div")),
    *(getattr(Tensor, f"__{name}__") for name in (*_OPERATORS, "iadd", "isub", "imul", "itruediv")),
}


def record_elementwise(function: Callable[..., Any], recorder: Recorder, *args: Any, **kwargs: Any) -> Any:
    """Run an elementwise operation with a copy of each parameter for every sample.

    Samples lie along the first dimension of the result. NotImplemented where they do not.
    """
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    shape: torch.Size = torch.broadcast_shapes(*(t.shape for t in tensors))  # type: ignore[no-untyped-call]
    given = [tensor for tensor in tensors if recorder.name_of(tensor) is None]
    rows = shape[0] if shape else 0
    if not rows or rows % recorder.samples or not any(_leads(tensor, shape) for tensor in given):
        return NotImplemented

    def copies(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or recorder.name_of(leaf) is None:
            return leaf
        padded = (1,) * (len(shape) - leaf.ndim) + tuple(leaf.shape)
        if padded[0] == rows:
            return _tap_aligned(recorder, leaf)
        return _tap_copies(recorder, leaf, leaf.detach().view(padded).expand(rows, *padded[1:]))

    args, kwargs = pytree.tree_map(copies, (args, kwargs))
    return function(*args, **kwargs)


def record_concatenation(
    function: Callable[..., Tensor], recorder: Recorder, tensors: Sequence[Tensor], dim: int = 0, **kwargs: Any
) -> Any:
    """Put parameters beside what belongs to the samples; both have the samples first."""
    rows = tensors[0].size(0) if tensors[0].ndim else 0
    along_samples = dim % max(1, tensors[0].ndim + (function is torch.stack)) == 0
    if not rows or rows % recorder.samples or along_samples or any(len(tensor) != rows for tensor in tensors):
        return NotImplemented
    tapped = [tensor if recorder.name_of(tensor) is None else _tap_aligned(recorder, tensor) for tensor in tensors]
    return function(tapped, dim, **kwargs)


def spread(function: Callable[..., Tensor], recorder: Recorder, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Spread ``[1, ..., ...]`` of at least three dimensions to one copy a sample; NotImplemented for others.

    Tensors of fewer dimensions may as well be spread over something else, as many as there are samples by chance; they
    stay one tensor until they meet the samples.
    """
    if not isinstance(tensor, Tensor) or recorder.name_of(tensor) is None or recorder.samples == 1:
        return NotImplemented
    if tensor.ndim < 3 or tensor.size(0) != 1:
        return NotImplemented
    result = function(tensor.detach(), *args, **kwargs)
    if result.ndim != tensor.ndim or result.size(0) != recorder.samples:
        return NotImplemented
    copied = _tap_copies(recorder, tensor, tensor.detach().expand(recorder.samples, *tensor.shape[1:]))
    sizes = args[0] if args and isinstance(args[0], list | tuple) else args
    if kwargs or len(sizes) != tensor.ndim:
        return NotImplemented
    if function is Tensor.repeat or function is torch.tile or function is Tensor.tile:
        return copied.repeat(1, *sizes[1:])
    return copied.expand(recorder.samples, *sizes[1:])


class AlignedUse(LayerUse):
    """A tensor ``[k * n, ...]`` of which rows ``i * k`` to ``i * k + k`` meet sample ``i`` and no other.

    Args:
        part: the tensor.
        samples: n.
    """

    def __init__(self, part: Part | None, samples: int) -> None:
        super().__init__([part], samples)
        self._gradient: Tensor | None = None

    def receive(self, gradient: Tensor) -> None:
        """Keep it."""
        self._gradient = wide(gradient).contiguous()

    def per_sample(self, name: str, samples: slice) -> Tensor:
        """Return what each sample's rows got, zero in all other rows, ``[m, *block]``."""
        assert self._gradient is not None
        rows = self._gradient.view(self.samples, -1, *self._gradient.shape[1:])
        chosen = range(self.samples)[samples]
        gradients = rows.new_zeros(len(chosen), *rows.shape)
        index = torch.arange(len(chosen), device=rows.device)
        gradients[index, index + samples.start] = rows[samples]
        return block(gradients.flatten(1, 2), self.selections[name])

    def zero_samples(self, index: Tensor) -> None:
        """Make their rows zero."""
        assert self._gradient is not None
        rows = self._gradient.view(self.samples, -1, *self._gradient.shape[1:])
        self._gradient = rows.index_fill(0, index, 0).flatten(0, 1)


def _leads(tensor: Tensor, shape: Sequence[int]) -> bool:
    return tensor.ndim == len(shape) and tensor.size(0) == shape[0]


def _tap_copies(recorder: Recorder, parameter: Tensor, copies: Tensor) -> Tensor:
    """Record copies ``[k * n, ...]`` of a parameter, of which every sample has ``k``."""
    part = recorder.part(parameter)

    def compute(gradient: Tensor) -> dict[str, Tensor]:
        assert part is not None
        sums = recorder.split(wide(gradient), "a parameter outside of a layer").sum(1)
        return {part.name: sums.reshape(recorder.samples, *parameter.shape)}

    return recorder.tap(copies, GradientUse([part], recorder.samples, compute))


def _tap_aligned(recorder: Recorder, tensor: Tensor) -> Tensor:
    return recorder.tap(tensor.detach(), AlignedUse(recorder.part(tensor), recorder.samples))


for _function in _ELEMENTWISE:
    RULES[_function] = functools.partial(record_elementwise, _function)
for _function in (torch.cat, torch.concat, torch.concatenate, torch.stack):
    RULES[_function] = functools.partial(record_concatenation, _function)
for _function in (Tensor.expand, Tensor.repeat, Tensor.tile, Tensor.broadcast_to, torch.broadcast_to, torch.tile):
    EXPANSIONS[_function] = functools.partial(spread, _function)
