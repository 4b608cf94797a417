"""Classical depth completion by morphology, in torch, so that it runs on batches and on any device.

The method is that of Ku, Harakeh and Waslander, "In Defense of Classical Image Processing" (arXiv 1802.00036), its
fast variant. All steps work on inverted depth ``max_depth - depth``, so that a maximum prefers the nearest point.
Shapes: ``B`` batch, ``H``, ``W`` height and width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_eff.arguments import check_choice, check_number

_EMPTY = 0.1  # inverted depths below, and depths below, are none; metres
_SORT5 = ((0, 1), (3, 4), (2, 4), (2, 3), (1, 4), (0, 3), (0, 2), (1, 3), (1, 2))  # pairs of a sorting network


class IPBasicCompletion(nn.Module):
    """Complete depth by dilation, closing, filling and blurring, without parameters.

    The defaults are the variant of the KITTI benchmark. Where the published code leaves holes, of more than 31 pixels,
    this fills on until none is left, which it must with few lidar lines.

    Args:
        blur: ``"gaussian"`` has the lower RMSE, ``"bilateral"`` the sharper edges.
        extrapolate: extend depth to the top of the image and fill large holes; otherwise they stay 0.
        max_depth: depths beyond are none, in metres, > 0.1.
        empty_depth: what an image without any point is filled with if ``extrapolate``, in metres, > 0.

    Raises:
        ValueError: an argument lies outside its range.
    """

    def __init__(
        self,
        blur: Literal["gaussian", "bilateral"] = "gaussian",
        extrapolate: bool = True,
        max_depth: float = 100.0,
        empty_depth: float = 15.0,
    ) -> None:
        super().__init__()
        check_choice("blur", blur, ("gaussian", "bilateral"))
        check_number("max_depth", max_depth, above=_EMPTY)
        check_number("empty_depth", empty_depth, above=0)
        self.blur, self.extrapolate = blur, extrapolate
        self.max_depth, self.empty_depth = max_depth, empty_depth

    def forward(self, rgb: Tensor | None, sparse: Tensor) -> Tensor:
        """Map sparse depth ``[B, 1, H, W]`` in metres, 0 = none, to dense depth alike; ``rgb`` is not read.

        Raises:
            ValueError: the image is smaller than 3 x 3, which the blur cannot mirror.
        """
        if min(sparse.shape[-2:]) < 3:
            raise ValueError(f"expected sparse depth of at least 3 x 3 pixels, got {list(sparse.shape)}")
        x = torch.where(sparse > _EMPTY, self.max_depth - sparse, 0).clamp(min=0)
        x = _dilate_diamond(x)
        x = -_dilate(-_dilate(x, 5), 5)
        x = torch.where(x < _EMPTY, _dilate(x, 7), x)
        if self.extrapolate:
            x = _fill_large(_extend_up(x))
        x = _median5(x)
        if self.blur == "bilateral":
            x = _bilateral5(x)
        else:
            x = torch.where(x > _EMPTY, _gaussian5(x), x)
        return torch.where(x > _EMPTY, self.max_depth - x, self.empty_depth if self.extrapolate else 0.0)


def _dilate(x: Tensor, size: int) -> Tensor:
    """Maximum over ``size x size`` pixels, ``size`` odd."""
    return _running_max(_running_max(x, size, -1), size, -2)


def _running_max(x: Tensor, size: int, dim: int) -> Tensor:
    half = size // 2
    x = F.pad(x, (half, half) if dim == -1 else (0, 0, half, half), value=-math.inf)
    reach = 1
    while reach < size:  # a maximum over 2 r pixels is one over two maxima over r pixels
        step = min(reach, size - reach)
        length = x.size(dim) - step
        x = torch.maximum(x.narrow(dim, 0, length), x.narrow(dim, step, length))
        reach += step
    return x


def _dilate_diamond(x: Tensor) -> Tensor:
    """Maximum over the 13 pixels at most two steps away: twice over a cross of 3 x 3."""
    for _ in range(2):
        x = torch.maximum(_running_max(x, 3, -1), _running_max(x, 3, -2))
    return x


def _extend_up(x: Tensor) -> Tensor:
    """Give the pixels above the topmost depth of each column that depth."""
    known = x > _EMPTY
    top = known.to(torch.uint8).argmax(-2, keepdim=True)
    above = known.cumsum(-2) == 0
    return torch.where(above, x.gather(-2, top), x)


def _fill_large(x: Tensor) -> Tensor:
    for _ in range(math.ceil(max(x.shape[-2:]) / 15)):
        empty = x < _EMPTY
        if not empty.any():
            break
        x = torch.where(empty, _dilate(x, 31), x)
    return x


def _median5(x: Tensor) -> Tensor:
    """Median over 5 x 5 pixels, the border repeated: by minima and maxima of whole images."""
    height, width = x.shape[-2:]
    x = F.pad(x, (2, 2, 2, 2), mode="replicate")
    ranks = _sort5([x.narrow(-2, i, height) for i in range(5)])
    table = [_sort5([rank.narrow(-1, j, width) for j in range(5)]) for rank in ranks]
    # rows and columns are sorted now, and what has 13 or more of the 25 on one side is not the median
    open_ = [table[i][j] for i in range(5) for j in range(5) if max((i + 1) * (j + 1), (5 - i) * (5 - j)) <= 13]
    return _median(open_)


def _sort5(tensors: Iterable[Tensor]) -> list[Tensor]:
    out = list(tensors)
    for i, j in _SORT5:
        out[i], out[j] = torch.minimum(out[i], out[j]), torch.maximum(out[i], out[j])
    return out


def _median(tensors: Sequence[Tensor]) -> Tensor:
    """Median of an odd number of tensors: of half of them and two more, neither the least nor the greatest is it."""
    half = len(tensors) // 2 + 2
    held, waiting = list(tensors[:half]), list(tensors[half:])
    while len(held) > 1:
        for i in range(len(held) - 1):  # carries the greatest to the end
            held[i], held[i + 1] = torch.minimum(held[i], held[i + 1]), torch.maximum(held[i], held[i + 1])
        held.pop()
        for i in range(len(held) - 1, 0, -1):  # and the least to the front
            held[i - 1], held[i] = torch.minimum(held[i - 1], held[i]), torch.maximum(held[i - 1], held[i])
        held.pop(0)
        if waiting:
            held.append(waiting.pop())
    return held[0]


def _gaussian5(x: Tensor) -> Tensor:
    """Blur with (1, 4, 6, 4, 1) / 16 both ways, the border mirrored without repeating it, as OpenCV does."""
    for dim, pad in ((-1, (2, 2, 0, 0)), (-2, (0, 0, 2, 2))):
        wide = F.pad(x, pad, mode="reflect")
        far, near = (wide.narrow(dim, i, x.size(dim)) + wide.narrow(dim, 4 - i, x.size(dim)) for i in (0, 1))
        x = far / 16 + near / 4 + x * (3 / 8)
    return x


def _bilateral5(x: Tensor, sigma_depth: float = 1.5, sigma_space: float = 2.0) -> Tensor:
    """Average over the 13 pixels at most two away, weighted by how near they lie in space and in depth."""
    height, width = x.shape[-2:]
    wide = F.pad(x, (2, 2, 2, 2), mode="reflect")
    total, weights = torch.zeros_like(x), torch.zeros_like(x)
    for i in range(-2, 3):
        for j in range(-2, 3):
            if i * i + j * j > 4:
                continue
            other = wide[..., 2 + i : 2 + i + height, 2 + j : 2 + j + width]
            exponent = (other - x).square() / (-2 * sigma_depth**2) - (i * i + j * j) / (2 * sigma_space**2)
            weight = exponent.exp()
            total += weight * other
            weights += weight
    return total / weights
