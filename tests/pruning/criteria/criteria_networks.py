"""What the tests of criteria share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_eff.surgery import ChannelGraph


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    """The loss of a batch ``(inputs, labels)`` or ``{"x": ..., "y": ...}``."""
    inputs, target = (batch["x"], batch["y"]) if isinstance(batch, dict) else batch
    return F.cross_entropy(model(inputs), target)


def only(graph: ChannelGraph, *names: str) -> ChannelGraph:
    """The graph with all other groups protected."""
    return graph.protect({name: "not asked for" for name in graph.groups if name not in names})


def kill(model: nn.Module, graph: ChannelGraph, name: str, channel: int) -> None:
    """Set every weight that reads the channel to zero."""
    for m in graph.groups[name].consumers:
        layer = model.get_submodule(m.path)
        positions = m.index[m.root == channel]
        with torch.no_grad():
            if isinstance(layer, nn.ConvTranspose2d):
                layer.weight[positions] = 0
            elif getattr(layer, "groups", 1) > 1:
                width = layer.weight.shape[1]
                blocks = layer.weight.view(layer.groups, -1, *layer.weight.shape[1:])
                for position in positions.tolist():
                    blocks[position // width, :, position % width] = 0
            else:
                layer.weight[:, positions] = 0


def wake(model: nn.Module, x: Tensor) -> None:
    """Give norms the statistics of ``x``: random ones let nothing through the many layers of a MobileNet."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    model.train()
    with torch.no_grad():
        model(x)
    model.eval()


def sharpen(model: nn.Module) -> None:
    """Let the labels of ``network("SmallCNN")``, which it gets right, be clear: its loss is not that of guessing."""
    with torch.no_grad():
        for parameter in model.layers.out.parameters():
            parameter *= 500
