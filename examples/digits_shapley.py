"""Quick start as a script: train on the digits, remove half of the multiply-adds by Shapley value, fine-tune, reload.

Run: python examples/digits_shapley.py
"""

import argparse

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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--dirpath", default="runs/digits")
    args = parser.parse_args()

    L.seed_everything(0)
    prune = ShapleyPruningCallback(
        amount=0.5,
        allocation=Allocation(target="macs"),
        schedule=Schedule(start=args.epochs * 2 // 3),
        calibration=Calibration(samples=360),
        dirpath=args.dirpath,
    )
    model, data = ImageClassifier(SmallCNN(width=16), lr=3e-3), DigitsDataModule()
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=args.epochs, callbacks=[prune], logger=False, enable_model_summary=False
    )
    trainer.fit(model, data)  # trains, scores, cuts, fine-tunes, prints the tables
    trainer.test(model, data)

    # The checkpoint of the smaller network in a fresh object, and as a program that needs no Python class.
    path = f"{args.dirpath}/final.ckpt"
    trainer.save_checkpoint(path)
    small = load_pruned(ImageClassifier, path, net=SmallCNN(width=16))
    images = torch.randn(4, 1, 8, 8)
    assert torch.equal(small.eval()(images), model.eval()(images))
    export_model(small, images, f"{args.dirpath}/pruned.pt2")


if __name__ == "__main__":
    main()
