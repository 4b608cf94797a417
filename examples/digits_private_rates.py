"""The tension between pre-pruning and gradient dropping: accuracy at one epsilon over both rates.

A dense layer of 64 units and tanh is trained privately on scikit-learn's digits for every pair of rates, several seeds
each; a table, a CSV file and a heat map tell the mean test accuracy. Epsilon is the same in every cell: what is not
trained costs no privacy, it only changes what the noise does.

Run: python examples/digits_private_rates.py          (about 2 minutes of one idle core)
     python examples/digits_private_rates.py --fast   (four cells, one seed, few steps)
"""

import argparse
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_eff.data import DigitsDataModule
from lightning_eff.privacy.figures import tension_figure
from lightning_eff.privacy.prepruning.callback import DPPrePruneCallback
from lightning_eff.privacy.strategy import DPGradientDropStrategy
from lightning_eff.reporting import Column, Table, progress, save_figure

for name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.WARNING)
warnings.filterwarnings("ignore", message="The '.*_dataloader' does not have many workers")
warnings.filterwarnings("ignore", message="`isinstance.treespec, LeafSpec.` is deprecated")
warnings.filterwarnings("ignore", message="amount=.* would leave")  # in cells where nearly everything is pruned

COLUMNS: list[str | Column] = [
    Column("prune_rate", "g"),
    Column("drop_rate", "g"),
    Column("epsilon", ".4g"),
    Column("delta", "g"),
    Column("accuracy", ".4f"),
    Column("active_coordinates", ","),
    Column("seconds_per_step", ".5f"),
]


class Classifier(L.LightningModule):
    """A small dense network; the learning rate grows as fewer coordinates are trained."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
        self.lr = lr

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.lr)


class Watch(L.Callback):
    """Notes active coordinates and the time of the steps."""

    active = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.begun = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        assert isinstance(trainer.strategy, DPGradientDropStrategy)
        self.active = trainer.strategy.active_coordinates

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds = (time.perf_counter() - self.begun) / trainer.global_step


def run(prune_rate: float, drop_rate: float, seed: int, args: argparse.Namespace) -> list[Any]:
    """Train one cell; one row of the CSV."""
    torch.manual_seed(seed)
    train, test = digits()
    # what is left bears larger steps: 2 for dense training, 4 where a tenth is trained
    model = Classifier(lr=min(8.0, 2.0 * ((1 - prune_rate) * (1 - drop_rate)) ** -0.3))
    strategy = DPGradientDropStrategy(
        noise_multiplier=args.sigma, delta=1e-4, max_grad_norm=0.5, drop_rate=drop_rate, granularity=args.granularity
    )
    watch = Watch()
    prune = [DPPrePruneCallback(prune_rate, args.score, scope="layerwise", seed=seed, rounds=20)] if prune_rate else []
    trainer = L.Trainer(
        max_steps=args.steps,
        accelerator="cpu",
        strategy=strategy,
        callbacks=[*prune, watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(train, batch_size=64))
    with torch.no_grad():
        right = (model.net(test.tensors[0]).argmax(1) == test.tensors[1]).float().mean()
    return [prune_rate, drop_rate, strategy.epsilon, 1e-4, float(right), watch.active, watch.seconds]


def digits() -> tuple[TensorDataset, TensorDataset]:
    """1,437 images to train on and 360 to test."""
    data = DigitsDataModule(normalize=False)
    data.setup()
    parts = [*data.train_set, *data.val_set], [*data.test_set]
    train, test = ([torch.stack(column) for column in zip(*part, strict=True)] for part in parts)
    return TensorDataset(*train), TensorDataset(*test)


def mean(rows: list[list[Any]]) -> list[Any]:
    """Average rows of one cell."""
    first = rows[0]
    average = [sum(row[column] for row in rows) / len(rows) for column in (4, 6)]
    return [*first[:4], average[0], first[5], average[1]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="little data, few steps: to see that it works")
    parser.add_argument("--seed", type=int, default=0, help="of the weights; never of the noise")
    parser.add_argument("--out", type=Path, default=Path("runs/digits_private_rates"), help="folder of results")
    parser.add_argument("--prune-rates", type=float, nargs="+", default=[0.0, 0.3, 0.5, 0.7, 0.9])
    parser.add_argument("--drop-rates", type=float, nargs="+", default=[0.0, 0.3, 0.5, 0.7, 0.9, 0.98])
    parser.add_argument("--score", choices=["random", "magnitude", "synflow"], default="random")
    parser.add_argument("--granularity", choices=["element", "row"], default="element")
    parser.add_argument("--sigma", type=float, default=1.0, help="noise multiplier")
    parser.add_argument("--steps", type=int, default=220)
    parser.add_argument("--seeds", type=int, default=3, help="how many, from --seed on")
    args = parser.parse_args()
    if args.fast:
        args.prune_rates, args.drop_rates, args.seeds, args.steps = [0.0, 0.9], [0.0, 0.9], 1, 30

    rows = []
    cells = [(prune, drop) for prune in args.prune_rates for drop in args.drop_rates]
    with progress("private training", len(cells) * args.seeds, unit="runs") as bar:
        for prune, drop in cells:
            several = []
            for seed in range(args.seed, args.seed + args.seeds):
                several.append(run(prune, drop, seed, args))
                bar.advance()
            rows.append(mean(several))
    caption = (
        f"Digits, dense 64-64-10, {args.steps} steps, sigma {args.sigma:g}, {args.score} pruning, {args.granularity} "
        f"dropping, mean of {args.seeds} seeds."
    )
    table = Table("Accuracy over two rates", COLUMNS, rows, caption)
    table.print()
    table.save(args.out / "grid.csv")
    accuracies = [[row[4] for row in rows if row[0] == prune] for prune in args.prune_rates]
    title = f"Digits at epsilon {rows[0][2]:.3g}, delta 1e-4"
    save_figure(tension_figure(args.prune_rates, args.drop_rates, accuracies, title=title), args.out / "tension.png")
    print(f"Written: {args.out / 'grid.csv'}, {args.out / 'tension.png'}")


if __name__ == "__main__":
    main()
