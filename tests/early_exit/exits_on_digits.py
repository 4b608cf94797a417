"""A small network with exits on real digits, and a trainer that prints nothing."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_eff.data import DigitsDataModule
from lightning_eff.early_exit.module import EarlyExitModule
from lightning_eff.models import SmallCNN

EXITS = ["layers.pool2", "layers.pool4"]


def data(**options: Any) -> DigitsDataModule:
    return DigitsDataModule(**{"batch_size": 64, **options})


def images(count: int = 8) -> Tensor:
    torch.manual_seed(5)
    return torch.randn(count, 1, 8, 8)


def backbone() -> nn.Module:
    torch.manual_seed(0)
    return SmallCNN(width=4)


def module(**options: Any) -> EarlyExitModule:
    """Two exits, the same weights every time; heads are built from the trainer's data unless told otherwise."""
    made = EarlyExitModule(**{"backbone": backbone(), "exits": EXITS, "num_classes": 10, **options})
    torch.manual_seed(1)  # of the heads
    return made


def trainer(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": any(isinstance(one, pl.callbacks.ModelCheckpoint) for one in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_train_batches": 3,
        "limit_val_batches": 2,
        "limit_test_batches": 2,
        "max_epochs": 4,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**quiet, **options})


def fixed_loader(batches: int = 3, size: int = 16) -> DataLoader[Any]:
    """The same digits in the same order in every epoch."""
    source = data()
    source.setup()
    pairs = [source.train_set[i] for i in range(batches * size)]
    return DataLoader(TensorDataset(torch.stack([x for x, _ in pairs]), torch.stack([y for _, y in pairs])), size)


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Diary(pl.Callback):
    """Writes down phase, learning rate and what is trained at every batch, and the state when each epoch begins."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, str, float, str]] = []
        self.states: dict[int, dict[str, Tensor]] = {}

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.states[trainer.current_epoch] = state(pl_module.network)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        group = optimizer.param_groups[0]
        network = pl_module.network
        parts = {"b": network.backbone, "h": network.heads}
        trained = "".join(name for name, part in parts.items() if any(p.grad is not None for p in part.parameters()))
        self.batches.append((trainer.current_epoch, trained, group["lr"], type(optimizer).__name__))


class ColourDigits(DigitsDataModule):
    """Digits with three equal channels, for networks made for colour."""

    def load(self) -> Any:
        parts = super().load()
        for part in parts:
            part.channels = 3
        return parts
