"""What the features are worth: neural-tangent features and those of DP-MERF under the same release and training.

DP-MERF (Harder, Adamczewski, Park, 2021) matches means of random Fourier features. It is written here anew, with the
joint release and the exact noise of this package, the same generator, optimizer and number of steps: only the features
differ. On a table it is run as published, on scaled numbers beside one-hot categories, and on the cells that DP-NTK is
given.

Run: python examples/benchmarks/dp_ntk_quality.py adult --data FOLDER   (folder with adult.data and adult.test)
     python examples/benchmarks/dp_ntk_quality.py fashion
     with --fast to see that it works, --epsilon 0.2 1 10, --seeds 2, --json FILE
     with --short one seed, and no scaled numbers for DP-NTK
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from harness import Headline, add_arguments, best, entry, one_thread, unavailable, write
from torch import Tensor, nn

from lightning_eff.reporting import Column, Table
from lightning_eff.synthesis import (
    CategoricalColumn,
    ConvImageGenerator,
    DPNTKGenerator,
    MeanEmbedding,
    TableSchema,
    TabularDataModule,
)
from lightning_eff.synthesis.evaluation import Cells, classifier_inputs, train_synthetic_test_real
from lightning_eff.synthesis.features.objective import MMD2Terms

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from adult_private_table import SCHEMA, read_adult  # noqa: E402

TECHNIQUE = "Private data generation"
DEVICE = "cpu"


class FourierFeatures(nn.Module):
    """Unit-norm random Fourier features of some coordinates, beside the others as they are: the features of DP-MERF.

    ``phi(x) = [cos(x W), sin(x W)] / sqrt(P / 2)``, and with one-hot coordinates of k columns
    ``[phi(x_numeric), x_onehot / sqrt(k)] / sqrt(2)``.

    Args:
        numeric: Which coordinates ``[D]`` bool go through Fourier features.
        columns: One-hot columns k behind the others.
        dim: Fourier features P, even.
        length_scale: Of the Gaussian kernel.
        seed: Of the frequencies.
    """

    def __init__(self, numeric: Tensor, columns: int, dim: int, length_scale: float, seed: int = 0) -> None:
        super().__init__()
        self.columns, self.numeric = columns, numeric
        random = torch.Generator().manual_seed(seed)
        self.register_buffer("frequencies", torch.randn(int(numeric.sum()), dim // 2, generator=random) / length_scale)
        self.feature_dim = dim + (int((~numeric).sum()) if columns else 0)
        self.layout = {"features": (self.feature_dim,)}

    def dense(self, x: Tensor) -> Tensor:
        """Features ``[B, P]`` of ``x [B, ...]``."""
        x = x.flatten(1)
        angle = x[:, self.numeric] @ self.frequencies
        fourier = torch.cat([angle.cos(), angle.sin()], 1) / math.sqrt(self.frequencies.shape[1])
        if not self.columns:
            return fourier
        return torch.cat([fourier, x[:, ~self.numeric] / math.sqrt(self.columns)], 1) / math.sqrt(2)

    def sums(self, num_classes: int, **_: Any) -> _Sums:
        """What a release adds records to."""
        return _Sums(self, num_classes)

    def mmd2_terms(self, target: MeanEmbedding, x: Tensor, y: Tensor, *, weights: Tensor, estimator: str) -> MMD2Terms:
        """The same objective as that of the neural-tangent features."""
        phi, total = self.dense(x), x.new_zeros(4)
        for c in range(target.num_classes):
            mine = phi[y == c]
            b, mean, goal = len(mine), mine.mean(0), target.blocks["features"][c] / target.counts[c]
            spread = mean.square().sum()
            if estimator == "u":
                spread = (b * spread - mine.square().sum() / b) / (b - 1)
            norm, cross = goal.square().sum(), mean @ goal
            total = total + weights[c] * torch.stack([norm - 2 * cross + spread, norm, cross, spread])
        return MMD2Terms(total[0], *total[1:].detach())


class _Sums:
    def __init__(self, features: FourierFeatures, num_classes: int) -> None:
        self.features, self.num_classes, self.degenerate = features, num_classes, 0
        self.total = torch.zeros(num_classes, features.feature_dim, dtype=torch.float64)
        self.counts = torch.zeros(num_classes, dtype=torch.float64)

    def add(self, x: Tensor, y: Tensor) -> None:
        with torch.no_grad():
            self.total.index_add_(0, y, self.features.dense(x).double())
        self.counts += torch.bincount(y, minlength=len(self.counts))

    def embedding(self) -> MeanEmbedding:
        return MeanEmbedding({"features": self.total}, self.counts)


def fit(model: DPNTKGenerator, data: L.LightningDataModule, epochs: int) -> float:
    """Release and train; seconds of process time."""
    start = time.process_time()
    trainer = L.Trainer(
        accelerator=DEVICE, max_epochs=epochs, limit_val_batches=0, logger=False, enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(model, datamodule=data)
    return time.process_time() - start


def adult(folder: Path, epsilons: Sequence[float], seeds: int, fast: bool, only: Sequence[str] | None = None) -> Table:
    """LogReg and gradient boosting trained on synthetic rows, tested on the real test rows of Adult."""
    cells = TableSchema.load(SCHEMA)
    scaled = TableSchema(
        [c if isinstance(c, CategoricalColumn) else _scaled(c) for c in cells.columns],
        cells.label,
        cells.label_categories,
    )
    train, test = read_adult(folder, cells)
    onehots = sum(isinstance(column, CategoricalColumn) for column in scaled.columns)
    numeric = torch.zeros(scaled.width, dtype=torch.bool)
    for head in scaled.heads:
        numeric[head.start : head.stop] = head.kind != "onehot"
    flags = sum(head.kind == "onehot" for head in scaled.heads) - onehots
    contenders: dict[str, tuple[TableSchema, Callable[[], nn.Module] | None]] = {
        "DP-NTK, cells": (cells, None),
        "DP-NTK, scaled numbers": (scaled, None),
        "DP-MERF, scaled numbers": (scaled, lambda: FourierFeatures(numeric, onehots + flags, 2000, 1.0)),
        # the distance of two rows that differ in half of 14 columns is sqrt(14)
        "DP-MERF, cells": (
            cells,
            lambda: FourierFeatures(torch.ones(cells.width, dtype=torch.bool), 0, 2000, math.sqrt(14)),
        ),
    }
    judge = Cells(cells)
    names, rows = ("logistic_regression", "hist_gradient_boosting"), []
    real = judge.count(train)
    target = classifier_inputs(cells, test)
    known = train_synthetic_test_real(classifier_inputs(cells, train), target, classifiers=names, progress=False)
    rows.append(["real records", None, None, *(known.mean("roc_auc", name) for name in names), 0.0, None])
    for epsilon in epsilons:
        for title, (schema, features) in contenders.items():
            for seed in range(seeds if only is None or title in only else 0):
                L.seed_everything(seed, verbose=False)
                model = DPNTKGenerator(
                    epsilon, schema=schema, feature_widths=(50,), latent_dim=20, samples_per_class=200, lr=3e-3
                )
                if features is not None:
                    model.features = features()  # type: ignore[assignment]
                seconds = fit(model, TabularDataModule(train, schema), 1 if fast else 4)
                made = model.generate(len(train["income"]), seed=seed).rows
                result = train_synthetic_test_real(
                    classifier_inputs(cells, made), target, classifiers=names, progress=False
                )
                tv = float(judge.single(real, judge.count(made)).mean())
                rows.append([title, epsilon, seed, *(result.mean("roc_auc", n) for n in names), tv, seconds])
                print(*(f"{v:.3f}" if isinstance(v, float) else v for v in rows[-1]), sep="  ", flush=True)
    columns = ["features", Column("epsilon", "g"), "seed", Column("LogReg AUC", ".3f"), Column("boosting AUC", ".3f")]
    caption = "delta = 1e-5: trained on 32,561 synthetic rows, tested on 16,281 real ones; CPU seconds to train."
    return Table("Adult", [*columns, Column("mean TV", ".3f"), Column("train [s]", ".1f")], rows, caption)


def fashion(epsilons: Sequence[float], seeds: int, fast: bool) -> Table:
    """LogReg and MLP trained on 6,000 synthetic images, tested on the real test images of Fashion-MNIST."""
    from lightning_eff.data import FashionMNISTDataModule

    data = FashionMNISTDataModule(normalize=False, batch_size=1000, val_size=1)
    data.prepare_data()
    data.setup()
    names, rows, size = ("logistic_regression", "mlp"), [], 1000 if fast else 6000
    x, y = (torch.cat(part) for part in zip(*data.test_dataloader(), strict=True))
    target = (x.flatten(1), y)
    contenders: dict[str, Callable[[], nn.Module] | None] = {
        "DP-NTK": None,
        "DP-MERF": lambda: FourierFeatures(torch.ones(784, dtype=torch.bool), 0, 10_000, math.sqrt(127)),
    }
    for epsilon in epsilons:
        for title, features in contenders.items():
            for seed in range(seeds):
                L.seed_everything(seed, verbose=False)
                model = DPNTKGenerator(
                    epsilon, num_classes=10, input_shape=(1, 28, 28), feature_widths=(200,), latent_dim=10,
                    samples_per_class=50, steps_per_epoch=20 if fast else 100, lr=1e-2,
                    generator=ConvImageGenerator(10, 10),
                )  # fmt: skip
                if features is not None:
                    model.features = features()  # type: ignore[assignment]
                seconds = fit(model, data, 1 if fast else 5)
                made = model.generate(size, seed=seed)
                result = train_synthetic_test_real(
                    (made.x.flatten(1), made.y), target, classifiers=names, progress=False
                )
                rows.append([title, epsilon, seed, *(result.mean("accuracy", n) for n in names), seconds])
                print(*(f"{v:.3f}" if isinstance(v, float) else v for v in rows[-1]), sep="  ", flush=True)
    columns = ["features", Column("epsilon", "g"), "seed", Column("LogReg", ".3f"), Column("MLP", ".3f")]
    caption = (
        "Fashion-MNIST, delta = 1e-5: accuracy on 10,000 real images after 6,000 synthetic ones; CPU seconds to train."
    )
    return Table("Fashion-MNIST", [*columns, Column("train [s]", ".1f")], rows, caption)


def _scaled(column: Any) -> dict[str, Any]:
    names = ("name", "low", "high", "transform", "zero_inflated", "integer")
    return {"encoding": "minmax", **{name: getattr(column, name) for name in names}}


OURS_AND_PEERS = ("DP-NTK, cells", "DP-MERF, scaled numbers", "DP-MERF, cells")


def headlines(tables: list[Table]) -> list[Headline]:
    """Of the first seed at epsilon 1."""
    lines = []
    for column in ("LogReg AUC", "boosting AUC"):
        key = (1.0, 0)
        mine, *theirs = ((name, *key) for name in OURS_AND_PEERS)
        ours = entry(tables, "Adult", mine, column)
        auc, who = best(tables, "Adult", theirs, column, most=True)
        work = f"ROC-AUC on real records after synthetic ones, Adult, epsilon 1, {column.removesuffix(' AUC')}"
        limit = 0.88 if column == "LogReg AUC" else None
        lines.append(
            Headline(work, ours, auc, who.split("'")[1], "", limit=limit, more_is_better=True, aside=limit is None)
        )
    seconds = entry(tables, "Adult", ("DP-NTK, cells", 1.0, 0), "train [s]")
    return [*lines, Headline("release of 32,561 records and training, Adult", seconds, None, "-", limit=10)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("what", nargs="?", choices=("adult", "fashion"), default="adult")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("LIGHTNING_EFF_DATA", ".")) / "dp_ntk")
    parser.add_argument("--epsilon", type=float, nargs="+", default=[1.0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--fast", action="store_true")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    seeds = 1 if options.short else options.seeds
    with one_thread():
        if options.what == "fashion":
            measured = fashion(options.epsilon, seeds, options.fast)
        elif (options.data / "adult.data").exists():
            only = OURS_AND_PEERS if options.short else None
            measured = adult(options.data, options.epsilon, seeds, options.fast, only)
        else:
            unavailable(f"adult.data and adult.test of the UCI repository are not in {options.data}")
    measured.print()
    if options.json is not None:
        write(
            options.json,
            [measured],
            headlines([measured]) if options.what == "adult" and 1.0 in options.epsilon else [],
        )
