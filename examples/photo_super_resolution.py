"""Prune a super-resolution network by the PSNR that its own validation logs: photographs, no classes, no BatchNorm.

A small network in the manner of EDSR (residual blocks, PixelShuffle) learns to double the resolution from random crops
of one of scikit-learn's two photographs. Three quarters of its multiply-adds are removed by random channel search; the
left half of the other photograph chooses the candidate, the right half is only looked at in the end.

Run: python examples/photo_super_resolution.py           (about 3 minutes on one core)
     python examples/photo_super_resolution.py --fast    (few crops, candidates and blocks, to see that it works)
"""

import argparse
import copy
from pathlib import Path
from typing import Any

import lightning as L
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.image import PeakSignalNoiseRatio

from lightning_eff import Calibration, ChannelGraph, Layers, RandomChannelPruningCallback, Repair, Search
from lightning_eff.reporting import Column, Table, new_figure, save_figure

CROP = 24  # side of a crop, in pixels of the small image


class Block(nn.Module):
    """Two convolutions around a ReLU, added to what comes in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(x)))


class SmallEDSR(nn.Module):
    """Map images ``[B, 3, H, W]`` in [0, 1] to ``[B, 3, 2H, 2W]``: bicubic interpolation plus what is learnt."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.tail = nn.Conv2d(width, width, 3, padding=1)
        self.up = nn.Sequential(nn.Conv2d(width, 4 * width, 3, padding=1), nn.PixelShuffle(2))
        self.out = nn.Conv2d(width, 3, 3, padding=1)
        nn.init.zeros_(self.out.weight)  # it begins as bicubic interpolation
        nn.init.zeros_(self.out.bias)

    def forward(self, small: Tensor) -> Tensor:
        features = self.head(small)
        features = features + self.tail(self.blocks(features))
        return bicubic(small) + self.out(self.up(features))


class SuperResolution(L.LightningModule):
    """A plain module: L1 loss, Adam with one cycle up to ``lr``, ``val/psnr`` in decibels by torchmetrics."""

    def __init__(self, net: nn.Module, lr: float) -> None:
        super().__init__()
        self.net, self.lr = net, lr
        self.psnr = PeakSignalNoiseRatio(data_range=1.0)

    def forward(self, small: Tensor) -> Tensor:
        return self.net(small)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        small, large = batch
        return F.l1_loss(self(small), large)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        small, large = batch
        self.psnr.update(self(small).clamp(0, 1), large)
        self.log("val/psnr", self.psnr)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), self.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def bicubic(small: Tensor) -> Tensor:
    return F.interpolate(small, scale_factor=2, mode="bicubic")


def photograph(number: int) -> tuple[Tensor, Tensor]:
    """The photograph at half its resolution ``[1, 3, 213, 320]`` and as it is ``[1, 3, 426, 640]``, in [0, 1]."""
    pixels = torch.tensor(load_sample_images().images[number])[:426]  # even sides
    large = pixels.permute(2, 0, 1)[None] / 255
    small = F.interpolate(large, scale_factor=0.5, mode="bicubic", antialias=True)
    return small.clamp(0, 1), large


