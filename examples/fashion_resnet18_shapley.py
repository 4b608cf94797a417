"""Prune a torchvision ResNet-18 on Fashion-MNIST in three steps, with the validation accuracy of every step.

Run: python examples/fashion_resnet18_shapley.py            (long: 20,000 images, seven epochs)
     python examples/fashion_resnet18_shapley.py --fast     (two minutes: few images, to see that it works)
"""

import argparse
from pathlib import Path

import lightning as L
import torchvision

from lightning_eff import (
    Allocation,
    Calibration,
    FashionMNISTDataModule,
    ImageClassifier,
    Schedule,
    ShapleyPruningCallback,
)
from lightning_eff.shapley import PermutationShapley


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="little data, few steps: to see that it works")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/fashion_resnet18_shapley"), help="folder of results")
    parser.add_argument("--data", default=None, help="folder with the idx files, if not Debian's or a download")
    args = parser.parse_args()

    L.seed_everything(args.seed)
    data = FashionMNISTDataModule(
        root=args.data,
        channels=3,
        train_size=512 if args.fast else 20_000,
        val_size=128 if args.fast else 1_000,
        test_size=128 if args.fast else 2_000,
    )
    model = ImageClassifier(torchvision.models.resnet18(weights=None, num_classes=10), lr=1e-3)
    prune = ShapleyPruningCallback(
        amount=0.5,
        allocation=Allocation(target="macs", round_to=8),
        schedule=Schedule(start=1 if args.fast else 2, steps=3),
        calibration=Calibration(samples=64 if args.fast else 256),
        estimator=PermutationShapley(walks=2 if args.fast else 4, depth="matched"),
        value="neg_loss",
        dirpath=args.out,
    )
    epochs = 4 if args.fast else 7
    trainer = L.Trainer(max_epochs=epochs, callbacks=[prune], logger=False, enable_model_summary=False)
    trainer.fit(model, data)
    trainer.test(model, data)


if __name__ == "__main__":
    main()
