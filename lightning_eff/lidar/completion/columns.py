"""Complete sparse depth by straight lines of inverse depth, along rows and then along columns of the image.

The inverse depth of a plane is affine in image coordinates, so planes come out exact between points. Leaving a lidar
line out changes only what lies between its two neighbours in each column: the model for which the errors of gaps
between kept lines add up. Shapes: ``B`` batch, ``H``, ``W`` height and width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_eff.arguments import check_number, check_whole


class ColumnInterpolation(nn.Module):
    """Complete depth by linear interpolation of inverse depth, without parameters, differentiable in the depth given.

    Between two points of a column inverse depth runs straight; beyond the first and the last it stays. Columns without
    any point run straight between their neighbours. Points of one row that lie close are joined first, since a lidar
    line at full resolution hits only some columns.

    Args:
        max_gap: how far apart, in pixels, neighbouring points of a row may lie to be joined, >= 1; 1 joins none.
        empty_depth: what an image without any point is filled with, in metres, > 0.

    Raises:
        ValueError: an argument lies outside its range.
    """

    def __init__(self, max_gap: int = 8, empty_depth: float = 15.0) -> None:
        super().__init__()
        check_whole("max_gap", max_gap)
        check_number("empty_depth", empty_depth, above=0)
        self.max_gap, self.empty_depth = max_gap, empty_depth

    def forward(self, rgb: Tensor | None, sparse: Tensor) -> Tensor:
        """Map sparse depth ``[B, 1, H, W]`` in metres, 0 = none, to dense depth alike; ``rgb`` is not read."""
        known = sparse > 0
        inverse = torch.where(known, sparse, torch.inf).reciprocal()
        inverse, joined = _interpolate(inverse, known, dim=-1, max_gap=self.max_gap)
        inverse, _ = _interpolate(inverse, joined, dim=-2)
        inverse, filled = _interpolate(inverse, joined.any(-2, keepdim=True), dim=-1)
        inverse = torch.where(filled, inverse, 1 / self.empty_depth)
        return torch.where(known, sparse, inverse.reciprocal())


def _interpolate(values: Tensor, known: Tensor, dim: int, max_gap: int | None = None) -> tuple[Tensor, Tensor]:
    """Fill unknown values along ``dim``; with ``max_gap`` only between two known ones that lie no farther apart.

    Args:
        values: ``[B, 1, H, W]``, 0 where unknown.
        known: of the same shape, or of one row that holds for all.
        dim: -1 or -2.
        max_gap: in pixels.

    Returns:
        The values, 0 where still unknown, and where they are known now, shaped like ``known``.
    """
    size = values.size(dim)
    place = torch.arange(size, device=values.device).view(-1, *[1] * (-dim - 1)).expand_as(known)
    before = torch.where(known, place, -1).cummax(dim).values
    after = torch.where(known, place, size).flip(dim).cummin(dim).values.flip(dim)
    first, last = before < 0, after >= size
    before.clamp_(min=0)
    after.clamp_(max=size - 1)
    gap = after - before
    share = (place - before).to(values.dtype).div_(gap.clamp(min=1))
    left, right = (values.gather(dim, index.expand_as(values)) for index in (before, after))
    between = torch.lerp(left, right, share)
    if max_gap is not None:
        joined = known | (gap <= max_gap) & ~(first | last)
        return torch.where(joined, between, 0), joined
    return torch.where(first, right, torch.where(last, left, between)), ~(first & last)
