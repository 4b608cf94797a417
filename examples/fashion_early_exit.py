"""Early exits on Fashion-MNIST: three training regimes, thresholds for a budget, and what leaving early saves.

A residual network of 15 MFLOP gets exits behind three of its four stages and is trained joint, mixed and disjoint for
the same number of epochs in all. Tables: accuracy of every output, accuracy at a budget, calibrated thresholds on
held-out data, and the time of real predictions.

Run: python examples/fashion_early_exit.py          (about 13 minutes on one core)
     python examples/fashion_early_exit.py --fast   (few images, two epochs, to see that it works)
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_eff import EarlyExitModule, FashionMNISTDataModule, SmallResNet
from lightning_eff.early_exit import CurveResult, calibrate, compare_table, curve_figure, select_from_all
from lightning_eff.early_exit.inference.leaving import Rule
from lightning_eff.reporting import Column, Table, save_figure

REGIMES = ("joint", "mixed", "disjoint")
EXITS = ["layer1", "layer2", "layer3"]


def train(regime: Any, data: FashionMNISTDataModule, epochs: int, seed: int) -> tuple[EarlyExitModule, CurveResult]:
    """One run, and its curve on the test set."""
    L.seed_everything(seed)
    model = EarlyExitModule(
        SmallResNet(),
        EXITS,
        num_classes=10,
        regime=regime,
        optimizer=partial(torch.optim.AdamW, lr=3e-3),
        # one cycle a phase: its length is filled in
        lr_scheduler={"class_path": "OneCycleLR", "init_args": {"max_lr": 3e-3, "total_steps": None}},
    )
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_checkpointing=False, enable_model_summary=False
    )
    trainer.fit(model, data)
    trainer.test(model, data, verbose=False)
    return model, model.curves["test"]


def recorded(model: EarlyExitModule, loader: Any) -> tuple[list[Tensor], Tensor]:
    """Logits of all outputs and labels of a whole data set."""
    model.eval()
    with torch.no_grad():
        parts = [(model.network(images), labels) for images, labels in loader]
    logits = [torch.cat(output) for output in zip(*(outputs for outputs, _ in parts), strict=True)]
    return logits, torch.cat([labels for _, labels in parts])


def calibrated(model: EarlyExitModule, data: FashionMNISTDataModule, budgets: tuple[float, ...]) -> Table:
    """Thresholds found on validation data by three methods, judged on test data."""
    val, val_labels = recorded(model, data.val_dataloader())
    test, test_labels = recorded(model, data.test_dataloader())
    scores = torch.stack([logits.softmax(-1).amax(-1) for logits in val[:-1]])
    correct = torch.stack([logits.argmax(-1) == val_labels for logits in val])
    costs = model.network.costs.fractions()
    rows = []
    for budget in budgets:
        for method in ("uniform", "geometric", "lagrangian"):
            found = calibrate(scores, correct, costs, budget=budget, method=method)
            rule = Rule(model.network.policy, list(found.thresholds), [1.0] * len(costs))
            answer = select_from_all(rule, test)
            accuracy = (answer.logits.argmax(-1) == test_labels).float().mean().item()
            cost = torch.tensor(costs)[answer.exit_index].mean().item()
            rows.append((f"{budget:.0%}", method, 100 * found.accuracy, 100 * found.cost, 100 * accuracy, 100 * cost))
    columns = [
        "budget",
        "method",
        Column("validation accuracy", ".2f"),
        Column("cost", ".1f"),
        Column("test accuracy", ".2f"),
        Column("test cost", ".1f"),
    ]
    return Table("Thresholds found on validation data (percent)", columns, rows, "cost: of the plain backbone's FLOPs")


def timed(model: EarlyExitModule, data: FashionMNISTDataModule, images: int) -> Table:
    """CPU time of real predictions at the uniform threshold that loses at most 0.3 points at the least cost."""
    curve = model.curves["test"]
    final = curve.head_accuracy[-1]
    fine = [t for t, accuracy in enumerate(curve.accuracy) if accuracy >= final - 0.003]
    at = min(fine, key=lambda t: curve.cost[t])
    network = model.network.eval()
    network.set_thresholds(curve.thresholds[at])
    x = torch.cat([batch for batch, _ in data.test_dataloader()])[:images]
    rows = []
    for batch in (256, 16):
        parts = x.split(batch)

        def full(parts: Any = parts) -> None:
            with torch.no_grad():
                for part in parts:
                    network.backbone(part)

        def predict(parts: Any = parts) -> None:
            for part in parts:
                network.predict(part)

        def stream(parts: Any = parts) -> None:
            network.stream(parts)

        seconds = {run.__name__: _median(run) for run in (full, predict, stream)}
        micros = [1e6 * s / len(x) for s in seconds.values()]
        rows.append((batch, *micros, *(seconds["full"] / seconds[name] for name in ("predict", "stream"))))
    columns = [
        "batch",
        Column("full network [us]", ".0f"),
        Column("predict [us]", ".0f"),
        Column("stream [us]", ".0f"),
        Column("predict faster [x]", ".2f"),
        Column("stream faster [x]", ".2f"),
    ]
    reached, spent = 100 * curve.accuracy[at], 100 * curve.cost[at]
    caption = (
        f"threshold {curve.thresholds[at]:.2f}: accuracy {reached:.2f} % at {spent:.1f} % of the FLOPs, full network "
        f"{100 * final:.2f} %; CPU time a sample, one thread, median of 5"
    )
    return Table("Real predictions", columns, rows, caption)


def _median(run: Any, repeats: int = 5) -> float:
    run()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return sorted(times)[repeats // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="little data, few steps: to see that it works")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/fashion_early_exit"), help="folder of results")
    parser.add_argument("--data", default=None, help="folder with the idx files, if not Debian's or a download")
    parser.add_argument("--epochs", type=int, default=4, help="of every regime, over all its phases")
    parser.add_argument("--seeds", type=int, default=1, help="how many, from --seed on")
    args = parser.parse_args()
    torch.set_num_threads(1)
    epochs = 2 if args.fast else args.epochs
    sizes: dict[str, Any] = {"train_size": 256, "val_size": 128, "test_size": 128} if args.fast else {"val_size": 5000}
    data = FashionMNISTDataModule(root=args.data, batch_size=128, **sizes)

    models: dict[str, EarlyExitModule] = {}
    curves: dict[str, list[CurveResult]] = {}
    for regime in REGIMES:
        for seed in range(args.seed, args.seed + args.seeds):
            models[regime], curve = train(regime, data, epochs, seed)
            curves.setdefault(regime, []).append(curve)

    outputs = [*(f"exit {k}" for k in range(len(EXITS))), "backbone"]
    rows = [[name, *(100 * value for value in runs[-1].head_accuracy)] for name, runs in curves.items()]
    tables = {
        "outputs": Table(
            f"Test accuracy of every output alone (%), {epochs} epochs in all",
            ["regime", *(Column(name, ".2f") for name in outputs)],
            rows,
        ),
        "budgets": compare_table(curves),
        "calibration": calibrated(models["joint"], data, (0.3, 0.5)),
        "time": timed(models["joint"], data, 64 if args.fast else 4096),
    }
    for name, table in tables.items():
        table.print()
        print()
        table.save(args.out / f"{name}.md")
    save_figure(curve_figure(curves), args.out / "curves.png")


if __name__ == "__main__":
    main()
