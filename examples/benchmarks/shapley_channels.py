"""Channel games: the same coalitions by an official-style loop, by captum, and by ours.

Every contender of the walk cases walks the same orders from no channel to all and returns the same Shapley estimates
(asserted). The official-style loop sets weights to zero in the network, runs the calibration set in batches of 105 and
puts the weights back, as the authors' code does; captum's ``ShapleyValueSampling`` works on a mask of channels.

Needs the extra ``bench`` and Fashion-MNIST. Run: python examples/benchmarks/shapley_channels.py     (about 25 minutes)
or some cases: python examples/benchmarks/shapley_channels.py lenet exact
With --short larger blocks of channels are the players of VGG-16 and ResNet-18, so that there are fewer coalitions, and
the other cases are timed once.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache

import torch
from captum.attr import ShapleyValueSampling
from cifar_networks import VGG16, cifar_resnet18, with_statistics
from harness import Headline, best, compare, entry, machine, main, one_thread
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_eff.data import FashionMNISTDataModule
from lightning_eff.models import LeNet
from lightning_eff.pruning import ChannelGame, Samples
from lightning_eff.reporting import Column, Table
from lightning_eff.shapley import ExactShapley, PermutationShapley
from lightning_eff.surgery import ChannelGraph

TECHNIQUE = "Shapley channel pruning"
Estimate = Callable[[], Tensor]
ERROR = 0.02  # relative squared error that counts as good enough


class Layer:
    """One layer of a network as a game of blocks of channels, walked in the given orders."""

    def __init__(self, model: nn.Module, name: str, x: Tensor, y: Tensor, *, block: int = 1, walks: int = 1) -> None:
        self.model, self.x, self.y = model.eval(), x, y
        graph = ChannelGraph.from_model(model, x[:2], check=False)
        group = graph.resolve(name)
        self.players = group.size // block
        members = tuple(replace(member, root=member.root // block) for member in group.members)
        self.group = replace(group, size=self.players, members=members)
        self.graph = replace(graph, groups={self.group.name: self.group})
        generator = torch.Generator().manual_seed(0)
        self.orders = torch.stack([torch.randperm(self.players, generator=generator) for _ in range(walks)])

    def game(self, groups: int | None = 1) -> ChannelGame:
        samples = Samples.collect([(self.x, self.y)], len(self.x), lambda batch: batch, groups=groups)
        return ChannelGame(self.model, self.graph, self.group.name, samples)

    def ours(self) -> Tensor:
        return self._mean(self.game().walk(self.orders, start="empty"))

    def official(self) -> Tensor:
        """Zero the weights that read the removed channels, run the loader, restore; once per coalition."""
        coalitions = torch.zeros(len(self.orders), self.players + 1, self.players, dtype=torch.bool)
        for walk, order in zip(coalitions, self.orders, strict=True):
            for step, player in enumerate(order, start=1):
                walk[step:, player] = True
        return self._mean(torch.stack([torch.stack([self.value(kept) for kept in walk]) for walk in coalitions]))

    def captum(self) -> Tensor:
        """Hand the same orders to captum, whose features are the players."""

        def value(mask: Tensor) -> Tensor:
            return self.value(mask[0] > 0.5).reshape(1)

        def generator(n_features: int, n_samples: int) -> Iterator[list[int]]:
            yield from self.orders.tolist()

        sampler = ShapleyValueSampling(value)
        sampler.permutation_generator = generator
        ones = torch.ones(1, self.players)
        return sampler.attribute(ones, baselines=0 * ones, n_samples=len(self.orders))[0].double()

    def _mean(self, values: Tensor) -> Tensor:
        """Values along the walks ``[walks, players + 1]`` -> mean marginal contributions."""
        return torch.zeros_like(values[:, 1:]).scatter_(1, self.orders, values.diff()).mean(0)

    @torch.no_grad()
    def value(self, kept: Tensor) -> Tensor:
        saved = []
        for member in self.group.consumers:
            weight = self.model.get_submodule(member.path).weight
            saved.append((weight, weight.clone()))
            weight[:, member.index[~kept[member.root]]] = 0
        right = 0
        for x, y in zip(self.x.split(105), self.y.split(105), strict=True):
            right += int((self.model(x).argmax(1) == y).sum())
        for weight, old in saved:
            weight.copy_(old)
        return torch.tensor(right / len(self.x), dtype=torch.float64)


def _walks(title: str, layers: list[Layer], *, official: bool, repeats: int) -> Table:
    """The same walks by all; slow cases run once, and are compared behind that."""
    results: dict[str, Tensor] = {}

    def contender(name: str, how: str) -> Callable[[], Tensor]:
        def run() -> Tensor:
            results[name] = torch.cat([getattr(layer, how)() for layer in layers])
            return results[name]

        return run

    names = {"official-style loop": "official"} if official else {}
    names |= {"captum ShapleyValueSampling": "captum", "lightning_eff": "ours"}
    table = compare(
        {name: contender(name, how) for name, how in names.items()},
        reference="captum ShapleyValueSampling",
        repeats=repeats,
        warmup=0,
        title=title,
        check=None if repeats == 1 else _equal,
    )
    for result in results.values():
        _equal(result, results["captum ShapleyValueSampling"])
    return table


def _equal(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


@cache
def _fashion() -> tuple[nn.Module, Tensor, Tensor]:
    """LeNet after a minute of training, 512 images that it has not seen, their labels."""
    data = FashionMNISTDataModule(batch_size=128)
    data.prepare_data()
    data.setup("fit")
    torch.manual_seed(0)
    model = LeNet()
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for (x, y), _ in zip(data.train_dataloader(), range(400), strict=False):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    x, y = (torch.cat(parts)[:512] for parts in zip(*data.val_dataloader(), strict=True))
    return model.eval(), x, y


def lenet(repeats: int = 3) -> list[Table]:
    """B1 and B2."""
    model, x, y = _fashion()
    return [
        _walks(f"LeNet layer {number}: {n} channels, 512 images, 10 walks", [layer], official=True, repeats=repeats)
        for number, name, n in ((1, "c1.0", 10), (2, "c3.0", 20))
        for layer in [Layer(model, name, x, y, walks=10)]
    ]


def vgg(block: int = 2) -> list[Table]:
    """B3."""
    torch.manual_seed(0)
    images, labels = torch.randn(16, 3, 32, 32), torch.randint(0, 10, (16,))
    model = with_statistics(VGG16(), images)
    names = [f"features.{i}" for i, layer in enumerate(model.features) if isinstance(layer, nn.Conv2d)] + ["fc"]
    title = f"VGG-16, all 14 layers: blocks of {block} channels, 16 images, 1 walk"
    layers = [Layer(model, name, images, labels, block=block) for name in names]
    return [_walks(title, layers, official=False, repeats=1)]


def resnet(block: int = 1) -> list[Table]:
    """B4."""
    torch.manual_seed(0)
    images, labels = torch.randn(8, 3, 32, 32), torch.randint(0, 10, (8,))
    model = with_statistics(cifar_resnet18(), images)
    names = [f"layer{stage}.{block}.conv1" for stage in (1, 2, 3, 4) for block in (0, 1)]
    title = f"ResNet-18, the 8 inner convolutions: blocks of {block} channel(s), 8 images, 1 walk"
    layers = [Layer(model, name, images, labels, block=block) for name in names]
    return [_walks(title, layers, official=False, repeats=1)]


@cache
def _truth(groups: int | None) -> tuple[Layer, Tensor, float]:
    model, x, y = _fashion()
    layer = Layer(model, "c3.0", x[:256], y[:256])
    with one_thread():
        begin = time.process_time()
        values = ExactShapley().estimate(layer.game(groups)).values
        return layer, values, time.process_time() - begin


def exact() -> list[Table]:
    """B6."""
    rows = []
    for groups in (1, None):
        layer, _, seconds = _truth(groups)
        rows.append([f"lightning_eff, {layer.game(groups).n_groups} group(s)", 2**20, seconds])
    with one_thread():
        begin = time.process_time()
        for _ in range(10):
            layer.value(torch.ones(20, dtype=torch.bool))
        each = (time.process_time() - begin) / 10
    rows.append(["official-style loop, extrapolated from 10 coalitions", 2**20, each * 2**20])
    columns = ["contender", Column("coalitions", ","), Column("CPU seconds", ",.1f")]
    return [Table("Exact values of LeNet layer 2: 20 channels, 256 images", columns, rows, machine())]


def until_precise(repeats: int = 3) -> list[Table]:
    """B8: each with the fewest walks whose median error over 20 seeds is small enough."""
    layer, truth, _ = _truth(1)

    def captum(walks: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        layer.orders = torch.stack([torch.randperm(20, generator=generator) for _ in range(walks)])
        return layer.captum()

    def ours(walks: int, seed: int) -> Tensor:
        return PermutationShapley(walks=walks).estimate(layer.game(None), generator=seed).values

    def drawn(walks: int, seed: int) -> Tensor:  # what captum would return, from walks that cost nothing
        generator = torch.Generator().manual_seed(seed)
        layer.orders = torch.stack([torch.randperm(20, generator=generator) for _ in range(walks)])
        return layer._mean(quick.walk(layer.orders, start="empty"))

    rows = []
    with one_thread():
        quick = layer.game()
        for name, estimate, trial, steps in (
            ("captum ShapleyValueSampling", captum, drawn, range(2, 200)),
            (f"lightning_eff, {layer.game(None).n_groups} groups", ours, ours, range(2, 200, 2)),
        ):
            walks, error = next((w, e) for w in steps for e in [_median_error(trial, w, truth)] if e <= ERROR)
            seconds = []
            for seed in range(repeats):
                begin = time.process_time()
                estimate(walks, seed)
                seconds.append(time.process_time() - begin)
            rows.append([name, walks, error, statistics.median(seconds)])
    for row in rows:
        row.append(rows[0][3] / row[3])
    columns = [
        "contender", "walks", Column("median error", ".4f"), Column("CPU seconds", ".3f"), Column("faster [x]", ".1f"),
    ]  # fmt: skip
    full, half = PermutationShapley(walks=32), PermutationShapley(walks=32, depth=10)
    depths = [["full", full.cost(20)], ["matched to 50 % pruning", half.cost(20)]]
    return [
        Table(f"LeNet layer 2, 256 images, until the relative squared error is {ERROR}", columns, rows, machine()),
        Table("Evaluations of 32 walks, 20 channels", ["depth", "evaluations"], depths),
    ]


def _median_error(estimate: Callable[[int, int], Tensor], walks: int, truth: Tensor) -> float:
    errors = [float((estimate(walks, seed) - truth).square().sum() / truth.square().sum()) for seed in range(20)]
    return statistics.median(errors)


CASES = {"lenet": lenet, "vgg": vgg, "resnet": resnet, "exact": exact, "until_precise": until_precise}


def short() -> list[Table]:
    return [*lenet(repeats=1), *vgg(block=16), *resnet(block=16), *exact(), *until_precise(repeats=1)]


def headlines(tables: list[Table]) -> list[Headline]:
    captum, ours = "captum ShapleyValueSampling", "lightning_eff"
    lines = []
    for table in tables:
        aims = {"LeNet layer 1": 6, "LeNet layer 2: 20": 100, "VGG-16": 5, "ResNet-18": 3.5}
        for aim in (aim for start, aim in aims.items() if table.title.startswith(start)):
            seconds = [entry([table], table.title, name, "median [s]") for name in (ours, captum)]
            aside = table.title.startswith(("LeNet layer 1", "ResNet-18"))
            lines.append(Headline(f"{table.title}, the same coalitions", *seconds, captum, target=aim, aside=aside))
        if table.title.startswith("Exact"):
            seconds, _ = best([table], "Exact", [row[0] for row in table.rows[:-1]], "CPU seconds")
            lines.append(
                Headline(
                    table.title, seconds, table.rows[-1][2], "official-style loop, extrapolated", limit=12, aside=True
                )
            )
        if table.title.startswith("LeNet layer 2, 256 images, until"):
            theirs, mine = (row[3] for row in table.rows)
            lines.append(Headline(table.title, mine, theirs, captum, target=300))
    return lines


if __name__ == "__main__":
    chosen = [argument for argument in sys.argv[1:] if argument in CASES] or list(CASES)
    others = [argument for argument in sys.argv[1:] if argument not in CASES]
    main(lambda: [table for case in chosen for table in CASES[case]()], headlines, short, others)
