"""Layers whose weight gradient is a sum over positions: what linear layers and convolutions have in common.

Shapes: ``n`` samples, ``m`` of them in a slice, ``T`` positions; the selected block of the weight has ``R`` rows and
``J`` numbers a row.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from functools import cached_property

import torch
from torch import Tensor

from lightning_eff.privacy.engine.tuning import Plan, Tuner
from lightning_eff.privacy.engine.uses import (
    CHUNK_ELEMENTS,
    KeptInput,
    LayerUse,
    Part,
    block,
    masked_,
    slices,
    square_norm,
    weighted_sum,
    wide,
)
from lightning_eff.privacy.selection.selected import Selection

# gradients [m, *block] of some samples, where possible written to a tensor that is there already
Gradients = Callable[[slice, Tensor | None], Tensor]

# positions beyond which Gram matrices are too inexact in float32, and seldom fast
_MOST_GRAM_POSITIONS = 512
# share of its upper bound under which a squared norm from Gram matrices has lost digits to cancellation
_CANCELLED = 1e-3
# share of active elements under which sparse products are faster than dense ones (a quarter to four tenths, measured)
_SPARSE = 0.25


class WeightUse(LayerUse):
    """A call whose weight gradient is ``sum_t b_t a_t^T`` over T positions, and whose bias gradient ``sum_t b_t``.

    Args:
        weight: None if frozen or dropped.
        bias: ``[O]``, None if frozen or dropped.
        inputs: ``[n, ...]``, the columns that the weight's selection needs; None without a weight.
        samples: n.
        tuner: chooses among the ways to the norms.
    """

    def __init__(
        self, weight: Part | None, bias: Part | None, inputs: Tensor | None, samples: int, tuner: Tuner
    ) -> None:
        super().__init__([weight, bias], samples)
        self._weight = weight
        self._bias = bias
        self._tuner = tuner
        self._inputs = None if weight is None or inputs is None else KeptInput(inputs, weight.name)
        self._gradient: Tensor | None = None
        self._bias_gradients: Tensor | None = None
        # [n, *block], or packed, [n, count]
        self._stored: Tensor | None = None
        self._packed = False

    @property
    @abstractmethod
    def positions(self) -> int:
        """T."""

    @abstractmethod
    def gradient_methods(self) -> dict[str, Gradients]:
        """Return by name the ways to gradients ``[m, *block]`` of the weight; the best guess first.

        They are new and not yet masked.
        """

    @abstractmethod
    def unfolded(self, samples: slice) -> tuple[Tensor, Tensor] | None:
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
        """Everything but the number of samples that decides which way is fastest."""
        # selections of nearly the same size share a plan
        sizes = tuple(size.bit_length() for size in self.selection.block_shape)
        gradient, masked = self.gradient, self.selection.mask is not None
        kind = (type(self), gradient.dtype, gradient.device)
        return (*kind, self.positions, self.selection.shape, sizes, masked, self.sparse)

    @property
    def stored_bytes(self) -> int:
        """Bytes that storing the weight gradients takes more than keeping the output's gradient."""
        kept = self.gradient.numel() * self.gradient.element_size()
        return 4 * self.samples * self.selection.block_shape.numel() - kept

    def keep(self, gradient: Tensor | None, bias_gradients: Tensor | None) -> None:
        """Keep the output's gradient for the weight, ``[n, ...]``, and the bias gradients, ``[n, O]``."""
        if self._weight is not None:
            self._gradient = gradient
        if self._bias is not None and bias_gradients is not None:
            self._bias_gradients = block(wide(bias_gradients), self._bias.selection)

    def per_sample(self, name: str, samples: slice) -> Tensor:
        """Make gradients of the weight, or take those of the bias."""
        if self._bias is not None and name == self._bias.name:
            assert self._bias_gradients is not None
            return self._bias_gradients[samples]
        if self._stored is not None:
            stored = self._stored[samples]
            return torch.stack([self.selection.unpack(one) for one in stored]) if self._packed else stored
        return masked_(next(iter(self.gradient_methods().values()))(samples, None), self.selection)

    def zero_samples(self, index: Tensor) -> None:
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
                total = weighted_sum(factor, self._stored)
                sums[self._weight.name] = self.selection.unpack(total) if self._packed else total
            else:
                sums[self._weight.name] = self.weight_sum(factor)
        return sums

    def weight_norms(self) -> Tensor:
        """Return the squared norms of the weight gradients, ``[n]``."""
        plan = self._tuner.plan(self)
        norms, self._stored = self.run(plan)
        self._packed = plan.method == "sampled"
        if self._stored is not None:
            self._inputs = self._gradient = None
        return norms

    def run(self, plan: Plan) -> tuple[Tensor, Tensor | None]:
        """Follow a plan: squared norms ``[n]``, and gradients if they are to be stored.

        Those are ``[n, *block]``, masked; with the method "sampled" they are packed, ``[n, count]``.
        """
        parts = slices(self.samples, plan.chunk)
        if plan.method == "gram":
            return torch.cat([self._gram_norms(part) for part in parts]), None
        if plan.method == "sampled":
            gradients = self._sampled()
            return square_norm(gradients), gradients if plan.store else None
        make = self.gradient_methods()[plan.method]
        if plan.store and plan.chunk >= self.samples:
            gradients = masked_(make(slice(0, self.samples), None), self.selection)
            return square_norm(gradients), gradients
        norms, stored, place = [], None, None
        if plan.store:
            dtype = torch.promote_types(self.gradient.dtype, torch.float32)
            stored = self.gradient.new_empty(self.samples, *self.selection.block_shape, dtype=dtype)
        for part in parts:
            place = None if stored is None else stored[part]
            gradients = masked_(make(part, place), self.selection)
            norms.append(square_norm(gradients))
            if place is not None and gradients.data_ptr() != place.data_ptr():
                place.copy_(gradients)
        return torch.cat(norms), stored

    def methods(self) -> list[str]:
        """Return the names of the ways to the norms."""
        names = [*self.gradient_methods()]
        if self.unfolded(slice(0, 1)) is None:
            return names
        if self.selection.mask is None and self.positions <= _MOST_GRAM_POSITIONS:
            names.append("gram")
        return [*names, "sampled"] if self.sparse else names

    def product(self, samples: slice, out: Tensor | None) -> Tensor:
        """Multiply what is unfolded: gradients ``[m, *block]``."""
        unfolded = self.unfolded(samples)
        assert unfolded is not None
        return self.multiplied(*unfolded, out)

    def multiplied(self, inputs: Tensor, gradients: Tensor, out: Tensor | None) -> Tensor:
        """Multiply inputs ``[m, T, J]`` and output gradients ``[m, T, R]``: gradients ``[m, *block]``."""
        if out is not None:
            torch.bmm(gradients.mT, inputs, out=out.view(len(out), gradients.size(2), inputs.size(2)))
            return out
        return torch.bmm(gradients.mT, inputs).view(-1, *self.selection.block_shape)

    @property
    def sparse(self) -> bool:
        """Whether so few elements are active that it pays to compute only those."""
        chosen = self.selection
        return chosen.mask is not None and chosen.count < _SPARSE * chosen.block_shape.numel()

    @cached_property
    def compressed(self) -> tuple[Tensor, Tensor]:
        """Where each row's active elements begin, ``[R + 1]``, and their columns in the row, ``[count]``."""
        positions = self.selection.positions
        assert positions is not None
        rows = self.selection.block_shape[0]
        width = self.selection.block_shape.numel() // rows
        starts = torch.searchsorted(positions, torch.arange(0, (rows + 1) * width, width, device=positions.device))
        return starts, positions % width

    def sampled(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Multiply inputs ``[N, J]`` and gradients ``[N, R]`` where the mask is True alone, ``[count]`` each."""
        rows, columns = self.compressed
        shape = self.selection.block_shape
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta", category=UserWarning)
            active = torch.sparse_csr_tensor(
                rows,
                columns,
                torch.zeros(len(columns), dtype=wide(self.gradient).dtype, device=rows.device),
                (shape[0], shape.numel() // shape[0]),
                check_invariants=False,
            )
            return [
                torch.sparse.sampled_addmm(active, gradient.T, inputs, beta=0.0).values() for inputs, gradient in pairs
            ]

    def _sampled(self) -> Tensor:
        """Packed gradients of all samples, ``[n, count]``."""
        parts = []
        for part in slices(self.samples, CHUNK_ELEMENTS // max(1, self.selection.block_shape.numel())):
            unfolded = self.unfolded(part)
            assert unfolded is not None
            parts.extend(self.sampled(zip(*unfolded, strict=True)))
        return torch.stack(parts)

    def _gram_norms(self, samples: slice) -> Tensor:
        """Return ``<a a^T, b b^T>`` for each sample: T x T numbers instead of those of the block."""
        unfolded = self.unfolded(samples)
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
