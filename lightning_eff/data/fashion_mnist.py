"""Fashion-MNIST from wherever it is: a folder you name, Debian's package, or a download.

Source: H. Xiao, K. Rasul, R. Vollgraf, arXiv:1708.07747.
"""

import gzip
import os
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_eff.arguments import check_whole
from lightning_eff.data.images import ImageSet
from lightning_eff.data.loading import SplitDataModule, seeded_permutation

MEAN, STD = 0.2860, 0.3530
"""Mean and standard deviation of the pixels of the 60,000 training images, in [0, 1]."""

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
TRAIN, TEST = 60_000, 10_000
FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


class FashionMNISTDataModule(SplitDataModule):
    """Ten kinds of clothing as images ``[channels, image_size, image_size]``; 60,000 to train on, 10,000 to test on.

    The idx files are looked for in ``root`` (directly, or where torchvision puts them: ``FashionMNIST/raw``), then
    where Debian's package ``dataset-fashion-mnist`` puts them, then downloaded with torchvision.

    Args:
        root: Folder that holds the files, gzipped or not; a download goes there too, by default to the user's cache.
        batch_size: Samples a batch, per process, >= 1.
        val_size: Images of the 60,000 set aside for validation, >= 1.
        train_size: Images to train on, drawn by the seed; ``None`` takes all that validation leaves.
        test_size: Images to test on, drawn by the seed; ``None`` takes all 10,000.
        channels: 1, or 3 to repeat the grey value for networks that take colour.
        image_size: Side of the images in pixels, >= 1; other than 28 they are interpolated as they are asked for.
        normalize: Whether pixels are made to have mean 0 and standard deviation 1; otherwise they lie in [0, 1].
        num_workers: Processes that load, >= 0.
        seed: Of the splits and of the order of the training set, >= 0.
        download: Whether the files may be downloaded.

    Attributes:
        source: Folder the files were read from; ``None`` before ``setup``.

    Raises:
        ValueError: An argument lies outside its range.
        FileNotFoundError: From ``prepare_data`` or ``setup``: the files are in none of the three places.
    """

    train_set: ImageSet
    val_set: ImageSet
    test_set: ImageSet

    def __init__(
        self,
        root: str | Path | None = None,
        batch_size: int = 128,
        val_size: int = 5000,
        train_size: int | None = None,
        test_size: int | None = None,
        channels: Literal[1, 3] = 1,
        image_size: int = 28,
        normalize: bool = True,
        num_workers: int = 0,
        seed: int = 0,
        download: bool = True,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        check_whole("val_size", val_size, 1)
        check_whole("image_size", image_size, 1)
        check_whole("train_size", 1 if train_size is None else train_size, 1)
        check_whole("test_size", 1 if test_size is None else test_size, 1)
        if channels not in (1, 3):
            raise ValueError(f"expected channels to be 1 or 3, got {channels!r}")
        if val_size + (train_size or 1) > TRAIN:
            raise ValueError(
                f"expected val_size + train_size <= {TRAIN:,}, got {val_size} + {train_size or 'at least 1'}"
            )
        if test_size is not None and test_size > TEST:
            raise ValueError(f"expected test_size <= {TEST:,}, got {test_size}")
        self.root = None if root is None else Path(root).expanduser()
        self.val_size, self.train_size, self.test_size = val_size, train_size, test_size
        self.channels, self.image_size, self.normalize = channels, image_size, normalize
        self.download = download
        self.source: Path | None = None

    def prepare_data(self) -> None:
        """Download the files unless they are at hand. Lightning calls this in one process a machine."""
        if self._find() is None and self.download:
            from torchvision.datasets import FashionMNIST

            try:
                FashionMNIST(str(self._download_root), download=True)
            except (OSError, RuntimeError) as error:
                raise FileNotFoundError(self._how_to_get("the download failed")) from error
        if self._find() is None:
            raise FileNotFoundError(self._how_to_get("no download was allowed"))

    def load(self) -> tuple[ImageSet, ImageSet, ImageSet]:
        """Read the files and split them."""
        source = self._find()
        if source is None:
            raise FileNotFoundError(self._how_to_get("prepare_data() has not downloaded them"))
        rank_zero_info(f"Fashion-MNIST is read from {source}")
        images, labels, test_images, test_labels = (read_idx(_existing(source, name)) for name in FILES)
        if len(images) != TRAIN or len(test_images) != TEST:
            raise ValueError(f"expected {TRAIN:,} + {TEST:,} images, got {len(images):,} + {len(test_images):,}")

        order = seeded_permutation(TRAIN, self.seed)
        val, train = order[: self.val_size], order[self.val_size :][: self.train_size]
        test = seeded_permutation(TEST, self.seed)[: self.test_size].sort().values
        self.source = source
        return (
            self._image_set(images[train], labels[train]),
            self._image_set(images[val], labels[val]),
            self._image_set(test_images[test], test_labels[test]),
        )

    def _image_set(self, images: Tensor, labels: Tensor) -> ImageSet:
        mean, std = (MEAN, STD) if self.normalize else (0.0, 1.0)
        return ImageSet(
            images, labels.long(), scale=255, mean=mean, std=std, channels=self.channels, size=self.image_size
        )

    @property
    def _download_root(self) -> Path:
        return self.root or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "lightning_eff"

    def _find(self) -> Path | None:
        named = [] if self.root is None else [self.root]
        places = [path for root in (*named, DEBIAN, self._download_root) for path in (root, root / "FashionMNIST/raw")]
        return next((place for place in places if all(_existing(place, name) for name in FILES)), None)

    def _how_to_get(self, why: str) -> str:
        return (
            f"expected the Fashion-MNIST files {', '.join(FILES)} (with or without .gz), got none: "
            f"{'no root was given' if self.root is None else f'{self.root} lacks them'}, {DEBIAN} lacks them, {why}. "
            "Either pass root=, a folder that holds them, or install the Debian package dataset-fashion-mnist, "
            "or allow download=True with a network connection."
        )


def _existing(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def read_idx(path: Path | None) -> Tensor:
    """Read a file of unsigned bytes in idx format.

    Args:
        path: The file, gzipped if its name ends in ``.gz``.

    Returns:
        uint8 tensor of the shape the file states.

    Raises:
        ValueError: It is no such file.
    """
    if path is None:
        raise ValueError("expected an idx file, got None")
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    # big endian: two zero bytes, type (8: unsigned byte), number of axes, then each length as int32
    if data[:3] != b"\x00\x00\x08":
        raise ValueError(f"expected an idx file of unsigned bytes at {path}, got the first bytes {data[:4]!r}")
    axes = data[3]
    shape = np.frombuffer(data, ">i4", count=axes, offset=4).tolist()
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * axes)
    if values.size != np.prod(shape):
        raise ValueError(f"expected {np.prod(shape)} bytes for shape {shape} in {path}, got {values.size}")
    return torch.from_numpy(values.copy()).reshape(shape)
