"""Neural-tangent features: class sums of a data set and the generator's step, against per-sample gradients.

Peers form the gradient of every sample: a Python loop as in the published code of DP-NTK, torch.func's vmap(grad),
Opacus' hooks and BackPACK. All results are asserted to be equal before anything is timed. Opacus' gradients carry no
graph, so it cannot train a generator. The floor is one plain forward and backward of the same network. Memory is that
of one step in a process of its own, above what the process holds before.

Run: python examples/benchmarks/dp_ntk.py          (about 10 minutes; needs `pip install backpack-for-pytorch`)
"""

import math
import resource
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence

import torch
from backpack import backpack, extend
from backpack.extensions import BatchGrad
from harness import Headline, best, compare, entry, machine, main, one_thread
from opacus import GradSampleModule
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from lightning_eff.reporting import Column, Table
from lightning_eff.synthesis.embedding import MeanEmbedding
from lightning_eff.synthesis.features import NTKFeatures
from lightning_eff.synthesis.networks import ConvFeatureNet, FCFeatureNet

TECHNIQUE = "Private data generation"
CLASSES, CHUNK = 10, 64
PLAIN = "plain forward and backward"
Gradients = Callable[[Tensor], Tensor]  # (n, D) -> (n, P)


def network(name: str) -> nn.Sequential:
    """Return a feature network as plain layers, which BackPACK and Opacus can take."""
    if name == "cnn":
        net: nn.Module = ConvFeatureNet((1, 28, 28), (16, 32), out_features=CLASSES)
        return nn.Sequential(nn.Unflatten(1, (1, 28, 28)), *net.layers)
    return FCFeatureNet(784, (int(name),), CLASSES).layers


def looped(net: nn.Module, *, graph: bool) -> Gradients:
    parameters = list(net.parameters())

    def gradients(x: Tensor) -> Tensor:
        rows = []
        for sample in x:
            found = torch.autograd.grad(net(sample[None]).sum(), parameters, create_graph=graph)
            rows.append(torch.cat([g.flatten() for g in found]))
        return torch.stack(rows)

    return gradients


def vmapped(net: nn.Module) -> Gradients:
    weights = {name: p.detach() for name, p in net.named_parameters()}
    one = grad(lambda values, sample: functional_call(net, values, (sample[None],)).sum())

    def gradients(x: Tensor) -> Tensor:
        found = vmap(one, in_dims=(None, 0))(weights, x)
        return torch.cat([found[name].flatten(1) for name in weights], 1)

    return gradients


def by_opacus(net: nn.Module) -> Gradients:
    hooked = GradSampleModule(net, loss_reduction="sum")

    def gradients(x: Tensor) -> Tensor:
        hooked.zero_grad()
        hooked(x).sum().backward()
        return torch.cat([p.grad_sample.flatten(1) for p in hooked.parameters()], 1)

    return gradients


def by_backpack(net: nn.Module, *, graph: bool) -> Gradients:
    hooked = extend(net)

    def gradients(x: Tensor) -> Tensor:
        hooked.zero_grad()
        with backpack(BatchGrad()):
            hooked(x).sum().backward(create_graph=graph)
        return torch.cat([p.grad_batch.flatten(1) for p in hooked.parameters()], 1)

    return gradients


def summed(gradients: Gradients, x: Tensor, y: Tensor, chunk: int) -> Tensor:
    """Class sums ``(C, P)`` from gradients that are written out for ``chunk`` samples at a time."""
    total: Tensor | int = 0
    for xs, ys in zip(x.split(chunk), y.split(chunk), strict=True):
        g = gradients(xs).detach()
        weights = nn.functional.one_hot(ys, CLASSES).to(g) / g.norm(dim=1, keepdim=True)
        total = total + weights.T @ g
    assert isinstance(total, Tensor)
    return total


def stepped(gradients: Gradients, x: Tensor, y: Tensor, means: Tensor) -> Tensor:
    """Gradient by the samples of the unbiased discrepancy, through gradients that are written out."""
    x = x.clone().requires_grad_()
    g = gradients(x)
    features = g / g.norm(dim=1, keepdim=True)
    b = len(x) // CLASSES
    e = features.view(CLASSES, b, -1).mean(1)
    spread = (b * b * e.square().sum() - b * CLASSES) / (b * (b - 1))
    loss = (means.square().sum() - 2 * (means * e).sum() + spread) / CLASSES
    return torch.autograd.grad(loss, x)[0]


