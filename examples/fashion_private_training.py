"""Private training on all 60,000 images of Fashion-MNIST, on all coordinates and on fewer, at one epsilon.

Batches of 512 drawn at random, four epochs, C = 0.1, momentum 0.9: epsilon is 1.52 at delta 1e-5 in every row, whatever
is dropped or pruned. A convolutional network of 26,010 parameters and a dense one of 669,706 are trained with several
selections; nothing is tuned here, the last epoch's test accuracy counts.

Run: python examples/fashion_private_training.py             (about 10 minutes of one idle core)
     python examples/fashion_private_training.py --net mlp --settings dense element-0.9
     python examples/fashion_private_training.py --fast      (two settings of each network, four steps)
"""

import argparse
import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_eff.accounting import PrivacyLedger
from lightning_eff.data import FashionMNISTDataModule, ImageSet
from lightning_eff.privacy.figures import accuracy_figure, epsilon_figure, kept_share_figure
from lightning_eff.privacy.options import PrivateTrainingOptions
from lightning_eff.privacy.prepruning.callback import DPPrePruneCallback
from lightning_eff.privacy.selection.plan import SelectionPlan
from lightning_eff.privacy.selection.selected import Selection
from lightning_eff.privacy.strategy import DPGradientDropStrategy
from lightning_eff.reporting import Column, Table, save_figure

for name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.WARNING)
warnings.filterwarnings("ignore", message="The '.*_dataloader' does not have many workers")
warnings.filterwarnings("ignore", message="`isinstance.treespec, LeafSpec.` is deprecated")

BATCH, EPOCHS, STEPS, SIGMA = 512, 4, 468, 0.8826


@dataclass
class Setting:
    """How one run is trained."""

    lr: float = 2.0
    selection: dict[str, Any] = field(default_factory=dict)
    prune_rate: float = 0.0
    dropped: Literal["freeze", "zero_grad"] = "zero_grad"


# With "freeze" momentum acts on a coordinate only in steps that train it: of the ten steps' worth that a gradient gives
# at momentum 0.9, 1 + 9 (1 - drop rate) are left, which a higher learning rate makes up for.
SETTINGS: dict[str, dict[str, Setting]] = {
    "cnn": {
        "dense": Setting(),
        "element-0.5": Setting(selection={"drop_rate": 0.5}),
        "magnitude-0.5": Setting(selection={"drop_rate": 0.5, "selection": "magnitude"}),
        "row-0.5": Setting(selection={"drop_rate": 0.5, "granularity": "row"}),
        "element-0.9": Setting(lr=4.0, selection={"drop_rate": 0.9}),
        "prune-0.5": Setting(prune_rate=0.5),
    },
    "mlp": {
        "dense": Setting(),
        "element-0.9": Setting(selection={"drop_rate": 0.9}),
        "element-0.9-freeze": Setting(lr=10.0, selection={"drop_rate": 0.9}, dropped="freeze"),
        "epoch-0.9": Setting(selection={"drop_rate": 0.9, "refresh": "epoch"}),
        "prune-0.9": Setting(prune_rate=0.9),
        "element-0.98": Setting(lr=4.0, selection={"drop_rate": 0.98}),
    },
}


def tanh_cnn() -> nn.Module:
    """26,010 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 8, stride=2, padding=3), nn.Tanh(), nn.MaxPool2d(2, 1),
        nn.Conv2d(16, 32, 4, stride=2), nn.Tanh(), nn.MaxPool2d(2, 1),
        nn.Flatten(), nn.Linear(512, 32), nn.Tanh(), nn.Linear(32, 10),
    )  # fmt: skip


def mlp() -> nn.Module:
    """669,706 parameters."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 10)
    )


NETS: dict[str, Callable[[], nn.Module]] = {"cnn": tanh_cnn, "mlp": mlp}


class Classifier(L.LightningModule):
    """An ordinary LightningModule: it does not know that it is trained privately."""

    def __init__(self, net: nn.Module, lr: float) -> None:
        super().__init__()
        self.net, self.lr = net, lr

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)


class Watch(L.Callback):
    """Test accuracy and epsilon after every epoch, time of the steps, and what the last one trained."""

    def __init__(self, test: tuple[Tensor, Tensor]) -> None:
        self.test = test
        self.curve: list[tuple[float, float]] = []
        self.seconds = 0.0
        self.selections: dict[str, Selection] = {}

    def on_train_epoch_start(self, *args: Any) -> None:
        self.begun = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        assert isinstance(trainer.strategy, DPGradientDropStrategy)
        self.selections = trainer.strategy.selection_state

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds += time.perf_counter() - self.begun
        assert isinstance(trainer.strategy, DPGradientDropStrategy)
        assert isinstance(pl_module, Classifier)
        images, labels = self.test
        with torch.no_grad():
            right = [
                (pl_module.net(part).argmax(1) == truth).float()
                for part, truth in zip(images.split(1000), labels.split(1000), strict=True)
            ]
        self.curve.append((trainer.strategy.epsilon, float(torch.cat(right).mean())))


