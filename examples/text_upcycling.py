"""Experts for a Transformer that is trained already: up-cycled from its own weights, against going on without.

A language model of bytes, made of torch's `nn.TransformerEncoderLayer` and with a training step that knows nothing of
experts, learns a text. Then three go on from there for as many tokens again: the model as it is; with its feed-forward
networks up-cycled to experts, whose output is the same at first; and with new experts in their place. One line
of a Trainer, `callbacks=[ReplaceFFN(...)]`, is the difference. Writes the table and the curves.

The text is --text, or the sources of Python's standard library.

Run: python examples/text_upcycling.py         (about 3 minutes of one core)
     python examples/text_upcycling.py --fast  (few steps of a small network, to see that it works)
"""

from __future__ import annotations

import argparse
import copy
import sysconfig
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_eff.data import ByteTextDataModule
from lightning_eff.moe import ReplaceFFN
from lightning_eff.reporting import KEPT, REFERENCE, SERIES, Column, Table, new_figure, save_figure

SEQ_LEN, BATCH = 128, 16
EXPERTS = {"expansion_rate": 8, "granularity": 2}


class ByteModel(L.LightningModule):
    """Predicts the next byte."""

    def __init__(self, d_model: int, n_layers: int, steps: int, lr: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        layer = nn.TransformerEncoderLayer(
            d_model, 4, dropout=0.0, dim_feedforward=4 * d_model, batch_first=True, norm_first=True
        )
        self.embedding = nn.Embedding(256, d_model)
        self.positions = nn.Parameter(0.02 * torch.randn(SEQ_LEN, d_model))
        self.encoder = nn.TransformerEncoder(layer, n_layers, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(d_model), nn.Linear(d_model, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        x = self.encoder(self.embedding(tokens) + self.positions, mask=mask, is_causal=True)
        return self.head(self.norm(x))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(self(batch[0]).flatten(0, 1), batch[1].flatten())

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.log("val/loss", self.training_step(batch))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), self.hparams.lr, betas=(0.9, 0.95), weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.hparams.lr, self.hparams.steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Curve(Callback):
    """Validation losses and CPU seconds."""

    def __init__(self) -> None:
        self.points: list[tuple[int, float]] = []
        self.seconds = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self._began = time.process_time()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds += time.process_time() - self._began

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.points.append((trainer.global_step, float(trainer.callback_metrics["val/loss"])))


def train(module: ByteModel, text: list[str], args: argparse.Namespace, *callbacks: Callback) -> Curve:
    """Train a module on windows that depend on the seed alone, validating at the start, on the way and at the end."""
    L.seed_everything(args.seed, verbose=False)
    data = ByteTextDataModule(text, seq_len=SEQ_LEN, batch_size=BATCH, seed=args.seed)
    steps, curve = module.hparams.steps, Curve()
    parts = 2 if args.fast else 20  # batches of the held-out text
    trainer = L.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, gradient_clip_val=1.0, callbacks=[*callbacks, curve],
        val_check_interval=max(1, steps // 8), check_val_every_n_epoch=None,
        limit_val_batches=parts, num_sanity_val_steps=parts,
        logger=False, enable_checkpointing=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, data)
    return curve


def draw(curves: dict[str, Curve], steps: int) -> Any:
    figure, axes = new_figure(1, 1, width=6.0, height=3.8)
    colours = {"dense": REFERENCE, "dense, going on": REFERENCE, "up-cycled": KEPT, "new experts": SERIES[1]}
    for name, curve in curves.items():
        begin = 0 if name == "dense" else steps
        at, losses = zip(*curve.points, strict=True)
        axes[0, 0].plot([begin + step for step in at], losses, color=colours[name], label=name if begin else None)
    low = min(loss for curve in curves.values() for _, loss in curve.points)
    axes[0, 0].set(xlabel="steps", ylabel="validation loss [nats a byte]", ylim=(low - 0.05, low + 1.0), xlim=(0, None))
    axes[0, 0].legend(frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="little data, few steps: to see that it works")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/text_upcycling"), help="folder of results")
    parser.add_argument("--text", nargs="+", help="files or patterns, read as one text")
    parser.add_argument("--steps", type=int, default=400, help="of 2,048 tokens: before, and again after")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate, before and after")
    args = parser.parse_args()
    text = args.text or sorted(str(path) for path in Path(sysconfig.get_path("stdlib")).glob("*.py"))
    steps = 8 if args.fast else args.steps
    torch.manual_seed(args.seed)
    dense = ByteModel(32 if args.fast else 96, 2 if args.fast else 3, steps, args.lr)
    curves = {"dense": train(dense, text, args)}
    rows = []
    for name, callbacks in {
        "dense, going on": [],
        "up-cycled": [ReplaceFFN("encoder.layers.*", EXPERTS, init="upcycle")],
        "new experts": [ReplaceFFN("encoder.layers.*", EXPERTS)],
    }.items():
        module = copy.deepcopy(dense)
        curve = curves[name] = train(module, text, args, *callbacks)
        size = sum(parameter.numel() for parameter in module.parameters())
        rows.append((name, size, curve.points[0][1], curve.points[-1][1], curve.seconds))
    table = Table(
        f"Validation loss after {steps:,} steps of a dense Transformer and {steps:,} more, nats a byte",
        [
            "model",
            Column("parameters", ",d"),
            Column("at first", ".3f"),
            Column("at the end", ".3f"),
            Column("CPU s", ".0f"),
        ],
        rows,
    )
    table.print()
    for written in (table.save(args.out / "table.md"), save_figure(draw(curves, steps), args.out / "curves.png")):
        print(written)


if __name__ == "__main__":
    main()
