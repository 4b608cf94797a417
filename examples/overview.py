"""Six techniques in one picture, each measured or drawn by a small run of its own: the picture of the README.

Pruning: channels chosen by four criteria, nothing trained after the cut. Early exits: accuracy against cost, all
thresholds. Private data: clothes nobody wore. Mixtures of experts: what a published law promises for a budget. Active
exploration: three glimpses of a scene. Lidar: depth from the lines that are kept.

Run: python examples/overview.py
     python examples/overview.py --fast   (little data, few steps: to see that it works)
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from digits_adaglimpse import build
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_eff import (
    ChannelGraph,
    ChinchillaLaw,
    ComputePlanner,
    DigitsDataModule,
    DPNTKGenerator,
    EarlyExitModule,
    EstimationOptions,
    FashionMNISTDataModule,
    FineGrainedMoELaw,
    ImageClassifier,
    LidarSaSSelector,
    PullPushCompletion,
    Repair,
    SmallCNN,
    SmallResNet,
    Spread,
    SyntheticLidarDataModule,
    compare_criteria,
)
from lightning_eff.glimpse.figures.scenes import draw_views
from lightning_eff.reporting import KEPT, REFERENCE, SERIES, new_figure, save_figure

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
}


def draw_pruning(axis: Any, fast: bool) -> None:
    """Accuracy against the multiply-adds that are left, four criteria."""
    model, data = ImageClassifier(SmallCNN(width=16), lr=3e-3), DigitsDataModule()
    L.Trainer(**QUIET, max_epochs=1 if fast else 12).fit(model, data)
    model.eval()
    graph = ChannelGraph.from_model(model.net, torch.zeros(2, 1, 8, 8))
    sizes = torch.tensor(list(graph.sizes.values()), dtype=torch.float64)
    shares = (0.5, 0.9) if fast else (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    configs = torch.stack([(share * sizes).round().clamp(min=1) for share in shares]).long()
    val = list(data.val_dataloader())

    def accuracy(net: nn.Module) -> float:
        with torch.no_grad():
            return float(torch.cat([net(x).argmax(1) == y for x, y in val]).float().mean())

    report = compare_criteria(
        model.net,
        graph,
        ["shapley", "dirichlet", "l1", "random"],
        configs=configs,
        batches=list(data.train_dataloader())[:6],
        score_fn=accuracy,
        loss_fn=lambda net, batch: F.cross_entropy(net(batch[0]), batch[1]),
        repair=Repair("none"),
        progress=False,
    )
    names = {"shapley": "Shapley value", "dirichlet": "Dirichlet", "l1": "L1 norm", "random": "random"}
    for name, row in zip(report.criteria, report.before, strict=True):
        colour = REFERENCE if name == "random" else SERIES[list(report.criteria).index(name)]
        axis.plot(100 * report.macs, 100 * row, marker="o", markersize=3.5, color=colour, label=names[name])
    axis.set(xlabel="multiply-adds left [%]", ylabel="accuracy [%]", title="Fewer channels, not fine-tuned")
    axis.legend(frameon=False, fontsize=8)


def draw_exits(axis: Any, fast: bool) -> None:
    """Accuracy against the mean cost of a sample, all thresholds of one network."""
    model = EarlyExitModule(SmallResNet(width=8), ["layer1", "layer2", "layer3"], num_classes=10, regime="mixed")
    data, trainer = DigitsDataModule(), L.Trainer(**QUIET, max_epochs=2 if fast else 24)
    trainer.fit(model, data)
    trainer.test(model, data, verbose=False)
    curve = model.curves["test"]
    axis.plot([100 * c for c in curve.cost], [100 * a for a in curve.accuracy], color=KEPT, label="leaves when sure")
    axis.plot(100 * curve.costs[-1], 100 * curve.head_accuracy[-1], "s", color=REFERENCE, label="whole network")
    axis.set(xlabel="mean cost of a sample [% of the FLOPs]", ylabel="accuracy [%]", title="Earlier answers")
    axis.legend(frameon=False, fontsize=8)


def draw_private_data(axis: Any, fast: bool) -> None:
    """Clothes of a generator that saw one private release."""
    data = FashionMNISTDataModule(normalize=False, val_size=1, train_size=2_000 if fast else None)
    model = DPNTKGenerator(
        10.0, num_classes=10, input_shape=(1, 28, 28), steps_per_epoch=5 if fast else 500, matching={"seed": 0}
    )
    L.Trainer(**QUIET, max_epochs=1).fit(model, data)
    made = model.generate(60, labels=torch.arange(10).repeat(6), seed=0)
    sheet = torch.ones(6 * 30 - 2, 10 * 30 - 2)
    for c in range(10):
        for row, image in enumerate(made.x[made.y == c].clamp(0, 1)[:6]):
            sheet[row * 30 : row * 30 + 28, c * 30 : c * 30 + 28] = image[0]
    axis.imshow(sheet.numpy(), cmap="gray", vmin=0, vmax=1)
    axis.set(xlabel="epsilon = 10, delta = 1e-5, one release", title="Clothes nobody wore")
    bare(axis)


def draw_law(axis: Any) -> None:
    """Loss of compute-optimal networks, dense and of experts."""
    law = FineGrainedMoELaw.paper()
    budgets = torch.logspace(18, 23, 40, dtype=torch.float64).tolist()
    for label, planner, colour in (
        ("dense", ComputePlanner(ChinchillaLaw.paper_dense()), REFERENCE),
        ("experts, G = 1", ComputePlanner(law, granularities=[1]), SERIES[1]),
        ("experts, best G", ComputePlanner(law), KEPT),
    ):
        axis.plot(budgets, [planner.optimal(flops).loss for flops in budgets], color=colour, label=label)
    axis.set(xscale="log", xlabel="training FLOPs", ylabel="loss [nats a token]", title="Fewer active parameters")
    axis.legend(frameon=False, fontsize=8)


def draw_glimpses(axis: Any, fast: bool) -> None:
    """Where a trained agent looks in a scene."""
    model, data, trainer = build(0, *([1, 1, 1] if fast else [43, 7, 17]), fast=fast)
    trainer.fit(model, data)
    images, target = next(iter(data.test_dataloader()))
    seen = model.explore(images, target=target, predictions="all")
    right = (seen.prediction.argmax(1) == target).nonzero().flatten() if seen.prediction is not None else [0]
    index = int(right[0]) if len(right) else 0
    draw_views(axis, as_image(images[index]), seen, index)
    axis.set(xlabel=f"{float(seen.pixel_percent[index]):.0f} % of the pixels", title="Fewer pixels looked at")
    bare(axis)


def draw_lines(axis: Any, fast: bool, out: Path) -> None:
    """Errors of depth that is completed from selected lines."""
    frames = 2 if fast else 16
    data = SyntheticLidarDataModule(train_size=frames, val_size=2, test_size=frames, scale=16 if fast else 8)
    selector = LidarSaSSelector(
        PullPushCompletion(),
        k=[32, 16, 8, 4],
        estimation=EstimationOptions(budget=128 if fast else 512, rounds=2),
        spread=Spread("auto", elevations="kitti"),
        dirpath=out / "lidar",
    )
    trainer = L.Trainer(**QUIET, max_epochs=2, limit_val_batches=0)
    trainer.fit(selector, data)
    trainer.test(selector, data, verbose=False)
    found = selector.evaluations["test"]
    rules = {"auto": ("Shapley value and spread", KEPT), "uniform": ("evenly spread", SERIES[1])}
    for rule, (label, colour) in {**rules, "random": ("random", REFERENCE)}.items():
        rows = sorted((row for row in found.rows if row.rule == rule and row.k), key=lambda row: row.k or 0)
        axis.plot([row.k for row in rows], [row.errors["rmse"] / 1000 for row in rows], "o-", markersize=3.5,
                  color=colour, label=label)  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.set_xticks([4, 8, 16, 32], ["4", "8", "16", "32"])
    axis.set(xlabel="lidar lines kept, of 64", ylabel="depth RMSE [m]", title="Fewer lidar lines bought")
    axis.legend(frameon=False, fontsize=8)


def as_image(image: Tensor) -> Tensor:
    """Grey values in [0, 1]."""
    return (image - image.min()) / (image.max() - image.min())


def bare(axis: Any) -> None:
    """Take ticks and grid off a picture."""
    axis.set_xticks([])
    axis.set_yticks([])
    axis.grid(visible=False)
    for side in ("left", "bottom"):
        axis.spines[side].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="little data, few steps: to see that it works")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/overview"), help="folder of results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*outside of the runs the law was fitted to")  # README says so

    figure, axes = new_figure(2, 3, width=11.0, height=6.2)
    drawings = (
        lambda axis: draw_pruning(axis, args.fast),
        lambda axis: draw_exits(axis, args.fast),
        lambda axis: draw_private_data(axis, args.fast),
        draw_law,
        lambda axis: draw_glimpses(axis, args.fast),
        lambda axis: draw_lines(axis, args.fast, args.out),
    )
    for axis, draw in zip(axes.flat, drawings, strict=True):
        L.seed_everything(args.seed, verbose=False)
        draw(axis)
    print(f"figure: {save_figure(figure, args.out / 'overview.png')}")


if __name__ == "__main__":
    main()
