"""One recorded call of a layer: what it keeps, and the per-sample quantities it can give.

Shapes: ``n`` samples of one physical batch; ``m`` of them in a slice; *block* is the part of a parameter that its
:class:`Selection` cuts out. How a call comes to be recorded is told in ``recording.py``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_eff.privacy.selection.selected import Selection

# per-sample gradients made at a time where nothing better is known: large enough for a matrix product to run well,
# small enough to stay in a processor's cache
CHUNK_ELEMENTS = 1 << 18


class Part(NamedTuple):
    """A parameter by its name in the module, and what of it is active in this step (never nothing)."""

    name: str
    selection: Selection


class LayerUse(ABC):
    """One call of a layer with parameters of which something is active.

    A subclass tells how the gradient of one sample is made (:meth:`per_sample`); norms and sums follow from it in
    chunks of samples. It overrides :meth:`square_norms` and :meth:`clipped_sums` where the layer allows more.

    Args:
        parts: the active parameters of the call; None stands for one that is frozen or wholly dropped.
        samples: n.
    """

    def __init__(self, parts: Sequence[Part | None], samples: int) -> None:
        self.selections: dict[str, Selection] = {part.name: part.selection for part in parts if part is not None}
        self.samples = samples

    @abstractmethod
    def receive(self, gradient: Tensor) -> None:
        """Take the gradient of the loss at the call's output.

        Called at most once, in the backward pass and without grad mode. The tensor belongs to autograd: it must not
        be changed. Keep only what the norms and the sum need.
        """

    @abstractmethod
    def per_sample(self, name: str, samples: slice) -> Tensor:
        """Return the gradients of a parameter's block for some samples, ``[m, *block]``.

        Float32 or wider; zero where the selection's mask is False. Only called after :meth:`receive`.
        """

    @abstractmethod
    def zero_samples(self, index: Tensor) -> None:
        """Make everything that was kept of the samples ``index`` (int64) zero: their gradient is not finite.

        Inputs and gradients belong to others, so this replaces tensors instead of changing them.
        """

    def square_norms(self, names: Collection[str]) -> dict[str, Tensor]:
        """Return the squared norm of each sample's gradient over the active coordinates, ``[n]``, by parameter.

        Args:
            names: the parameters asked for; the others are used several times in the step.
        """
        return {
            name: torch.cat([square_norm(self.per_sample(name, part)) for part in self.chunks(name)]) for name in names
        }

    def clipped_sums(self, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return ``sum_i factors_i * gradient_i`` as block of each parameter; ``factors`` is ``[n]`` by name."""
        sums = {}
        for name in self.selections:
            total: Tensor | None = None
            for part in self.chunks(name):
                gradients = self.per_sample(name, part)
                added = weighted_sum(factors[name][part], gradients)
                total = added if total is None else total.add_(added)
            assert total is not None
            sums[name] = total
        return sums

    def chunks(self, name: str) -> Iterator[slice]:
        """Cut the samples into slices whose per-sample gradients of this parameter are small."""
        return slices(self.samples, CHUNK_ELEMENTS // max(1, math.prod(self.selections[name].block_shape)))


class GradientUse(LayerUse):
    """A call whose per-sample gradients are small: they are made as soon as the output's gradient comes, and kept.

    Args:
        parts: as in :class:`LayerUse`.
        samples: n.
        compute: takes the output's gradient and returns by parameter name the per-sample gradients of the whole
            parameter, ``[n, *shape]``.
    """

    def __init__(
        self, parts: Sequence[Part | None], samples: int, compute: Callable[[Tensor], Mapping[str, Tensor]]
    ) -> None:
        super().__init__(parts, samples)
        self._compute: Callable[[Tensor], Mapping[str, Tensor]] | None = compute
        self._gradients: dict[str, Tensor] = {}

    def receive(self, gradient: Tensor) -> None:
        """Make the gradients and let go of what they were made from."""
        assert self._compute is not None
        gradients = self._compute(gradient)
        self._compute = None
        self._gradients = {name: block(wide(gradients[name]), part) for name, part in self.selections.items()}

    def per_sample(self, name: str, samples: slice) -> Tensor:
        """Return kept gradients, ``[m, *block]``."""
        return self._gradients[name][samples]

    def zero_samples(self, index: Tensor) -> None:
        """Put zeros in their place."""
        self._gradients = {name: kept.index_fill(0, index, 0) for name, kept in self._gradients.items()}

    def square_norms(self, names: Collection[str]) -> dict[str, Tensor]:
        """Square and add, ``[n]`` by name."""
        return {name: square_norm(self._gradients[name]) for name in names}

    def clipped_sums(self, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One product of a vector and a matrix for each parameter."""
        return {name: weighted_sum(factors[name], kept) for name, kept in self._gradients.items()}


class KeptInput:
    """A layer's input until the gradient comes, and the proof that nobody changed it meanwhile.

    Args:
        tensor: the input, or what of it is needed.
        what: the layer, for the error.
    """

    def __init__(self, tensor: Tensor, what: str) -> None:
        self._tensor = tensor.detach()
        self._version = None if tensor.is_inference() else tensor._version
        self._what = what

    def get(self) -> Tensor:
        """Return the input.

        Raises:
            RuntimeError: it was changed in place after the layer had read it.
        """
        if self._version is not None and self._tensor._version != self._version:
            raise RuntimeError(
                f"the input of {self._what} was changed in place after the layer had read it, so its gradient cannot "
                "be computed: use the operation that is not in place (for example relu instead of relu_)"
            )
        return self._tensor

    def without(self, index: Tensor) -> KeptInput:
        """Return a copy ``[n, ...]`` in which the samples ``index`` are zero."""
        return KeptInput(self.get().index_fill(0, index, 0), self._what)


def slices(samples: int, size: int) -> Iterator[slice]:
    """Cut ``samples`` into slices of ``size`` (at least one) samples."""
    size = max(1, size)
    return (slice(start, min(start + size, samples)) for start in range(0, samples, size))


def wide(tensor: Tensor) -> Tensor:
    """Cast to float32 where it is narrower: a norm in bfloat16 can be too small, which breaks the bound."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def block(gradients: Tensor, selection: Selection) -> Tensor:
    """Cut the block out of per-sample gradients ``[m, *shape]`` and make it zero where the mask is False."""
    if selection.rows is not None:
        gradients = cut(gradients, 1, selection.rows)
    if selection.columns is not None:
        gradients = cut(gradients, 2, selection.columns)
    return masked(gradients, selection)


def cut(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    """Take indices of one dimension (not negative): ``tensor.index_select(dim, index)``, up to ten times faster."""
    if dim < 2:
        return tensor.index_select(dim, index)
    # torch is slow beyond the second dimension
    taken = tensor.flatten(0, dim - 1).index_select(1, index)
    return taken.view(*tensor.shape[:dim], len(index), *tensor.shape[dim + 1 :])


def masked(blocks: Tensor, selection: Selection) -> Tensor:
    """Make blocks ``[..., *block]`` zero where the mask is False."""
    mask = selection.block_mask
    # several times faster than torch.where; a dropped coordinate that is not finite takes its sample out
    return blocks if mask is None else blocks * mask


def masked_(blocks: Tensor, selection: Selection) -> Tensor:
    """As :func:`masked`, in place: for blocks that were just made."""
    mask = selection.block_mask
    return blocks if mask is None else blocks.mul_(mask)


def square_norm(gradients: Tensor) -> Tensor:
    """Return the squared norm of each sample, ``[m]`` from ``[m, ...]``."""
    flat = gradients.reshape(len(gradients), 1, -1)
    return torch.bmm(flat, flat.mT).view(-1)


def weighted_sum(factors: Tensor, gradients: Tensor) -> Tensor:
    """Return ``sum_i factors_i * gradients_i``, ``[...]`` from ``[m]`` and ``[m, ...]``."""
    return (factors.to(gradients.dtype) @ gradients.reshape(len(gradients), -1)).view(gradients.shape[1:])
