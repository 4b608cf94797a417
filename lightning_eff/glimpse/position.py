"""Sine and cosine codes of where a patch lies and how large it is; arXiv 2309.13353."""

from __future__ import annotations

import torch
from torch import Tensor


def box_codes(boxes: Tensor, dim: int, unit: float, temperature: float = 10_000.0) -> Tensor:
    """Return a code of each box.

    Each of its four numbers u, told in ``unit``, becomes [sin(u w), cos(u w)] with frequencies
    w_i = temperature^(-i / (D/8)), i = 0 ... D/8 - 1; the four codes follow in the order y0, x0, y1, x1.

    Args:
        boxes: In pixels [..., 4].
        dim: D, width of the codes; a multiple of 8.
        unit: Pixels that count as 1, > 0.
        temperature: Of the frequencies, > 0. In small scenes most of the usual frequencies are flat; a smaller unit
            and temperature spread them.

    Returns:
        Codes [..., D].
    """
    check_code_dim(dim)
    count = dim // 8
    frequencies = temperature ** (-torch.arange(count, dtype=torch.float32, device=boxes.device) / count)
    angles = (boxes.float() / unit).unsqueeze(-1) * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)


def cell_boxes(scene: tuple[int, int], side: int) -> Tensor:
    """Return boxes of the cells of ``side`` pixels that cover a scene of (height, width), row by row [cells, 4]."""
    rows, columns = cells_of(scene, side)
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    corners = torch.stack([y, x], dim=-1).flatten(0, 1)
    return torch.cat([corners, corners + 1], dim=1).float() * side


def cells_of(scene: tuple[int, int], side: int) -> tuple[int, int]:
    """Return how many rows and columns of cells of ``side`` pixels cover a scene; the last may stick out."""
    height, width = scene
    return -(-height // side), -(-width // side)


def check_code_dim(dim: int) -> None:
    """Raise a ValueError unless ``dim`` can be the width of a code."""
    if dim < 8 or dim % 8:
        raise ValueError(f"expected the width of tokens to be a multiple of 8, got {dim}: a box has 4 codes of pairs")
