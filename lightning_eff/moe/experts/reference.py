"""What a mixture of experts is, one token and one expert at a time: slow, and differentiable any number of times."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_eff.moe.config import Activation
from lightning_eff.moe.experts.activations import activate


def reference_ffn(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    weights: Tensor,
    token_index: Tensor,
    counts: Tensor,
    activation: Activation,
) -> Tensor:
    """Sum experts' outputs token by token; arguments and result as in :func:`lightning_eff.moe.moe_ffn`."""
    rows = [x.new_zeros(x.shape[1])] * x.shape[0]
    experts = torch.arange(counts.numel()).repeat_interleave(counts.cpu()).tolist()
    first, second = w1.unbind(0), w2.unbind(0)
    for assignment, expert in enumerate(experts):
        token = int(token_index[assignment])
        pre = x[token] @ first[expert]
        if b1 is not None:
            pre = pre + b1[expert]
        hidden = activate(pre, activation)
        rows[token] = rows[token] + (weights[assignment] * (hidden @ second[expert])).to(x.dtype)
    return torch.stack(rows) if rows else torch.zeros_like(x)
