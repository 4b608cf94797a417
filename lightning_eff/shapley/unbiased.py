"""Regression with the known matrix of the Shapley kernel instead of a sampled one (I. Covert, S.-I. Lee, 2012.01536).

Under the kernel's distribution of coalitions A = E[z z^T] has 1/2 on its diagonal and one number c elsewhere, so that
phi = (b - mean(b)) / (1/2 - c) + (v(N) - v(empty)) / n with b = E[z (v(z) - v(empty))]: a mean over samples, unbiased
at any budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_eff.shapley.coalition_run import CoalitionEstimator, Sampled, over_groups
from lightning_eff.shapley.coalitions import CoalitionSequence, SizeSequence
from lightning_eff.shapley.regression import kernel_sizes


@dataclass(frozen=True)
class UnbiasedKernelShapley(CoalitionEstimator):
    """Shapley values as a mean over pairs of a coalition and its complement: unbiased, errs more than regression.

    Args:
        budget: evaluations: a number, or a multiple of the players such as `"20n"`.
        share_coalitions: let all groups of a grouped game see the same coalitions.
        chunk_size: most coalitions a call of the game; it has no influence on the values.

    Raises:
        ValueError: an argument out of range.
    """

    method = "unbiased_kernel"

    def sequence(self, n: int, seed: int, group: int) -> CoalitionSequence:
        """As `CoalitionEstimator.sequence`."""
        return SizeSequence(kernel_sizes(n), seed, group)

    def fit(self, samples: Sequence[Sampled]) -> tuple[Tensor, Tensor]:
        """As `CoalitionEstimator.fit`; the error is that of a mean over pairs."""
        return over_groups(samples, _mean_of_pairs)


def _mean_of_pairs(sampled: Sampled) -> tuple[Tensor, Tensor]:
    """Mean over the pairs of one group and its squared standard error, `[n, D]`."""
    n, count = sampled.n, len(sampled.packed)
    share = (sampled.ends[1] - sampled.ends[0]) / n
    sizes = torch.arange(n + 1, dtype=torch.float64)
    both = float((kernel_sizes(n) * sizes * (sizes - 1)).sum()) / (n * (n - 1))  # c: two given players are there
    mean = torch.stack([_pairs(sampled, both, share, part).sum(0) for part in sampled.blocks()]).sum(0) / count
    if count == 1:
        return mean, torch.full_like(mean, torch.inf)
    deviations = [(_pairs(sampled, both, share, part) - mean).square().sum(0) for part in sampled.blocks()]
    return mean, torch.stack(deviations).sum(0) / (count - 1) / count


def _pairs(sampled: Sampled, both: float, share: Tensor, part: tuple[Tensor, Tensor]) -> Tensor:
    """What every pair says, `[b, n, D]`."""
    z, values = part
    z, gain = z[:, :, None], values - sampled.ends[0]  # [b, n, 1], [b, 2, D]
    moment = (z * gain[:, :1] + (1 - z) * gain[:, 1:]) / 2
    return (moment - moment.mean(1, keepdim=True)) / (0.5 - both) + share
