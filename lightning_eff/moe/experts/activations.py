"""Activations of experts and their derivatives, into memory that is there already.

Rows of assignments come first; ``pre`` is what the first matrix gives, [rows, h], or [rows, 2 h] with a gate before.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_eff.moe.config import Activation

_APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}


def width(activation: Activation) -> int:
    """Return how many hidden columns of the first matrix one unit takes: 2 with a gate, else 1."""
    return 2 if activation == "swiglu" else 1


def activate(pre: Tensor, activation: Activation) -> Tensor:
    """Return the hidden units [..., h] of ``pre`` [..., h or 2 h], differentiably."""
    if activation == "swiglu":
        gate, up = pre.chunk(2, -1)
        return F.silu(gate) * up
    if activation == "relu":
        return F.relu(pre)
    if activation == "silu":
        return F.silu(pre)
    return F.gelu(pre, approximate=_APPROXIMATE[activation])


def activate_into(out: Tensor, pre: Tensor, activation: Activation, gates: Tensor | None = None) -> None:
    """Write the hidden units of ``pre`` to ``out``, and those of a gate, before they are multiplied, to ``gates``."""
    if activation == "relu":
        torch.clamp_min(pre, 0, out=out)
    elif activation in _APPROXIMATE:
        torch.ops.aten.gelu.out(pre, approximate=_APPROXIMATE[activation], out=out)
    elif activation == "silu":
        torch.ops.aten.silu.out(pre, out=out)
    else:
        gate, up = pre.chunk(2, -1)
        gates = out if gates is None else gates
        if _leaves_a_rest(gate):
            gate = gates.copy_(gate)
        torch.ops.aten.silu.out(gate, out=gates)
        torch.mul(gates, up, out=out)


def backward_into(out: Tensor, grad: Tensor, pre: Tensor, activation: Activation, gates: Tensor, work: Tensor) -> None:
    """Write the gradient by ``pre`` to ``out``, given the one by the hidden units, which is overwritten.

    Args:
        out: As ``pre``.
        grad: [rows, h].
        pre: [rows, h or 2 h].
        activation: Which one.
        gates: What :func:`activate_into` wrote there [rows, h].
        work: Memory [rows, h].
    """
    if activation == "relu":
        torch.ops.aten.threshold_backward.grad_input(grad, pre, 0, grad_input=out)
    elif activation in _APPROXIMATE:
        torch.ops.aten.gelu_backward.grad_input(grad, pre, approximate=_APPROXIMATE[activation], grad_input=out)
    elif activation == "silu":
        torch.ops.aten.silu_backward.grad_input(grad, pre, grad_input=out)
    else:
        gate, up = pre.chunk(2, -1)
        by_gate, by_up = out.chunk(2, -1)
        torch.mul(grad, gates, out=by_up)
        grad.mul_(up)
        if _leaves_a_rest(gate):
            torch.ops.aten.silu_backward.grad_input(grad, work.copy_(gate), grad_input=work)
            by_gate.copy_(work)
        else:
            torch.ops.aten.silu_backward.grad_input(grad, gate, grad_input=by_gate)


def _leaves_a_rest(half: Tensor) -> bool:
    """Whether rows of ``half`` are no whole vectors: what is left of each is then exponentiated one by one.

    Copied to where rows follow each other, only the last one leaves a rest: more than twice as fast for rows of 48.
    """
    return half.shape[-1] % 32 != 0
