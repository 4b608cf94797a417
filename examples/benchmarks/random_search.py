"""Random channel pruning: configurations, searches, importance by KL and solves, each against the plain way.

The reference of a search is what one writes with torch-pruning: for every draw copy, trace, cut with a ratio per layer
and count, until a draw meets the budget; then fit layer after layer, new BatchNorm statistics, and a pass over the
whole validation set. Both cut the same channels and fit the same weights: asserted first, with the multiply-adds that
torch itself counts. Random images serve, in a network whose norms have seen them.

Run: python examples/benchmarks/random_search.py          (about 8 minutes; Fashion-MNIST needed)
"""

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice, pairwise
from typing import Any

import torch
import torch_pruning as tp
import torchvision
from cifar_networks import with_statistics
from harness import Headline, compare, entry, machine, main, one_thread
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lightning_eff.data import FashionMNISTDataModule
from lightning_eff.pruning.criteria import importance
from lightning_eff.pruning.random_channel import config_of, random_search, sample_configs
from lightning_eff.pruning.repair import Moments, Repair, collect_moments, repair
from lightning_eff.reporting import Column, Table
from lightning_eff.surgery import ChannelGraph, PruningPlan, Trial

TECHNIQUE = "Random channel pruning"
CANDIDATES, TOP_K, AMOUNT, TOLERANCE, MIN_RATIO = 30, 5, 0.5, 0.01, 0.1
BATCH, RANKING, FULL, CALIBRATION = 64, 10, 50, 8  # samples a batch, and batches
Batches = Sequence[tuple[Tensor, Tensor]]
Config = Mapping[str, int]


class Clock(dict[str, float]):
    """CPU seconds by name."""

    def __call__(self, name: str, run: Callable[..., Any], *args: Any) -> Any:
        start = time.process_time()
        result = run(*args)
        self[name] = self.get(name, 0.0) + time.process_time() - start
        return result


class Reference:
    """A network to search in by hand: of our code only the names of groups and the scores of channels."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        x = torch.randn(BATCH, 3, 64, 64)
        self.model = with_statistics(getattr(torchvision.models, name)(weights=None, num_classes=10), x)
        self.graph, self.x = ChannelGraph.from_model(self.model, x[:2]), x[:1]
        self.scores = importance(self.model, self.graph, "l1")

    def draw(self, config: Config) -> Any:
        """Copy, trace, cut and count."""
        net: Any = copy.deepcopy(self.model)
        names = {net.get_submodule(path): name for path, name in self.graph.aliases.items()}
        ratios = {net.get_submodule(k): 1 - (kept + 0.5) / self.graph.sizes[k] for k, kept in config.items()}
        options = {"pruning_ratio": 0.0, "pruning_ratio_dict": ratios, "ignored_layers": [net.fc]}  # it rounds down
        tp.pruner.BasePruner(net, self.x, lambda g: self.scores[names[g[0].dep.target.module]], **options).step()
        tp.utils.count_ops_and_params(net, self.x)
        return net

    def watch(self, batches: Batches, positions: int) -> None:
        """Keep what layers give for calibration batches, at some positions of each."""
        self.batches, self.at, self.most = batches, {}, positions
        layers = [path for path, layer in self.model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
        self.targets = self._seen(self.model, layers, lambda layer, x, y: y)

    def _seen(self, net: nn.Module, paths: Sequence[str], take: Callable[[Any, Tensor, Tensor], Tensor]) -> Any:
        """What is taken of each layer's input and output, ``[rows, channels]``."""
        found: dict[str, list[Tensor]] = {path: [] for path in paths}

        def keep(layer: nn.Module, args: tuple[Tensor], y: Tensor, path: str) -> None:
            at = self.at.setdefault(path, torch.randperm(y[0, 0].numel())[: self.most])
            values = take(layer, args[0], y)
            found[path].append(values.reshape(*values.shape[:2], -1)[:, :, at].transpose(1, 2).flatten(0, 1))

        handles = [net.get_submodule(p).register_forward_hook(lambda *a, p=p: keep(*a, path=p)) for p in paths]
        _run(net, self.batches)
        _ = [handle.remove() for handle in handles]
        return {path: torch.cat(rows) for path, rows in found.items()}

    def repair(self, net: nn.Module, config: Config) -> None:
        """Fit every layer that lost inputs to the whole network's outputs, in order; then new norm statistics."""
        for path in self.targets:
            layer: Any = net.get_submodule(path)
            if layer.weight.shape[1] < self.model.get_submodule(path).get_parameter("weight").shape[1]:
                name, y = self.graph.aliases[path], self.targets[path]
                if name in config:
                    y = y[:, self.scores[name].topk(config[name]).indices.sort().values]
                _fit(layer, self._seen(net, [path], _patches)[path], y)
        for norm in (module for module in net.modules() if isinstance(module, nn.BatchNorm2d)):
            norm.reset_running_stats()
            norm.train().momentum = None
        _run(net, self.batches)
        net.eval()

    def assert_equal(self, batches: Batches) -> None:
        """A candidate here and a finalist of ours are one network: in float64, fitted at all positions."""
        double = copy.copy(self)
        double.model, double.x = copy.deepcopy(self.model).double(), self.x.double()
        double.watch(few := [(x[:, :, ::2, ::2].double(), y) for x, y in batches[:2]], positions=10_000)
        config = config_of(self.graph, sample_configs(self.graph, 2, 0.85)[1])
        net = double.draw(config)
        with _trial(double, config) as trial:
            torch.testing.assert_close(_run(double.model, few), _run(net, few))
        double.repair(net, config)
        repair(trial, few, Repair("sequential", positions=10_000))
        expected = {name: net.state_dict()[name] for name in trial.state()}
        torch.testing.assert_close(trial.state(), expected, rtol=1e-4, atol=1e-6)


