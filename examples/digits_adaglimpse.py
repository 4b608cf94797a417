"""Digits somewhere in scenes of 96 x 96 pixels, a camera of 16 x 16: both the agent and the network that reads learn.

The backbone paints glimpses into a canvas and a small convolutional network reads it. It is trained on glimpses at
random first; then the agent learns what raises the probability of the right digit, and both take turns. Afterwards the
same backbone is asked with glimpses of policies that do not learn, of one that knows where the digit is, and with early
stops. Another network is trained on one even view of as many pixels, which no camera of this size can take.

Run: python examples/digits_adaglimpse.py          (three seeds)
     python examples/digits_adaglimpse.py --fast   (one seed, few batches, to see that it works)
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.nn import functional as F

from lightning_eff.data import CanvasDataModule
from lightning_eff.glimpse import (
    AdaGlimpseModule,
    AgentConfig,
    CanvasBackbone,
    ClassificationTask,
    GlimpseConfig,
    GlimpseReport,
    Oracle,
    PolicyCurve,
    PolicyCurves,
    ReplayOptions,
    TrainingPlan,
    UniformLowRes,
    curve_figure,
    evaluate_policies,
    make_policy,
    stopping_curve,
)
from lightning_eff.models import SmallCNN
from lightning_eff.reporting import Column, Table, save_figure

SCENE, CLASSES = 96, 10
THRESHOLDS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)


def build(
    seed: int, pretrain: int, agent_alone: int, turns: int, fast: bool = False
) -> tuple[AdaGlimpseModule, CanvasDataModule, L.Trainer]:
    """Module, data and trainer; epochs of 21 batches for each part of training."""
    L.seed_everything(seed)
    model = AdaGlimpseModule(
        CanvasBackbone(num_classes=CLASSES),
        ClassificationTask(CLASSES),
        GlimpseConfig(SCENE, num_glimpses=3, patch_size=8),
        AgentConfig(
            hidden=64,
            lr=1e-3,
            ent_coef="auto_0.1",
            target_entropy=-5.08,  # -3 on [-1, 1]^3
            state_parts=("patch", "box"),
            replay=ReplayOptions(batch_size=128, updates_per_step=2, random_steps=4 if fast else 20),
        ),
        TrainingPlan(
            pretrain_epochs=pretrain,
            rl_only_epochs=agent_alone,
            alternate_every=10,
            alternate_unit="batch",
            pretrain_tries=4,
            learning_rates="cosine_backbone",
            warmup_fraction=0.05,
        ),
        backbone_optimizer=partial(torch.optim.AdamW, lr=3e-3),
    )
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=pretrain + agent_alone + turns,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    sizes = {"train_size": 256 if fast else None, "test_size": 24 if fast else 500}
    return model, CanvasDataModule("digits", canvas=SCENE, batch_size=64, val_size=0, **sizes), trainer


def measure(model: AdaGlimpseModule, data: CanvasDataModule, everything: bool) -> PolicyCurves:
    """Accuracy of the trained backbone with glimpses of several policies."""
    names = ["random", "full_then_random"]
    if everything:
        names += ["fixed_grid", "repeat_full_view", "greedy_lookahead"]
    policies: dict[str, Any] = {name: make_policy(name, model.glimpse) for name in names}
    policies |= {"oracle": Oracle(model.glimpse, data.test_set.boxes), "learned": model.act}
    return evaluate_policies(model.world, data.test_dataloader(), policies)


def one_even_view(data: CanvasDataModule, config: GlimpseConfig, epochs: int) -> float:
    """Accuracy of a network that is trained and tested on one shrunk view with the pixels of all glimpses."""
    L.seed_everything(0, verbose=False)
    shrink, net = UniformLowRes(config), SmallCNN(width=16)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, epochs * len(data.train_dataloader()))
    for _ in range(epochs):
        for images, target in data.train_dataloader():
            loss = F.cross_entropy(net(shrink.view(images)), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            plan.step()
    net.eval()
    with torch.no_grad():
        right = [net(shrink.view(images)).argmax(1) == target for images, target in data.test_dataloader()]
    return float(torch.cat(right).float().mean())


def draw(model: AdaGlimpseModule, data: CanvasDataModule, curves: list[PolicyCurve], even: float, out: Path) -> None:
    """Write trajectories, what stopping early gives, and the curves of all policies."""
    images, target = (torch.cat(part) for part in zip(*data.test_dataloader(), strict=True))
    seen = model.explore(images, target=target, predictions="all", scored=True)
    seen.save(out / "trajectories.jsonl")
    stops = stopping_curve(seen, model.task, images, target, THRESHOLDS)
    rows = [(threshold, percent, accuracy) for threshold, percent, accuracy in stops]
    columns = [Column("threshold", ".2f"), Column("pixel %", ".2f"), Column("accuracy", ".3f")]
    stopping = Table("The agent stops when the backbone is that sure", columns, rows)
    stopping.print()
    stopping.save(out / "stopping.csv")
    points = {"one even view": (model.glimpse.pixel_percent(model.glimpse.num_glimpses), even)}
    save_figure(curve_figure(curves, stopping=stops, references=points), out / "comparison.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="little data, few steps: to see that it works")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/digits_adaglimpse"), help="folder of results")
    parser.add_argument("--seeds", type=int, help="how many, from --seed on (default 3)")
    parser.add_argument("--epochs", type=int, nargs=3, default=[43, 7, 17], help="pretraining, agent alone, in turns")
    args = parser.parse_args()
    torch.set_num_threads(1)
    seeds = range(args.seed, args.seed + (args.seeds or (1 if args.fast else 3)))
    epochs = [1, 1, 1] if args.fast else args.epochs
    curves: list[PolicyCurve] = []
    rows = []
    for seed in seeds:
        model, data, trainer = build(seed, *epochs, fast=args.fast)
        start = time.process_time()
        trainer.fit(model, data)
        print(f"seed {seed}: trained for {time.process_time() - start:.0f} CPU s")
        found = measure(model, data, everything=seed == seeds[0])
        curves += found
        rows += [[seed, curve.policy, *curve.values] for curve in found]
        PolicyCurves(found, f"Digits in {SCENE} x {SCENE} pixels, seed {seed}").print()
        second = model.explore(torch.cat([images for images, _ in data.test_dataloader()])).actions[:, 1]
        print(
            "spread of the second glimpse's (y, x, zoom) over images:", [f"{one:.2f}" for one in second.std(0).tolist()]
        )
    columns = ["seed", "policy", *(Column(f"accuracy@{t}", ".3f") for t in range(1, model.glimpse.num_glimpses + 1))]
    Table("By seed", columns, rows).save(args.out / "seeds.csv")
    even = one_even_view(data, model.glimpse, 1 if args.fast else 40)
    height, width = UniformLowRes(model.glimpse).size
    print(f"a network for one even view of {height} x {width} pixels, as many as all glimpses have: {even:.3f}")
    draw(model, data, curves, even, args.out)
    pictures = GlimpseReport(args.out)  # of the last agent: where it looks, how far it zooms
    L.Trainer(accelerator="cpu", callbacks=[pictures], logger=False).test(model, data, verbose=False)
    print(f"tables, figures, trajectories: {args.out}")


if __name__ == "__main__":
    main()
