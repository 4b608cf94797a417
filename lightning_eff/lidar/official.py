"""The estimator of the published code, for comparison only: it converges to another value than Shapley's.

The code (arXiv 2303.11720, branch `fixedlines`) draws the size of a coalition uniformly, then fits a linear regression
with a free intercept and the Shapley kernel as weights. The kernel (n - 1) / (C(n, s) s (n - s)) is meant for all
coalitions at once; drawing by size divides by the number C(n, s) of coalitions a second time, so that the fit listens
to single lines and to nearly all lines only. Nor do the values add up to v(all) - v(none).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_eff.shapley.coalition_run import CoalitionEstimator, Sampled
from lightning_eff.shapley.coalitions import CoalitionSequence, SizeSequence
from lightning_eff.shapley.regression import uniform_sizes


@dataclass(frozen=True)
class OfficialLineRegression(CoalitionEstimator):
    """The published regression on coalitions of uniform sizes 1..n-1; it gives no error bars (NaN).

    Below about n evaluations, where a fit is not unique, the smallest coefficients are taken, as the code's library
    does.

    Args:
        budget: evaluations: a number, or a multiple of the players such as `"20n"`.
        share_coalitions: let all frames see the same coalitions, as the code does.
        chunk_size: most coalitions a call of the game; it has no influence on the values.
    """

    method = "official"

    @property
    def unit_cost(self) -> int:
        """As `CoalitionEstimator.unit_cost`: coalitions come alone."""
        return 1

    def sequence(self, n: int, seed: int, group: int) -> CoalitionSequence:
        """As `CoalitionEstimator.sequence`."""
        return SizeSequence(uniform_sizes(n), seed, group)

    def fit(self, samples: Sequence[Sampled]) -> tuple[Tensor, Tensor]:
        """As `CoalitionEstimator.fit`; frames are fitted one by one."""
        values = torch.stack([sampled.weight * _fit(sampled) for sampled in samples]).sum(0)
        return values, torch.full_like(values, torch.nan)


def _fit(sampled: Sampled) -> Tensor:
    """Coefficients `[n, D]` of a weighted least-squares fit with intercept."""
    n = sampled.n
    blocks = list(sampled.blocks())
    kept, values = torch.cat([rows for rows, _ in blocks]), torch.cat([values[:, 0] for _, values in blocks])
    kernel = torch.tensor([(n - 1) / (math.comb(n, s) * s * (n - s)) for s in range(1, n)], dtype=torch.float64)
    weight = kernel[sampled.sizes() - 1]
    weight = (weight / weight.sum())[:, None]
    kept, values = kept - (weight * kept).sum(0), values - (weight * values).sum(0)  # the intercept
    solution: Tensor = torch.linalg.lstsq(kept * weight.sqrt(), values * weight.sqrt(), driver="gelsd").solution
    return solution
