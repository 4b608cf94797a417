"""What one layer contributes to the gradients of n samples, kept as factors and never written out.

The gradient of a dense layer is delta a^T (arXiv 2303.01687, features of dense layers), summed over positions where a
layer is applied to several. Its norm, class sums, inner products, and the derivative of all of them follow from delta
and a.

``n`` samples, ``T`` positions, ``I`` inputs, ``O`` outputs, ``C`` classes, ``P`` stored coordinates.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor

Backend = Literal["auto", "kernel", "dense"]
TOGETHER = 400_000
"""Weights of a layer up to which all classes are taken in one call; larger blocks are worked on while in cache."""


class Part(NamedTuple):
    """The samples ``start:stop`` of one class, and what the objective asks of them.

    The objective sums, over parts, ``attract * <S_c, E> + repel * ||E||^2`` with S_c the target's class sum and E the
    sum of the weighted gradients of the part.
    """

    label: int
    start: int
    stop: int
    attract: float = 0.0
    repel: float = 0.0


class Pull(NamedTuple):
    """Terms of the objective by part, and their derivative with respect to the weights of the samples."""

    cross: Tensor
    """``<S_c, E>``, one for each part."""
    square: Tensor
    """``||E||^2``, one for each part."""
    by_weight: Tensor | None
    """``(n,)``; ``None`` where no gradient was asked for."""


class LayerUse(ABC):
    """Gradients of one layer's parameters for n samples.

    Args:
        names: Names of the blocks it fills, in order; the shapes are those of the tensors given to it by name.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)

    @abstractmethod
    def square_norms(self) -> Tensor:
        """Return ``(n,)`` squared norms of the gradients."""

    def aligned_square_norms(self) -> Tensor | None:
        """Return ``(n,)`` squared norms that the gradients had if all positions pulled the same way.

        They bound the squared norms, and rounding of those is relative to them: where they are much larger, positions
        cancel. ``None`` where squared norms are not worked out from positions. No derivative.
        """
        return None

    @abstractmethod
    def double(self) -> Self:
        """Return the same gradients, to be worked on in float64."""

    @abstractmethod
    def per_sample(self) -> Tensor:
        """Return the gradients ``(n, P)`` written out, block after block."""

    @abstractmethod
    def gram(self, other: LayerUse) -> Tensor:
        """Return ``(n, n2)`` inner products with the gradients of the same layer for other samples."""

    @abstractmethod
    def add_sums(self, weights: Tensor, parts: Sequence[Part], sums: Mapping[str, Tensor]) -> None:
        """Add to ``sums[name][label]`` the gradients of each part, weighted by ``weights`` ``(n,)``."""

    @abstractmethod
    def pull(
        self, weights: Tensor, parts: Sequence[Part], target: Mapping[str, Tensor], backend: Backend, derive: bool
    ) -> Pull:
        """Work out the objective's terms of this layer; with ``derive`` also what :meth:`gradients` needs."""

    @abstractmethod
    def gradients(self, weights: Tensor, by_square_norm: Tensor) -> tuple[Tensor, ...]:
        """Return the objective's derivative with respect to the tensors the use was made of.

        Called once, after :meth:`pull`. ``by_square_norm`` ``(n,)`` is its derivative with respect to squared norms.
        """


