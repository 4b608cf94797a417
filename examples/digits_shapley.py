"""Quick start as a script: train on the digits, remove half of the multiply-adds by Shapley value, fine-tune, reload.

Run: python examples/digits_shapley.py
     python examples/digits_shapley.py --fast
"""

import argparse
from pathlib import Path

import lightning as L
import torch

from lightning_eff import (
    Allocation,
    Calibration,
    DigitsDataModule,
    ImageClassifier,
    Schedule,
    ShapleyPruningCallback,
    SmallCNN,
    export_model,
    load_pruned,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="little data, few steps: to see that it works")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/digits_shapley"), help="folder of results")
    args = parser.parse_args()
    epochs = 2 if args.fast else 12

    L.seed_everything(args.seed)
    prune = ShapleyPruningCallback(
        amount=0.5,
        allocation=Allocation(target="macs"),
        schedule=Schedule(start=epochs * 2 // 3),
        calibration=Calibration(samples=64 if args.fast else 360),
        dirpath=args.out,
    )
    model, data = ImageClassifier(SmallCNN(width=16), lr=3e-3), DigitsDataModule()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[prune],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data)  # trains, scores, cuts, fine-tunes, prints the tables
    trainer.test(model, data)

    # The checkpoint of the smaller network in a fresh object, and as a program that needs no Python class.
    path = args.out / "final.ckpt"
    trainer.save_checkpoint(path)
    small = load_pruned(ImageClassifier, path, net=SmallCNN(width=16))
    images = torch.randn(4, 1, 8, 8)
    assert torch.equal(small.eval()(images), model.eval()(images))
    export_model(small, images, args.out / "pruned.pt2")


if __name__ == "__main__":
    main()
