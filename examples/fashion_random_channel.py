"""Random channel configurations without training: what the repair of the weights does, and how much the criterion does.

Two small networks are trained on 20,000 images of Fashion-MNIST. Ten random configurations with half of the
multiply-adds are cut by L1 norm and repaired in seven ways; then every criterion prunes the same ten configurations;
then the best configuration, the uniform one and the whole network are trained on for as long.

Run: python examples/fashion_random_channel.py                (about 10 minutes on one core)
     python examples/fashion_random_channel.py --net residual (one of the two networks, 4 minutes)
     python examples/fashion_random_channel.py --fast         (few images, configurations and criteria)
"""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_eff import ChannelGraph, FashionMNISTDataModule, ImageClassifier, Repair, compare_criteria
from lightning_eff.pruning import SearchResult, random_search, sample_configs
from lightning_eff.pruning.criteria import KL, Criterion, Random, ShapleyCriterion
from lightning_eff.reporting import Column, Table

REPAIRS = {
    "none": Repair("none", bn_samples=0),
    "BatchNorm recalibrated": Repair("none"),
    "channel": Repair("channel", bn_samples=0),
    "gram": Repair("gram", bn_samples=0),
    "gram, BatchNorm recalibrated": Repair("gram"),
    "sequential": Repair("sequential", bn_samples=0),
    "sequential, BatchNorm recalibrated": Repair("sequential"),
}


def conv(inputs: int, outputs: int, stride: int = 1, kernel: int = 3) -> list[nn.Module]:
    """A convolution and its norm."""
    return [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs)]


class Plain(nn.Sequential):
    """Six convolutions 16, 16, 32, 32, 64, 64 with two poolings: 72,666 parameters, 7.34 M multiply-adds."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for inputs, outputs in ((1, 16), (16, 32), (32, 64)):
            layers += [*conv(inputs, outputs), nn.ReLU(), *conv(outputs, outputs), nn.ReLU(), nn.MaxPool2d(2)]
        layers[-1] = nn.AdaptiveAvgPool2d(1)
        super().__init__(*layers, nn.Flatten(), nn.Linear(64, 10))


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*conv(inputs, outputs, stride), nn.ReLU(), *conv(outputs, outputs))
        self.shortcut = nn.Sequential(*conv(inputs, outputs, stride, 1)) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class Residual(nn.Sequential):
    """A stem and residual blocks 16, 32/2, 64/2: 77,754 parameters, 2.64 M multiply-adds."""

    def __init__(self) -> None:
        super().__init__(
            *conv(1, 16), nn.ReLU(), nn.MaxPool2d(2), Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
        )  # fmt: skip


NETS: dict[str, Callable[[], nn.Module]] = {"plain": Plain, "residual": Residual}
Score = Callable[[nn.Module], float]


class OneCycle(ImageClassifier):
    """SGD with momentum 0.9 and one cycle up to ``lr``."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), self.lr, 0.9, weight_decay=5e-4)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(net: nn.Module, data: L.LightningDataModule, epochs: int, lr: float) -> nn.Module:
    """Train the network in place and return it in evaluation mode."""
    L.seed_everything(0, verbose=False)
    L.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_checkpointing=False, enable_model_summary=False,
        enable_progress_bar=False, limit_val_batches=0,
    ).fit(OneCycle(net.train(), lr=lr), data)  # fmt: skip
    return net.eval()


def accuracy(batches: list[tuple[Tensor, Tensor]]) -> Score:
    """Return the score of a network: its accuracy on these batches."""
    count = sum(len(labels) for _, labels in batches)

    def score(model: nn.Module) -> float:
        with torch.no_grad():
            return sum(int((model(images).argmax(1) == labels).sum()) for images, labels in batches) / count

    return score


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def on_one_batch(criterion: Criterion) -> Criterion:
    """Let a costly criterion see 128 images only; any function of these four arguments is a criterion."""
    return lambda model, graph, batches, loss_fn: criterion(model, graph, batches[:1], loss_fn)


