"""Networks, samples and coalitions that the tests of channel games share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_eff.batch import split_batch
from lightning_eff.pruning import Samples
from lightning_eff.surgery import ChannelGraph

sys.path.insert(0, str(Path(__file__).parents[1] / "surgery"))

from networks import build, randomised

__all__ = ["NETWORKS", "coalitions", "network", "randomised", "samples"]

NETWORKS = [
    ("LeNet", "c1.0"),
    ("LeNet", "c5"),
    ("ResNet-18", "layer2.0.conv1"),
    ("ResNet-18", "layer2.0.conv2"),  # the residual stream: three producers
    ("MobileNetV2", "features.2.conv.0.0"),
    ("concat-flatten", "b"),
    ("concat-flatten", "c"),
    ("grouped", "a"),
    ("squeeze-excite", "conv"),
]


def network(name: str, count: int = 12) -> tuple[nn.Module, ChannelGraph, Tensor, Tensor]:
    """A network in evaluation mode, its graph, inputs, and labels that it mostly gets right."""
    model, x = build(name)
    model.eval()
    graph = ChannelGraph.from_model(model, x)
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, *x.shape[1:], generator=generator)
    *_, last = (layer for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv2d))
    with torch.no_grad():
        last.bias -= model(inputs).mean(0)  # or an untrained network gives every input the same class
        labels = model(inputs).argmax(1)
    labels[::4] = torch.randint(0, 4, labels[::4].shape, generator=generator)
    return model, graph, inputs, labels


def samples(inputs: Any, target: Any, groups: int = 2) -> Samples:
    return Samples.collect([(inputs, target)], 10**6, split_batch, groups=groups)


def coalitions(n: int, count: int = 3, seed: int = 0) -> Tensor:
    """Everybody, a single one, random ones; never nobody, which no cut network is."""
    some = torch.rand(count, n, generator=torch.Generator().manual_seed(seed)) < 0.5
    some[:, 0] = True
    single = torch.zeros(1, n, dtype=torch.bool)
    single[0, -1] = True
    return torch.cat([torch.ones(1, n, dtype=torch.bool), single, some])
