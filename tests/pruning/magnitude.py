"""The smallest ranking rule: what a new pruning callback takes, and a fast one for tests of everything else."""

from __future__ import annotations

from collections.abc import Mapping

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_eff.pruning import Scores, Scoring, StructuredPruningCallback


class Magnitude(StructuredPruningCallback):
    """Rank channels by the L1 norm of the weights that produce them."""

    def score(self, scoring: Scoring) -> Mapping[str, Scores]:
        return {name: scoring.remembered(name, lambda n=name: self.one(scoring, n)) for name in scoring.graph.prunable}

    def one(self, scoring: Scoring, name: str) -> Scores:
        return Scores(scoring.model.get_submodule(name).weight.detach().flatten(1).norm(1, dim=1).double())


class Net(pl.LightningModule):
    """A user's module that knows nothing of pruning."""

    def __init__(self, width: int = 8, optimizer: str = "adamw", dropout: float = 0.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3), nn.ReLU(), nn.Dropout(dropout), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(2 * width * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> object:
        if self.hparams.optimizer == "sgd":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(self.parameters(), 0.05, 0.9)
        elif self.hparams.optimizer == "adam":
            optimizer = torch.optim.Adam(self.parameters(), 5e-3)
        else:
            optimizer = torch.optim.AdamW(self.parameters(), 5e-3)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)}


def digits(count: int = 512, batch_size: int = 64) -> tuple[DataLoader, DataLoader]:
    """Training and validation loaders over scikit-learn's digits, unshuffled."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    y = torch.tensor(data.target)
    train = TensorDataset(x[:count], y[:count])
    val = TensorDataset(x[-256:], y[-256:])
    return DataLoader(train, batch_size), DataLoader(val, batch_size)


def trainer(*callbacks: pl.Callback, **options: object) -> pl.Trainer:
    defaults = {
        "accelerator": "cpu", "devices": 1, "max_epochs": 2, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip
    return pl.Trainer(callbacks=list(callbacks), **{**defaults, **options})
