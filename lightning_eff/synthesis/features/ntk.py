"""Features of the empirical neural tangent kernel of an untrained network (DP-NTK, arXiv 2303.01687)."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_eff.synthesis.embedding import MeanEmbedding
from lightning_eff.synthesis.features.objective import MMD2Terms
from lightning_eff.synthesis.features.sums import ClassSums

Estimator = Literal["u", "v"]
Backend = Literal["auto", "kernel", "dense"]


class NTKFeatures(nn.Module):
    """Unit-norm gradients of an untrained network as features of its inputs.

    The feature of x is the gradient of ``network(x).sum()`` with respect to all parameters, divided by its norm.

    Args:
        network: Any module from ``(B, *input_shape)`` to ``(B, ...)``; it is copied, and used in evaluation mode.
        input_shape: Shape of one sample; by default ``network.input_shape``, or the ``in_features`` of a first dense
            layer.
        collapse_last: Keep the K equal copies of the last dense layer's gradient as one, scaled by sqrt(K): norms,
            kernel and sensitivity stay the same.
        drop_final_bias: Leave out the bias of the last dense layer, whose gradient is constant.
        sketch_dim: Keep a tensor sketch of so many coordinates, re-normalised, instead of the gradient: less memory,
            a slower pass over the data.
        sketch_seed: Draws the sketch.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        input_shape: Sequence[int] | None = None,
        collapse_last: bool = True,
        drop_final_bias: bool = False,
        sketch_dim: int | None = None,
        sketch_seed: int = 0,
    ) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.input_shape = tuple(input_shape or network.input_shape)  # type: ignore[arg-type]

    @property
    def layout(self) -> dict[str, tuple[int, ...]]:
        """Stored shape of each block of a feature, by parameter name."""
        return {name: tuple(parameter.shape) for name, parameter in self.network.named_parameters()}

    @property
    def feature_dim(self) -> int:
        """Stored coordinates P of one feature."""
        return sum(math.prod(shape) for shape in self.layout.values())

    def dense(self, x: Tensor) -> Tensor:
        """Return the features ``(B, P)`` themselves, differentiable in ``x``: for reference, memory is B times P."""
        weights = dict(self.network.named_parameters())

        def total(w: dict[str, Tensor], one: Tensor) -> Tensor:
            return torch.func.functional_call(self.network, w, (one[None],)).sum()

        x = x.reshape(len(x), *self.input_shape)
        grads = torch.func.vmap(torch.func.grad(total), in_dims=(None, 0))(weights, x)
        flat = torch.cat([grads[name].flatten(1) for name in weights], 1)
        return flat / flat.norm(dim=1, keepdim=True).clamp(min=1e-12)

    def sums(
        self, num_classes: int, *, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
    ) -> ClassSums:
        """Return empty class sums to add batches to."""
        return ClassSums(self, num_classes, dtype, device)

    def class_sums(self, x: Tensor, y: Tensor, num_classes: int) -> MeanEmbedding:
        """Return the class sums of one batch in the network's precision."""
        one_hot = torch.nn.functional.one_hot(y.long(), num_classes).to(x.dtype)
        flat = one_hot.T @ self.dense(x).detach()
        pieces = flat.split([math.prod(shape) for shape in self.layout.values()], dim=1)
        blocks = {
            name: piece.unflatten(1, shape) for piece, (name, shape) in zip(pieces, self.layout.items(), strict=True)
        }
        return MeanEmbedding(blocks, one_hot.sum(0))

    def kernel(self, x: Tensor, x2: Tensor | None = None) -> Tensor:
        """Return the kernel matrix ``(B, B2)``, entries in [-1, 1]."""
        phi = self.dense(x)
        return phi @ (phi if x2 is None else self.dense(x2)).T

    def mmd2(
        self,
        target: MeanEmbedding,
        x: Tensor,
        y: Tensor,
        *,
        weights: Tensor | None = None,
        estimator: Estimator = "u",
        backend: Backend = "auto",
    ) -> Tensor:
        """Return the squared mean discrepancy between ``target`` and samples, a scalar differentiable in ``x``."""
        return self.mmd2_terms(target, x, y, weights=weights, estimator=estimator, backend=backend).mmd2

    def mmd2_terms(
        self,
        target: MeanEmbedding,
        x: Tensor,
        y: Tensor,
        *,
        weights: Tensor | None = None,
        estimator: Estimator = "u",
        backend: Backend = "auto",
    ) -> MMD2Terms:
        """Return :meth:`mmd2` and its terms."""
        phi, sums = self.dense(x), target.flatten()
        total = x.new_zeros(4)
        for c in range(target.num_classes):
            rows = phi[y == c]
            omega = 1 / target.num_classes if weights is None else weights[c]
            mean, b = sums[c] / target.counts[c], len(rows)
            square = rows.mean(0).square().sum()
            spread = square if estimator == "v" else (b * b * square - b) / (b * (b - 1))
            norm, cross = mean.square().sum(), rows.mean(0) @ mean
            total = total + omega * torch.stack([norm - 2 * cross + spread, norm, cross, spread])
        return MMD2Terms(total[0], *total[1:].detach())
