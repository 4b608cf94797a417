"""Gradient equilibrium: what reaches a feature is the mean, not the sum, of the gradients of the outputs behind it.

A block in front of exit ``k`` gets the gradients of all ``K - k`` outputs at or behind it, so they add up toward the
input. At each exit the branch into the head multiplies the gradient by ``1 / (K - k)`` and the branch that goes on by
``(K - k - 1) / (K - k)``; forward values are bit-identical. Source: Li et al., Improved Techniques for Training
Adaptive Deep Networks (arXiv 1908.06294), which sums unweighted losses: combine it with ``weights=[1, 1, ...]`` to get
their method.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Branch = Callable[[int, Tensor], tuple[Tensor, Tensor]]


class _ScaledGradient(torch.autograd.Function):
    """Hand the input on, and its gradient times a factor back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        # a copy: layers behind the exit may write into it, which autograd refuses for views of custom functions
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """Return a copy of ``x`` whose gradient is multiplied by ``factor`` on its way back."""
    scaled: Tensor = _ScaledGradient.apply(x, factor)
    return scaled


def equilibrium_branch(outputs: int) -> Branch:
    """Branching for a network of ``outputs`` (``K``) outputs, exits and the backbone's own.

    Args:
        outputs: ``K`` >= 1.

    Returns:
        ``(exit index k, feature) -> (feature for the head, feature that goes on)``, for ``k`` in 0..K-2.

    Raises:
        ValueError: ``outputs`` < 1.
    """
    if outputs < 1:
        raise ValueError(f"expected at least one output, got {outputs}")

    def branch(exit_index: int, feature: Tensor) -> tuple[Tensor, Tensor]:
        if not feature.requires_grad:
            return feature, feature
        behind = outputs - exit_index
        return scale_gradient(feature, 1 / behind), scale_gradient(feature, (behind - 1) / behind)

    return branch
