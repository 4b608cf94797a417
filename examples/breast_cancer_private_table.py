"""A private table of a few hundred records: scikit-learn's breast cancer data, 398 to learn from and 171 to test on.

Thirty measurements of cells in each record are scaled by their bounds and generated as numbers, not as cells: with so
few records there is little to be learned of each cell. One line for each epsilon: ROC-AUC of classifiers trained on
synthetic rows and tested on real ones, mean of three splits. With 398 records little is left at epsilon = 0.2.

The bounds are taken from the data set, which is public; of private records they would have to be known beforehand.

Run: python examples/breast_cancer_private_table.py          (two minutes)
     python examples/breast_cancer_private_table.py --fast   (one split, one epsilon, fewer steps)
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import warnings
from pathlib import Path
from typing import Any

import lightning as L
from sklearn.datasets import load_breast_cancer

from lightning_eff.reporting import Column, Table
from lightning_eff.synthesis import DPNTKGenerator, TableSchema, TabularDataModule
from lightning_eff.synthesis.evaluation import classifier_inputs, evaluate_table, train_synthetic_test_real
from lightning_eff.synthesis.tables import split_rows

CLASSIFIERS = ("logistic_regression", "random_forest")
RUNS = ((math.inf, 50), (10.0, 50), (1.0, 50), (1.0, 20), (0.2, 20))  # epsilon, hidden units of the feature network


def breast_cancer() -> tuple[TableSchema, dict[str, list[Any]]]:
    """Schema and 569 rows by column."""
    data = load_breast_cancer()
    rows = {name: values.tolist() for name, values in zip(data.feature_names.tolist(), data.data.T, strict=True)}
    rows["diagnosis"] = data.target_names[data.target].tolist()
    return TableSchema.infer(rows, "diagnosis", public=True, encoding="minmax"), rows


def synthetic_rows(
    schema: TableSchema, train: Any, epsilon: float, width: int, epochs: int, seed: int
) -> dict[str, Any]:
    """As many synthetic rows as there are records."""
    L.seed_everything(seed, verbose=False)
    model = DPNTKGenerator(
        epsilon, schema=schema, feature_widths=(width,), latent_dim=20, samples_per_class=200, lr=3e-3
    )
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=epochs, limit_val_batches=0, logger=False, enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(model, datamodule=TabularDataModule(train, schema))
    return model.generate(len(train["diagnosis"]), seed=seed).rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="little data, few steps: to see that it works")
    parser.add_argument("--seed", type=int, default=0, help="of the first split; never of the noise")
    parser.add_argument("--out", type=Path, default=Path("runs/breast_cancer_private_table"), help="folder of results")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # fifteen fits
    runs, splits, epochs = (RUNS[2:3], 1, 1) if options.fast else (RUNS, 3, 8)

    schema, rows = breast_cancer()
    parts = [split_rows(rows, 0.3, options.seed + number) for number in range(splits)]
    lines: list[list[Any]] = []
    for number, (epsilon, width) in enumerate((*runs, (None, None))):
        scores: dict[str, list[float]] = {name: [] for name in CLASSIFIERS}
        for seed, (train, test) in enumerate(parts, options.seed):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="NOT PRIVATE")  # epsilon = inf is meant
                made = train if epsilon is None else synthetic_rows(schema, train, epsilon, width, epochs, seed)
            result = train_synthetic_test_real(
                classifier_inputs(schema, made), classifier_inputs(schema, test),
                classifiers=CLASSIFIERS, progress=False,
            )  # fmt: skip
            for name in CLASSIFIERS:
                scores[name].append(result.mean("roc_auc", name))
            if number == 0 and seed == options.seed:
                first = made
        label = "real records" if epsilon is None else f"epsilon = {epsilon:g}"
        lines.append([label, width, *(statistics.fmean(scores[name]) for name in CLASSIFIERS)])
    table = Table(
        "Breast cancer: ROC-AUC on real test records",
        ["trained on", "feature width", *(Column(name.replace("_", " "), ".3f") for name in CLASSIFIERS)],
        lines,
        f"mean of {splits} splits, {100 * epochs} steps",
    )
    print(table)
    table.save(options.out / "epsilon.md")
    quality = evaluate_table(schema, first, *parts[0], classifiers=(), progress=False)
    quality.write(options.out)
    print(f"{options.out / 'columns.md'}, nearest.md: columns and nearest records of the first run")


if __name__ == "__main__":
    main()
