"""Inference with early exits: engines, the regrouping stream and earlyon 0.3.0, same backbone, heads and thresholds.

Thresholds are set so that 34 / 30 / 9 / 27 % of the samples leave at the outputs, with every policy decision really
taken. Answers of all engines are compared with choosing from all outputs before anything is timed; earlyon's batched
mode lets a batch leave only as a whole, so its answers are those of the full network here.

Run: python examples/benchmarks/early_exit.py          (about 6 minutes; needs the extra bench for the peer)
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from harness import Headline, compare, entry, machine, main, one_thread
from torch import Tensor

from lightning_eff.early_exit import MultiExitNetwork, calibrate
from lightning_eff.early_exit.inference.leaving import select_from_all
from lightning_eff.models import SmallResNet
from lightning_eff.reporting import Column, Table

TECHNIQUE = "Early exits"
SHARES = (0.34, 0.30, 0.09)
EXITS = ("layer1", "layer2", "layer3")
SAMPLES = 2048


def networks(width: int) -> tuple[MultiExitNetwork, Any, Tensor]:
    """Ours and earlyon's network around one backbone, with the same heads and thresholds, and images."""
    from earlyon.models.custom import custom_ee

    torch.manual_seed(0)
    backbone = SmallResNet(width=width).eval()
    images = torch.randn(SAMPLES, 1, 28, 28)
    peer = custom_ee(backbone, EXITS, 10, input_shape=(1, 1, 28, 28)).eval()
    # hooks of its own are on its own copy of the backbone: neither pays for the other's
    ours = MultiExitNetwork(
        copy.deepcopy(SmallResNet(width=width).eval()),
        {name: copy.deepcopy(peer.exit_heads[f"e{k}"]) for k, name in enumerate(EXITS)},
        10,
        example_input=images[:4],
    ).eval()
    ours.backbone.load_state_dict(backbone.state_dict())
    with torch.no_grad():
        scores = [logits.softmax(-1).amax(-1) for logits in ours(images)[:-1]]
    left = torch.ones(SAMPLES, dtype=torch.bool)
    thresholds = []
    for share, score in zip(SHARES, scores, strict=True):
        rest = score[left].sort(descending=True).values
        at = round(share * SAMPLES)
        thresholds.append(float(rest[at - 1 : at + 1].mean()))  # between two scores: rounding decides nothing
        left &= score < thresholds[-1]
    ours.set_thresholds(thresholds)
    peer.config.confidence_thresholds = thresholds
    return ours, peer, images


def same_answers(actual: Any, expected: Any) -> None:
    """Exits equal, logits up to the rounding of other batch sizes; None is what cannot be compared."""
    if actual is not None:
        torch.testing.assert_close(actual[1], expected[1], rtol=0, atol=0)
        torch.testing.assert_close(actual[0], expected[0], rtol=1e-4, atol=1e-5)


def engines(ours: MultiExitNetwork, peer: Any, images: Tensor, batch: int) -> dict[str, Callable[[], Any]]:
    """What is timed: each answers all images in batches of the given size."""
    batches = images.split(batch)
    staged, off = copy.copy(ours), copy.copy(ours)
    staged.engine, off.engine = "staged", "off"
    staged.stages(((images[:4],), {}))
    disabled = copy.deepcopy(ours)
    disabled.set_thresholds(None)

    def answers(network: MultiExitNetwork) -> Callable[[], Any]:
        def run() -> Any:
            outs = [network.predict(x) for x in batches]
            return torch.cat([o.logits for o in outs]), torch.cat([o.exit_index for o in outs])

        return run

    def full() -> Any:
        with torch.no_grad():
            for x in batches:
                ours.backbone(x)
        return None

    def earlyon() -> Any:
        if batch > 1:
            for x in batches:
                peer.forward_inference_batched(x)
            return None
        outs = [peer(x, mode="inference") for x in batches]
        where = torch.tensor([len(EXITS) if o.exit_taken < 0 else o.exit_taken for o in outs])
        return torch.cat([o.prediction for o in outs]), where

    contenders = {"off": answers(off), "full network": full, "earlyon": earlyon, "hooks": answers(ours)}
    contenders["staged"] = answers(staged)
    if batch > 1:

        def stream() -> Any:
            out = ours.stream(batches)
            return out.logits, out.exit_index

        contenders["stream"] = stream

    def nothing_leaves() -> Any:
        for x in batches:
            disabled.predict(x)
        return None

    contenders["all exits disabled"] = nothing_leaves
    return contenders


