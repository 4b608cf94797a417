"""Shapley values as the solution of a weighted least-squares problem with the efficiency axiom as a constraint.

phi minimises sum_S k(s) (v(S) - v(empty) - sum_{i in S} phi_i)^2 subject to sum phi = v(N) - v(empty), with k(s) =
(n-1) / (C(n,s) s (n-s)) (Charnes et al. 1988; S. Lundberg, S.-I. Lee, arXiv 1705.07874). Coalitions are sampled by
leverage scores, without replacement and with their complements (C. Musco, R. T. Witter, arXiv 2410.01917).

A coalition z and its complement together say what one row says: with x = z - 1/2 and d = (v(z) - v(1-z)) / 2 the two
squares add up to 2 (d - x phi)^2 and a constant. Hence a pair is one row of the regression, and leaving a pair out has
the closed form of leaving a row out, which gives the jackknife without solving again.

Any function of the size s alone that vanishes at 0 and n has Shapley values of zero, so it may be subtracted from v
without a trace in the values. A few such terms are fitted along (ours): where v bends with the number of players kept,
as accuracies do, that bend is noise to a regression without them.

Shapes: `n` players, `b` rows, `q` extra columns, `D` components.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_eff.arguments import check_choice, check_number
from lightning_eff.shapley.coalition_run import CoalitionEstimator, Sampled, over_groups
from lightning_eff.shapley.coalitions import CoalitionSequence, LeverageSequence, SizeSequence
from lightning_eff.shapley.estimator import check_counts, warn

# rows a group needs, per unknown, to be solved alone: then the differences between groups are no noise any more (on a
# real game twice to three times less squared error; with fewer rows, more)
_ROWS_ALONE = 2

Sampling = Literal["leverage", "kernel", "official"]


@dataclass(frozen=True)
class RegressionShapley(CoalitionEstimator):
    """Shapley values by constrained regression on sampled coalitions.

    Memory is O(n^2) beside m n bits of coalitions and their m values; time O(m n^2) beside the game. All 2**n
    coalitions give the exact value.

    Args:
        budget: evaluations: a number, or a multiple of the players such as `"20n"`. With `"leverage"` no coalition
            comes twice, so no more than 2**n are made.
        share_coalitions: let all groups of a grouped game see the same coalitions.
        chunk_size: most coalitions a call of the game; it has no influence on the values.
        sampling: `"leverage"`: every size has the same share, no coalition comes twice, weights k(s) / share;
            `"kernel"`: sizes from s in proportion to 1 / (s (n-s)), with replacement, equal weights; `"official"`: what
            the published pruning code does, uniform sizes and ordinary least squares with a free intercept. It
            converges to another value and is there for comparison.
        paired: evaluate the complement of every coalition too; `"official"` does not.
        size_terms: number of smooth functions of the coalition's size that are fitted along; 0 is the plain method.
        ridge: pulls towards equal shares, as that many rows of mean weight would; helps below about 8 n evaluations,
            hurts above.

    Raises:
        ValueError: an argument out of range; from `estimate` also a budget with fewer rows than values to tell apart.
    """

    sampling: Sampling = "leverage"
    paired: bool = True
    size_terms: int = 2
    ridge: float = 0.0

    method = "regression"
    not_resumed = ("budget", "chunk_size", "size_terms", "ridge")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("sampling", self.sampling, ("leverage", "kernel", "official"))
        check_counts(self, "size_terms", least=0)
        check_number("ridge", self.ridge, least=0)

    @property
    def unit_cost(self) -> int:
        """As `CoalitionEstimator.unit_cost`."""
        return 2 if self.paired and self.sampling != "official" else 1

    def least_units(self, n: int) -> int:
        """Rows that could tell all unknowns apart: a pair says one thing, and the sum of the values is known."""
        if self.sampling == "official":
            return n + 1
        return n - 1 + self._terms(n) if self.unit_cost == 2 else min(n + self._terms(n), 2**n - 2)

    def _terms(self, n: int) -> int:
        """Size terms that can be told apart: odd ones on the sizes below n / 2 of pairs, or on all sizes."""
        return min(self.size_terms, (n - 1) // 2 if self.unit_cost == 2 else max(n - 3, 0))

    def sequence(self, n: int, seed: int, group: int) -> CoalitionSequence:
        """As `CoalitionEstimator.sequence`."""
        if self.sampling == "leverage":
            return LeverageSequence(n, self.paired, seed, group)
        return SizeSequence(kernel_sizes(n) if self.sampling == "kernel" else uniform_sizes(n), seed, group)

    def fit(self, samples: Sequence[Sampled]) -> tuple[Tensor, Tensor]:
        """As `CoalitionEstimator.fit`; groups with rows enough are solved one by one, others together."""
        n = samples[0].n
        if len(samples) > 1 and all(len(s.packed) >= _ROWS_ALONE * self.least_units(n) for s in samples):
            return over_groups(samples, self._alone)
        if self.sampling == "official":
            return least_squares([_Rows(s, None, False, intercept=True) for s in samples], n, None)
        total = torch.stack([s.weight * (s.ends[1] - s.ends[0]) for s in samples]).sum(0)
        counts = LeverageSequence(n, self.paired, 0, 0).counts if self.sampling == "leverage" else None
        paired = self.unit_cost == 2
        rows = [_Rows(s, counts, paired, terms=self._terms(n)) for s in samples]
        return least_squares(rows, n, total, ridge=self.ridge)

    def _alone(self, sampled: Sampled) -> tuple[Tensor, Tensor]:
        values, stderr = self.fit([replace(sampled, weight=1.0)])
        return values, stderr**2


def kernel_sizes(n: int) -> Tensor:
    """Share of every size 0..n in the Shapley kernel, in proportion to 1 / (s (n - s)): float64 `[n + 1]`."""
    sizes = torch.arange(n + 1, dtype=torch.float64)
    mass = torch.where((sizes > 0) & (sizes < n), 1 / (sizes * (n - sizes)), 0.0)
    return mass / mass.sum()


def uniform_sizes(n: int) -> Tensor:
    """Equal share of the sizes 1..n-1: float64 `[n + 1]`."""
    sizes = torch.arange(n + 1, dtype=torch.float64)
    return ((sizes > 0) & (sizes < n)).double()


class Row(NamedTuple):
    """Rows of a regression: x `[b, n + q]`, y `[b, D]`, weights `[b]`, the fraction of all such rows drawn `[b]`."""

    x: Tensor
    y: Tensor
    weight: Tensor
    drawn: Tensor


class _Rows:
    """Rows of one group; `counts` are the numbers of units of each size, for sampling without replacement."""

    def __init__(
        self,
        sampled: Sampled,
        counts: dict[int, int] | None,
        paired: bool,
        *,
        terms: int = 0,
        intercept: bool = False,
    ) -> None:
        self.sampled, self.paired = sampled, paired
        n = sampled.n
        self.weight_of, self.drawn_of = torch.ones(n + 1, dtype=torch.float64), torch.zeros(n + 1, dtype=torch.float64)
        if counts is not None:
            there = torch.bincount(sampled.sizes(), minlength=n + 1).double()
            units = torch.tensor([float(min(counts.get(s, 0), 10**300)) for s in range(n + 1)], dtype=torch.float64)
            half = torch.ones(n + 1, dtype=torch.float64)
            if paired and n % 2 == 0:
                half[n // 2] = 0.5  # both coalitions of a pair are of this size
            self.weight_of = torch.where(there > 0, half * kernel_sizes(n) / there, 0.0)
            self.drawn_of = torch.where(there > 0, there / units, 0.0)
        t = torch.linspace(-1, 1, n + 1, dtype=torch.float64)  # of the sizes; all terms vanish at both ends
        powers = [2 * k + 1 if paired else k for k in range(terms)]  # the half difference of a pair is odd in t
        columns = [t**power * (1 - t**2) for power in powers] + [torch.ones_like(t)] * intercept
        self.extra_of = torch.stack(columns, 1) if columns else torch.zeros(n + 1, 0, dtype=torch.float64)

    @property
    def extra(self) -> int:
        """Number `q` of columns beside the players."""
        return self.extra_of.shape[1]

    def __iter__(self) -> Iterator[Row]:
        sampled = self.sampled
        for z, values in sampled.blocks():
            size = z.sum(1).long()
            if self.paired:
                x, y = z - 0.5, (values[:, 0] - values[:, 1]) / 2
            else:
                x, y = z, values[:, 0] - sampled.ends[0]
            x = torch.cat([x, self.extra_of[size]], 1)
            yield Row(x, y, sampled.weight * self.weight_of[size], self.drawn_of[size])


def least_squares(
    groups: Sequence[_Rows], n: int, total: Tensor | None, *, ridge: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Solve a weighted least-squares problem, and its jackknife.

    Args:
        groups: rows of `n` players and `q` columns beside them; they are read twice.
        n: number of players.
        total: what the values of the players must add up to, `[D]`; None leaves them free.
        ridge: penalty on the distance from equal shares, in mean weights of a row.

    Returns:
        Values and standard errors `[n, D]`: leave-one-row-out, with the finite-population correction.
    """
    width = n + groups[0].extra
    players = (torch.arange(width) < n).double()
    gram = torch.zeros(width, width, dtype=torch.float64)
    moment, mass, count = torch.zeros(width, 1, dtype=torch.float64), 0.0, 0
    share = torch.zeros(width, 1, dtype=torch.float64) if total is None else players[:, None] * total / n
    for row in _all(groups):
        weighted = row.x * row.weight[:, None]
        gram.addmm_(weighted.T, row.x)
        moment = moment + weighted.T @ (row.y - row.x @ share)
        mass, count = mass + float(row.weight.sum()), count + len(row.x)
    gram.diagonal().add_(ridge * mass / count * players)
    inverse, regular = _inverse(gram, None if total is None else players)
    solution = inverse @ moment + share
    variance = torch.zeros_like(solution)
    for row in _all(groups):
        influence = row.x @ inverse  # [b, width]
        leverage = row.weight * (influence * row.x).sum(1)
        error = (row.y - row.x @ solution) * row.weight[:, None]
        left = 1 - leverage
        scale = (1 - row.drawn).clamp(min=0)  # what is drawn completely has no error
        alone = (left < 1e-9) & (scale > 0)
        jackknifed = torch.where(alone, 0.0, scale.sqrt() / left.clamp(min=1e-9))[:, None] * error
        variance += (influence**2).T @ jackknifed**2
        # a row that decides values alone tells nothing of their error
        variance[(influence[alone].abs() > 1e-6 * influence.abs().max()).any(0)] = torch.inf
    if not regular:
        variance = torch.full_like(variance, torch.inf)
    return solution[:n], variance[:n].sqrt()