def _trial(net: Reference, config: Config) -> Trial:
    return Trial(net.model, net.graph, PruningPlan.from_scores(net.graph, net.scores, config))


def _patches(layer: Any, x: Tensor, y: Tensor) -> Tensor:
    return x if x.ndim == 2 else F.unfold(x, layer.kernel_size, padding=layer.padding, stride=layer.stride)


@torch.no_grad()
def _fit(layer: Any, x: Tensor, y: Tensor) -> None:
    means = x.mean(0), y.mean(0)
    if layer.bias is not None:
        x, y = x - means[0], y - means[1]
    gram, cross = x.T @ x / len(x), x.T @ y / len(x)
    gram.diagonal().add_(Repair().ridge * gram.diagonal().mean())
    weight = torch.cholesky_solve(cross, torch.linalg.cholesky(gram)).T
    layer.weight.copy_(weight.reshape(layer.weight.shape))
    if layer.bias is not None:
        layer.bias.copy_(means[1] - weight @ means[0])


def _run(model: nn.Module, batches: Batches) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(x) for x, _ in batches])


def _right(model: nn.Module, batches: Batches) -> float:
    return float((_run(model, batches).argmax(1) == torch.cat([y for _, y in batches])).double().mean())


def configurations() -> Table:
    """Multiply-adds of drawn configurations."""
    rows = []
    for name in ("resnet18", "resnet50"):
        reference, clock = Reference(name), Clock()
        graph, drawn = reference.graph, sample_configs(reference.graph, 10_000, AMOUNT)
        for row, macs in zip(drawn[1:6], graph.macs(drawn)[1:6].tolist(), strict=True):
            net = clock("torch-pruning", reference.draw, config_of(graph, row))
            clock("closed form", graph.macs, drawn)
            clock("drawn", sample_configs, graph, len(drawn), AMOUNT)
            with FlopCounterMode(display=False) as counter:
                net(reference.x)
            assert counter.get_total_flops() == 2 * macs
        peer, ours = clock["torch-pruning"] / 5, clock["closed form"] / 5e4
        rows.append((name, peer * 1e3, ours * 1e6, peer / ours, clock["drawn"] / 5e4 * 1e6))
    ways = Column("torch-pruning: copy, cut, count [ms]", ".1f"), Column("closed form [us]", ".2f")
    columns = ["network", *ways, Column("faster [x]", ",.0f"), Column("drawn to meet the budget [us]", ".2f")]
    caption = f"64 x 64; means of 5 rounds, closed form and drawing 10,000 at a time; {machine()}"
    return Table("Multiply-adds of one configuration", columns, rows, caption)