def compare_repairs(net: nn.Module, graph: ChannelGraph, configs: Tensor, judge: Score, images: dict) -> Table:
    """What each repair makes of the same configurations, all cut by L1 norm."""
    rows = []
    for name, repair in REPAIRS.items():
        report = compare_criteria(net, graph, ["l1"], configs=configs, score_fn=judge, repair=repair, **images)
        scores, error = report.before[0], None if report.errors.isnan().any() else report.errors.mean()
        rows.append((name, scores.mean(), scores.max(), scores.min(), error))
    columns = ["repair", *(Column(what, ".3f") for what in ("mean", "best", "worst", "reconstruction error"))]
    caption = (
        f"{len(configs)} random configurations with {graph.macs(configs).mean() / graph.macs().item():.1%} of the "
        f"multiply-adds on average; dense {judge(net):.3f}; validation accuracy without any training."
    )
    return Table("Repairs", columns, rows, caption)


def criteria(fast: bool) -> dict[str, Any]:
    """Criteria by the name they have in the tables."""
    names = ("random", "l1", "l2", "gm", "bn_scale", "taylor", "es", "kl_fisher", "dirichlet")
    chosen: dict[str, Any] = {name: name for name in (("random", "l1", "taylor") if fast else names)}
    chosen["random (another draw)"] = Random(seed=1)
    if not fast:
        chosen["kl (128 images)"] = on_one_batch(KL())
        chosen["shapley (128 images)"] = on_one_batch(ShapleyCriterion(budget="4n", seed=0))
    return chosen


def fine_tune(
    net: nn.Module, graph: ChannelGraph, found: dict[str, SearchResult], data: L.LightningDataModule, epochs: int
) -> Table:
    """Test accuracy of the whole network and of what searches found, before and after the same training."""
    final = accuracy([tuple(batch) for batch in data.test_dataloader()])
    rows = [("dense", graph.macs().item(), final(net), final(train(copy.deepcopy(net), data, epochs, 0.01)))]
    for name, result in found.items():
        smaller = copy.deepcopy(net)
        result.apply(smaller, graph)
        rows.append((name, result.best.macs, final(smaller), final(train(smaller, data, epochs, 0.01))))
    columns = ["network", Column("MACs", ",.0f"), Column("test accuracy", ".4f"), Column("fine-tuned", ".4f")]
    caption = f"Accuracy on {len(data.test_dataloader().dataset):,} test images; fine-tuning takes {epochs} epoch(s)."
    return Table("Fine-tuning", columns, rows, caption)


def study(title: str, data: L.LightningDataModule, out: Path, seed: int, *, fast: bool) -> None:
    """Train one network and print its tables."""
    L.seed_everything(seed, verbose=False)
    net = train(NETS[title](), data, 1 if fast else 3, 0.1)
    judge = accuracy([tuple(batch) for batch in data.val_dataloader()][:16])
    # 512 images
    calibration = [tuple(batch) for batch, _ in zip(data.train_dataloader(), range(1 if fast else 4), strict=False)]
    graph = ChannelGraph.from_model(net, calibration[0][0][:2])
    configs = sample_configs(graph, 3 if fast else 11, 0.5, seed=seed)
    drawn = configs[1:]  # row 0 is the uniform configuration
    images = {"batches": calibration, "loss_fn": cross_entropy, "progress": False}

    print(f"\nThe {title} network")
    repairs = compare_repairs(net, graph, drawn, judge, images)
    repairs.print()
    compared = compare_criteria(net, graph, criteria(fast), configs=drawn, score_fn=judge, **images)
    compared.print()
    found = {
        name: random_search(net, graph, configs=rows, score_fn=judge, top_k=3, **images)
        for name, rows in (("uniform", configs[:1]), (f"best of {len(configs)}", configs))
    }
    tuned = fine_tune(net, graph, found, data, 1 if fast else 2)
    tuned.print()
    for stem, table in (("repairs", repairs), ("tuned", tuned)):
        table.save(out / f"{stem}.json")
        table.save(out / f"{stem}.md")
    compared.write(out)
    found[f"best of {len(configs)}"].write(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="little data, few steps: to see that it works")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/fashion_random_channel"), help="folder of results")
    parser.add_argument("--data", default=None, help="folder with the idx files, if not Debian's or a download")
    parser.add_argument("--net", choices=[*NETS, "both"], default="both")
    args = parser.parse_args()
    sizes = {"train_size": 512, "val_size": 128, "test_size": 256} if args.fast else {"train_size": 20_000}
    data = FashionMNISTDataModule(root=args.data, batch_size=128, **sizes)
    for title in NETS if args.net == "both" else [args.net]:
        study(title, data, args.out / title, args.seed, fast=args.fast)


if __name__ == "__main__":
    main()
