"""Weights that explain outputs from what is left of the inputs: ridge regression on second moments.

With second moments ``G`` of the kept inputs and ``B`` between outputs and kept inputs, the weights that minimise
``E ||y - V x||^2 + p ||V||^2`` are ``V = B (G + p I)^-1``, and what stays unexplained is
``E ||y||^2 - <V, B> - p ||V||^2``.

Shape letters: ``J`` blocks, ``R`` outputs, ``K`` inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_eff.pruning.repair.settings import RepairError

ESCALATIONS = 5
ROWS = 192  # that are substituted back at a time
DOUBLE_UP_TO = 1024  # inputs; above, moments are held and solved as they were summed


class Fit(NamedTuple):
    """``weights [J, R, K]``, and the part of the outputs' second moment that they leave unexplained."""

    weights: Tensor
    relative_error: float


def solve_type(columns: int, summed: torch.dtype) -> torch.dtype:
    """The type in which moments of so many columns are held and solved."""
    return torch.float64 if columns <= DOUBLE_UP_TO else summed


def summed_type(weight: Tensor) -> torch.dtype:
    """The type in which rows are multiplied: that of the weights, at least float32."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def about_zero(covariance: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Turn products about the means ``[J, A]`` and ``[J, B]`` into second moments ``[J, A, B]``."""
    return covariance + (left.unsqueeze(2) * right.unsqueeze(1)).to(covariance.dtype)


def ridge_fit(gram: Tensor, cross: Tensor, energy: float, penalty: Penalty, path: str) -> Fit:
    """Solve for the weights.

    Args:
        gram: second moments of the kept inputs ``[J, K, K]``.
        cross: second moments between outputs and kept inputs ``[J, R, K]``.
        energy: sum of the outputs' second moments.
        penalty: the ridge.
        path: of the layer, for messages.
    """
    factor, added = penalty.factor(gram, path)
    weights = torch.cholesky_solve(cross.transpose(1, 2), factor).transpose(1, 2)
    return Fit(checked(weights, path), unexplained(weights, cross, energy, added))


def unexplained(weights: Tensor, cross: Tensor, energy: float, added: float) -> float:
    """What weights ``[J, R, K]`` leave of ``energy``, as a fraction of it."""
    if energy <= 0:
        return 0.0
    left = energy - float((weights * cross).sum()) - added * float(weights.square().sum())
    return max(0.0, left / energy)


def checked(weights: Tensor, path: str) -> Tensor:
    """Return finite weights; RepairError for others."""
    if not torch.isfinite(weights).all():
        raise RepairError(f"{path}: the corrected weights are not finite; raise ridge or the number of samples")
    return weights


def substituted_back(lower: Tensor, right: Tensor) -> Tensor:
    """Solve ``lower^T x = right``, some rows at a time: a part of a factor is not copied, and most of it is products.

    Args:
        lower: factor ``[J, K, K]``; what is above its diagonal is not read.
        right: ``[J, K, R]``; becomes the solution.
    """
    count = lower.shape[1]
    for first in reversed(range(0, count, ROWS)):
        rows, behind = slice(first, min(first + ROWS, count)), slice(first + ROWS, count)
        right[:, rows] -= lower[:, behind, rows].transpose(1, 2) @ right[:, behind]
        block = lower[:, rows, rows].transpose(1, 2)
        right[:, rows] = torch.linalg.solve_triangular(block, right[:, rows], upper=True)
    return right


class Penalty(NamedTuple):
    """What is added to the diagonal, and how it grows when that is not enough.

    Attributes:
        ridge: as a fraction of ``scale``.
        scale: mean second moment of the inputs, or their mean variance.
        summed: type the rows were multiplied in, whose rounding errors are covered in any case.
    """

    ridge: float
    scale: float
    summed: torch.dtype

    def factor(self, gram: Tensor, path: str) -> tuple[Tensor, float]:
        """Cholesky factor of ``gram + penalty``, with ten times the penalty as often as it needs; and what was added.

        Raises:
            RepairError: moments that are not finite, or not positive definite with the largest penalty.
        """
        if not torch.isfinite(gram).all():
            raise RepairError(
                f"{path}: its inputs are not all finite on the calibration samples; look for NaN or overflow in the "
                "batches or before this layer"
            )
        added = (self.ridge + torch.finfo(self.summed).eps) * self.scale
        if added == 0:
            added = 1.0  # inputs that never vary: any penalty gives weights of zero
        for _ in range(ESCALATIONS + 1):
            regular = gram.clone()
            regular.diagonal(dim1=-2, dim2=-1).add_(added)
            factor, failed = torch.linalg.cholesky_ex(regular)
            if not failed.any():
                return factor, added
            added *= 10
        raise RepairError(
            f"{path}: the second moments of its inputs are not positive definite, even with {10**ESCALATIONS:,} times "
            f"ridge={self.ridge:g}; raise ridge or the number of samples"
        )
