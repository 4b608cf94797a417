"""Small pictures at random places of larger scenes: where to look is worth learning.

Fragments of other pictures can lie about, as in the cluttered translated MNIST of V. Mnih et al., arXiv:1406.6247.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_eff.arguments import check_choice, check_whole
from lightning_eff.data.fashion_mnist import TEST, TRAIN, FashionMNISTDataModule
from lightning_eff.data.images import ImageSet, Sample
from lightning_eff.data.loading import ResumableLoader, SplitDataModule, TrainerEpochSampler

DIGITS = 1797
FRAGMENT = 8
"""Side of a fragment of clutter in pixels."""


class SceneSet(Dataset[Sample]):
    """Scenes with one picture each, at a place that depends on seed and index alone.

    Indices go on beyond the length N: index i shows picture i mod N, at a new place in every round of N. The black of
    the scene is 0, and where things overlap the brighter one is seen.

    Args:
        pictures: Square pictures with pixels in [0, 1], and their labels.
        canvas: Height and width of scenes in pixels, no smaller than pictures.
        clutter: Fragments of 8 x 8 pixels of other pictures in every scene, >= 0.
        seed: Of places and fragments, >= 0.
    """

    def __init__(self, pictures: ImageSet, canvas: tuple[int, int], clutter: int = 0, seed: int = 0) -> None:
        self.pictures, self.canvas, self.clutter, self.seed = pictures, canvas, clutter, seed
        self.side = pictures.size or pictures.images.shape[-1]

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Sample:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Sample]:
        """Return samples ``([1, H, W] float32 in [0, 1], [] int64)``; a DataLoader asks for a whole batch."""
        samples = self.pictures.__getitems__([index % len(self) for index in indices])
        draws = [np.random.default_rng((self.seed, index)) for index in indices]
        scenes = torch.zeros(len(indices), 1, *self.canvas)
        places = torch.stack([self._place(draw, self.side) for draw in draws])
        _paste(scenes, torch.stack([picture for picture, _ in samples]), places)
        for _ in range(self.clutter):
            others = [int(draw.integers(len(self))) for draw in draws]
            corners = [draw.integers(self.side - FRAGMENT + 1, size=2).tolist() for draw in draws]
            fragments = [
                picture[:, y : y + FRAGMENT, x : x + FRAGMENT]
                for (picture, _), (y, x) in zip(self.pictures.__getitems__(others), corners, strict=True)
            ]
            _paste(scenes, torch.stack(fragments), torch.stack([self._place(draw, FRAGMENT) for draw in draws]))
        return [(scene, label) for scene, (_, label) in zip(scenes.unbind(), samples, strict=True)]

    @property
    def boxes(self) -> Tensor:
        """Boxes y0, x0, y1, x1 of the pictures of scenes 0 to N - 1 in pixels [N, 4], for whoever may know them."""
        return self.boxes_of(list(range(len(self))))

    def boxes_of(self, indices: list[int]) -> Tensor:
        """Return the boxes of the pictures of these scenes [n, 4], float32 pixels."""
        draws = (np.random.default_rng((self.seed, index)) for index in indices)
        corners = torch.stack([self._place(draw, self.side) for draw in draws]).float()
        return torch.cat([corners, corners + self.side], dim=1)

    def _place(self, draw: np.random.Generator, side: int) -> Tensor:
        height, width = self.canvas
        return torch.from_numpy(draw.integers((height - side + 1, width - side + 1)))


class CanvasDataModule(SplitDataModule):
    """Digits or clothes at random places of larger scenes; batches of images ``[B, 1, H, W]`` in [0, 1] and labels.

    A scene of the validation and the test set is always the same. One of the training set has a new place in every
    epoch, given by seed and epoch: a resumed run sees the scenes that the uninterrupted one would have seen.

    Args:
        dataset: ``"digits"``, the 1,797 that come with scikit-learn, or ``"fashion_mnist"``.
        canvas: Of scenes in pixels: a side, or (height, width).
        picture_size: Side of the pictures in pixels; None takes 16 for digits, which are stored as 8 x 8, and 28 for
            clothes.
        clutter: Fragments of 8 x 8 pixels of other pictures in every scene, >= 0.
        batch_size: Samples a batch, per process, >= 1.
        train_size: Pictures to train on; None takes all that validation and test leave.
        val_size: Pictures for validation, >= 1; none of the digits, 0, go with ``Trainer(limit_val_batches=0)``.
        test_size: Pictures for the test, >= 1.
        num_workers: Processes that load, >= 0.
        seed: Of splits, places, fragments and the order of the training set, >= 0.
        root: Folder of Fashion-MNIST's files, as in :class:`FashionMNISTDataModule`.

    Raises:
        ValueError: An argument lies outside its range, or a picture does not fit in the scene.
    """

    train_set: SceneSet
    val_set: SceneSet
    test_set: SceneSet

    def __init__(
        self,
        dataset: Literal["digits", "fashion_mnist"] = "digits",
        canvas: int | tuple[int, int] = 96,
        picture_size: int | None = None,
        clutter: int = 0,
        batch_size: int = 64,
        train_size: int | None = None,
        val_size: int = 200,
        test_size: int = 500,
        num_workers: int = 0,
        seed: int = 0,
        root: str | Path | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        check_choice("dataset", dataset, ("digits", "fashion_mnist"))
        check_whole("clutter", clutter, 0)
        check_whole("val_size", val_size, 0 if dataset == "digits" else 1)
        check_whole("test_size", test_size, 1)
        check_whole("train_size", 1 if train_size is None else train_size, 1)
        self.picture_size = (16 if dataset == "digits" else 28) if picture_size is None else picture_size
        check_whole("picture_size", self.picture_size, FRAGMENT if clutter else 1)
        height, width = (canvas, canvas) if isinstance(canvas, int) else canvas
        check_whole("the smaller side of canvas", min(height, width), self.picture_size)
        if dataset == "digits" and (train_size or 1) + val_size + test_size > DIGITS:
            raise ValueError(
                f"expected train_size + val_size + test_size <= {DIGITS:,}, got {train_size or 'at least 1'} + "
                f"{val_size} + {test_size}"
            )
        if dataset == "fashion_mnist" and ((train_size or 1) + val_size > TRAIN or test_size > TEST):
            raise ValueError(
                f"expected train_size + val_size <= {TRAIN:,} and test_size <= {TEST:,}, got "
                f"{train_size or 'at least 1'} + {val_size} and {test_size}"
            )
        self.dataset, self.canvas, self.clutter = dataset, (height, width), clutter
        self.train_size, self.val_size, self.test_size = train_size, val_size, test_size
        self.root = root

    def prepare_data(self) -> None:
        """Download Fashion-MNIST unless it is at hand. Lightning calls this in one process a machine."""
        if self.dataset == "fashion_mnist":
            self._fashion().prepare_data()

    def load(self) -> tuple[SceneSet, SceneSet, SceneSet]:
        """Read the pictures and split them."""
        parts = self._digits() if self.dataset == "digits" else self._fashion().load()
        # a seed of its own for each part, or their n-th pictures would lie at the same place
        train, val, test = (
            SceneSet(part, self.canvas, self.clutter, 3 * self.seed + number) for number, part in enumerate(parts)
        )
        return train, val, test

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of the training set in an order and at places given by seed and epoch."""
        sampler = EverNewSampler(self.train_set, self.trainer, self.seed)
        return ResumableLoader(self.train_set, sampler=sampler, **self._loading())

    def _digits(self) -> tuple[ImageSet, ImageSet, ImageSet]:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        labels = digits.target
        rest, test = train_test_split(range(DIGITS), test_size=self.test_size, stratify=labels, random_state=self.seed)
        train, val = rest[self.val_size :][: self.train_size], rest[: self.val_size]
        images, classes = torch.from_numpy(digits.images).float(), torch.from_numpy(labels).long()
        train_set, val_set, test_set = (
            ImageSet(images[part], classes[part], scale=16, size=self.picture_size) for part in (train, val, test)
        )
        return train_set, val_set, test_set

    def _fashion(self) -> FashionMNISTDataModule:
        return FashionMNISTDataModule(
            self.root,
            val_size=self.val_size,
            train_size=self.train_size,
            test_size=self.test_size,
            image_size=self.picture_size,
            normalize=False,
            seed=self.seed,
        )


class EverNewSampler(TrainerEpochSampler):
    """A sampler whose indices go on where those of the epoch before ended; for :class:`SceneSet`."""

    def __iter__(self) -> Iterator[int]:
        """Yield the indices of this epoch."""
        start = self.epoch * len(self.dataset)  # type: ignore[arg-type]
        for index in super().__iter__():
            yield start + index


def _paste(scenes: Tensor, pictures: Tensor, places: Tensor) -> None:
    """Lay ``pictures`` [B, 1, h, w] into ``scenes`` [B, 1, H, W] in place, upper left corners at ``places`` [B, 2]."""
    height, width = pictures.shape[-2:]
    rows = places[:, 0, None, None] + torch.arange(height)[:, None]
    columns = places[:, 1, None, None] + torch.arange(width)
    which = torch.arange(len(scenes))[:, None, None]
    under = scenes[which, 0, rows, columns]
    scenes[which, 0, rows, columns] = torch.maximum(under, pictures[:, 0])
