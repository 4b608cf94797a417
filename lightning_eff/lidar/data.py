"""Lightning data modules of lidar frames: KITTI and synthetic streets."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

from torch.utils.data import Dataset, Subset

from lightning_eff.arguments import check_choice, check_whole
from lightning_eff.data.loading import SplitDataModule, seeded_permutation
from lightning_eff.lidar.batches import LidarSample, RandomFlip
from lightning_eff.lidar.datasets import CROP, KittiDepthDataset, KittiScanDataset
from lightning_eff.lidar.layout import DepthSplit
from lightning_eff.lidar.lines import LineMethod
from lightning_eff.lidar.synthetic import SyntheticLidarDataset

KittiSplit = Literal[DepthSplit, "object"]


class KittiDepthDataModule(SplitDataModule):
    """KITTI's frames: some to train or measure line values with, the others to evaluate on.

    Args:
        root: folder of the depth-completion set, see :func:`lightning_eff.lidar.layout.find_depth_frames`; for
            `split="object"` of full scans, see :func:`lightning_eff.lidar.layout.find_scan_frames`.
        split: frames of the training loader: `"train"`, `"val"`, `"val_select"`, or `"object"` for full scans, whose
            truth is the depth of all lines.
        num_calibration: how many frames of `split` the training loader has, drawn by the seed, >= 1; `None` takes all.
        eval_split: frames of the other loaders; by default those of `split` that were not drawn.
        line_source: how lines are found: `"laser_table"`, or another of the data set.
        batch_size: frames a batch, per process, >= 1.
        crop: height and width of the window, at the bottom and centred; `None` keeps images of full size, which
            differ, so that `batch_size` must be 1.
        scale: divides the resolution after the crop, >= 1.
        raw_root: folder of the raw data with images and calibrations, by default `root`.
        augment: whether frames of the training loader are mirrored half of the time and their brightness, contrast
            and saturation changed by up to a tenth. Only for training a network.
        num_workers: processes that load, >= 0.
        seed: of the draw and of the order of the training loader, >= 0.

    Raises:
        ValueError: an argument lies outside its range, or, from `setup`, no frame is left to evaluate on.
        FileNotFoundError: from `setup`, files are missing.
    """

    def __init__(
        self,
        root: str | Path,
        split: KittiSplit = "val_select",
        num_calibration: int | None = 64,
        eval_split: KittiSplit | None = None,
        line_source: LineMethod = "laser_table",
        batch_size: int = 1,
        crop: tuple[int, int] | None = CROP,
        scale: int = 1,
        raw_root: str | Path | None = None,
        augment: bool = False,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        check_whole("num_calibration", 1 if num_calibration is None else num_calibration, 1)
        for name, value in {"split": split, "eval_split": eval_split or split}.items():
            check_choice(name, value, ("object", *get_args(DepthSplit)))
        if split == "test":
            raise ValueError("expected a split with truth to train or measure with, got 'test': it can be eval_split")
        if num_calibration is None and eval_split in (None, split):
            raise ValueError(
                "num_calibration=None takes all frames of split: pass eval_split=, another split to evaluate on, or "
                "a number"
            )
        if crop is None and batch_size > 1:
            raise ValueError(f"expected batch_size 1 with crop=None, images differing in size, got {batch_size}")
        self.root, self.split, self.num_calibration, self.eval_split = root, split, num_calibration, eval_split
        self.line_source, self.crop, self.scale = line_source, crop, scale
        self.raw_root, self.augment = raw_root, augment

    def load(self) -> tuple[Dataset[LidarSample], Dataset[LidarSample], Dataset[LidarSample]]:
        """Find the files and draw."""
        frames = self._frames(self.split)
        total, taken = len(frames), self.num_calibration or len(frames)
        separate = self.eval_split not in (None, self.split)
        if taken > total or (taken == total and not separate):
            raise ValueError(
                f"expected num_calibration {'<=' if separate else '<'} {total}, the frames of {self.split!r} in "
                f"{self.root}, got {taken}"
                + ("" if separate else ": none is left to evaluate on; take fewer or pass eval_split=")
            )
        order = seeded_permutation(total, self.seed)
        drawn, rest = (part.sort().values.tolist() for part in (order[:taken], order[taken:]))
        train: Dataset[LidarSample] = Subset(frames, drawn)
        held_out = self._frames(self.eval_split) if separate and self.eval_split else Subset(frames, rest)
        return (_Augmented(train) if self.augment else train), held_out, held_out

    def _frames(self, split: KittiSplit) -> KittiDepthDataset | KittiScanDataset:
        if split == "object":
            return KittiScanDataset(self.root, line_source=self.line_source, crop=self.crop, scale=self.scale)
        return KittiDepthDataset(
            self.root,
            split,
            raw_root=self.raw_root,
            line_source=self.line_source,
            crop=self.crop,
            scale=self.scale,
        )


class _Augmented(Dataset[LidarSample]):
    """Frames mirrored and with other colours, as the published training has them."""

    def __init__(self, frames: Dataset[LidarSample]) -> None:
        from torchvision.transforms import ColorJitter

        self.frames, self.flip = frames, RandomFlip(0.5)
        self.jitter = ColorJitter(brightness=0.1, contrast=0.1, saturation=0.1)

    def __len__(self) -> int:
        return len(self.frames)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> LidarSample:
        sample = self.flip(self.frames[index])
        return {**sample, "rgb": self.jitter(sample["rgb"])}


class SyntheticLidarDataModule(SplitDataModule):
    """Synthetic streets, nothing to download; parts share no scene.

    Args:
        train_size: frames to train or to measure line values with, >= 1.
        val_size: frames to validate on, >= 1.
        test_size: frames to test on, >= 1.
        batch_size: frames a batch, per process, >= 1.
        num_workers: processes that load, >= 0.
        seed: of the scenes and of the order of the training set, >= 0.
        **options: `scale` and the further options of :class:`lightning_eff.lidar.synthetic.SyntheticLidarDataset`.

    Raises:
        ValueError: an argument lies outside its range.
    """

    def __init__(
        self,
        train_size: int = 64,
        val_size: int = 16,
        test_size: int = 16,
        batch_size: int = 4,
        num_workers: int = 0,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        for name, size in (("train_size", train_size), ("val_size", val_size), ("test_size", test_size)):
            check_whole(name, size)
        self.sets = (
            SyntheticLidarDataset(length=train_size, part="train", seed=seed, **options),
            SyntheticLidarDataset(length=val_size, part="val", seed=seed, **options),
            SyntheticLidarDataset(length=test_size, part="test", seed=seed, **options),
        )

    def load(self) -> tuple[Dataset[LidarSample], Dataset[LidarSample], Dataset[LidarSample]]:
        """Return the three sets, which hold no frames until they are asked for them."""
        return self.sets
