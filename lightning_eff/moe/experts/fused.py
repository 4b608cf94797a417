"""Experts by a loop over pieces that fit the cache, with a backward pass written by hand: fast on CPUs, exact anywhere.

Weights of the combination lie on the hidden units, so that no [S, d] tensor is ever stored: with a_e the hidden units
of expert e, w_e its tokens' weights and g_e the gradient by the output at its tokens,
``q_e = g_e W2[e]^T``, ``dw_e = rowsum(q_e a_e)``, ``dW2[e] = (w_e a_e)^T g_e``, ``da_e = w_e q_e``,
``dW1[e] = x_e^T dpre_e`` and ``dx_e = dpre_e W1[e]^T``. Only x and the first products are kept for it.

Letters: T tokens, S assignments, n experts, d model width, h expert width, m 2 with a gate, else 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, split_with_sizes
from torch.utils.flop_counter import register_flop_formula

from lightning_eff.moe.config import Activation
from lightning_eff.moe.experts.activations import activate_into, backward_into

#: Numbers in the gathered tokens of a chunk, which then stay in a core's second-level cache.
_CHUNK_NUMBERS = 192 * 1024
#: Assignments of a chunk at least: products of fewer rows cost more than memory does.
_LEAST_ROWS = 256


def fused_ffn(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    weights: Tensor,
    token_index: Tensor,
    counts: Tensor,
    activation: Activation,
) -> Tensor:
    """Sum experts' outputs; arguments and result as in :func:`lightning_eff.moe.moe_ffn`. Differentiable once."""
    keep = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, w1, b1, w2, weights)
    )  # otherwise the first products need not outlive their chunk
    y: Tensor = _forward(x, w1, b1, w2, weights, token_index, counts, activation, keep)[0]
    return y


class _Chunk(NamedTuple):
    """Neighbouring assignments that are worked on together."""

    rows: slice
    experts: list[int]
    sizes: list[int]
    #: whether the first piece goes on with the expert of the chunk before
    goes_on: bool


