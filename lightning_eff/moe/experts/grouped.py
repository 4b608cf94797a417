"""Experts by grouped matrix products: what is fast on CUDA in bfloat16, without a host synchronisation.

Letters: S assignments, n experts, d model width, h expert width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import flop_registry, register_flop_formula

from lightning_eff.moe.config import Activation
from lightning_eff.moe.experts.activations import activate


def grouped_problem(w1: Tensor, w2: Tensor) -> str | None:
    """Tell why ``torch.nn.functional.grouped_mm`` cannot take these weights; None where it can."""
    if w1.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"grouped products take float32, bfloat16 and float16, got {w1.dtype}"
    for width in (w1.shape[1], w1.shape[2], w2.shape[1]):
        if width * w1.element_size() % 16:
            return f"grouped products need rows of a multiple of 16 bytes, got {width} columns of {w1.dtype}"
    return None


def grouped_ffn(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    weights: Tensor,
    token_index: Tensor,
    counts: Tensor,
    activation: Activation,
) -> Tensor:
    """Sum experts' outputs; arguments and result as in :func:`lightning_eff.moe.moe_ffn`.

    Raises:
        ValueError: dtype or widths are none that grouped products take.
    """
    if problem := grouped_problem(w1, w2):
        raise ValueError(f"{problem}; use backend='fused'")
    ends = counts.cumsum(0)
    rows = torch.arange(token_index.numel(), device=x.device)
    # rows behind the last expert's come out of the product as whatever the memory held: their gradient, too
    idle = (rows >= ends[-1])[:, None]
    offsets = ends.to(torch.int32)
    gathered = x.index_select(0, token_index).masked_fill(idle, 0)
    pre = F.grouped_mm(gathered, w1, offs=offsets).masked_fill(idle, 0)
    if b1 is not None:
        expert = torch.searchsorted(ends, rows, right=True).clamp(max=counts.numel() - 1)
        pre = pre + b1.index_select(0, expert)
    hidden = (activate(pre, activation) * weights[:, None]).to(x.dtype)
    out = F.grouped_mm(hidden.masked_fill(idle, 0), w2, offs=offsets).masked_fill(idle, 0)
    wide = torch.promote_types(x.dtype, torch.float32)
    y = torch.zeros(x.shape, dtype=wide, device=x.device)
    return y.index_add(0, token_index, out.to(wide)).to(x.dtype)


def _product_flops(left: Any, right: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Count a product of which rows, columns or summed-over entries are grouped, or that is one of a stack."""
    stacked = int(left[0]) if len(left) == len(right) == 3 else 1
    return 2 * stacked * int(left[-2] * left[-1] * right[-1])


if torch.ops.aten._grouped_mm not in flop_registry:  # torch's own counter knows no grouped product as of 2.15
    register_flop_formula(torch.ops.aten._grouped_mm)(_product_flops)