def closed_form_step(features: NTKFeatures, target: MeanEmbedding, x: Tensor, y: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(features.mmd2(target, x, y), x)[0]


def plain(net: nn.Module, x: Tensor) -> Callable[[], None]:
    def run() -> None:
        net.zero_grad()
        net(x).sum().backward()

    return run


def unfolded(sums: Tensor | MeanEmbedding, net: nn.Module) -> Tensor:
    """Class sums in the coordinates of the parameters: the last layer's one row for its K equal ones."""
    if isinstance(sums, Tensor):
        return sums
    blocks = []
    for name, parameter in net.named_parameters():
        block = sums.blocks[f"{name}"].flatten(1)
        copies = parameter.numel() // block.shape[1]
        blocks.append(block.repeat(1, copies) / math.sqrt(copies))
    return torch.cat(blocks, 1)


def release_methods(name: str, dtype: torch.dtype) -> dict[str, Callable[[Tensor, Tensor], Tensor | MeanEmbedding]]:
    """Return, by name, functions that form class sums of ``(n, D)`` and labels."""
    peers = {
        "loop": (looped(network(name).to(dtype), graph=False), 1),
        "torch.func vmap(grad)": (vmapped(network(name).to(dtype)), CHUNK),
        "Opacus": (by_opacus(network(name).to(dtype)), CHUNK),
        "BackPACK": (by_backpack(network(name).to(dtype), graph=False), CHUNK),
    }
    features = NTKFeatures(network(name).to(dtype), input_shape=(784,))
    methods: dict[str, Callable[[Tensor, Tensor], Tensor | MeanEmbedding]] = {
        method: lambda x, y, g=g, chunk=chunk: summed(g, x, y, chunk) for method, (g, chunk) in peers.items()
    }
    methods["lightning_eff"] = lambda x, y: features.class_sums(x, y, CLASSES)
    return methods


def release(name: str, records: int) -> Table:
    """Time class sums of ``records`` samples."""
    x, y, net = data(records), torch.arange(records) % CLASSES, network(name)
    y = y[torch.randperm(records, generator=torch.Generator().manual_seed(0))]
    # compared in float64: in float32 the peers' norms of 636,010 numbers are some 5e-6 off (the closed form's 1e-7),
    # and rounding decides now and then which of two pooled values is larger
    few = x[:CHUNK].double(), y[:CHUNK]
    sums = {method: unfolded(run(*few), net) for method, run in release_methods(name, torch.float64).items()}
    for method, found in sums.items():
        difference = float((found - sums["loop"]).abs().max())
        assert difference < 1e-5, f"{method}: largest difference of class sums {difference:.1e}"
    contenders = {method: lambda run=run: run(x, y) for method, run in release_methods(name, torch.float32).items()}
    contenders[PLAIN] = plain(net, x)
    timed = compare(contenders, reference="loop", repeats=3, check=None)
    return against_ours(timed, records, f"Class sums of {records} samples, {title(name)}")


def step_methods(name: str, samples: int, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """Return, by name, functions that give the gradient of the discrepancy by the samples."""
    x, y = data(samples).to(dtype), torch.arange(CLASSES).repeat_interleave(samples // CLASSES)
    net = network(name).to(dtype)
    features = NTKFeatures(net, input_shape=(784,))
    target = features.class_sums(data(1000, seed=2).to(dtype), torch.arange(1000) % CLASSES, CLASSES)
    means = unfolded(target, net) / target.counts[:, None]
    peers = {
        "loop": looped(net, graph=True),
        "torch.func vmap(grad)": vmapped(net),
        "BackPACK": by_backpack(network(name).to(dtype), graph=True),
    }
    methods: dict[str, Callable[[], Tensor]] = {
        method: lambda g=g: stepped(g, x, y, means) for method, g in peers.items()
    }
    methods["lightning_eff"] = lambda: closed_form_step(features, target, x, y)
    return methods


def step(name: str, samples: int = 100) -> Table:
    """Time one step of a generator: discrepancy and its gradient by the samples."""
    gradients = {method: run() for method, run in step_methods(name, 20, torch.float64).items()}
    for method, found in gradients.items():
        difference = float((found - gradients["loop"]).abs().max())
        assert difference < 1e-6, f"{method}: largest difference of input gradients {difference:.1e}"
    contenders: dict[str, Callable[[], object]] = dict(step_methods(name, samples, torch.float32))
    contenders[PLAIN] = plain(network(name), data(samples))
    # each method by itself, step after step as in a training: a step of 2 ms right after one that has moved a gigabyte
    # is timed with everything out of the caches
    each = [
        compare({method: run}, reference=method, repeats=20 if method in ("lightning_eff", PLAIN) else 3, check=None)
        for method, run in contenders.items()
    ]
    timed = Table(
        "",
        each[0].columns,
        [table.rows[0] for table in each],
        f"{each[0].caption.split(';')[0]}; CPU seconds, 3 to 20 steps",
    )
    return against_ours(timed, samples, f"A generator's step on {samples} samples, {title(name)}")


def against_ours(timed: Table, samples: int, heading: str) -> Table:
    # the least of the rounds: other processes on the machine can only add to a time
    least = {row[0]: row[2] for row in timed.rows}
    columns = ["method", Column("time [ms]", ".2f"), Column("per sample [us]", ".1f"), Column("times ours", ".2f")]
    ours = least["lightning_eff"]
    rows = [[method, 1e3 * t, 1e6 * t / samples, t / ours] for method, t in least.items()]
    return Table(heading, columns, rows, f"{timed.caption}, the least of them")


def title(name: str) -> str:
    return "two convolutions (16, 32 channels)" if name == "cnn" else f"one hidden layer of {name}"


def data(records: int, seed: int = 1) -> Tensor:
    return torch.rand(records, 784, generator=torch.Generator().manual_seed(seed))


def memory(names: list[str]) -> Table:
    """Measure the peak of one step of each method, each in a process of its own."""
    rows = []
    for name in names:
        peaks = {}
        for method in ("loop", "vmap", "lightning_eff"):
            command = [sys.executable, __file__, "--peak", name, method]
            peaks[method] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
        for method, peak in peaks.items():
            rows.append([title(name), method, peak / 2**20, 100 * peak / peaks["vmap"]])
    columns = ["network", "method", Column("memory [MiB]", ".1f"), Column("% of vmap", ".1f")]
    return Table("Peak memory of a generator's step on 100 samples", columns, rows, machine())


def peak(name: str, method: str) -> None:
    """Print by how many bytes one step raises the peak of this process."""
    with one_thread():
        net, y = network(name), torch.arange(CLASSES).repeat_interleave(10)
        features = NTKFeatures(net, input_shape=(784,))
        target = features.class_sums(data(20), torch.arange(20) % CLASSES, CLASSES)
        target.square_norms()
        means = unfolded(target, net) / target.counts[:, None]
        gradients = looped(net, graph=True) if method == "loop" else vmapped(net)
        x = data(100)
        few, some = x[::5].contiguous(), y[::5].contiguous()
        if method == "lightning_eff":
            closed_form_step(features, target, few, some)  # libraries load their code in the first call
        else:
            stepped(gradients, few, some, means)
        before = current_bytes()
        with open("/proc/self/clear_refs", "w") as file:  # the peak counts from here
            file.write("5")
        if method == "lightning_eff":
            closed_form_step(features, target, x, y)
        else:
            stepped(gradients, x, y, means)
        print(peak_bytes() - before)


def tables(names: Sequence[str] = ("100", "800", "cnn")) -> list[Table]:
    warnings.filterwarnings("ignore", "Full backward hook is firing|Using backward\\(\\) with create_graph")
    torch.manual_seed(0)
    measured = []
    for name in names:
        measured.append(release(name, 1024))
        measured.append(step(name))
        for table in measured[-2:]:
            table.print()
    measured.append(memory(list(names)))
    return measured


def headlines(tables: list[Table]) -> list[Headline]:
    """Peers that hold the gradient of every sample apart from the loop, which takes one after the other."""
    aims = {"100": (None, 15, None, 30), "800": (35, 50, 150, 60), "cnn": (5, 3, None, None)}
    ours, loop, column, lines = "lightning_eff", "loop", "time [ms]", []
    for name, (sums_loop, sums_batched, step_loop, step_batched) in aims.items():
        if not any(table.title.endswith(title(name)) for table in tables):
            continue
        for what, aim, aim_batched in (
            ("Class sums of 1024 samples", sums_loop, sums_batched),
            ("A generator's step on 100 samples", step_loop, step_batched),
        ):
            heading = f"{what}, {title(name)}"
            mine = entry(tables, heading, ours, column)
            table = next(table for table in tables if table.title == heading)
            peers = [row[0] for row in table.rows if row[0] not in (ours, loop, PLAIN)]
            theirs, who = best(tables, heading, peers, column)
            slow = entry(tables, heading, loop, column)
            lines.append(Headline(heading, mine, theirs, who, "ms", target=aim_batched, aside=name != "800"))
            lines.append(Headline(heading, mine, slow, loop, "ms", target=aim, aside=True))
            if name == "800" and what.startswith("Class sums"):
                floor = entry(tables, heading, PLAIN, column)
                lines.append(Headline(heading, mine, floor, f"{PLAIN}, no sums", "ms", target=1 / 1.7))
        held = (entry(tables, "Peak memory", (title(name), method), "memory [MiB]") for method in (ours, "vmap"))
        mine, theirs = (max(1.0, size) for size in held)  # less than that is how memory is handed out
        work = f"memory of a generator's step, {title(name)} (at least 1 MiB)"
        lines.append(
            Headline(work, mine, theirs, "torch.func vmap(grad)", "MiB", limit=theirs / 10, aside=name != "800")
        )
    return lines


def current_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def peak_bytes() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        peak(*sys.argv[2:4])
    else:
        main(tables, headlines, lambda: tables(["100", "800"]))