def crops(count: int, seed: int) -> TensorDataset:
    """Random crops of the first photograph in all eight orientations, with their colours exchanged at random."""
    small, large = photograph(0)
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for number in range(count):
        y, x = (int(torch.randint(side - CROP + 1, (), generator=generator)) for side in small.shape[2:])
        colours = torch.randperm(3, generator=generator)
        pair = [
            image[0, colours, k * y : k * (y + CROP), k * x : k * (x + CROP)]
            for k, image in enumerate((small, large), 1)
        ]
        if number % 2:
            pair = [image.flip(2) for image in pair]
        pairs.append([image.rot90(number // 2, (1, 2)) for image in pair])
    return TensorDataset(*map(torch.stack, zip(*pairs, strict=True)))


def psnr_of_each(outputs: Tensor, large: Tensor) -> Tensor:
    """Decibels of each image ``[B]``."""
    return -10 * (outputs.clamp(0, 1) - large).square().flatten(1).mean(1).log10()


def fit(net: nn.Module, loaders: list[DataLoader], epochs: int, lr: float, *callbacks: L.Callback) -> nn.Module:
    """Train the network in place."""
    L.seed_everything(0, verbose=False)
    L.Trainer(
        accelerator="cpu", max_epochs=epochs, callbacks=list(callbacks), logger=False, enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False,
    ).fit(SuperResolution(net, lr), *loaders)  # fmt: skip
    return net


def draw(networks: dict[str, Any], small: Tensor, large: Tensor, path: Path) -> None:
    """Save a part of the photograph as each network gives it, beside the photograph itself."""
    figure, axes = new_figure(1, len(networks) + 1, width=2.4 * (len(networks) + 1), height=2.9)
    with torch.no_grad():
        images = {name: net(small).clamp(0, 1) for name, net in networks.items()}
    for axis, (name, image) in zip(axes[0], {**images, "photograph": large}.items(), strict=True):
        axis.imshow(image[0, :, 150:270, 20:140].permute(1, 2, 0).numpy())
        axis.set_title(f"{name}: {float(psnr_of_each(image, large)):.2f} dB" if name in images else name)
        axis.set_axis_off()
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="little data, few steps: to see that it works")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/photo_super_resolution"), help="folder of results")
    args = parser.parse_args()

    halves = [[part.contiguous() for part in image.chunk(2, 3)] for image in photograph(1)]
    (val_small, test_small), (val_large, test_large) = halves
    train = DataLoader(crops(32 if args.fast else 2_000, args.seed), batch_size=16, shuffle=True)
    loaders = [train, DataLoader(TensorDataset(val_small, val_large))]

    def psnr(net: nn.Module) -> float:
        with torch.no_grad():
            return float(psnr_of_each(net(test_small), test_large))

    L.seed_everything(args.seed, verbose=False)
    dense = fit(SmallEDSR(*((8, 1) if args.fast else (32, 4))), loaders, 1 if args.fast else 3, 2e-3)
    graph = ChannelGraph.from_model(dense, torch.rand(2, 3, CROP, CROP))
    whole = round(graph.macs().item())
    further = fit(copy.deepcopy(dense), loaders, 1, 5e-4)
    rows = [("bicubic", None, None, psnr(bicubic), None), ("dense", whole, 1.0, psnr(dense), psnr(further))]

    uniform = Search(sampler="uniform", top_k=1, monitor="val/psnr", mode="max")
    random = Search(candidates=4 if args.fast else 50, top_k=3, monitor="val/psnr", mode="max")
    ways = {
        "uniform, weights as they were": (uniform, Repair("none")),
        "uniform, repaired": (uniform, Repair()),
        f"best of {random.candidates}, repaired": (random, Repair()),
    }
    for title, (search, repair) in ways.items():
        prune = RandomChannelPruningCallback(
            0.75,
            search=search,
            repair=repair,
            layers=Layers(submodule="net", coupled="all"),  # the residual stream as well
            calibration=Calibration("train", samples=16 if args.fast else 512),
            value=psnr_of_each,
            dirpath=args.out if search is random else None,
            verbose=search is random,
        )
        smaller = fit(copy.deepcopy(dense), loaders, 1, 5e-4, prune)
        cut = copy.deepcopy(dense)
        prune.search.apply(cut, graph)  # what the search found, before any training
        macs = prune.search.best.macs
        rows.append((title, macs, macs / whole, psnr(cut), psnr(smaller)))

    columns = ["network", Column("MACs", ","), Column("MACs kept", ".1%")]
    columns += [Column("PSNR", ".2f"), Column("PSNR, one more epoch", ".2f")]
    caption = f"PSNR in dB on the right half of the other photograph; MACs of a {CROP} x {CROP} crop."
    table = Table("Double resolution", columns, rows, caption)
    table.print()
    table.save(args.out / "psnr.json")
    table.save(args.out / "psnr.md")

    shown = {"bicubic": bicubic, "dense": dense, "pruned": cut, "one more epoch": smaller}
    draw(shown, test_small, test_large, args.out / "crops.png")


if __name__ == "__main__":
    main()