def search(short: bool = False) -> list[Table]:
    """Whole searches for half the multiply-adds; ``short`` with a third of the candidates, one of them by hand."""
    n, top_k, full, by_hand = (CANDIDATES // 3, 2, 2 * RANKING, 1) if short else (CANDIDATES, TOP_K, FULL, 2)
    reference, theirs, ours = Reference("resnet18"), Clock(), Clock()
    model, graph, images = reference.model, reference.graph, torch.randn(BATCH * full, 3, 64, 64)
    validation = [(x, _run(model, [(x, x)]).argmax(1)) for x in images.split(BATCH)]
    calibration = validation[:CALIBRATION]
    reference.assert_equal(calibration)
    draws, accepted = _rejection(graph, n)
    theirs("outputs of the whole network", reference.watch, calibration, Repair().positions)

    def candidate(config: Config) -> None:
        net = theirs("draws", reference.draw, config)
        theirs("fits and norms", reference.repair, net, config)
        theirs("validation", _right, net, validation)

    def searched() -> list[Config]:
        options: Any = {"amount": AMOUNT, "n": n, "top_k": top_k, "progress": False}
        options["score_fn"] = lambda net: ours("scores on 10 batches", _right, net, validation[:RANKING])
        options["final_score_fn"] = lambda net: ours("scores on all batches", _right, net, validation)
        return [found.config for found in random_search(model, graph, batches=calibration, **options).candidates]

    candidate(accepted[0])
    configs = ours("all", searched)
    _ = [candidate(config) for config in accepted[1:by_hand]]
    _ = [theirs("draws", reference.draw, config) for config in draws[:4]]
    scale = {"draws": len(draws) / (4 + by_hand), "fits and norms": n / by_hand, "validation": n / by_hand}
    theirs.update({name: theirs[name] * factor for name, factor in scale.items()})
    whole, total, scoring = sum(theirs.values()), ours.pop("all"), sum(ours.values())
    if not short:
        ours.update(_parts(reference, calibration, configs))
    bare, ours_bare = whole - theirs["validation"], total - scoring
    rows = [("all", whole, total, whole / total), ("without validation", bare, ours_bare, bare / ours_bare)]
    caption = (
        f"ResNet-18, 64 x 64, {n} candidates of {AMOUNT:.0%} of the multiply-adds, {BATCH * full:,} images "
        f"for validation; ours ranks on {BATCH * RANKING} and judges {top_k} on all. The reference is measured on "
        f"{by_hand} candidate(s) and {4 + by_hand} draws and scaled to {n} and to the {len(draws)} draws that find "
        f"them; {machine()}"
    )
    columns = ["", Column("reference [s]", ".1f"), Column("lightning_eff [s]", ".1f"), Column("faster [x]", ".1f")]
    repeated = f"Scores as in the search; other parts repeated one by one, one finalist times {TOP_K}"
    share = ["part", Column("CPU s", ".2f"), Column("share", ".1%")]
    return [
        Table(f"Random search, {n} candidates", columns, rows, caption),
        Table("Time of the reference", share, [(name, s, s / whole) for name, s in theirs.items()]),
        Table("Time of lightning_eff, parts", share, [(name, s, s / total) for name, s in ours.items()], repeated),
    ]


def _rejection(graph: ChannelGraph, wanted: int) -> tuple[list[Config], list[Config]]:
    """Uniform draws until as many as wanted meet the budget, told in closed form; and those that meet it."""
    sizes = torch.tensor(list(graph.sizes.values()))
    ratios = torch.rand(20_000, len(sizes), generator=torch.Generator().manual_seed(0))
    ratios[:, [name not in graph.prunable for name in graph.sizes]] = 1
    counts = ((MIN_RATIO + (1 - MIN_RATIO) * ratios) * sizes).round().long()
    near = (graph.macs(counts) / graph.macs() - (1 - AMOUNT)).abs() <= TOLERANCE
    numbers = near.nonzero().flatten()[:wanted]
    drawn = [config_of(graph, row) for row in counts[: numbers[-1] + 1]]
    return drawn, [drawn[number] for number in numbers]


def _parts(reference: Reference, batches: Batches, configs: Sequence[Config]) -> Clock:
    """The parts of our search, one by one: what is done once, all candidates, one finalist times five."""
    clock, model, graph = Clock(), reference.model, reference.graph
    moments = clock("moments", collect_moments, model, graph, batches, Repair())
    shared = moments.nested({name: s.argsort(descending=True) for name, s in reference.scores.items()})
    for number, config in enumerate(configs):
        trial = clock("cuts on trial", _trial, reference, config)
        if number < CANDIDATES:
            name = "repairs by gram" if number else "factors, and the first repair by gram"
            clock(name, partial(repair, trial, batches, Repair("gram", bn_samples=0), moments=shared))
    clock("repairs in order", repair, trial, batches, Repair("sequential", bn_samples=0))
    clock("norm statistics", repair, trial, batches, Repair("none"))
    clock.update({name: clock[name] * TOP_K for name in ("repairs in order", "norm statistics")})
    return clock


def criteria() -> Table:
    """Exact KL of every channel against its second order, in a network trained for a moment."""
    data, layers = FashionMNISTDataModule(train_size=8_000, batch_size=BATCH), list[nn.Module]()
    data.prepare_data()
    data.setup()
    torch.manual_seed(0)
    for before, width in pairwise((1, 16, 16, 32, 32, 64, 64)):
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] * (before == width < 64)
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for x, y in data.train_dataloader():
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    batches = list(islice(data.val_dataloader(), 256 // BATCH))
    graph, clock = ChannelGraph.from_model(model.eval(), batches[0][0][:2]), Clock()
    for _ in range(2):
        fisher = clock("kl_fisher", importance, model, graph, "kl_fisher", batches)
        exact = clock("kl", importance, model, graph, "kl", batches)
    rho = [float(spearmanr(exact[name], fisher[name]).statistic) for name in graph.prunable]
    kl, second = clock["kl"] / 2, clock["kl_fisher"] / 2
    row = (kl, second, kl / second, statistics.median(rho), min(rho))
    formats = {"kl [s]": ".2f", "kl_fisher [s]": ".2f", "faster [x]": ".1f", "median Spearman": ".3f", "least": ".3f"}
    columns = [Column(name, digits) for name, digits in formats.items()]
    caption = f"Fashion-MNIST, 224 channels, 256 images, accuracy {_right(model, batches):.3f}; {machine()}"
    return Table("Importance by the divergence of predictions", columns, [row], caption)


def solves() -> Table:
    """One factor for all candidates against a factor each: 128 channels of 3 x 3 weights."""
    torch.manual_seed(0)
    x, head = torch.randn(256, 3, 16, 16), [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)]
    model = nn.Sequential(nn.Conv2d(3, 128, 3), nn.ReLU(), nn.Conv2d(128, 128, 3), nn.ReLU(), *head)
    graph = ChannelGraph.from_model(model, x[:2])
    moments = Moments.collect(model, graph, [(x, None)])
    order = importance(model, graph, "l1")["0"].argsort(descending=True)
    keeps = [torch.zeros(128, dtype=torch.bool).index_fill(0, order[:n], True) for n in range(13, 128, 4)]
    solvers: dict[str, Any] = {"a factor each": moments, "one, made before": moments.nested({"0": order})}
    runs = {name: lambda s=s: [s.solve("2", keep).weight for keep in keeps] for name, s in solvers.items()}
    equal = partial(torch.testing.assert_close, rtol=0, atol=1e-5)
    title = f"Weights of a layer with 1,152 inputs for {len(keeps)} candidates, equal to 1e-5"
    return compare(runs, reference="a factor each", check=equal, title=title)


def tables() -> list[Table]:
    """Measure."""
    with one_thread():
        return [configurations(), *search(), criteria(), solves()]


def headlines(tables: list[Table]) -> list[Headline]:
    by_hand = "torch-pruning, rejection by hand, scaled"
    lines = []
    for name in ("resnet18", "resnet50"):
        theirs = 1e3 * entry(tables, "Multiply-adds", name, "torch-pruning: copy, cut, count [ms]")
        ours = entry(tables, "Multiply-adds", name, "closed form [us]")
        lines.append(
            Headline(
                f"configuration of {name}, counted",
                ours,
                theirs,
                "torch-pruning",
                "us",
                target=1e4,
                aside=name == "resnet50",
            )
        )
    for part, aim in (("all", None), ("without validation", 20)):
        seconds = (entry(tables, "Random search", part, f"{who} [s]") for who in ("lightning_eff", "reference"))
        title = next(table.title for table in tables if table.title.startswith("Random search"))
        work = f"{title}, ResNet-18, {part}"
        lines.append(Headline(work, *seconds, by_hand, target=aim))
    divergence = next(table for table in tables if table.title.startswith("Importance"))
    exact, second, _, spearman, _ = divergence.rows[0]
    work = "importance of 224 channels by KL, second order"
    return [
        *lines,
        Headline(work, second, exact, "exact KL, of this package", target=15),
        Headline(
            f"{work}: median rank correlation",
            spearman,
            1.0,
            "exact KL",
            "",
            limit=0.9,
            more_is_better=True,
            aside=True,
        ),
    ]


def short() -> list[Table]:
    with one_thread():
        return [configurations(), *search(short=True), criteria()]


if __name__ == "__main__":
    main(tables, headlines, short)
