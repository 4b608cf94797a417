"""Covariances in one pass over rows, without the cancellation that subtracting products of means brings.

Rows are shifted by the means of the first ones before they are multiplied, so that rounding errors are of the size of
what varies, not of what is constant. Of products of rows with themselves one half is multiplied, strip by strip, and
mirrored in the end.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

STRIP = 192  # columns; narrower ones save no more and multiply more slowly (measured)


class Scatter:
    """Products of two kinds of rows about their means, summed.

    Shape letters: ``J`` blocks, ``n`` rows, ``A`` and ``B`` columns.

    Args:
        kind: type in which sums are held.
    """

    def __init__(self, kind: torch.dtype) -> None:
        self._kind = kind
        self._products: Tensor | None = None
        self._mirrored = False
        self.count = 0.0

    def add(self, left: Tensor, right: Tensor) -> None:
        """Add rows ``[J, n, A]`` and, pair by pair, ``[J, n, B]``; the same tensor twice always or never."""
        if self._products is None:
            self._shifts = left.mean(1, keepdim=True), right.mean(1, keepdim=True)
            self._sums = tuple(torch.zeros_like(shift, dtype=torch.float64).squeeze(1) for shift in self._shifts)
            size = (left.shape[0], left.shape[2], right.shape[2])
            self._products = torch.zeros(size, dtype=self._kind, device=left.device)
        same = left is right
        left = left - self._shifts[0]
        right = left if same else right - self._shifts[1]
        if same:
            for strip in _strips(left.shape[2]):
                self._products[:, strip, : strip.stop] += left[:, :, strip].transpose(1, 2) @ left[:, :, : strip.stop]
            self._mirrored = True
        else:
            self._products += left.transpose(1, 2) @ right
        for total, rows in zip(self._sums, (left, right), strict=True):
            total += rows.sum(1)
        self.count += left.shape[1]

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """Means ``[J, A]`` and ``[J, B]``, float64."""
        a, b = (
            total / self.count + shift.squeeze(1).double()
            for total, shift in zip(self._sums, self._shifts, strict=True)
        )
        return a, b

    def covariance(self) -> Tensor:
        """Mean product about the means ``[J, A, B]``; frees the sums."""
        assert self._products is not None
        products, self._products = self._products, None
        if self._mirrored:
            for strip in _strips(products.shape[1]):
                products[:, : strip.start, strip] = products[:, strip, : strip.start].transpose(1, 2)
        left, right = (total / self.count for total in self._sums)
        return products.div_(self.count).sub_((left.unsqueeze(2) * right.unsqueeze(1)).to(self._kind))


def _strips(columns: int) -> Iterator[slice]:
    """Consecutive columns, some at a time."""
    return (slice(first, min(first + STRIP, columns)) for first in range(0, columns, STRIP))
