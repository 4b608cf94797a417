"""Fill the holes of sparse depth without any training: pull averages up a pyramid, push them down into the holes.

The filling is that of Gortler et al., "The Lumigraph" (1996), section 3.4, in inverse depth and with weights 0 and 1.
Shapes: ``B`` batch, ``H``, ``W`` height and width.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_eff.arguments import check_number


class PullPushCompletion(nn.Module):
    """Complete depth by pull and push, without parameters, differentiable in the depth given.

    Measured points are kept; a hole takes the smooth average of what lies around it at the smallest scale at which
    anything does. Images of a batch do not touch each other.

    Args:
        empty_depth: what an image without any point is filled with, in metres, > 0.

    Raises:
        ValueError: ``empty_depth`` is not positive.
    """

    def __init__(self, empty_depth: float = 15.0) -> None:
        super().__init__()
        check_number("empty_depth", empty_depth, above=0)
        self.empty_depth = empty_depth

    def forward(self, rgb: Tensor | None, sparse: Tensor) -> Tensor:
        """Map sparse depth ``[B, 1, H, W]`` in metres, 0 = none, to dense depth alike; ``rgb`` is not read."""
        return pull_push(sparse, self.empty_depth)


def pull_push(sparse: Tensor, empty_depth: float = 15.0) -> Tensor:
    """Fill the holes of sparse depth.

    Args:
        sparse: ``[B, 1, H, W]`` in metres, 0 = none.
        empty_depth: of an image without any point, in metres, > 0.

    Returns:
        Dense depth ``[B, 1, H, W]`` in metres.
    """
    known = sparse > 0
    inverse = torch.where(known, sparse, torch.inf).reciprocal()
    levels = [(inverse, known)]
    while max(inverse.shape[-2:]) > 1:
        # sums over 2 x 2 pixels, what lies beyond an odd border counting as a hole
        count = F.avg_pool2d(known.to(inverse.dtype), 2, ceil_mode=True, divisor_override=1)
        inverse = F.avg_pool2d(inverse, 2, ceil_mode=True, divisor_override=1) / count.clamp(min=1)
        known = count > 0
        levels.append((inverse, known))
    wider = torch.full_like(inverse, 1 / empty_depth)
    for (inverse, known), (finer, _) in pairwise(reversed(levels)):
        wider = F.interpolate(torch.where(known, inverse, wider), scale_factor=2.0, mode="bilinear")
        wider = wider[..., : finer.size(-2), : finer.size(-1)]
    return torch.where(sparse > 0, sparse, wider.reciprocal())
