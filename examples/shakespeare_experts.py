"""A language model of bytes with and without experts: equal tokens, and equal seconds.

Four networks of the same active parameters learn a text for as many tokens: a dense one, eight times the parameters in
experts of its width (G = 1), and the same in experts of a quarter of it (G = 4). The dense one comes with the output
norm of G = 4 and without one, as G = 1 is, whose router a norm would starve. Then the better of these two learns once
more, for as long as G = 4 takes on this machine. Writes the table, the curves and who was busy when.

The text is --text, or tinyshakespeare.txt in the folder that LIGHTNING_EFF_DATA names (moe_scaling/), or the sources of
Python's standard library.

Run: python examples/shakespeare_experts.py         (about six minutes of one core)
     python examples/shakespeare_experts.py --fast  (few steps of a small network, to see that it works)
"""

from __future__ import annotations

import argparse
import os
import statistics
import sysconfig
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from lightning_eff.data import ByteTextDataModule
from lightning_eff.moe import DecoderConfig, ExpertLoadMonitor, MoEScalingModule
from lightning_eff.reporting import KEPT, REFERENCE, SERIES, Column, Table, new_figure, save_figure

SEQ_LEN, BATCH = 128, 16
ROUNDS = 15  # of timed steps, one of each network in turn


@dataclass
class Run:
    """One network and how it went.

    Attributes:
        name: What it is called.
        module: The trained network.
        steps: It was trained for.
        step_seconds: CPU seconds of a step.
        curve: Step and validation loss on a part of the held-out text, nats a byte.
        loss: On all of it, at the end.
        busiest: Load of the busiest expert over the mean, at the end; None without experts.
    """

    name: str
    module: MoEScalingModule
    steps: int
    step_seconds: float
    curve: list[tuple[int, float]]
    loss: float
    busiest: float | None


class Curve(Callback):
    """Keeps the validation losses."""

    def __init__(self) -> None:
        self.points: list[tuple[int, float]] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self.points.append((trainer.global_step, float(trainer.callback_metrics["val/loss"])))


def default_text() -> list[str]:
    """Shakespeare where it is at hand, else the standard library."""
    shakespeare = Path(os.environ.get("LIGHTNING_EFF_DATA", "data")) / "moe_scaling" / "tinyshakespeare.txt"
    if shakespeare.is_file():
        return [str(shakespeare)]
    library = Path(sysconfig.get_path("stdlib"))
    found = sorted(str(path) for path in library.rglob("*.py") if "site-packages" not in path.parts)
    print(f"no {shakespeare}: taking the {len(found)} sources of {library}")
    return found


def decoders(d_model: int, n_layers: int, positions: str = "rope") -> dict[str, DecoderConfig]:
    """The networks by name."""
    experts = {
        f"G = {granularity}": DecoderConfig.of(
            d_model=d_model,
            n_layers=n_layers,
            n_heads=4,
            max_seq_len=SEQ_LEN,
            positions=positions,
            moe={"expansion_rate": 8, "granularity": granularity},
        )
        for granularity in (1, 4)
    }
    dense = experts["G = 4"].dense_twin()
    return {"dense": dense, "dense, no norm": DecoderConfig.of(dense, ffn_output_norm="none"), **experts}


