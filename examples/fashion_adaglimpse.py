"""Clothes at random places of larger scenes: an agent learns where to look, against policies that do not learn.

Two tasks. `--task reconstruction` shows the scene again from three glimpses of 16 x 16 pixels: the backbone pastes them
into a canvas and has no weights, only the agent learns. `--task classification` names the piece of clothing among
fragments of others: a small transformer reads the glimpses and is trained first, on glimpses at random.

Run: python examples/fashion_adaglimpse.py                          (three seeds)
     python examples/fashion_adaglimpse.py --task classification
     python examples/fashion_adaglimpse.py --fast                   (one seed, few batches, to see that it works)
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lightning_eff.data import CanvasDataModule
from lightning_eff.glimpse import (
    AdaGlimpseModule,
    AgentConfig,
    BestFixedSequence,
    CanvasBackbone,
    ClassificationTask,
    GlimpseBackbone,
    GlimpseConfig,
    GlimpseReport,
    Oracle,
    PolicyCurve,
    PolicyCurves,
    ReconstructionTask,
    ReplayOptions,
    RewardOptions,
    TrainingPlan,
    UniformLowRes,
    curve_figure,
    evaluate_policies,
    make_policy,
)
from lightning_eff.glimpse.backbones.base import Encoded, Seen
from lightning_eff.glimpse.backbones.transformer import Block
from lightning_eff.glimpse.position import box_codes
from lightning_eff.reporting import Column, Table, save_figure

CLOTHES = ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"]
BATCH = 64


class StemTransformer(GlimpseBackbone):
    """A backbone of one's own: convolutions read each glimpse, two transformer blocks all of them together.

    It shows what a backbone must do: `encode` what has been seen, `predict` from that.
    """

    def __init__(self, num_classes: int, channels: int = 1, dim: int = 64) -> None:
        super().__init__()
        self.channels, self.latent_dim = channels, dim
        layers: list[nn.Module] = []
        for before, after, stride in ((channels, 16, 1), (16, 32, 2), (32, dim, 2)):
            layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.GELU()]
        self.stem = nn.Sequential(*layers, nn.AdaptiveMaxPool2d(2))
        self.cls_token = nn.Parameter(torch.randn(dim) * 0.02)
        self.blocks = nn.Sequential(Block(dim, 4), Block(dim, 4))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, num_classes)

    def encode(self, seen: Seen, importance: bool = False) -> Encoded:
        """Encode four tokens a glimpse and the class token."""
        images, glimpses = seen.views.shape[:2]
        tokens = self.cls_token.expand(images, 1, -1)
        if glimpses:
            tokens = torch.cat([tokens, self._read(seen, images * glimpses).reshape(images, -1, self.latent_dim)], 1)
        tokens = self.norm(self.blocks(tokens))
        return Encoded(tokens[:, 0], tokens[:, 1:])

    def predict(self, encoded: Encoded, seen: Seen) -> Tensor:
        """Return logits."""
        return self.head(encoded.pooled)

    def _read(self, seen: Seen, glimpses: int) -> Tensor:
        # a glimpse is 2 x 2 patches, row by row
        patches = seen.patches.view(glimpses, 2, 2, self.channels, *seen.patches.shape[-2:])
        pictures = patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
        codes = box_codes(seen.boxes.view(glimpses, 4, 4), self.latent_dim, unit=4.0, temperature=100.0)
        return self.stem(pictures).flatten(2).mT + codes


def build(
    task: str, seed: int, batches: int, fast: bool = False
) -> tuple[AdaGlimpseModule, CanvasDataModule, L.Trainer]:
    """Module, data and trainer; `batches` of an epoch, of which there are 4 or 14."""
    L.seed_everything(seed)
    agent = AgentConfig(
        hidden=64,
        lr=1e-3,
        ent_coef="auto_0.1",
        target_entropy=-5.08,  # -3 on [-1, 1]^3
        state_parts=("patch", "box"),
        replay=ReplayOptions(batch_size=128, updates_per_step=2, random_steps=4 if fast else 20),
    )
    if task == "reconstruction":
        epochs, canvas, clutter = 4, 64, 0
        model = AdaGlimpseModule(
            CanvasBackbone(),
            ReconstructionTask(),
            GlimpseConfig(canvas, num_glimpses=3, patch_size=8),
            agent,
            TrainingPlan(regime="frozen", learning_rates="constant"),
            RewardOptions(scale=20 / 255),  # scores are grey levels
        )
    else:
        epochs, canvas, clutter = 14, 112, 16
        model = AdaGlimpseModule(
            StemTransformer(len(CLOTHES)),
            ClassificationTask(len(CLOTHES)),
            GlimpseConfig(canvas, num_glimpses=3, patch_size=14),
            agent,
            TrainingPlan(pretrain_epochs=10, regime="frozen", pretrain_tries=4, learning_rates="cosine_backbone"),
            backbone_optimizer=partial(torch.optim.AdamW, lr=2e-3),
        )
    data = CanvasDataModule(
        "fashion_mnist", canvas=canvas, clutter=clutter, batch_size=BATCH, val_size=64, test_size=24 if fast else 1000
    )
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        limit_train_batches=batches,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    return model, data, trainer


def references(model: AdaGlimpseModule, data: CanvasDataModule, fast: bool) -> dict[str, Any]:
    """Policies that do not learn, and one that knows where the clothes are."""
    config = model.glimpse
    names = ("random", "full_then_random", "fixed_grid", "fine_to_coarse", "repeat_full_view", "greedy_lookahead")
    policies: dict[str, Any] = {name: make_policy(name, config) for name in names}
    some = data.train_set.__getitems__(list(range(16 if fast else 256)))
    images, target = (torch.stack(part) for part in zip(*some, strict=True))
    rounds, population = (1, 5) if fast else (20, 40)
    policies["best_fixed_sequence"] = BestFixedSequence.fit(
        model.backbone, model.task, config, images, target, rounds=rounds, population=population
    )
    return {**policies, "oracle": Oracle(config, data.test_set.boxes)}


def run(
    task: str, seed: int, batches: int, *, everything: bool, fast: bool = False
) -> tuple[AdaGlimpseModule, CanvasDataModule, PolicyCurves]:
    """Train with one seed; measure the agent, and if `everything` whatever it is compared with."""
    model, data, trainer = build(task, seed, batches, fast)
    start = time.process_time()
    trainer.fit(model, data)
    print(f"seed {seed}: trained for {time.process_time() - start:.0f} CPU s")
    policies = references(model, data, fast) if everything else {"random": make_policy("random", model.glimpse)}
    metric = "rmse_per_image" if task == "reconstruction" else "accuracy"
    curves = evaluate_policies(model.world, data.test_dataloader(), {**policies, "learned": model.act}, metric=metric)
    return model, data, curves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="little data, few steps: to see that it works")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/fashion_adaglimpse"), help="folder of results")
    parser.add_argument("--task", choices=("reconstruction", "classification"), default="reconstruction")
    parser.add_argument("--seeds", type=int, help="how many, from --seed on (default 3)")
    parser.add_argument("--batches", type=int, default=100, help="of an epoch")
    args = parser.parse_args()
    torch.set_num_threads(1)
    out = args.out / args.task
    seeds = range(args.seed, args.seed + (args.seeds or (1 if args.fast else 3)))
    batches = 4 if args.fast else args.batches
    curves: list[PolicyCurve] = []
    rows = []
    for seed in seeds:
        model, data, found = run(args.task, seed, batches, everything=seed == seeds[0], fast=args.fast)
        curves += found
        rows += [[seed, curve.policy, *curve.values] for curve in found if curve.policy in ("random", "learned")]
        if seed == seeds[0]:
            PolicyCurves(found, f"Fashion-MNIST, {args.task}, seed {seed}").print()
    metric = curves[0].metric
    digits = ".2f" if args.task == "reconstruction" else ".3f"
    columns = ["seed", "policy", *(Column(f"{metric}@{t}", digits) for t in range(1, model.glimpse.num_glimpses + 1))]
    by_seed = Table("By seed", columns, rows)
    by_seed.print()
    by_seed.save(out / "seeds.csv")
    even = None
    if args.task == "reconstruction":
        scenes = torch.cat([images for images, _ in data.test_dataloader()])
        shown = UniformLowRes(model.glimpse)
        even = -float(model.task.score(shown.reconstruct(scenes), scenes, None).mean())
        print(f"one even view of {shown.size[0]} x {shown.size[1]} pixels, as many as all glimpses have: {even:.2f}")
    points = {} if even is None else {"one even view": (model.glimpse.pixel_percent(model.glimpse.num_glimpses), even)}
    save_figure(curve_figure(curves, references=points), out / "comparison.png")
    # of the last agent: where it looks, how far it zooms
    pictures = GlimpseReport(out, class_names=CLOTHES if args.task == "classification" else None)
    L.Trainer(accelerator="cpu", callbacks=[pictures], logger=False).test(model, data, verbose=False)
    print(f"tables and figures: {out}")


if __name__ == "__main__":
    main()
