"""Data modules used by examples, tests and the command line, and the one convention of what a batch is."""

from lightning_eff.batch import BatchKeys, SplitBatch, batch_size, call_model, split_batch, take
from lightning_eff.data.digits import DigitsDataModule
from lightning_eff.data.fashion_mnist import FashionMNISTDataModule
from lightning_eff.data.in_memory import ImageSet, InMemoryDataModule, ResumableLoader

__all__ = [
    "BatchKeys",
    "DigitsDataModule",
    "FashionMNISTDataModule",
    "ImageSet",
    "InMemoryDataModule",
    "ResumableLoader",
    "SplitBatch",
    "batch_size",
    "call_model",
    "split_batch",
    "take",
]