class RowUse(LayerUse):
    """A dense layer's delta and a, or those of another layer that is one after its inputs were unfolded.

    Args:
        names: Name of the weight and, where there is one, of the bias.
        delta: ``(n, T, O)`` derivative of the outputs' sum with respect to the layer's output.
        a: ``(n, T, I)`` input of the layer.
    """

    def __init__(self, names: Sequence[str], delta: Tensor, a: Tensor) -> None:
        super().__init__(names)
        self.delta, self.a = delta, a
        self.dtype = a.dtype
        self.has_bias = len(self.names) == 2
        self._by_u: Tensor | None = None
        self._by_a: Tensor | None = None

    @property
    def positions(self) -> int:
        """Positions T of a sample."""
        return self.a.shape[1]

    def square_norms(self) -> Tensor:
        """Return ``(n,)`` squared norms: products of factors at one position, of Gram matrices at several."""
        if self.positions == 1:
            self._a_square = _square_lengths(self.a, self.dtype) + float(self.has_bias)
            self._delta_square = _square_lengths(self.delta, self.dtype)
            return self._a_square * self._delta_square
        # T x T Gram matrices: cheaper than the gradient where T * T < O * I
        delta, a = self.delta.to(self.dtype), self.a.to(self.dtype)
        self._a_gram = a @ a.mT + float(self.has_bias)
        self._delta_gram = delta @ delta.mT
        return (self._a_gram * self._delta_gram).sum((1, 2))

    def aligned_square_norms(self) -> Tensor | None:
        """Return the square of the summed lengths of the positions' gradients."""
        if self.positions == 1:
            return None
        delta, a = (torch.linalg.vector_norm(t.detach(), dim=2, dtype=self.dtype) for t in (self.delta, self.a))
        aligned: Tensor = (torch.sqrt(a.square_() + float(self.has_bias)) * delta).sum(1).square_()
        return aligned

    def double(self) -> Self:
        """Return a copy that works in float64; its factors are widened where they are used."""
        other = copy.copy(self)
        other.dtype = torch.float64
        return other

    def per_sample(self) -> Tensor:
        """Return the gradients, ``(n, P)``."""
        delta = self.delta.to(self.dtype)
        weight = (delta.mT @ self.a.to(self.dtype)).flatten(1)
        return torch.cat([weight, delta.sum(1)], 1) if self.has_bias else weight

    def gram(self, other: LayerUse) -> Tensor:
        """Return ``(n, n2)`` inner products of gradients."""
        assert isinstance(other, RowUse)
        if self.positions > 1:
            return self.per_sample() @ other.per_sample().mT
        inputs = self.a[:, 0] @ other.a[:, 0].mT + float(self.has_bias)
        return inputs * (self.delta[:, 0] @ other.delta[:, 0].mT)

    def add_sums(self, weights: Tensor, parts: Sequence[Part], sums: Mapping[str, Tensor]) -> None:
        """Add the weighted gradients of each part to its class, by one matrix product."""
        for part in parts:
            rows = slice(part.start, part.stop)
            u = (self.delta[rows] * weights[rows, None, None]).flatten(0, 1)
            a = self.a[rows].flatten(0, 1).to(u.dtype)
            weight = sums[self.names[0]][part.label].flatten(1)
            if weight.dtype == u.dtype:
                weight.addmm_(u.mT, a)
            else:
                weight += u.mT @ a
            if self.has_bias:
                sums[self.names[1]][part.label] += u.sum(0)

    def pull(
        self, weights: Tensor, parts: Sequence[Part], target: Mapping[str, Tensor], backend: Backend, derive: bool
    ) -> Pull:
        """Work out the terms, and their derivative by the rows of the weighted delta and of a."""
        u = (self.delta * weights[:, None, None]).flatten(0, 1)
        a = self.a.flatten(0, 1).to(self.dtype)
        if derive:
            self._by_u, self._by_a = torch.empty_like(u), torch.empty_like(a)
        small = u.shape[1] * a.shape[1] <= TOGETHER
        if backend != "dense" and small and _alike(parts) and _kernel_is_cheaper(u[: len(u) // len(parts)], a):
            terms = self._pull_together(u, a, parts, target)
            return Pull(*terms, self._by_weight())
        cross, square = [], []
        for part in parts:
            rows = slice(part.start * self.positions, part.stop * self.positions)
            wanted = target[self.names[0]][part.label].flatten(1)
            bias = target[self.names[1]][part.label] if self.has_bias else None
            by_u = self._by_u[rows] if self._by_u is not None else None
            by_a = self._by_a[rows] if self._by_a is not None else None
            kernel = backend == "kernel" or (backend == "auto" and _kernel_is_cheaper(u[rows], a[rows]))
            form = _kernel_form if kernel else _dense_form
            terms = form(u[rows], a[rows], wanted, bias, part, by_u, by_a)
            cross.append(terms[0])
            square.append(terms[1])
        return Pull(torch.stack(cross), torch.stack(square), self._by_weight())

    def _by_weight(self) -> Tensor | None:
        if self._by_u is None:
            return None
        return (self._by_u * self.delta.flatten(0, 1)).sum(1).view(-1, self.positions).sum(1)

    def _pull_together(
        self, u: Tensor, a: Tensor, parts: Sequence[Part], target: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The kernel form of all parts at once: for small layers, where the time goes into calls."""
        labels = slice(parts[0].label, parts[-1].label + 1)
        wanted = target[self.names[0]][labels].flatten(2)
        u, a = u.view(len(parts), -1, u.shape[1]), a.view(len(parts), -1, a.shape[1])
        if self.has_bias:
            seen = torch.baddbmm(target[self.names[1]][labels, None], a, wanted.mT)
        else:
            seen = torch.bmm(a, wanted.mT)
        a_gram = torch.bmm(a, a.mT).add_(float(self.has_bias))
        u_gram = torch.bmm(u, u.mT)
        cross, square = (u * seen).sum((1, 2)), (a_gram * u_gram).sum((1, 2))
        if self._by_u is not None and self._by_a is not None:
            attract = u.new_tensor([part.attract for part in parts])[:, None, None]
            repel = u.new_tensor([2 * part.repel for part in parts])[:, None, None]
            by_u, by_a = self._by_u.view_as(u), self._by_a.view_as(a)
            torch.baddbmm(seen.mul_(attract), a_gram.mul_(repel), u, out=by_u)
            torch.bmm(u * attract, wanted, out=by_a)
            by_a.baddbmm_(u_gram.mul_(repel), a)
        return cross, square

    def gradients(self, weights: Tensor, by_square_norm: Tensor) -> tuple[Tensor, ...]:
        """Return the derivatives by delta and a."""
        assert self._by_u is not None
        assert self._by_a is not None
        by_delta = self._by_u.view_as(self.delta).mul_(weights[:, None, None])
        by_a = self._by_a.view_as(self.a)
        twice = 2 * by_square_norm
        if self.positions == 1:
            by_delta.addcmul_(self.delta, (twice * self._a_square)[:, None, None])
            by_a.addcmul_(self.a, (twice * self._delta_square)[:, None, None])
        else:
            by_delta.baddbmm_(self._a_gram * twice[:, None, None], self.delta.to(self.dtype))
            by_a.baddbmm_(self._delta_gram * twice[:, None, None], self.a.to(self.dtype))
        return by_delta, by_a


class ConstantRowUse(RowUse):
    """A dense layer whose delta is a constant: only its input has a derivative."""

    def gradients(self, weights: Tensor, by_square_norm: Tensor) -> tuple[Tensor, ...]:
        """Return the derivative by a."""
        return super().gradients(weights, by_square_norm)[1:]


class DoubleUse(LayerUse):
    """Another use, worked on in float64; what goes in and comes out has its precision.

    Args:
        use: The use.
    """

    def __init__(self, use: RowUse) -> None:
        super().__init__(use.names)
        self._dtype, self._use = use.dtype, use.double()

    def square_norms(self) -> Tensor:
        """Return ``(n,)`` squared norms of the gradients."""
        return self._use.square_norms().to(self._dtype)

    def aligned_square_norms(self) -> Tensor | None:
        """Return ``(n,)`` squared norms without cancellation."""
        aligned = self._use.aligned_square_norms()
        return None if aligned is None else aligned.to(self._dtype)

    def double(self) -> Self:
        """Return itself."""
        return self

    def per_sample(self) -> Tensor:
        """Return the gradients, ``(n, P)``."""
        return self._use.per_sample().to(self._dtype)

    def gram(self, other: LayerUse) -> Tensor:
        """Return ``(n, n2)`` inner products of gradients."""
        return self._use.gram(other.double()).to(self._dtype)

    def add_sums(self, weights: Tensor, parts: Sequence[Part], sums: Mapping[str, Tensor]) -> None:
        """Add the weighted gradients of each part to its class."""
        self._use.add_sums(weights.double(), parts, sums)

    def pull(
        self, weights: Tensor, parts: Sequence[Part], target: Mapping[str, Tensor], backend: Backend, derive: bool
    ) -> Pull:
        """Work out the terms."""
        wide = {name: target[name].double() for name in self.names}
        found = self._use.pull(weights.double(), parts, wide, backend, derive)
        by_weight = None if found.by_weight is None else found.by_weight.to(self._dtype)
        return Pull(found.cross.to(self._dtype), found.square.to(self._dtype), by_weight)

    def gradients(self, weights: Tensor, by_square_norm: Tensor) -> tuple[Tensor, ...]:
        """Return the derivatives by what the use was made of."""
        found = self._use.gradients(weights.double(), by_square_norm.double())
        return tuple(gradient.to(self._dtype) for gradient in found)


def _square_lengths(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the squared norm of each of ``(n, 1, m)``; no tensor of that size is made unless it is differentiated."""
    if rows.requires_grad and torch.is_grad_enabled():
        return rows.to(dtype).square().sum((1, 2))
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=(1, 2), dtype=dtype)
    return lengths.square_()


def _alike(parts: Sequence[Part]) -> bool:
    """Whether the parts have the same size and consecutive labels."""
    size = parts[0].stop - parts[0].start
    return all(
        part.stop - part.start == size and part.label == parts[0].label + index for index, part in enumerate(parts)
    )


def _kernel_is_cheaper(u: Tensor, a: Tensor) -> bool:
    """Compare the work on the rows' Gram matrices with that on one more matrix of the weight's size."""
    rows, outputs, inputs = len(u), u.shape[1], a.shape[1]
    # 64: passes over the weight's memory that the dense form makes, in multiplications that take as long; below half a
    # million multiplications the time goes into calls, of which the kernel form can serve all classes at once
    return 3 * rows * rows * (outputs + inputs) < (rows + 64) * outputs * inputs + 500_000


def _kernel_form(
    u: Tensor, a: Tensor, wanted: Tensor, bias: Tensor | None, part: Part, by_u: Tensor | None, by_a: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return ``<S, E>`` and ``||E||^2`` from inner products of rows; fill the derivatives by u and a."""
    ones = float(bias is not None)
    seen = torch.mm(a, wanted.mT) if bias is None else torch.addmm(bias, a, wanted.mT)
    a_gram = torch.mm(a, a.mT).add_(ones)
    u_gram = torch.mm(u, u.mT)
    cross, square = torch.dot(u.flatten(), seen.flatten()), torch.dot(a_gram.flatten(), u_gram.flatten())
    if by_u is not None and by_a is not None:
        torch.addmm(seen, a_gram, u, beta=part.attract, alpha=2 * part.repel, out=by_u)
        torch.mm(u_gram.mul_(2 * part.repel), a, out=by_a)
        by_a.addmm_(u, wanted, alpha=part.attract)
    return cross, square


def _dense_form(
    u: Tensor, a: Tensor, wanted: Tensor, bias: Tensor | None, part: Part, by_u: Tensor | None, by_a: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same from E itself, of which there is one at a time."""
    total = torch.mm(u.mT, a)
    cross = torch.dot(total.flatten(), wanted.flatten())
    square = torch.dot(total.flatten(), total.flatten())
    if bias is not None:
        total_bias = u.sum(0)
        cross, square = cross + torch.dot(total_bias, bias), square + torch.dot(total_bias, total_bias)
    if by_u is not None and by_a is not None:
        total.mul_(2 * part.repel).add_(wanted, alpha=part.attract)
        torch.mm(a, total.mT, out=by_u)
        torch.mm(u, total, out=by_a)
        if bias is not None:
            by_u += total_bias.mul_(2 * part.repel).add_(bias, alpha=part.attract)
    return cross, square
