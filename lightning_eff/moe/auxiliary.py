"""Auxiliary losses of all mixture-of-experts layers of a model, ready to be added to the task's loss."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from lightning_eff.moe.layer import FineGrainedMoE

Reduce = Literal["mean", "sum"]


def collect_aux_losses(module: nn.Module, reduce: Reduce = "mean") -> dict[str, Tensor]:
    """Return the auxiliary losses of the last forward pass, before their weights.

    Args:
        module: Anything with :class:`FineGrainedMoE` layers in it; those that have not run yet are left out.
        reduce: ``"mean"`` over the layers that have the loss, so that weights need not follow the depth; or ``"sum"``.

    Returns:
        ``"balance"`` and ``"z"``, as far as a layer has them; scalars with a graph.
    """
    layers = [layer.aux_losses for layer in module.modules() if isinstance(layer, FineGrainedMoE)]
    return _reduce(layers, reduce)


def total_aux_loss(module: nn.Module, reduce: Reduce = "mean") -> Tensor:
    """Return the sum of the auxiliary losses of the last forward pass, each times its layer's weight.

    A layer that the last pass left out still has those of its own last pass, whose graph may be gone: where layers are
    dropped at random, let :func:`~lightning_eff.moe.replace_ffn` inject the losses.

    Args:
        module: Anything with :class:`FineGrainedMoE` layers in it.
        reduce: As of :func:`collect_aux_losses`.

    Returns:
        Scalar with a graph; 0 without layers or losses.
    """
    layers = [
        {name: layer.aux_weights[name] * loss for name, loss in layer.aux_losses.items()}
        for layer in module.modules()
        if isinstance(layer, FineGrainedMoE)
    ]
    return sum(_reduce(layers, reduce).values(), torch.zeros(()))


def _reduce(layers: list[dict[str, Tensor]], reduce: Reduce) -> dict[str, Tensor]:
    if reduce not in ("mean", "sum"):
        raise ValueError(f"reduce must be 'mean' or 'sum', got {reduce!r}")
    found = {}
    for name in ("balance", "z"):
        losses = [losses[name] for losses in layers if name in losses]
        if losses:
            total = torch.stack([loss.to(losses[0].device) for loss in losses])
            found[name] = total.mean() if reduce == "mean" else total.sum()
    return found