def inference(width: int, cases: dict[int, int], rounds: int = 7) -> Table:
    """Time every engine for batch sizes, each with so many samples."""
    ours, peer, images = networks(width)
    rows = []
    with one_thread():
        for batch, count in cases.items():
            part = images[:count]
            with torch.no_grad():
                where = select_from_all(ours.rule, ours(part)).exit_index
            ideal = ours.costs.base / float(torch.tensor(ours.costs.totals())[where].mean())
            contenders = engines(ours, peer, part, batch)
            timed = compare(contenders, reference="off", repeats=rounds, check=same_answers)
            seconds = {row[0]: row[1] for row in timed.rows}
            for name in contenders:
                faster, than_peer = (seconds[other] / seconds[name] for other in ("full network", "earlyon"))
                rows.append((batch, name, seconds[name] / count * 1e6, faster, than_peer, faster / ideal))
    mflop = ours.costs.base / 1e6
    shares = ", ".join(f"{rate:.0%}" for rate in (where.bincount() / count).tolist())
    caption = f"{machine()}; median CPU time of {rounds} interleaved rounds. Share of samples at each output: {shares}"
    columns = [
        "batch",
        "engine",
        Column("us a sample", ".0f"),
        Column("faster than the full network [x]", ".2f"),
        Column("than earlyon [x]", ".2f"),
        Column("of the FLOP ideal", ".2f"),
    ]
    return Table(f"ResNet-18 of width {width}, {mflop:.0f} MFLOP, FLOP ideal {ideal:.2f}", columns, rows, caption)


def calibration() -> Table:
    """Time the calibration of 8 exits on 50,000 samples."""
    generator = torch.Generator().manual_seed(0)
    exits, count = 8, 50_000
    skill = torch.linspace(0.6, 0.95, exits + 1)
    sure = torch.rand(exits + 1, count, generator=generator)
    correct = torch.rand(exits + 1, count, generator=generator) < skill[:, None] * 0.5 + sure * 0.5
    costs = torch.linspace(0.15, 1.0, exits + 1).tolist()

    def run(method: Any) -> Callable[[], Any]:
        return lambda: calibrate(sure[:-1], correct, costs, budget=0.5, method=method)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        methods = {name: run(name) for name in ("uniform", "geometric", "lagrangian")}
        title = "Calibration of 50,000 samples x 8 exits"
        return compare(methods, reference="uniform", repeats=3, check=None, title=title)


def tables() -> list[Table]:
    """Measure everything."""
    small, large = {256: 2048, 64: 1024, 16: 1024, 8: 1024, 1: 256}, {128: 512, 8: 256}
    return [inference(16, small), inference(64, large), calibration()]


def short() -> list[Table]:
    return [inference(16, {256: 1024, 64: 512, 1: 128}, 3), inference(64, {128: 256, 8: 128}, 3), calibration()]


def headlines(tables: list[Table]) -> list[Headline]:
    peer, small, large = "earlyon", "ResNet-18 of width 16", "ResNet-18 of width 64"

    def us(title: str, batch: int, engine: str) -> float:
        return entry(tables, title, (batch, engine), "us a sample")

    def line(title: str, batch: int, engine: str, against: str, **aim: Any) -> Headline:
        who = against if against != peer else f"{peer} 0.3.0"
        work = f"{title}, batches of {batch}, a sample, {engine}"
        return Headline(work, us(title, batch, engine), us(title, batch, against), who, "us", **aim)

    def ideal(engine: str, aim: float, aside: bool = False) -> Headline:
        ours, theirs = (entry(tables, large, (128, name), "of the FLOP ideal") for name in (engine, peer))
        work = f"{large}, batches of 128: speed over what its FLOPs allow, {engine}"
        return Headline(work, ours, theirs, f"{peer} 0.3.0", "", limit=aim, more_is_better=True, aside=aside)

    return [
        line(small, 256, "hooks", peer, target=1.4),
        line(small, 64, "hooks", peer, target=1.3, aside=True),
        line(small, 1, "staged", peer, target=1.03),
        line(large, 8, "stream", "full network", target=1.9),
        ideal("hooks", 0.9),
        ideal("stream", 0.95, aside=True),
        Headline(
            "calibration of 8 exits on 50,000 samples, lagrangian",
            entry(tables, "Calibration", "lagrangian", "median [s]"),
            None,
            "-",
            limit=3,
            aside=True,
        ),
    ]


if __name__ == "__main__":
    main(tables, headlines, short)
