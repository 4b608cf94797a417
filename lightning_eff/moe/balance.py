"""The loss-free bias of all mixture-of-experts layers of a model, moved after a step."""

from __future__ import annotations

import torch
from torch import nn

from lightning_eff.moe.layer import FineGrainedMoE


def update_balance_biases(model: nn.Module) -> int:
    """Move the loss-free bias of every layer by the loads since the last call; call it after every optimizer step.

    Calling it again before the next forward pass changes nothing: there are no new loads. In a run of several
    processes all of them must call it.

    Args:
        model: Anything with :class:`FineGrainedMoE` layers in it.

    Returns:
        Number of layers whose ``balance.method`` is ``"bias"``.
    """
    layers = [m for m in model.modules() if isinstance(m, FineGrainedMoE) and m.balance_bias is not None]
    for layer in layers:
        layer.update_balance_bias()
    return len(layers)


def forget_loads(model: nn.Module) -> None:
    """Leave out of the next move of the biases what has been counted since the last: batches of a step never made.

    Args:
        model: Anything with :class:`FineGrainedMoE` layers in it.
    """
    for layer in model.modules():
        if isinstance(layer, FineGrainedMoE):
            layer._load_since_step = torch.zeros_like(layer._load_since_step)
