"""What data modules with a training, a validation and a test set share.

The order of the training set depends on the seed and the epoch alone, and the training loader remembers how far an
epoch has come: a resumed run sees the batches the uninterrupted one would have seen.
"""

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from types import MappingProxyType
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from lightning_eff.arguments import check_whole


class SplitDataModule(LightningDataModule, ABC):
    """Loaders for a training, a validation and a test set; the subclass makes them.

    Args:
        batch_size: Samples a batch, per process, >= 1.
        num_workers: Processes that load, >= 0.
        seed: Of splits and of the order of the training set, >= 0.
    """

    train_set: Dataset[Any]
    val_set: Dataset[Any]
    test_set: Dataset[Any]

    def __init__(self, batch_size: int, num_workers: int, seed: int) -> None:
        super().__init__()
        check_whole("batch_size", batch_size, 1)
        check_whole("num_workers", num_workers, 0)
        check_whole("seed", seed, 0)
        self.batch_size, self.num_workers, self.seed = int(batch_size), int(num_workers), int(seed)
        self._loaded = False

    @abstractmethod
    def load(self) -> tuple[Dataset[Any], Dataset[Any], Dataset[Any]]:
        """Read and split: training, validation and test set."""

    def setup(self, stage: str | None = None) -> None:
        """Read the data unless that has been done. It is the same for every stage."""
        if not self._loaded:
            self.train_set, self.val_set, self.test_set = self.load()
            self._loaded = True

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of the training set in an order given by seed and epoch, split among the processes."""
        sampler = TrainerEpochSampler(self.train_set, self.trainer, self.seed)
        return ResumableLoader(self.train_set, sampler=sampler, **self._loading())

    def val_dataloader(self) -> DataLoader[Any]:
        """Batches of the validation set, in order."""
        return DataLoader(self.val_set, **self._loading())

    def test_dataloader(self) -> DataLoader[Any]:
        """Batches of the test set, in order."""
        return DataLoader(self.test_set, **self._loading())

    def predict_dataloader(self) -> DataLoader[Any]:
        """Batches of the test set, in order."""
        return self.test_dataloader()

    def _loading(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
        }


class ResumableLoader(DataLoader[Any]):
    """A DataLoader that can go on in the middle of an epoch.

    Lightning stores ``state_dict()`` in a checkpoint and hands it back on resuming. The batches of that epoch already
    seen are drawn and dropped; other epochs are whole, whenever in its epoch the checkpoint was written. It takes the
    arguments of a DataLoader, with a sampler that has an ``epoch``, as DistributedSampler has; with another one it
    drops nothing.
    """

    _seen = 0
    _loaded: Mapping[str, int | None] = MappingProxyType({})

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield batches, from where the loaded state left off."""
        # a generator: what stands here runs at the first batch, when Lightning has told the sampler the epoch
        loaded, self._loaded = self._loaded, {}
        same = self._epoch is not None and loaded.get("epoch") == self._epoch
        self._seen = loaded["batches_seen"] or 0 if same else 0
        for batch in islice(super().__iter__(), self._seen, None):
            self._seen += 1
            yield batch

    def state_dict(self) -> dict[str, int | None]:
        """Return the epoch and the number of its batches handed out."""
        return {"epoch": self._epoch, "batches_seen": self._seen}

    def load_state_dict(self, state: Mapping[str, int | None]) -> None:
        """Make the next iteration skip the batches handed out before, if it is of the same epoch."""
        self._loaded = dict(state)

    @contextmanager
    def aside(self) -> Generator[None, None, None]:
        """Inside the block the loader gives whole epochs, and nothing of it is counted as handed out.

        For whoever reads it beside a Trainer, whose own pass is under way or is to go on where a checkpoint left it.
        """
        held, self._loaded = (self._loaded, self._seen), {}
        try:
            yield
        finally:
            self._loaded, self._seen = held

    @property
    def _epoch(self) -> int | None:
        return getattr(self.sampler, "epoch", None)


class TrainerEpochSampler(DistributedSampler[Any]):
    """Order given by the seed and the trainer's epoch, split among its processes.

    Lightning leaves a DistributedSampler in its place and tells it the epoch. With ``max_steps`` and no
    ``max_epochs``, Lightning 2.6 tells a run resumed at an epoch's end a number too high by one: the trainer's own
    count is right and is taken instead.

    Args:
        dataset: What is sampled.
        trainer: Whose epochs and processes; ``None`` for one process that calls ``set_epoch`` itself.
        seed: Of the order, >= 0.
    """

    def __init__(self, dataset: Dataset[Any], trainer: Trainer | None, seed: int) -> None:
        replicas, rank = (trainer.world_size, trainer.global_rank) if trainer else (1, 0)
        super().__init__(dataset, num_replicas=replicas, rank=rank, shuffle=True, seed=seed)
        self._trainer = trainer

    def set_epoch(self, epoch: int) -> None:
        """Take the trainer's epoch, or the one given where there is no trainer."""
        super().set_epoch(self._trainer.current_epoch if self._trainer else epoch)


def seeded_permutation(n: int, seed: int) -> Tensor:
    """Permutation of ``range(n)``, int64 ``[n]``, that depends on the seed alone."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))
