"""What a network's outputs say about its predictions: classes by softmax, or values with a normal error.

Shapes: ``B`` samples, ``K`` classes, ``P`` positions (pixels, tokens; 1 for plain classification).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_eff.pruning.values import equal_outputs

OutputKind = Literal["softmax", "gaussian"]


def select(outputs: Any, kind: OutputKind, key: str | int | None) -> Tensor:
    """Take the outputs that count; ValueError where they cannot be what ``kind`` says.

    Those of a list of equal shape, as a network with early exits has them, become positions ``[..., E]``.
    """
    found = outputs if key is None else outputs[key]
    if equal_outputs(found):
        found = torch.stack(found, -1)
    if not isinstance(found, Tensor):
        keys = f" with {sorted(map(str, found))}" if isinstance(found, Mapping) else ""
        raise ValueError(
            f"expected the model to return a tensor, got a {type(found).__name__}{keys}: give the criterion key=, the "
            'key or position of the outputs, for example KL(key="logits")'
        )
    if kind == "softmax" and (found.ndim < 2 or found.shape[1] < 2):
        raise ValueError(
            f'expected logits [B, K, ...] of at least two classes, got {list(found.shape)}: use output="gaussian", for '
            'example KL(output="gaussian")'
        )
    return found


def divergence(dense: Tensor, outputs: Tensor, kind: OutputKind) -> Tensor:
    """Divergence of predictions from the dense network's, float64 ``[B]``: nats, or squared units of the outputs."""
    if kind == "gaussian":
        return (outputs.double() - dense.double()).square().flatten(1).mean(1)
    log_p, log_q = (logits.double().log_softmax(1) for logits in (dense, outputs))
    p = log_p.exp()
    terms = torch.where(p > 0, p * (log_p - log_q), 0.0)
    return terms.sum(1).reshape(len(p), -1).mean(1)
