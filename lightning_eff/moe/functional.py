"""A mixture of feed-forward experts as a function: who goes where is known, and differentiable is the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_eff.moe.config import Activation, Backend
from lightning_eff.moe.experts.activations import width
from lightning_eff.moe.experts.fused import fused_ffn
from lightning_eff.moe.experts.grouped import grouped_ffn, grouped_problem
from lightning_eff.moe.experts.reference import reference_ffn

_BACKENDS = {"fused": fused_ffn, "grouped": grouped_ffn, "reference": reference_ffn}


def moe_ffn(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    weights: Tensor,
    token_index: Tensor,
    counts: Tensor,
    activation: Activation = "relu",
    backend: Backend = "auto",
    b1: Tensor | None = None,
) -> Tensor:
    """Compute ``y[t] = sum over assignments s of token t: weights[s] * act(x[t] W1[e(s)] + b1[e(s)]) W2[e(s)]``.

    Assignments are sorted by expert: the first ``counts[0]`` belong to expert 0, the next ``counts[1]`` to expert 1
    and so on. Those behind the sum of the counts are ignored, which keeps shapes when tokens are dropped.
    Differentiable in x, w1, w2, weights and b1: once with ``"fused"``, any number of times with ``"reference"``.
    Under autocast x, w1, w2 and b1 are cast; weights stay as they are.

    Args:
        x: Tokens [T, d].
        w1: First matrices [n, d, h], or [n, d, 2 h] for swiglu: gates first.
        w2: Second matrices [n, h, d].
        weights: Of the assignments [S], float32 also where x is of lower precision.
        token_index: Token of each assignment [S], integers in 0..T-1.
        counts: Assignments of each expert [n], integers whose sum is at most S.
        activation: Of the hidden units.
        backend: ``"fused"``, ``"grouped"``, ``"reference"``, or ``"auto"``: see :func:`choose_backend`.
        b1: Biases of the hidden units [n, h or 2 h].

    Returns:
        [T, d] of the dtype of x, or of autocast.

    Raises:
        ValueError: Shapes do not fit together, or the backend cannot take dtype or widths.
    """
    _check_shapes(x, w1, w2, weights, token_index, counts, activation, b1)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, w1, w2, b1 = x.to(dtype), w1.to(dtype), w2.to(dtype), b1 if b1 is None else b1.to(dtype)
    name = choose_backend(w1, w2) if backend == "auto" else backend
    return _BACKENDS[name](x, w1, b1, w2, weights, token_index, counts, activation)


def choose_backend(w1: Tensor, w2: Tensor) -> Backend:
    """Return ``"grouped"`` for bfloat16 on CUDA devices of compute capability 8.0 and up, aligned; else ``"fused"``.

    Args:
        w1: First matrices [n, d, h or 2 h].
        w2: Second matrices [n, h, d].
    """
    modern = w1.device.type == "cuda" and torch.cuda.get_device_capability(w1.device) >= (8, 0)
    grouped = modern and w1.dtype == torch.bfloat16 and grouped_problem(w1, w2) is None
    return "grouped" if grouped else "fused"


def _check_shapes(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    weights: Tensor,
    token_index: Tensor,
    counts: Tensor,
    activation: Activation,
    b1: Tensor | None,
) -> None:
    n, h, d = w2.shape
    inner = width(activation) * h
    expected: list[tuple[str, Tensor, tuple[int, ...]]] = [
        ("x", x, (x.shape[0], d)),
        ("w1", w1, (n, d, inner)),
        ("weights", weights, (token_index.numel(),)),
        ("counts", counts, (n,)),
    ]
    if b1 is not None:
        expected.append(("b1", b1, (n, inner)))
    for name, tensor, shape in expected:
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)} (w2: {[n, h, d]})")
