"""One private training step, from forward pass to changed parameters, against opacus and torch.func.

    python examples/benchmarks/dp_step.py --net mlp --memory
    python examples/benchmarks/dp_step.py --short           all networks, three rounds

Every way clips to the same norm; its clipped sum is compared with that of torch.func before anything is timed. Noise is
drawn by all private ways, on the coordinates that they train; a new selection is drawn in every step.
"""

import argparse
import copy
import gc
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import Headline, add_arguments, best, compare, entry, machine, one_thread, write
from torch import Tensor, nn

from lightning_eff.privacy.engine import PerSampleEngine
from lightning_eff.privacy.selection.plan import SelectionPlan
from lightning_eff.privacy.selection.selected import Selection
from lightning_eff.reporting import Column, Table

TECHNIQUE = "Private training"
MAX_NORM, NOISE, RATE = 1.0, 1.0, 0.05


class Attention(nn.Module):
    """Self-attention of linear layers, which every peer takes."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        # spelled out: vmap has no rule for the fused one on the CPU and would be slower than it needs to be
        attended = (query @ key.mT * query.size(-1) ** -0.5).softmax(-1) @ value
        return self.out(attended.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Four blocks of width 128 over 64 patches; 800,906 parameters. No class token, which opacus takes badly."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 128, 4, stride=4)
        self.blocks = nn.Sequential(*(Block(128, 4) for _ in range(4)))
        self.norm = nn.LayerNorm(128)
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(tokens)).mean(1))


def tanh_cnn() -> nn.Module:
    """26,010 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 8, stride=2, padding=3), nn.Tanh(), nn.MaxPool2d(2, 1),
        nn.Conv2d(16, 32, 4, stride=2), nn.Tanh(), nn.MaxPool2d(2, 1),
        nn.Flatten(), nn.Linear(512, 32), nn.Tanh(), nn.Linear(32, 10),
    )  # fmt: skip


def mlp() -> nn.Module:
    """669,706 parameters."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 10)
    )


def cifar_cnn() -> nn.Module:
    """550,570 parameters."""
    layers: list[nn.Module] = []
    width = 3
    for out in (32, 32, 0, 64, 64, 0, 128, 128, 0):
        if out:
            layers += [nn.Conv2d(width, out, 3, padding=1), nn.Tanh()]
            width = out
        else:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2048, 128), nn.Tanh(), nn.Linear(128, 10))


# network, shape of an image, batch size
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "tanh_cnn": (tanh_cnn, (1, 28, 28), 256),
    "mlp": (mlp, (1, 28, 28), 256),
    "cifar_cnn": (cifar_cnn, (3, 32, 32), 64),
    "vit": (ViT, (3, 32, 32), 64),
}


class Step:
    """A way to train, with a model of its own.

    Args:
        model: is copied.
        images: ``[n, ...]``.
        labels: ``[n]``.
    """

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        self.model = copy.deepcopy(model)
        self.images, self.labels = images, labels
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=RATE)
        self.selections: dict[str, Selection] | None = None

    def clipped_sum(self) -> dict[str, Tensor]:
        """The sum before noise, by parameter name: whole, or blocks of what is selected."""
        raise NotImplementedError

    def __call__(self) -> None:
        n = len(self.images)
        sums = self.clipped_sum()
        for name, parameter in self.model.named_parameters():
            noisy = sums[name].add_(torch.randn_like(sums[name]), alpha=NOISE * MAX_NORM)
            parameter.grad = noisy.div_(n).view_as(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()


class PlainSGD(Step):
    def __call__(self) -> None:
        F.cross_entropy(self.model(self.images), self.labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class Vmap(Step):
    def per_sample(self) -> dict[str, Tensor]:
        parameters = {name: p.detach() for name, p in self.model.named_parameters()}

        def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
            output = torch.func.functional_call(self.model, parameters, (image.unsqueeze(0),))
            return F.cross_entropy(output, label.unsqueeze(0))

        return torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, self.images, self.labels)

    def clipped_sum(self) -> dict[str, Tensor]:
        return clipped(self.per_sample())


class OpacusHooks(Step):
    def __init__(self, *args) -> None:
        from opacus.grad_sample import GradSampleModule
        from opacus.optimizers import DPOptimizer

        super().__init__(*args)
        self.wrapped = GradSampleModule(self.model)
        self.private = DPOptimizer(
            self.optimizer, noise_multiplier=NOISE, max_grad_norm=MAX_NORM, expected_batch_size=len(self.images)
        )

    def backward(self) -> None:
        F.cross_entropy(self.wrapped(self.images), self.labels).backward()

    def clipped_sum(self) -> dict[str, Tensor]:
        self.backward()
        self.private.clip_and_accumulate() if not isinstance(self, OpacusGhost) else self.private.accumulate()
        sums = {name: p.summed_grad.clone() for name, p in self.model.named_parameters()}
        self.private.zero_grad()
        return sums

    def __call__(self) -> None:
        self.backward()
        self.private.step()
        self.private.zero_grad()


class OpacusGhost(OpacusHooks):
    def __init__(self, *args) -> None:
        from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping
        from opacus.optimizers.optimizer_fast_gradient_clipping import DPOptimizerFastGradientClipping
        from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

        Step.__init__(self, *args)
        self.wrapped = GradSampleModuleFastGradientClipping(self.model, max_grad_norm=MAX_NORM, use_ghost_clipping=True)
        self.private = DPOptimizerFastGradientClipping(
            self.optimizer, noise_multiplier=NOISE, max_grad_norm=MAX_NORM, expected_batch_size=len(self.images)
        )
        self.loss = DPLossFastGradientClipping(self.wrapped, self.private, nn.CrossEntropyLoss())

    def backward(self) -> None:
        self.loss(self.wrapped(self.images), self.labels).backward()


class Ours(Step):
    """The engine; ``options`` of the selection plan."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args)
        self.engine = PerSampleEngine(self.model)
        self.plan = SelectionPlan(**options) if options else None
        self.steps = 0
        self.noise = torch.empty(sum(parameter.numel() for parameter in self.model.parameters()))
        if self.plan is not None:
            self.plan.bind(dict(self.model.named_parameters()))

    def clipped_sum(self) -> dict[str, Tensor]:
        if self.plan is not None:
            self.selections = self.plan.at(self.steps)
            self.engine.select(self.selections)
        self.steps += 1
        with self.engine.record(len(self.images)):
            loss = F.cross_entropy(self.model(self.images), self.labels)
        self.engine.backward(loss)
        return self.engine.clipped_sum(MAX_NORM)

    @torch.no_grad()
    def __call__(self) -> None:
        with torch.enable_grad():
            sums = self.clipped_sum()
        n = len(self.images)
        for name, parameter in self.model.named_parameters():
            chosen = None if self.selections is None else self.selections[name]
            packed = sums[name].view(-1) if chosen is None else chosen.pack(sums[name])
            # one place for all noise: new memory costs half as much as the noise
            packed.add_(self.noise[: len(packed)].normal_(), alpha=NOISE * MAX_NORM)
            update(parameter, chosen, packed.mul_(-RATE / n))


