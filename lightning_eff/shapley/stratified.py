"""Shapley values from the mean value of coalitions by size and membership (P. Kolpaczki et al., arXiv 2302.00736).

phi_i = (1/n) sum_s (mean v over S of size s with i - mean v over S of size s-1 without i), and every coalition tells
something of every player. The value may be replaced by its odd part u(S) = (v(S) - v(N without S)) / 2, which has the
same Shapley values; then the two means are one, phi_i = (2/n) sum_s mean u over S of size s with i, and everything that
is even in v is gone from the noise.

Shapes: `n` players, `P` pairs, `D` components.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_eff.shapley.coalition_run import CoalitionEstimator, Sampled, over_groups
from lightning_eff.shapley.coalitions import CoalitionSequence, SizeSequence
from lightning_eff.shapley.regression import kernel_sizes


@dataclass(frozen=True)
class StratifiedShapley(CoalitionEstimator):
    """Shapley values from means over strata (size of the coalition, whether the player is in it).

    Coalitions of one player, and of all but one, are all evaluated; the others in pairs with their complements, sizes
    in proportion to 1 / (s (n-s)). A stratum that no coalition fell into takes the mean of its size, which pulls values
    together at small budgets, and what is missing to v(N) - v(empty) is shared equally. Memory O(n^2).

    Args:
        budget: evaluations: a number, or a multiple of the players such as `"20n"`; at least 2 n + 2.
        share_coalitions: let all groups of a grouped game see the same coalitions.
        chunk_size: most coalitions a call of the game; it has no influence on the values.

    Raises:
        ValueError: an argument out of range.
    """

    method = "stratified"
    small = 3  # then all coalitions have one player or lack one

    def least_units(self, n: int) -> int:
        """As `CoalitionEstimator.least_units`."""
        return n

    def sequence(self, n: int, seed: int, group: int) -> CoalitionSequence:
        """As `CoalitionEstimator.sequence`."""
        return _SinglesFirst(n, seed, group)

    def fit(self, samples: Sequence[Sampled]) -> tuple[Tensor, Tensor]:
        """As `CoalitionEstimator.fit`; variances are pooled over the strata of a size."""
        return over_groups(samples, _strata_means)


class _SinglesFirst:
    """The single players, each with all but him, then coalitions of 2 to n - 2 players."""

    length = sys.maxsize

    def __init__(self, n: int, seed: int, group: int) -> None:
        self._singles = torch.eye(n, dtype=torch.bool)
        mass = kernel_sizes(n)
        mass[[1, n - 1]] = 0.0
        self._others = SizeSequence(mass, seed, group)

    def take(self, count: int) -> Tensor:
        """As `CoalitionSequence.take`."""
        singles, self._singles = self._singles[:count], self._singles[count:]
        return torch.cat([singles, self._others.take(count - len(singles))])


def _strata_means(sampled: Sampled) -> tuple[Tensor, Tensor]:
    """Values of one group and their squared standard errors, `[n, D]`."""
    n, components = sampled.n, sampled.values.shape[2]
    count = torch.zeros(n + 1, n, dtype=torch.float64)
    total, square = (torch.zeros(components, n + 1, n, dtype=torch.float64) for _ in range(2))
    for z, values in sampled.blocks():
        sizes = z.sum(1).long()
        odd = (values[:, 0] - values[:, 1]) / 2  # [b, D]
        for rows, size, sign in ((z, sizes, 1), (1 - z, n - sizes, -1)):
            count.index_add_(0, size, rows)
            for d in range(components):
                total[d].index_add_(0, size, sign * rows * odd[:, d, None])
                square[d].index_add_(0, size, rows * odd[:, d, None] ** 2)
    gain = sampled.ends[1] - sampled.ends[0]
    count[n], total[:, n], square[:, n] = 1, gain[:, None] / 2, gain[:, None] ** 2 / 4
    mean = torch.where(count > 0, total / count, (total.sum(2) / count.sum(1)).nan_to_num()[:, :, None])  # [D, n+1, n]
    values = 2 / n * mean[:, 1:].sum(1).T
    values = values + (gain - values.sum(0)) / n

    # strata have the variance of their size, or of all sizes where none was seen twice; sizes 1, n - 1 and n are known
    sampled_sizes = torch.arange(2, n - 1)
    deviations = (square - count * mean**2).clamp(min=0).sum(2)[:, sampled_sizes]  # [D, n-3]
    freedom = (count - 1).clamp(min=0).sum(1)[sampled_sizes]
    pooled = deviations.sum(1, keepdim=True) / freedom.sum()
    spread = torch.where(freedom > 0, deviations / freedom, pooled)[:, :, None]
    variance = 4 / n**2 * (spread / count[sampled_sizes].clamp(min=1)).sum(1).T
    return values, torch.where(variance.isnan(), torch.inf, variance)