def _chunks(counts: list[int], most: int) -> list[_Chunk]:
    """Join experts to chunks of at most ``most`` assignments; an expert of more is cut into even pieces."""
    chunks: list[_Chunk] = []
    experts: list[int] = []
    sizes: list[int] = []
    start, total, goes_on = 0, 0, False
    for expert, count in enumerate(counts):
        pieces = -(-count // most)
        for piece in range(pieces):
            size = count // pieces + (piece < count % pieces)
            if total and (piece or total + size > most):
                chunks.append(_Chunk(slice(start, start + total), experts, sizes, goes_on))
                start, total, experts, sizes, goes_on = start + total, 0, [], [], piece > 0
            experts.append(expert)
            sizes.append(size)
            total += size
    if total:
        chunks.append(_Chunk(slice(start, start + total), experts, sizes, goes_on))
    return chunks


def _rows_of(d: int) -> int:
    return max(_LEAST_ROWS, _CHUNK_NUMBERS // d)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which sums over experts are formed."""
    return torch.promote_types(dtype, torch.float32)


@torch.library.custom_op("lightning_eff::moe_ffn", mutates_args=())
def _forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    weights: Tensor,
    token_index: Tensor,
    counts: Tensor,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Return the output [T, d] and the first products [S, m h], which are empty unless ``keep``."""
    loads = counts.tolist()
    (d, inner), h = w1.shape[1:], w2.shape[1]
    y = torch.zeros(x.shape, dtype=_wide(x.dtype), device=x.device)
    pre = x.new_empty(token_index.numel() if keep else 0, inner)
    chunks = _chunks(loads, _rows_of(d))
    most = max((sum(chunk.sizes) for chunk in chunks), default=0)
    tokens, hidden = x.new_empty(most, d), x.new_empty(most, h)
    inner_rows = x.new_empty(0 if keep else most, inner)
    first, second = w1.unbind(0), w2.unbind(0)
    biases = None if b1 is None else b1.unbind(0)
    for rows, experts, sizes, _ in chunks:
        total = rows.stop - rows.start
        index = token_index[rows]
        a, p = hidden[:total], pre[rows] if keep else inner_rows[:total]
        gathered = torch.index_select(x, 0, index, out=tokens[:total])
        pieces = split_with_sizes(gathered, sizes)
        if biases is None:
            for e, piece, out in zip(experts, pieces, split_with_sizes(p, sizes), strict=True):
                torch.mm(piece, first[e], out=out)
        else:
            for e, piece, out in zip(experts, pieces, split_with_sizes(p, sizes), strict=True):
                torch.addmm(biases[e], piece, first[e], out=out)
        activate_into(a, p, activation)  # type: ignore[arg-type]
        a.mul_(weights[rows, None])
        for e, piece, out in zip(experts, split_with_sizes(a, sizes), pieces, strict=True):
            torch.mm(piece, second[e], out=out)
        y.index_add_(0, index, gathered.to(y.dtype))
    return y.to(x.dtype), pre


@torch.library.custom_op("lightning_eff::moe_ffn_backward", mutates_args=())
def _backward(
    grad: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    weights: Tensor,
    token_index: Tensor,
    counts: Tensor,
    pre: Tensor,
    activation: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return gradients by x, w1, b1, w2 and weights; those that ``needs`` does not ask for are empty."""
    loads = counts.tolist()
    (d, inner), h = w1.shape[1:], w2.shape[1]
    by_x, by_w1, by_b1, by_w2, by_weights = needs
    dx = torch.zeros(x.shape if by_x else (0,), dtype=_wide(x.dtype), device=x.device)
    dw1 = torch.empty_like(w1, memory_format=torch.contiguous_format) if by_w1 else w1.new_empty(0)
    db1 = w1.new_zeros((len(loads), inner) if by_b1 else (0,))
    dw2 = torch.empty_like(w2, memory_format=torch.contiguous_format) if by_w2 else w2.new_empty(0)
    dweights = torch.zeros_like(weights) if by_weights else weights.new_empty(0)
    for expert, load in enumerate(loads):
        if not load:
            for gradient in (dw1, dw2):
                if gradient.numel():
                    gradient[expert].zero_()
    chunks = _chunks(loads, _rows_of(d))
    most = max((sum(chunk.sizes) for chunk in chunks), default=0)
    x_rows, g_rows = (grad.new_empty(most, d) for _ in range(2))
    a_rows, q_rows, gate_rows, work_rows = (grad.new_empty(most, h) for _ in range(4))
    p_rows = grad.new_empty(most, inner)
    first, second = ([w.t() for w in stack.unbind(0)] for stack in (w1, w2))
    into_w1, into_b1, into_w2 = (t.unbind(0) if t.numel() else () for t in (dw1, db1, dw2))
    for rows, experts, sizes, goes_on in chunks:
        total = rows.stop - rows.start
        index, p, w = token_index[rows], pre[rows], weights[rows, None]
        a, q, dp = a_rows[:total], q_rows[:total], p_rows[:total]
        gates, work = gate_rows[:total], work_rows[:total]
        g = torch.index_select(grad, 0, index, out=g_rows[:total])
        g_pieces, dp_pieces = split_with_sizes(g, sizes), split_with_sizes(dp, sizes)
        for e, piece, out in zip(experts, g_pieces, split_with_sizes(q, sizes), strict=True):
            torch.mm(piece, second[e], out=out)
        activate_into(a, p, activation, gates)  # type: ignore[arg-type]
        if by_weights:
            torch.mul(q, a, out=work)
            dweights[rows] = work.sum(1, dtype=dweights.dtype)
        if by_w2:
            a.mul_(w)
            _add_products(into_w2, experts, split_with_sizes(a, sizes), g_pieces, goes_on)
        if not (by_x or by_w1 or by_b1):
            continue
        q.mul_(w)
        backward_into(dp, q, p, activation, gates, work)  # type: ignore[arg-type]
        if by_w1:
            x_pieces = split_with_sizes(torch.index_select(x, 0, index, out=x_rows[:total]), sizes)
            _add_products(into_w1, experts, x_pieces, dp_pieces, goes_on)
        if by_b1:
            for e, piece in zip(experts, dp_pieces, strict=True):
                into_b1[e].add_(piece.sum(0))
        if by_x:
            for e, piece, out in zip(experts, dp_pieces, g_pieces, strict=True):
                torch.mm(piece, first[e], out=out)
            dx.index_add_(0, index, g.to(dx.dtype))
    return dx.to(x.dtype), dw1, db1, dw2, dweights


def _add_products(
    into: tuple[Tensor, ...], experts: list[int], left: tuple[Tensor, ...], right: tuple[Tensor, ...], goes_on: bool
) -> None:
    """Write ``left^T right`` of each expert's piece; the first one is added where its expert has had a piece."""
    for position, (e, one, other) in enumerate(zip(experts, left, right, strict=True)):
        if goes_on and not position:
            torch.addmm(into[e], one.t(), other, out=into[e])
        else:
            torch.mm(one.t(), other, out=into[e])


@_forward.register_fake
def _(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    weights: Tensor,
    token_index: Tensor,
    counts: Tensor,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(token_index.numel() if keep else 0, w1.shape[2])


@_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    weights: Tensor,
    token_index: Tensor,
    counts: Tensor,
    pre: Tensor,
    activation: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shapes = (x.shape, w1.shape, (w1.shape[0], w1.shape[2]), w2.shape)
    made = [w1.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=False)]
    return made[0], made[1], made[2], made[3], weights.new_empty(weights.shape if needs[4] else (0,))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, w1, _, w2, weights, token_index, counts, activation, _ = inputs
    ctx.save_for_backward(x, w1, w2, weights, token_index, counts, output[1])
    ctx.activation = activation


def _differentiate(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, w1, w2, weights, token_index, counts, pre = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:5])
    made = _backward(grad, x, w1, w2, weights, token_index, counts, pre, ctx.activation, needs)
    return (*(gradient if need else None for gradient, need in zip(made, needs, strict=True)), None, None, None, None)


_forward.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.lightning_eff.moe_ffn)
def _forward_flops(
    x: Any, w1: Any, b1: Any, w2: Any, weights: Any, token_index: Any, *_: Any, out_shape: Any = None
) -> int:
    return 2 * int(token_index[0]) * int(w1[1] * w1[2] + w2[1] * w2[2])


@register_flop_formula(torch.ops.lightning_eff.moe_ffn_backward)
def _backward_flops(
    grad: Any,
    x: Any,
    w1: Any,
    w2: Any,
    weights: Any,
    token_index: Any,
    counts: Any,
    pre: Any,
    activation: Any,
    needs: Any,
    out_shape: Any = None,
) -> int:
    by_x, by_w1, by_b1, by_w2, by_weights = needs
    first, second = int(w1[1] * w1[2]), int(w2[1] * w2[2])
    by_hidden = by_x or by_w1 or by_b1 or by_weights
    return int(2 * token_index[0] * (second * (by_hidden + by_w2) + first * (by_x + by_w1)))
