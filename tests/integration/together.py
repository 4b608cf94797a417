"""A small network, data of three classes and quiet trainers that several techniques share."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_eff import EarlyExitModule
from lightning_eff.models import ImageClassifier
from lightning_eff.surgery import ChannelGraph, PruningPlan


def network() -> nn.Sequential:
    """Three convolutions and a linear layer on images of 8 x 8 pixels, always the same weights; no normalisation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Conv2d(8, 12, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(12, 3),
        )


def images(count: int = 48, seed: int = 1, channels: int = 1) -> tuple[Tensor, Tensor]:
    """Images ``[count, channels, 8, 8]`` whose class shifts their brightness."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    noise = torch.randn(count, channels, 8, 8, generator=generator)
    return noise + labels[:, None, None, None] - 1.0, labels


def loader(count: int = 48, seed: int = 1, channels: int = 1) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*images(count, seed, channels)), batch_size=16)


def trainer(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    given = {"max_epochs": 1, "accelerator": "cpu", "enable_checkpointing": False, **options}
    return pl.Trainer(callbacks=list(callbacks), **quiet, **given)


def classifier(net: nn.Module | None = None) -> ImageClassifier:
    return ImageClassifier(net or network(), lr=1e-2)


def exits(regime: str = "joint", net: nn.Module | None = None, **options: Any) -> EarlyExitModule:
    """Exits behind the first two convolutions, heads always of the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        given = {"thresholds": 0.36, "example_input": images()[0][:2], **options}
        return EarlyExitModule(net or network(), ["1", "3"], 3, regime, **given)


def widths(model: nn.Module) -> list[int]:
    """Output channels of the convolutions and linear layers, in order."""
    return [m.weight.shape[0] for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]


def first_half(graph: ChannelGraph) -> PruningPlan:
    """Keep the first half of the channels of every group that may lose some."""
    return PruningPlan({name: list(range(graph.groups[name].size // 2)) for name in graph.prunable}, graph.sizes)


def masked(model: nn.Module, graph: ChannelGraph, plan: PruningPlan, inputs: Any) -> Any:
    """What the model returns with the channels that a plan removes set to zero, in evaluation mode."""
    gates = {name: mask.float() for name, mask in plan.keep_masks(graph).items()}
    model.eval()
    with torch.no_grad(), graph.gate(model, gates):
        return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def same_state(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
