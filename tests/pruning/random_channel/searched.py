"""A small network, its graph and data that the tests of searches share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_eff.surgery import ChannelGraph

sys.path.insert(0, str(Path(__file__).parents[2] / "surgery"))

from networks import build


def small() -> tuple[nn.Module, ChannelGraph, list[tuple[Tensor, Tensor]]]:
    """A convolutional network with BatchNorm, half of it in training mode, and two batches with its own labels."""
    model, x = build("SmallCNN")
    model.eval()
    graph = ChannelGraph.from_model(model, x)
    inputs = torch.randn(64, *x.shape[1:], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        labels = model(inputs).argmax(1)
    model.train()
    next(model.children())[0].eval()
    return model, graph, list(zip(inputs.split(32), labels.split(32), strict=True))


def likeness(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Callable[[nn.Module], float]:
    """Score of a smaller network: minus the mean squared distance from the outputs of the whole one."""
    modes = {module: module.training for module in model.modules()}
    with torch.no_grad():
        wanted = [model.eval()(inputs) for inputs, _ in batches]
    for module, mode in modes.items():
        module.training = mode

    def score(smaller: nn.Module) -> float:
        assert not torch.is_grad_enabled()
        assert not smaller.training
        return -sum(float((smaller(x) - y).square().mean()) for (x, _), y in zip(batches, wanted, strict=True))

    return score


class Untouched:
    """Everything of a model that a search must give back as it was."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.before = model, self._now(model)

    @staticmethod
    def _now(model: nn.Module) -> tuple[list[object], list[Tensor], Tensor]:
        tensors = [*model.parameters(), *model.buffers()]
        facts = [
            [m.training for m in model.modules()],
            [(id(t), t.requires_grad, t.grad is None) for t in tensors],
            [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
            [str(m) for m in model.modules()],
        ]
        return facts, [t.detach().clone() for t in tensors], torch.get_rng_state()

    def check(self) -> None:
        now = self._now(self.model)
        assert now[0] == self.before[0]
        assert all(torch.equal(a, b) for a, b in zip(now[1], self.before[1], strict=True))
        assert torch.equal(now[2], self.before[2])
