"""How good are rankings before and after fine-tuning? Shapley values, greedy removal, leave-one-out, L1 norm, chance.

Channels are ranked on validation images; accuracies are on test images, mean over networks trained from several seeds
(for chance also over ten drawings each). Fine-tuning is the same short run for every ranking; --short is LeNet without.

Run: python examples/benchmarks/ranking_quality.py          (about 6 minutes; Fashion-MNIST needed)
"""

import copy
import warnings
from collections.abc import Callable

import lightning as L
import torch
from harness import Headline, best, entry, machine, main
from torch import Tensor

from lightning_eff.data import DigitsDataModule, FashionMNISTDataModule
from lightning_eff.models import ImageClassifier, LeNet, SmallCNN
from lightning_eff.pruning import ChannelGame, Samples
from lightning_eff.reporting import Column, Table
from lightning_eff.shapley import (
    GreedyBackward,
    LeaveOneOut,
    PermutationShapley,
    ShapleyEstimator,
    choose_estimator,
)
from lightning_eff.surgery import ChannelGraph, PruningPlan, apply_plan

TECHNIQUE = "Shapley channel pruning"
SEEDS = 3


def _fit(model: L.LightningModule, data: L.LightningDataModule, steps: int) -> None:
    L.Trainer(
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        limit_val_batches=0,
    ).fit(model, data)


def _all(loader: torch.utils.data.DataLoader) -> tuple[Tensor, Tensor]:
    x, y = zip(*loader, strict=True)
    return torch.cat(x), torch.cat(y)


def _accuracy(model: torch.nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        return float((model(x).argmax(1) == y).double().mean())


def _scores(
    model: torch.nn.Module, graph: ChannelGraph, samples: Samples, keep: dict[str, int]
) -> dict[str, list[dict[str, Tensor]]]:
    """Every ranking's scores for the layers in ``keep``; chance is drawn ten times."""

    games = {name: ChannelGame(model, graph, name, samples) for name in keep}

    def values(choose: Callable[[int, int], ShapleyEstimator]) -> list[dict[str, Tensor]]:
        """Scores by the estimator that is chosen for the number of channels there are and of those that go."""
        return [
            {
                name: choose(game.n_players, game.n_players - keep[name]).estimate(game, generator=0).values
                for name, game in games.items()
            }
        ]

    generator = torch.Generator().manual_seed(0)
    return {
        "Shapley, matched depth": values(lambda n, removed: PermutationShapley(walks=32, depth=removed)),
        "Shapley, full": values(lambda n, removed: choose_estimator(n, "20n")),
        "greedy removal": values(lambda n, removed: GreedyBackward()),
        "leave-one-out": values(lambda n, removed: LeaveOneOut()),
        "L1 norm": [{n: model.get_submodule(n).weight.detach().flatten(1).norm(1, dim=1) for n in keep}],
        "chance": [
            {name: torch.rand(graph.resolve(name).size, generator=generator) for name in keep} for _ in range(10)
        ],
    }


def _experiment(
    title: str, network: str, data: L.LightningDataModule, keep: dict[str, int], steps: int, tuned: int = 3
) -> Table:
    results: dict[str, list[tuple[float, float]]] = {}
    dense = []
    for seed in range(SEEDS):
        L.seed_everything(seed, verbose=False)
        net, lr = (SmallCNN(width=16), 3e-3) if network == "SmallCNN" else (LeNet(), 1e-3)
        model = ImageClassifier(net, lr=lr)
        _fit(model, data, steps)
        x, y = _all(data.val_dataloader())
        test = _all(data.test_dataloader())
        dense.append(_accuracy(model, *test))
        graph = ChannelGraph.from_model(model, x[:2])
        samples = Samples.collect([(x[:1024], y[:1024])], 1024, lambda batch: batch)
        for name, drawings in _scores(model, graph, samples, keep).items():
            pairs = []
            for number, scores in enumerate(drawings):
                small = copy.deepcopy(model)
                apply_plan(small, PruningPlan.from_scores(graph, scores, keep), x[:2], graph=graph)
                before = _accuracy(small, *test)
                if number < tuned:
                    torch.manual_seed(0)
                    _fit(small, data, 200)
                    pairs.append((before, _accuracy(small, *test)))
                else:
                    pairs.append((before, float("nan")))
            tensor = torch.tensor(pairs, dtype=torch.float64)
            results.setdefault(name, []).append((tensor[:, 0].mean().item(), tensor[:, 1].nanmean().item()))
    rows = [
        (name, *(torch.tensor(values).mean(0).tolist()), min(v[0] for v in values), max(v[0] for v in values))
        for name, values in results.items()
    ]
    columns = [
        "ranking",
        Column("before fine-tuning", ".3f"),
        Column("after 200 steps", ".3f"),
        Column("least before", ".3f"),
        Column("most before", ".3f"),
    ]
    return Table(
        title, columns, rows, f"dense {sum(dense) / len(dense):.3f}; mean over {SEEDS} trained networks; {machine()}"
    )


LENET = "LeNet 10-20-100 to 8-9-36 on Fashion-MNIST"


def lenet(tuned: int = 3) -> list[Table]:
    """Prune LeNet on Fashion-MNIST."""
    warnings.filterwarnings("ignore")
    fashion = FashionMNISTDataModule(train_size=20_000, val_size=1024, test_size=5_000)
    return [_experiment(LENET, "LeNet", fashion, {"net.c1.0": 8, "net.c3.0": 9, "net.c5": 36}, 600, tuned)]


def tables() -> list[Table]:
    """Prune LeNet, and one layer at a time a small CNN on the digits."""
    out = lenet()
    for layer in (1, 2, 3, 4):
        size = 16 if layer < 3 else 32
        name = f"net.layers.conv{layer}"
        out.append(
            _experiment(
                f"small CNN on digits, half of layer {layer}", "SmallCNN", DigitsDataModule(), {name: size // 2}, 140
            )
        )
    return out


def headlines(tables: list[Table]) -> list[Headline]:
    rivals = ["greedy removal", "leave-one-out", "L1 norm", "chance"]
    column = "before fine-tuning"
    ours = entry(tables, LENET, "Shapley, full", column)
    theirs, who = best(tables, LENET, rivals, column, most=True)
    return [Headline(f"test accuracy, {LENET}, {column}", ours, theirs, who, unit="", more_is_better=True)]


if __name__ == "__main__":
    main(tables, headlines, lambda: lenet(tuned=0))
