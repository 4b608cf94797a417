"""Which ranking keeps a LeNet alive when part of every layer goes at once? Dirichlet switches, L1 norm and chance.

A LeNet is trained on Fashion-MNIST; then the same share of every layer is removed without any fine-tuning. Switches are
trained by one pass over 12,000 of the training images.

Run: python examples/fashion_lenet_dirichlet.py                     (about 5 minutes on one core)
     python examples/fashion_lenet_dirichlet.py --few --net plain   (where it is no better than chance)
     python examples/fashion_lenet_dirichlet.py --fast              (few images, two rankings, to see that it works)
"""

import argparse
import time
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import lightning as L
import torch
from torch import Tensor, nn

from lightning_eff import (
    ChannelGraph,
    DirichletOptions,
    FashionMNISTDataModule,
    ImageClassifier,
    dirichlet_scores,
)
from lightning_eff.pruning import Gate, Prior, posterior_figure
from lightning_eff.reporting import SERIES, Column, Table, new_figure, save_figure

KEEP = (0.75, 0.5, 0.35)
MEAN = DirichletOptions()
SAMPLE = replace(MEAN, estimator="sample")
VARIANTS = {
    "Dirichlet": MEAN,
    "Dirichlet, early stop": replace(MEAN, early_stop=True),
    "Dirichlet, lr 1e-3": replace(MEAN, lr=1e-3),
    "Dirichlet, a draw per example": SAMPLE,
    "Dirichlet, producer site": replace(MEAN, gate=Gate(site="producer")),
    "Dirichlet, producer site, BatchNorm training": replace(MEAN, gate=Gate(site="producer", train_bn=True)),
    "Dirichlet, scale dim": replace(MEAN, gate=Gate(scale="dim")),
    "Dirichlet, joint, lr 1e-3": replace(MEAN, layers="joint", lr=1e-3),
    "Dirichlet, joint, scale dim": replace(MEAN, layers="joint", gate=Gate(scale="dim")),
}


class WideLeNet(nn.Sequential):
    """LeNet 20-50-200-84: norm behind pooling and ReLU (or between them), ReLU between linear layers."""

    def __init__(self, norm_first: bool = False) -> None:
        order = -1 if norm_first else 1
        super().__init__(
            nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), *[nn.ReLU(), nn.BatchNorm2d(20)][::order],
            nn.Conv2d(20, 50, 5), nn.MaxPool2d(2), *[nn.ReLU(), nn.BatchNorm2d(50)][::order],
            nn.Flatten(), nn.Linear(800, 200), nn.ReLU(), nn.Linear(200, 84), nn.ReLU(), nn.Linear(84, 10),
        )  # fmt: skip