def make(decoder: DecoderConfig, lr: float, steps: int) -> MoEScalingModule:
    optimizer = partial(torch.optim.AdamW, lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    return MoEScalingModule(decoder, optimizer, warmup_fraction=20 / max(steps, 40), loss_window=max(1, steps // 10))


def step_seconds(networks: dict[str, DecoderConfig], rounds: int) -> dict[str, float]:
    """Median CPU seconds of forward pass, backward pass and AdamW, the networks taking turns."""
    tokens = torch.randint(256, (BATCH, SEQ_LEN))
    times: dict[str, list[float]] = {name: [] for name in networks}
    made = {}
    for name, decoder in networks.items():
        module = make(decoder, 1e-3, 100)
        module.configure_model()
        made[name] = module, torch.optim.AdamW(module.parameters(), 1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(rounds + 2):
        for name, (module, optimizer) in made.items():
            begun = time.process_time()
            loss = torch.nn.functional.cross_entropy(module(tokens).flatten(0, 1), tokens.flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            times[name].append(time.process_time() - begun)
    return {name: statistics.median(taken[2:]) for name, taken in times.items()}


def train(
    decoder: DecoderConfig,
    text: list[str],
    steps: int,
    lr: float,
    seed: int = 0,
    callbacks: tuple[Callback, ...] = (),
    ckpt_path: str | None = None,
    **options: Any,
) -> tuple[MoEScalingModule, L.Trainer, Curve]:
    """Train a network; the module, its trainer and the curve."""
    L.seed_everything(seed, verbose=False)
    curve = Curve()
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        gradient_clip_val=1.0,
        val_check_interval=max(1, steps // 14),
        check_val_every_n_epoch=None,
        limit_val_batches=10,
        callbacks=[curve, *callbacks],
        **{"logger": False, "enable_checkpointing": False, "enable_model_summary": False, **options},
    )
    module = make(decoder, lr, steps)
    data = ByteTextDataModule(text, seq_len=SEQ_LEN, batch_size=BATCH)
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return module, trainer, curve


def evaluate(module: MoEScalingModule, text: list[str], batches: int | None = None) -> float:
    """Loss on all of the held-out text, or on its first batches, nats a byte."""
    trainer = L.Trainer(
        accelerator="cpu",
        limit_val_batches=batches,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    return trainer.validate(module, ByteTextDataModule(text, seq_len=SEQ_LEN, batch_size=BATCH), verbose=False)[0][
        "val/loss"
    ]


def run(name: str, decoder: DecoderConfig, text: list[str], steps: int, seconds: float, args: Any) -> Run:
    print(f"{name}: {steps} steps, about {steps * seconds:.0f} CPU seconds", flush=True)
    monitor = ExpertLoadMonitor(max(1, steps // 14), args.out if name == "G = 4" else args.out / name.replace(" ", ""))
    watched = (monitor,) if decoder.moe else ()
    module, trainer, curve = train(decoder, text, steps, args.lr, args.seed, watched)
    busiest = trainer.callback_metrics.get("moe/load_max_over_mean")
    loss = evaluate(module, text, 2 if args.fast else None)
    print(f"{name}: {loss:.3f} nats a byte", flush=True)
    return Run(name, module, steps, seconds, curve.points, loss, None if busiest is None else float(busiest))


def table(runs: list[Run]) -> Table:
    rows = []
    for one in runs:
        shape = one.module.decoder.shape
        parameters = sum(p.numel() for p in one.module.parameters())
        tokens = one.steps * BATCH * SEQ_LEN
        row = (one.name, parameters / 1e6, shape.n_active / 1e6, tokens / 1e6, one.steps * one.step_seconds)
        rows.append((*row, one.loss, one.loss / 0.693147, one.busiest))
    columns = ["network", Column("parameters, M", ".2f"), Column("active, M", ".2f"), Column("tokens, M", ".2f")]
    columns += [Column("CPU s", ".0f"), Column("nats a byte", ".3f"), Column("bits a byte", ".3f")]
    columns += [Column("busiest over mean load", ".2f")]
    return Table("Validation loss", columns, rows, "CPU s: steps times the median of timed steps, networks in turn.")


def conclusion(runs: list[Run]) -> str:
    """What the table says, win or not."""
    normed, plain, _, fine, longer = runs

    def gap(other: Run) -> str:
        difference = other.loss - fine.loss
        return f"{abs(difference):.3f} nats a byte {'below' if difference > 0 else 'above'}"

    return (
        f"At equal tokens G = 4 ends {gap(normed)} the dense network with the same output norm and {gap(plain)} the "
        f"one without; a step takes {fine.step_seconds / normed.step_seconds:.2f} times as long. "
        f"At equal seconds it ends {gap(longer)} the better of these."
    )


def curves(runs: list[Run]) -> Table:
    rows = [
        (one.name, step, step * BATCH * SEQ_LEN, step * one.step_seconds, loss)
        for one in runs
        for step, loss in one.curve
    ]
    return Table(
        "Validation loss on a part of the held-out text", ["network", "step", "tokens", "seconds", "loss"], rows
    )


def draw(runs: list[Run]) -> Any:
    """Curves over tokens and over seconds."""
    figure, axes = new_figure(1, 2, width=9.0, height=3.8)
    colours = {"dense": REFERENCE, "dense, no norm": SERIES[2], "G = 1": SERIES[1], "G = 4": KEPT}
    for one in runs:
        again = one.name.endswith(", longer")
        style = {"color": colours[one.name.removesuffix(", longer")], "linestyle": "--" if again else "-"}
        steps, losses = zip(*one.curve, strict=True)
        tokens = [step * BATCH * SEQ_LEN / 1e6 for step in steps]
        if not again:  # its schedule is of more tokens
            axes[0, 0].plot(tokens, losses, label=one.name, **style)
        axes[0, 1].plot([step * one.step_seconds for step in steps], losses, label=one.name, **style)
    # the first losses are far above what is of interest
    top = max(one.curve[1][1] for one in runs if len(one.curve) > 1)
    low = min(loss for one in runs for _, loss in one.curve)
    for axis, name in zip(axes[0], ("tokens, million", "CPU seconds"), strict=True):
        axis.set(xlabel=name, ylim=(low - 0.03, top), xlim=(0, None))
        axis.legend(frameon=False)
    axes[0, 0].set(ylabel="validation loss [nats a byte]", title="equal tokens")
    axes[0, 1].set(title="equal seconds")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="little data, few steps: to see that it works")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/shakespeare_experts"), help="folder of results")
    parser.add_argument("--text", nargs="+", help="files, read as one text")
    parser.add_argument("--steps", type=int, default=350, help="of 2,048 tokens")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--positions", choices=("rope", "learned"), default="rope", help="learned: as in the paper")
    args = parser.parse_args()
    text = args.text or default_text()
    networks = decoders(*((32, 2) if args.fast else (128, 4)), args.positions)
    steps = 6 if args.fast else args.steps
    seconds = step_seconds(networks, 1 if args.fast else ROUNDS)
    runs = [run(name, decoder, text, steps, seconds[name], args) for name, decoder in networks.items()]
    # dense once more, for as many seconds as G = 4: the schedule of a run must fit its length
    best = min(runs[:2], key=lambda one: one.loss).name
    longer = round(steps * seconds["G = 4"] / seconds[best])
    runs.append(run(f"{best}, longer", networks[best], text, longer, seconds[best], args))
    result = table(runs)
    result.print()
    print(conclusion(runs))
    for written in (
        result.save(args.out / "table.md"),
        result.save(args.out / "table.json"),
        curves(runs).save(args.out / "curves.csv"),
        save_figure(draw(runs), args.out / "curves.png"),
    ):
        print(written)


if __name__ == "__main__":
    main()
