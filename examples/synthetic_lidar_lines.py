"""Lines of a 64-line lidar that are worth keeping: a network trained on synthetic streets, measured on others.

A small network learns to complete depth while LineDropout takes random lines away, so that it can be asked about any
subset. Then the selector estimates what every line is worth to it, selects 32, 16, 8 and 4 and measures them on streets
that neither training nor selection saw, beside evenly spread, random, most valuable and best interpolated lines.

Run: python examples/synthetic_lidar_lines.py           (about two minutes on one core)
     python examples/synthetic_lidar_lines.py --fast    (few frames, to see that it works)
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning as L
import torch

from lightning_eff import (
    DepthCompletionModule,
    EstimationOptions,
    LidarSaSSelector,
    LightDepthCompletionNet,
    LineDropout,
    Spread,
    SyntheticLidarDataModule,
)
from lightning_eff.lidar.batches import LidarKeys
from lightning_eff.lidar.figures import completion_figure, points_figure
from lightning_eff.lidar.frames import frames_of
from lightning_eff.reporting import save_figure


def train(net: LightDepthCompletionNet, scale: int, frames: int, epochs: int, out: Path) -> None:
    """Train on streets of their own, lines dropped at random."""
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[LineDropout(p=0.75)],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=out,
    )
    data = SyntheticLidarDataModule(train_size=frames, val_size=4, test_size=4, batch_size=4, scale=scale, seed=1)
    trainer.fit(DepthCompletionModule(net, loss="l1", lr=2e-3), data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="little data, few steps: to see that it works")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/synthetic_lidar_lines"), help="folder of results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    L.seed_everything(args.seed)
    scale, frames, epochs, calibration, held_out = (16, 8, 1, 2, 2) if args.fast else (8, 192, 10, 16, 32)

    net = LightDepthCompletionNet(width=8)
    train(net, scale, frames, epochs, args.out)

    data = SyntheticLidarDataModule(train_size=calibration, val_size=4, test_size=held_out, scale=scale)
    selector = LidarSaSSelector(
        net,
        k=[32, 16, 8, 4],
        estimation=EstimationOptions(budget=120 if args.fast else 600, rounds=2),
        spread=Spread("auto", elevations="kitti"),
        dirpath=args.out,
    )
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=2,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(selector, data)
    trainer.test(selector, data, verbose=False)  # prints the table of the streets held out

    keys, batch = LidarKeys(), next(iter(data.test_dataloader()))
    frame, lines = frames_of(*keys(batch))[0], selector.result.selected[8]
    masked = selector.mask(batch, 8)
    with torch.no_grad():
        depth = net.eval()(batch["rgb"], masked["sparse"])
    save_figure(points_figure(frame, lines), args.out / "points.png")
    save_figure(completion_figure(frame, masked["sparse"][0], depth[0]), args.out / "completion.png")
    print(f"tables and figures: {args.out}")


if __name__ == "__main__":
    main()
