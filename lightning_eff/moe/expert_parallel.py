"""Experts that live on different processes: tokens travel to them, outputs travel back.

Letters: T tokens of this process, S its assignments, n experts of all processes, r processes, d model width, h expert
width, m 2 with a gate, else 1.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_eff.moe.config import Activation, Backend
from lightning_eff.moe.functional import moe_ffn


def expert_parallel_ffn(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    weights: Tensor,
    token_index: Tensor,
    counts: Tensor,
    activation: Activation,
    backend: Backend,
    b1: Tensor | None,
    group: dist.ProcessGroup,
) -> Tensor:
    """Compute what :func:`lightning_eff.moe.moe_ffn` does with the experts of all processes of ``group``.

    All of them must call it, forwards and backwards, also without tokens. Gradients of experts are those of the sum of
    the processes' losses, divided by r: the mean, as data parallelism gives it to all other weights.

    Args:
        x: Tokens [T, d].
        w1: First matrices of the experts of this process [n / r, d, m h].
        w2: Second matrices of the experts of this process [n / r, h, d].
        weights: Of the assignments [S].
        token_index: Token of each assignment [S], sorted by expert.
        counts: Assignments of each expert, of all n [n].
        activation: Of the hidden units.
        backend: As of ``moe_ffn``.
        b1: Biases of the hidden units of the experts of this process [n / r, m h].
        group: The processes, in the order in which they share the experts out.

    Returns:
        [T, d].
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    ranks, here = dist.get_world_size(group), w1.shape[0]
    w1, w2 = _Divide.apply(w1, ranks), _Divide.apply(w2, ranks)
    b1 = None if b1 is None else _Divide.apply(b1, ranks)
    arriving = torch.empty_like(counts)  # [r, n / r]: what each process sends to each of the experts here
    dist.all_to_all_single(arriving, counts.contiguous(), group=group)
    leaving, arriving = counts.view(ranks, here), arriving.view(ranks, here)
    sent, received = torch.stack([leaving.sum(1), arriving.sum(1)]).tolist()
    token_index, weights = token_index[: sum(sent)], weights[: sum(sent)]
    rows = _Exchange.apply(x.index_select(0, token_index), sent, received, group)
    # by process, and by expert within it; experts take them across processes
    expert = torch.arange(here, device=x.device).repeat(ranks).repeat_interleave(arriving.flatten())
    order = expert.sort(stable=True).indices
    ones = weights.new_ones(order.numel())
    y = moe_ffn(rows, w1, w2, ones, order, arriving.sum(0), activation, backend, b1)
    back = _Exchange.apply(y, received, sent, group)
    out = weights.new_zeros(x.shape).index_add(0, token_index, weights[:, None] * back)
    return out.to(x.dtype)


class _Exchange(torch.autograd.Function):
    """Send the first ``sent[0]`` rows to the first process and so on; gradients go the other way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.way_back = received, sent, group
        out = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        back: Tensor = _Exchange.apply(grad, *ctx.way_back)
        return back, None, None, None


class _Divide(torch.autograd.Function):
    """Identity whose gradient is divided."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, by: int) -> Tensor:
        ctx.by = by
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.by, None