def _all(groups: Sequence[_Rows]) -> Iterator[Row]:
    return (row for rows in groups for row in rows)


def _inverse(gram: Tensor, constrained: Tensor | None) -> tuple[Tensor, bool]:
    """K with solution = share + K moment, and whether gram was regular.

    Where the sum of the `constrained` unknowns (1 in a float64 `[width]`) is given, K gram K = K and K constrained = 0.
    Adding a multiple of constrained constrained^T to gram changes no such solution and makes that of pairs regular.
    """
    scale = gram.diagonal().mean()
    matrix = gram if constrained is None else gram + scale / len(gram) * torch.outer(constrained, constrained)
    factor, info = torch.linalg.cholesky_ex(matrix)
    regular = not int(info) and bool((factor.diagonal() ** 2 > 1e-11 * matrix.diagonal()).all())
    if not regular:
        warn(
            "the coalitions drawn do not tell all players apart: values are pulled to equal shares where they cannot, "
            "and there are no error bars; use a larger budget"
        )
        jitter = 1e-9 * scale.clamp(min=1e-300) * torch.eye(len(gram), dtype=gram.dtype)
        factor = torch.linalg.cholesky(matrix + jitter)
    inverse = torch.cholesky_inverse(factor)
    if constrained is not None:
        column = inverse @ constrained
        inverse = inverse - torch.outer(column, column) / (column @ constrained)
    return inverse, regular
