"""Data modules used by examples, tests and the command line, and the one convention of what a batch is."""

from lightning_eff.batch import BatchKeys, SplitBatch, batch_size, call_model, split_batch, take
from lightning_eff.data.canvas import CanvasDataModule, SceneSet
from lightning_eff.data.digits import DigitsDataModule
from lightning_eff.data.fashion_mnist import FashionMNISTDataModule
from lightning_eff.data.images import ImageSet
from lightning_eff.data.loading import ResumableLoader, SplitDataModule
from lightning_eff.data.text import ByteTextDataModule

__all__ = [
    "BatchKeys",
    "ByteTextDataModule",
    "CanvasDataModule",
    "DigitsDataModule",
    "FashionMNISTDataModule",
    "ImageSet",
    "ResumableLoader",
    "SceneSet",
    "SplitBatch",
    "SplitDataModule",
    "batch_size",
    "call_model",
    "split_batch",
    "take",
]
