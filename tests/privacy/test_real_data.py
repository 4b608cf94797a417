"""Private training of real images reaches what it should, dense and on fewer coordinates, at the epsilon it should."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import REPOSITORY, run_python
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_eff.privacy.options import PrivateTrainingOptions
from lightning_eff.privacy.prepruning.callback import DPPrePruneCallback
from lightning_eff.privacy.strategy import DPGradientDropStrategy

pytestmark = pytest.mark.filterwarnings("ignore:noise_seed makes noise and sampling repeatable")


@pytest.fixture(scope="module")
def digits() -> tuple[TensorDataset, Tensor, Tensor]:
    """1,437 digits to train on, 360 to test on, every class in both in the same share."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16, labels, test_size=360, stratify=labels, random_state=0)
    train, test, train_labels, test_labels = (torch.from_numpy(part) for part in parts)
    return TensorDataset(train.float(), train_labels), test.float(), test_labels


class Classifier(L.LightningModule):
    def __init__(self, lr: float) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
        self.lr = lr

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.lr)


def train(
    data: tuple[TensorDataset, Tensor, Tensor], seed: int, lr: float, *callbacks: L.Callback, **settings: Any
) -> tuple[float, DPGradientDropStrategy]:
    """220 steps of expected batch 64 with sigma 1 and C 0.5; test accuracy."""
    torch.manual_seed(seed)
    model = Classifier(lr)
    options = PrivateTrainingOptions(noise_seed=seed)
    strategy = DPGradientDropStrategy(noise_multiplier=1.0, delta=1e-4, max_grad_norm=0.5, options=options, **settings)
    trainer = L.Trainer(
        max_steps=220,
        accelerator="cpu",
        strategy=strategy,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    dataset, images, labels = data
    trainer.fit(model, DataLoader(dataset, batch_size=64))
    with torch.no_grad():
        return float((model.net(images).argmax(1) == labels).float().mean()), strategy


# test accuracy, mean of five seeds, of another implementation of the same steps
DIGITS = {
    "dense": (2.0, {}, 0.937),
    "element 0.5": (3.0, {"drop_rate": 0.5}, 0.942),
    "row 0.5": (2.0, {"drop_rate": 0.5, "granularity": "row"}, 0.933),
    "element 0.9": (4.0, {"drop_rate": 0.9}, 0.927),
    "element 0.98": (8.0, {"drop_rate": 0.98}, 0.918),
}


@pytest.mark.parametrize("setting", ["dense", "element 0.9", "row 0.5"])
def test_digits_reach_their_accuracy_at_their_epsilon(setting: str, digits: Any) -> None:
    lr, options, expected = DIGITS[setting]
    results = [train(digits, seed, lr, **options) for seed in range(2)]
    assert sum(accuracy for accuracy, _ in results) / len(results) == pytest.approx(expected, abs=0.03)
    ledger = results[0][1].ledger
    assert ledger.epsilon() == pytest.approx(3.707, abs=0.01)  # the same with and without dropping
    assert ledger.epsilon(accountant="rdp") == pytest.approx(4.2521, abs=0.001)
    assert [(event.noise_multiplier, event.steps) for event in ledger.history] == [(1.0, 220)]
    assert ledger.history[0].sample_rate == pytest.approx(64 / 1437)


@pytest.mark.slow
@pytest.mark.parametrize("setting", list(DIGITS))
def test_digits_reach_their_accuracy_on_average_over_five_seeds(setting: str, digits: Any) -> None:
    lr, options, expected = DIGITS[setting]
    accuracies = [train(digits, seed, lr, **options)[0] for seed in range(5)]
    assert sum(accuracies) / 5 == pytest.approx(expected, abs=0.03)


def test_pre_pruned_digits_train_inside_of_what_is_left(digits: Any) -> None:
    active = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
            assert isinstance(trainer.strategy, DPGradientDropStrategy)
            active.append(trainer.strategy.active_coordinates)
            for name, mask in prune.masks.items():
                assert not pl_module.get_parameter(name)[~mask].any()

    prune = DPPrePruneCallback(0.5, score="synflow", scope="layerwise", rounds=10, input_shape=[64])
    accuracy, strategy = train(digits, 0, 3.0, prune, Watch(), drop_rate=0.5)
    # half of half of 64 * 64 and of 64 * 10, and all biases
    assert set(active) == {1024 + 160 + 74}
    assert accuracy > 0.85
    assert strategy.ledger.epsilon() == pytest.approx(3.707, abs=0.01)


SCRIPT = REPOSITORY / "examples" / "fashion_private_training.py"
# test accuracy of one seed, of another implementation of the same steps
FASHION = {
    "cnn": {
        "dense": 0.815,
        "element-0.5": 0.812,
        "magnitude-0.5": 0.821,
        "row-0.5": 0.809,
        "element-0.9": 0.806,
        "prune-0.5": 0.810,
    },
    "mlp": {"dense": 0.833, "element-0.9": 0.816, "epoch-0.9": 0.822, "prune-0.9": 0.821, "element-0.98": 0.813},
}


@pytest.mark.slow
@pytest.mark.parametrize("net", list(FASHION))
def test_fashion_mnist_reaches_its_accuracy_at_its_epsilon(net: str, tmp_path: Path) -> None:
    run_python(SCRIPT, "--net", net, "--out", str(tmp_path), timeout=3600)
    rows = {row["setting"]: row for row in csv.DictReader((tmp_path / "results.csv").open())}
    accuracies = {name: float(row["accuracy"]) for name, row in rows.items()}
    assert {name: accuracies[name] for name in FASHION[net]} == pytest.approx(FASHION[net], abs=0.02)
    for row in rows.values():
        assert float(row["epsilon prv"]) == pytest.approx(1.519, abs=0.01)
        assert float(row["epsilon rdp"]) == pytest.approx(2.0, abs=0.01)