class PlainNet(nn.Sequential):
    """Six convolutions of widths 16, 16, 32, 32, 64, 64 with BatchNorm and ReLU, then the mean over positions."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for before, width in pairwise((1, 16, 16, 32, 32, 64, 64)):
            layers += [nn.MaxPool2d(2)] if before < width and before > 1 else []
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


NETWORKS = {"lenet": WideLeNet, "norm-first": partial(WideLeNet, norm_first=True), "plain": PlainNet}


class OneCycle(ImageClassifier):
    """SGD with momentum 0.9 and one cycle up to a learning rate of 0.1."""

    def configure_optimizers(self) -> object:
        optimizer = torch.optim.SGD(self.parameters(), 0.01, 0.9, weight_decay=5e-4)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def trained(data: L.LightningDataModule, epochs: int, network: str, seed: int) -> nn.Module:
    """Train the network and return it in evaluation mode."""
    L.seed_everything(seed, verbose=False)
    model = OneCycle(NETWORKS[network]())
    L.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_checkpointing=False, enable_model_summary=False,
        enable_progress_bar=False, limit_val_batches=0,
    ).fit(model, data)  # fmt: skip
    return model.net.eval()


def accuracy(model: nn.Module, graph: ChannelGraph, scores: dict[str, Tensor], keep: float, test: list) -> float:
    """Test accuracy with the best ``keep`` of every layer, the rest masked, which equals removing it."""
    masks = {}
    for name, values in scores.items():
        masks[name] = torch.zeros(len(values))
        best = values.sort(descending=True, stable=True).indices[: max(1, round(keep * len(values)))]
        masks[name][best] = 1
    with torch.no_grad(), graph.gate(model, masks):
        return sum(int((model(x).argmax(1) == y).sum()) for x, y in test) / sum(len(y) for _, y in test)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="little data, few steps: to see that it works")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/fashion_lenet_dirichlet"), help="folder of results")
    parser.add_argument("--data", default=None, help="folder with the idx files, if not Debian's or a download")
    parser.add_argument("--few", action="store_true", help="the default ranking and scale dim only")
    parser.add_argument("--net", choices=list(NETWORKS), default="lenet", help="norm-first: norms before the ReLUs")
    args = parser.parse_args()

    data = FashionMNISTDataModule(
        root=args.data, batch_size=128, train_size=1_024 if args.fast else None, test_size=500 if args.fast else 5_000
    )
    model = trained(data, 1 if args.fast else 4, args.net, args.seed)
    train, test = ([tuple(batch) for batch in loader] for loader in (data.train_dataloader(), data.test_dataloader()))
    train = train[: 4 if args.fast else 94]
    graph = ChannelGraph.from_model(model, train[0][0][:2])
    cross_entropy = nn.functional.cross_entropy

    few = [name for name in VARIANTS if name in ("Dirichlet", "Dirichlet, scale dim")]
    rankings: list[tuple[str, list[dict[str, Tensor]], float]] = []
    generator = torch.Generator().manual_seed(args.seed)
    chance = [{name: torch.rand(graph.sizes[name], generator=generator) for name in graph.prunable} for _ in range(5)]
    rankings.append(("chance, five drawings", chance, 0.0))
    rankings.append(("L1 norm", [graph.weight_norms(model, p=1)], 0.0))
    prior = Prior(dataset_size=len(data.train_dataloader().dataset))
    for title in few if args.fast or args.few else VARIANTS:
        start = time.process_time()
        posteriors = dirichlet_scores(
            model, graph, train, lambda net, batch: cross_entropy(net(batch[0]), batch[1]),
            options=replace(VARIANTS[title], prior=prior), progress=False,
        )  # fmt: skip
        scores = {name: posterior.relative for name, posterior in posteriors.items()}
        rankings.append((title, [scores], time.process_time() - start))
        if title == "Dirichlet":
            kept = {name: posterior.rank()[: len(posterior.mean) // 2] for name, posterior in posteriors.items()}
            save_figure(posterior_figure(posteriors, kept), args.out / "posterior.png")

    rows, curves = [], {}
    fractions = KEEP if args.fast else (0.9, 0.75, 0.6, 0.5, 0.35, 0.2)
    for title, drawings, seconds in rankings:
        found = {
            keep: [accuracy(model, graph, scores, keep, test) for scores in drawings] for keep in {*fractions, *KEEP}
        }
        rows.append((title, *(sum(found[k]) / len(found[k]) for k in KEEP), min(found[0.5]), max(found[0.5]), seconds))
        curves[title] = [sum(found[k]) / len(found[k]) for k in fractions]
    dense = accuracy(model, graph, chance[0], 1.0, test)
    columns = ["ranking", *(Column(f"keep {keep:.0%}", ".3f") for keep in KEEP)]
    columns += [Column("least of 50%", ".3f"), Column("most of 50%", ".3f"), Column("CPU s", ".1f")]
    table = Table(f"Part of every layer masked, network: {args.net}", columns, rows, f"dense {dense:.3f}")
    table.print()
    table.save(args.out / "accuracy.json")
    table.save(args.out / "accuracy.md")

    figure, axes = new_figure()
    axis = axes[0, 0]
    for number, (title, values) in enumerate(curves.items()):
        style = "o-" if number < len(SERIES) else "s:"
        axis.plot(fractions, values, style, color=SERIES[number % len(SERIES)], label=title, markersize=3)
    axis.axhline(dense, color="black", linestyle="--", linewidth=1, label="dense")
    axis.set_xlabel("channels kept in every layer")
    axis.set_ylabel("test accuracy, not fine-tuned")
    axis.legend(fontsize=7)
    save_figure(figure, args.out / "accuracy.png")


if __name__ == "__main__":
    main()
