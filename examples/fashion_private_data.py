"""How good are classifiers trained on clothes that nobody ever wore? Images generated under (epsilon, delta).

A generator is trained on one private release of Fashion-MNIST; logistic regression and an MLP are trained on 6,000
generated images and tested on 10,000 real ones, beside the same classifiers trained on 6,000 real images.

Run: python examples/fashion_private_data.py                       (about four minutes on one core)
     python examples/fashion_private_data.py --epsilon 10 --seeds 1
     python examples/fashion_private_data.py --fast                (few images and steps, to see that it works)
"""

import argparse
import logging
import time
from pathlib import Path

import lightning as L
import torch

from lightning_eff import FashionMNISTDataModule
from lightning_eff.reporting import Column, Table
from lightning_eff.synthesis import DPNTKGenerator, SynthesisFigures
from lightning_eff.synthesis.evaluation import train_synthetic_test_real

NAMES = ["t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
CLASSIFIERS = ("logistic_regression", "mlp")


def generator(data: L.LightningDataModule, epsilon: float, seed: int, steps: int, out: Path) -> DPNTKGenerator:
    """Release once and train."""
    L.seed_everything(seed, verbose=False)
    model = DPNTKGenerator(
        epsilon, num_classes=10, input_shape=(1, 28, 28), feature_widths=(200,), latent_dim=10, samples_per_class=50,
        steps_per_epoch=steps, matching={"seed": seed},
    )  # fmt: skip
    figures = SynthesisFigures(out / f"epsilon-{epsilon:g}", every_n_steps=max(1, steps // 2), class_names=NAMES)
    L.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_model_summary=False,
        enable_progress_bar=False, callbacks=[figures],
    ).fit(model, datamodule=data)  # fmt: skip
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="little data, few steps: to see that it works")
    parser.add_argument("--seed", type=int, default=0, help="of the generator; never of the noise")
    parser.add_argument("--out", type=Path, default=Path("runs/fashion_private_data"), help="folder of results")
    parser.add_argument("--data", default=None, help="folder with the idx files, if not Debian's or a download")
    parser.add_argument("--epsilon", type=float, nargs="+", default=[10.0, 1.0])
    parser.add_argument("--seeds", type=int, default=1, help="how many, from --seed on")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)

    # pixels in [0, 1]: their mean and deviation would be taken from the private images
    data = FashionMNISTDataModule(
        root=args.data, normalize=False, val_size=1, train_size=1_000 if args.fast else None,
        test_size=300 if args.fast else None,
    )  # fmt: skip
    data.prepare_data()
    data.setup()
    test, real = (tuple(map(torch.stack, zip(*part.__getitems__(list(range(n))), strict=True))) for part, n in (
        (data.test_set, len(data.test_set)), (data.train_set, 300 if args.fast else 6_000),
    ))  # fmt: skip

    rows = []
    for epsilon in args.epsilon[:1] if args.fast else args.epsilon:
        for seed in range(args.seed, args.seed + args.seeds):
            start = time.process_time()
            model = generator(data, epsilon, seed, 10 if args.fast else 500, args.out)
            seconds = time.process_time() - start
            made = model.generate(len(real[0]), seed=seed)
            first = not rows
            scores = train_synthetic_test_real(
                (made.x, made.y), test, real=real if first else None, classifiers=CLASSIFIERS, progress=False
            )
            if first:
                rows.append(["real", None, *(scores.mean("accuracy", name, "real") for name in CLASSIFIERS), None])
            rows.append([f"{epsilon:g}", seed, *(scores.mean("accuracy", name) for name in CLASSIFIERS), seconds])
        model.privacy_report().write(args.out / f"epsilon-{epsilon:g}")
    columns = [
        "epsilon",
        "seed",
        *(Column(name, ".3f") for name in CLASSIFIERS),
        Column("CPU s", ".0f"),
    ]
    table = Table(
        "Accuracy on real images",
        columns,
        rows,
        f"delta 1e-5, {len(data.train_set):,} private images; CPU s: release and training",
    )
    table.print()
    table.save(args.out / "accuracy.json")
    table.save(args.out / "accuracy.md")


if __name__ == "__main__":
    main()