def update(parameter: Tensor, chosen: Selection | None, packed: Tensor) -> None:
    """Add to the active coordinates alone."""
    if chosen is None:
        parameter.add_(packed.view_as(parameter))
    elif chosen.rows is None and chosen.columns is None:
        flat = parameter.view(-1)
        flat.add_(packed) if chosen.positions is None else flat.index_add_(0, chosen.positions, packed)
    elif chosen.columns is None:
        parameter.index_add_(0, chosen.rows, chosen.unpack(packed))
    else:
        parameter.add_(chosen.expand(chosen.unpack(packed)))


MODES: dict[str, Callable[..., Step]] = {
    "SGD": PlainSGD,
    "opacus hooks": OpacusHooks,
    "opacus ghost": OpacusGhost,
    "vmap(grad)": Vmap,
    "ours": Ours,
    "ours, element .9": lambda *args: Ours(*args, drop_rate=0.9, granularity="element"),
    "ours, row .5": lambda *args: Ours(*args, drop_rate=0.5, granularity="row"),
    "ours, row .9": lambda *args: Ours(*args, drop_rate=0.9, granularity="row"),
}
PEERS = ("opacus hooks", "opacus ghost", "vmap(grad)")


def clipped(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Clip per-sample gradients ``name -> [n, *shape]`` and sum."""
    norm = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients.values()]).norm(dim=0)
    factor = (MAX_NORM / (norm + 1e-6)).clamp(max=1)
    return {name: torch.einsum("n,n...->...", factor, gradient) for name, gradient in gradients.items()}


def verify(steps: dict[str, Step], model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Assert that every way has the clipped sum of torch.func, to 1e-4 of its norm."""
    gradients = Vmap(model, images, labels).per_sample()
    for name, step in steps.items():
        if isinstance(step, PlainSGD):
            continue
        actual = step.clipped_sum()
        chosen = step.selections
        expected = clipped(
            gradients if chosen is None else {name: g * chosen[name].full_mask() for name, g in gradients.items()}
        )
        if chosen is not None:
            actual = {name: chosen[name].expand(block) for name, block in actual.items()}
        wrong = torch.cat([(actual[key] - expected[key]).flatten() for key in expected]).norm()
        size = torch.cat([value.flatten() for value in expected.values()]).norm()
        assert wrong < 1e-4 * size, f"{name}: the clipped sum differs by {wrong / size:.1e} of its norm"


def make(net: str, batch: int | None) -> tuple[nn.Module, Tensor, Tensor]:
    build, shape, usual = NETS[net]
    torch.manual_seed(0)
    model = build()
    batch = batch or usual
    return model, torch.randn(batch, *shape), torch.randint(10, (batch,))


def measure(net: str, batch: int | None, modes: list[str], rounds: int, memory: bool) -> Table:
    """Time all modes in turns."""
    model, images, labels = make(net, batch)
    with one_thread():
        steps = {mode: MODES[mode](model, images, labels) for mode in modes}
        verify(steps, model, images, labels)
        gc.collect()
    timed = compare(steps, reference=modes[0], repeats=rounds, warmup=2, check=None)
    median = {row[0]: row[1] for row in timed.rows}
    least = {row[0]: row[2] for row in timed.rows}
    peers = [least[peer] for peer in PEERS if peer in least]
    rows = [
        [
            mode,
            median[mode] * 1000,
            least[mode] * 1000,
            least[mode] / least["SGD"] if "SGD" in least else None,
            least[mode] / min(peers) if peers else None,
            peak_of(net, batch, mode) if memory else None,
        ]
        for mode in modes
    ]
    columns = [
        "step",
        Column("median [ms]", ".1f"),
        Column("min [ms]", ".1f"),
        Column("of SGD [x]", ".2f"),
        Column("of best peer [x]", ".2f"),
        Column("peak memory [MB]", ".0f"),
    ]
    size = sum(p.numel() for p in model.parameters())
    return Table(f"{net}, {size:,} parameters, batch {len(images)}", columns, rows, timed.caption)


def peak_of(net: str, batch: int | None, mode: str) -> float:
    """Measure in a process of its own what a step takes at most beyond what was there before, in MB."""
    command = [sys.executable, __file__, "--net", net, "--peak-of", mode]
    if batch is not None:
        command += ["--batch", str(batch)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def print_peak(net: str, batch: int | None, mode: str) -> None:
    """The largest resident size of three steps less the size before; the first steps choose ways and do not count."""
    torch.set_num_threads(1)
    model, images, labels = make(net, batch)
    step = MODES[mode](model, images, labels)
    gc.collect()
    before = resident("VmRSS")
    for _ in range(2):
        step()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(3):
        step()
    print((resident("VmHWM") - before) / 1024)


def resident(field: str) -> int:
    """Kilobytes, of Linux."""
    lines = Path(f"/proc/{os.getpid()}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


# least step over that of the best peer, and over plain SGD's, that were aimed at: all coordinates, row .5, row .9
AIMS = {
    "tanh_cnn": (0.75, 0.70, 0.65),
    "mlp": (0.65, 0.52, 0.38),
    "cifar_cnn": (0.72, 0.58, 0.53),
    "vit": (0.85, 0.80, 0.62),
}


def headlines(tables: list[Table]) -> list[Headline]:
    lines = []
    for table in tables:
        net, _, batch = table.title.split(", ")
        peers = [row[0] for row in table.rows if row[0] in PEERS]
        theirs, who = best([table], net, peers, "min [ms]")
        for mode, aim in zip(("ours", "ours, row .5", "ours, row .9"), AIMS[net], strict=True):
            drawn = {"ours": "all coordinates"}.get(mode, f"without {mode[-1]}0 % of the neurons")
            work = f"one private step, {net}, {batch}, {drawn}"
            mine = entry([table], net, mode, "min [ms]")
            lines.append(Headline(work, mine, theirs, who, "ms", target=1 / aim, aside=mode != "ours" and net != "mlp"))
            if mode != "ours, row .5":
                sgd, slower = entry([table], net, "SGD", "min [ms]"), 1.35 if mode == "ours" else 1.0
                least = None if (net, mode) == ("tanh_cnn", "ours, row .9") else 1 / slower
                lines.append(Headline(work, mine, sgd, "plain SGD, not private", "ms", least, aside=net != "mlp"))
        if table.rows[0][-1] is not None:
            ghost, column = "opacus ghost", "peak memory [MB]"
            for mode, more in (("ours", 1.3), ("ours, row .5", 1.1)):
                held = (entry([table], net, name, column) for name in (mode, ghost))
                lines.append(
                    Headline(
                        f"memory of a private step, {net}, {mode}", *held, ghost, "MB", 1 / more, aside=net != "mlp"
                    )
                )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--net", choices=[*NETS, "all"], default="mlp")
    parser.add_argument("--batch", type=int, help="examples; each network has its usual number")
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES), metavar="MODE")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--memory", action="store_true", help="peak memory too, in processes of their own (Linux)")
    parser.add_argument("--peak-of", choices=list(MODES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    # opacus' hooks are not full ones where an input needs no gradient, as in every first layer
    warnings.filterwarnings("ignore", message="Full backward hook", category=UserWarning)
    if options.peak_of:
        return print_peak(options.net, options.batch, options.peak_of)
    print(machine())
    nets = list(NETS) if options.net == "all" or options.short else [options.net]
    rounds = min(3, options.rounds) if options.short else options.rounds
    tables = []
    for net in nets:
        tables.append(measure(net, options.batch, options.modes, rounds, options.memory))
        tables[-1].print()
    if options.json is not None:
        write(options.json, tables, headlines(tables) if options.modes == list(MODES) else [])


if __name__ == "__main__":
    main()
