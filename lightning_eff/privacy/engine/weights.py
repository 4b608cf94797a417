"""Layers whose weight gradient is a sum over positions: what linear layers and convolutions have in common.

Shapes: ``n`` examples, ``m`` of them in a slice, ``T`` positions; the selected block of the weight has ``R`` rows and
``J`` numbers a row.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Hashable, Mapping

import torch
from torch import Tensor

from lightning_eff.privacy.engine.tuning import Plan, Tuner
from lightning_eff.privacy.engine.uses import (
    KeptInput,
    LayerUse,
    Part,
    block,
    masked,
    slices,
    square_norm,
    weighted_sum,
    wide,
)
from lightning_eff.privacy.selection.selected import Selection

# gradients [m, *block] of some examples, where possible written to a tensor that is there already
Gradients = Callable[[slice, Tensor | None], Tensor]

# positions beyond which Gram matrices are too inexact in float32, and seldom fast
_MOST_GRAM_POSITIONS = 512
# share of its upper bound under which a squared norm from Gram matrices has lost digits to cancellation
_CANCELLED = 1e-3


class WeightUse(LayerUse):
    """A call whose weight gradient is ``sum_t b_t a_t^T`` over T positions, and whose bias gradient ``sum_t b_t``.

    Args:
        weight: None if frozen or dropped.
        bias: ``[O]``, None if frozen or dropped.
        inputs: ``[n, ...]``, the columns that the weight's selection needs; None without a weight.
        examples: n.
        tuner: chooses among the ways to the norms.
    """

    def __init__(
        self, weight: Part | None, bias: Part | None, inputs: Tensor | None, examples: int, tuner: Tuner
    ) -> None:
        super().__init__([weight, bias], examples)
        self._weight = weight
        self._bias = bias
        self._tuner = tuner
        self._inputs = None if weight is None or inputs is None else KeptInput(inputs, weight.name)
        self._gradient: Tensor | None = None
        self._bias_gradients: Tensor | None = None
        self._stored: Tensor | None = None

    @property
    @abstractmethod
    def positions(self) -> int:
        """T."""

    @abstractmethod
    def gradient_methods(self) -> dict[str, Gradients]:
        """Return by name the ways to gradients ``[m, *block]`` of the weight, not yet masked; the best guess first."""

    @abstractmethod
    def unfolded(self, examples: slice) -> tuple[Tensor, Tensor] | None:
        """Return inputs ``[m, T, J]`` and output gradients ``[m, T, R]``; None where the layer has no such form."""

    @abstractmethod
    def weight_sum(self, factors: Tensor) -> Tensor:
        """Return the weighted sum of the weight gradients as a block, masked; ``factors`` is ``[n]``."""

    @property
    def selection(self) -> Selection:
        """The selection of the weight."""
        assert self._weight is not None
        return self._weight.selection

    @property
    def inputs(self) -> Tensor:
        """The kept input, ``[n, ...]``."""
        assert self._inputs is not None
        return self._inputs.get()

    @property
    def gradient(self) -> Tensor:
        """What is kept of the output's gradient, ``[n, ...]``."""
        assert self._gradient is not None
        return self._gradient

    @property
    def key(self) -> tuple[Hashable, ...]:
        """Everything but the number of examples that decides which way is fastest."""
        # selections of nearly the same size share a plan
        sizes = tuple(size.bit_length() for size in self.selection.block_shape)
        gradient, mask = self.gradient, self.selection.mask is not None
        return (type(self), self.positions, self.selection.shape, sizes, mask, gradient.dtype, gradient.device)

    @property
    def stored_bytes(self) -> int:
        """Bytes that storing the weight gradients takes more than keeping the output's gradient."""
        kept = self.gradient.numel() * self.gradient.element_size()
        return 4 * self.examples * self.selection.block_shape.numel() - kept

    def keep(self, gradient: Tensor | None, bias_gradients: Tensor | None) -> None:
        """Keep the output's gradient for the weight, ``[n, ...]``, and the bias gradients, ``[n, O]``."""
        if self._weight is not None:
            self._gradient = gradient
        if self._bias is not None and bias_gradients is not None:
            self._bias_gradients = block(wide(bias_gradients), self._bias.selection)

    def per_sample(self, name: str, examples: slice) -> Tensor:
        """Make gradients of the weight, or take those of the bias."""
        if self._bias is not None and name == self._bias.name:
            assert self._bias_gradients is not None
            return self._bias_gradients[examples]
        if self._stored is not None:
            return self._stored[examples]
        return masked(next(iter(self.gradient_methods().values()))(examples, None), self.selection)

    def zero_examples(self, index: Tensor) -> None:
        """Zero the gradients, and the inputs too: 0 * inf is not 0."""
        if self._bias_gradients is not None:
            self._bias_gradients = self._bias_gradients.index_fill(0, index, 0)
        if self._stored is not None:
            self._stored = self._stored.index_fill_(0, index, 0)
        if self._gradient is not None:
            self._gradient = self._gradient.index_fill(0, index, 0)
        if self._inputs is not None:
            self._inputs = self._inputs.without(index)

    def square_norms(self, names: Collection[str]) -> dict[str, Tensor]:
        """Go the way that the tuner chooses, and store the weight gradients if that is the plan."""
        norms = {}
        if self._bias is not None and self._bias.name in names:
            assert self._bias_gradients is not None
            norms[self._bias.name] = square_norm(self._bias_gradients)
        if self._weight is not None and self._weight.name in names:
            norms[self._weight.name] = self.weight_norms()
        return norms

    def clipped_sums(self, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sum what is stored, or make the sum from input and scaled gradient."""
        sums = {}
        if self._bias is not None:
            assert self._bias_gradients is not None
            sums[self._bias.name] = weighted_sum(factors[self._bias.name], self._bias_gradients)
        if self._weight is not None:
            factor = factors[self._weight.name]
            if self._stored is not None:
                sums[self._weight.name] = weighted_sum(factor, self._stored)
            else:
                sums[self._weight.name] = self.weight_sum(factor)
        return sums

    def weight_norms(self) -> Tensor:
        """Return the squared norms of the weight gradients, ``[n]``."""
        norms, self._stored = self.run(self._tuner.plan(self))
        if self._stored is not None:
            self._inputs = self._gradient = None
        return norms

    def run(self, plan: Plan) -> tuple[Tensor, Tensor | None]:
        """Follow a plan: squared norms ``[n]``, and gradients ``[n, *block]``, masked, if they are to be stored."""
        parts = slices(self.examples, plan.chunk)
        if plan.method == "gram":
            return torch.cat([self._gram_norms(part) for part in parts]), None
        make = self.gradient_methods()[plan.method]
        if plan.store and plan.chunk >= self.examples:
            gradients = masked(make(slice(0, self.examples), None), self.selection)
            return square_norm(gradients), gradients
        norms, stored, place = [], None, None
        if plan.store:
            dtype = torch.promote_types(self.gradient.dtype, torch.float32)
            stored = self.gradient.new_empty(self.examples, *self.selection.block_shape, dtype=dtype)
        for part in parts:
            place = None if stored is None else stored[part]
            made = make(part, place)
            gradients = masked(made, self.selection)
            norms.append(square_norm(gradients))
            if place is not None and gradients.data_ptr() != place.data_ptr():
                place.copy_(gradients)
        return torch.cat(norms), stored

    def methods(self) -> list[str]:
        """Return the names of the ways to the norms."""
        gram = self.selection.mask is None and self.positions <= _MOST_GRAM_POSITIONS
        return [*self.gradient_methods(), *(["gram"] if gram and self.unfolded(slice(0, 1)) is not None else [])]

    def product(self, examples: slice, out: Tensor | None) -> Tensor:
        """Multiply what is unfolded: gradients ``[m, *block]``."""
        unfolded = self.unfolded(examples)
        assert unfolded is not None
        return self.multiplied(*unfolded, out)

    def multiplied(self, inputs: Tensor, gradients: Tensor, out: Tensor | None) -> Tensor:
        """Multiply inputs ``[m, T, J]`` and output gradients ``[m, T, R]``: gradients ``[m, *block]``."""
        if out is not None:
            torch.bmm(gradients.mT, inputs, out=out.view(len(out), gradients.size(2), inputs.size(2)))
            return out
        return torch.bmm(gradients.mT, inputs).view(-1, *self.selection.block_shape)

    def _gram_norms(self, examples: slice) -> Tensor:
        """Return ``<a a^T, b b^T>`` for each example: T x T numbers instead of those of the block."""
        unfolded = self.unfolded(examples)
        assert unfolded is not None
        inputs, gradients = unfolded
        left, right = torch.bmm(inputs, inputs.mT), torch.bmm(gradients, gradients.mT)
        norms = torch.bmm(left.view(len(left), 1, -1), right.view(len(right), -1, 1)).view(-1)
        lengths = left.diagonal(dim1=1, dim2=2) * right.diagonal(dim1=1, dim2=2)
        # where positions cancel each other, the difference of large numbers can be too small, which breaks the bound
        doubtful = (norms < _CANCELLED * lengths.sqrt().sum(1).square()).nonzero().squeeze(1)
        if len(doubtful):
            norms[doubtful] = square_norm(torch.bmm(gradients[doubtful].mT, inputs[doubtful]))
        return norms


def scaled_pair(factors: Tensor, inputs: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Multiply the smaller of two tensors ``[n, ...]`` by ``factors`` ``[n]``; both in float32 or wider."""
    inputs, gradient = wide(inputs), wide(gradient)
    if inputs.numel() < gradient.numel():
        return inputs * _column(factors, inputs), gradient
    return inputs, gradient * _column(factors, gradient)


def _column(factors: Tensor, like: Tensor) -> Tensor:
    return factors.to(like.dtype).view(-1, *[1] * (like.ndim - 1))