def images(folder: str | None) -> tuple[ImageSet, tuple[Tensor, Tensor]]:
    """All 60,000 training images, and the test images as tensors."""
    data = FashionMNISTDataModule(root=folder)
    data.prepare_data()
    data.setup()
    one, two = data.train_set, data.val_set
    stored = torch.cat([one.images, two.images]), torch.cat([one.labels, two.labels])
    train = ImageSet(*stored, scale=one.scale, mean=one.mean, std=one.std)
    test = [torch.stack(column) for column in zip(*data.test_set.__getitems__(list(range(10_000))), strict=True)]
    return train, (test[0], test[1])


def run(net: str, setting: Setting, train: ImageSet, watch: Watch, steps: int, seed: int) -> tuple[PrivacyLedger, int]:
    """Train once; the ledger, and how many coordinates are left by pre-pruning."""
    torch.manual_seed(seed)
    model = Classifier(NETS[net](), setting.lr)
    strategy = DPGradientDropStrategy(
        noise_multiplier=SIGMA,
        delta=1e-5,
        max_grad_norm=0.1,
        selection=SelectionPlan(**setting.selection),
        options=PrivateTrainingOptions(dropped=setting.dropped),
    )
    prune = [DPPrePruneCallback(setting.prune_rate)] if setting.prune_rate else []
    trainer = L.Trainer(
        max_steps=steps,
        limit_train_batches=steps // EPOCHS,
        accelerator="cpu",
        devices=1,
        strategy=strategy,
        callbacks=[*prune, watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(train, batch_size=BATCH))
    kept = sum(parameter.numel() for parameter in model.parameters())
    kept -= sum(int((~mask).sum()) for one in prune for mask in one.masks.values())
    return strategy.ledger, kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="little data, few steps: to see that it works")
    parser.add_argument("--seed", type=int, default=0, help="of the weights; never of the noise")
    parser.add_argument("--out", type=Path, default=Path("runs/fashion_private_training"), help="folder of results")
    parser.add_argument("--data", default=None, help="folder with the idx files, if not Debian's or a download")
    parser.add_argument("--net", choices=[*NETS], help="one of the two networks")
    parser.add_argument("--settings", nargs="+", help="names of rows, all by default")
    args = parser.parse_args()
    train, test = images(args.data)
    if args.fast:
        test = test[0][:1000], test[1][:1000]
    rows = []
    for net in [args.net] if args.net else list(NETS):
        curves = {}
        chosen = args.settings or list(SETTINGS[net])[:: 3 if args.fast else 1]
        for name, setting in SETTINGS[net].items():
            if name not in chosen:
                continue
            watch = Watch(test)
            ledger, kept = run(net, setting, train, watch, EPOCHS if args.fast else STEPS, args.seed)
            active = sum(one.count for one in watch.selections.values())
            accuracy, steps = watch.curve[-1][1], ledger.steps
            rdp = ledger.epsilon(accountant="rdp")
            rows.append([net, name, setting.lr, kept, active, ledger.epsilon(), rdp, accuracy, watch.seconds / steps])
            curves[f"{name}, lr {setting.lr:g}"] = watch.curve
            print(f"{net} {name}: accuracy {accuracy:.4f}")
            save_figure(kept_share_figure(watch.selections), args.out / f"{net}_{name}_share.png")
        save_figure(accuracy_figure(curves, delta=1e-5), args.out / f"{net}_accuracy.png")
        save_figure(epsilon_figure(ledger), args.out / "epsilon.png")
        ledger.save(args.out / f"{net}_privacy.json")
    columns: list[str | Column] = ["network", "setting", Column("lr", "g"), Column("kept", ","), Column("active", ",")]
    columns += [Column("epsilon prv", ".3f"), Column("epsilon rdp", ".3f"), Column("accuracy", ".3f")]
    columns += [Column("seconds a step", ".4f")]
    table = Table("Fashion-MNIST, private", columns, rows, "delta 1e-5, one seed; epsilon is the same in all rows.")
    table.print()
    table.save(args.out / "results.csv")
    print(f"Written to {args.out}")


if __name__ == "__main__":
    main()
