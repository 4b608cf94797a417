"""Read private records once each: which form the data may have, what is refused, and who reads which share.

The sensitivity of a release rests on how often one record may enter it. A data loader that repeats, weights or pads
would break that without a sign, so map-style data sets are read by a loader of our own, in order and in disjoint
shards without padding, and samplers are asked beforehand which records they would take.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from lightning_eff.batch import SplitBatch
from lightning_eff.surgery.state import untouched_generators

PrivateData = DataLoader[Any] | Dataset[Any] | tuple[Tensor, Tensor] | Iterable[Any]


@dataclass(frozen=True)
class Processes:
    """The processes that read together; one where torch.distributed is not running."""

    rank: int = 0
    world: int = 1

    @classmethod
    def running(cls) -> Processes:
        """Those of the default process group."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    def agree(self, problem: BaseException | None) -> None:
        """Raise the problem of any of them in all of them, so that none waits for one that has failed."""
        if self.world > 1:
            problems: list[Any] = [None] * self.world
            dist.all_gather_object(problems, None if problem is None else f"{type(problem).__name__}: {problem}")
            if problem is None and any(problems):
                failed = next(rank for rank, text in enumerate(problems) if text)
                raise RuntimeError(f"process {failed} could not read its records: {problems[failed]}")
        if problem is not None:
            raise problem

    def sum(self, values: Tensor) -> Tensor:
        """Add up a tensor of each of them, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def from_first(self, values: Tensor) -> Tensor:
        """Overwrite a tensor by that of process 0."""
        if self.world > 1:
            dist.broadcast(values, src=0)
        return values


@dataclass(frozen=True)
class Shard:
    """What this process reads.

    Args:
        batches: Its batches.
        records: How many records all processes read together; ``None`` where only reading tells.
        mine: Records among them that this process reads.
        once: Whether it was seen beforehand how often each record is read, or has to be believed.
    """

    batches: Iterable[Any]
    records: int | None
    mine: int | None
    once: bool = True

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def shard_of(
    data: PrivateData, *, batch_size: int, max_contributions: int = 1, processes: Processes | None = None
) -> Shard:
    """Split private data among the processes: disjoint, complete, without padding. No record is read here.

    Args:
        data: A data loader, a map-style data set of ``(x, y)``, tensors ``(x [n, ...], y [n])``, or, in one process,
            any iterable of batches.
        batch_size: Records read at a time, of map-style data sets.
        max_contributions: How often one record may be read.
        processes: By default those of the running process group.

    Raises:
        ValueError: The data would give records more than ``max_contributions`` times, in numbers that depend on other
            records, or not in disjoint shards.
    """
    processes = processes or Processes.running()
    if isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        if len(data[0]) != len(data[1]):
            raise ValueError(f"expected as many labels as records, got {len(data[1])} and {len(data[0])}")
        data = TensorDataset(*data)
    if isinstance(data, Tensor):
        data = TensorDataset(data)
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        data = DataLoader(data, batch_size=batch_size)
    if isinstance(data, DataLoader) and not isinstance(data.dataset, IterableDataset):
        return _shard_of_loader(data, batch_size, max_contributions, processes)
    return _shard_of_iterable(data, batch_size, processes)


def _shard_of_loader(loader: DataLoader[Any], batch_size: int, max_contributions: int, processes: Processes) -> Shard:
    if loader.batch_sampler is None:  # the data set itself gives batches
        indices = _indices(loader.sampler, max_contributions, processes)
        share = indices[_part(len(indices), processes)]
        return Shard(_own_loader(loader, sampler=share, batch_size=None), None, None)
    if type(loader.batch_sampler) is BatchSampler:
        indices = _indices(loader.batch_sampler.sampler, max_contributions, processes)
        kept = len(indices)
        if loader.drop_last and not isinstance(loader.sampler, DistributedSampler):
            kept -= kept % int(loader.batch_size or 1)
        if kept < len(indices):
            rank_zero_warn(
                f"drop_last=True: {len(indices) - kept} of {len(indices)} records are ignored, the release is of "
                f"{kept}; pass a loader with drop_last=False to use all"
            )
            if not kept:
                raise ValueError(f"expected at least one full batch of {loader.batch_size}, got {len(indices)} records")
        indices = indices[:kept]
    else:
        indices = [index for batch in _drawn(loader.batch_sampler, processes) for index in batch]
        _check_repeats(indices, max_contributions, loader.batch_sampler)
    share = indices[_part(len(indices), processes)]
    batches = [list(share[start : start + batch_size]) for start in range(0, len(share), batch_size)]
    if type(loader.dataset) is TensorDataset and loader.collate_fn is default_collate:
        # a tensor gives a batch at once, a hundred times faster than record by record
        return Shard(DataLoader(loader.dataset, batch_size=None, sampler=batches), len(indices), len(share))
    return Shard(_own_loader(loader, batch_sampler=batches), len(indices), len(share))


def _shard_of_iterable(data: Any, batch_size: int, processes: Processes) -> Shard:
    if not isinstance(data, Iterable) or isinstance(data, dict | str):
        raise ValueError(
            "expected private data as a DataLoader, a data set of (x, y), tensors (x, y) or an iterable of batches, "
            f"got a {type(data).__name__}"
        )
    if isinstance(data, list | tuple) and any(isinstance(part, DataLoader) for part in data):
        raise ValueError(f"expected one data loader, got {len(data)}: join their data sets with ConcatDataset")
    if processes.world > 1:
        raise ValueError(
            "an iterable cannot be shown to give each process other records: pass a map-style data set or its loader, "
            "or release in one process before fit"
        )
    if isinstance(data, IterableDataset):
        data = DataLoader(data, batch_size=batch_size)
    if isinstance(data, DataLoader) and data.num_workers > 1:
        raise ValueError(
            f"{data.num_workers} workers may each give all records of an IterableDataset, which multiplies their "
            "sensitivity: take num_workers of 0 or 1"
        )
    return Shard(data, None, None, once=False)


def _indices(sampler: Iterable[int], max_contributions: int, processes: Processes) -> Sequence[int]:
    """Which records a sampler takes, in an order that is the same in every process."""
    if isinstance(sampler, WeightedRandomSampler):
        raise ValueError(
            "a WeightedRandomSampler repeats some records and, where weights follow the labels, how often depends on "
            "the other records, so no sensitivity is known: pass the loader with shuffle=True or without a sampler"
        )
    if isinstance(sampler, RandomSampler) and sampler.replacement and max_contributions == 1:
        raise ValueError(
            "RandomSampler(replacement=True) repeats records, which multiplies their sensitivity: pass a loader "
            "without replacement, or max_contributions=, the most times one record may be read, if it is intended"
        )
    if isinstance(sampler, DistributedSampler):
        size = len(cast(Sized, sampler.dataset))
        if sampler.num_replicas != processes.world:
            raise ValueError(
                f"a DistributedSampler for {sampler.num_replicas} processes pads its shards with repeated records, and "
                f"{processes.world} process reads: pass the loader without it, shards are made here"
            )
        return range(size)
    size = len(sampler.data_source) if isinstance(sampler, SequentialSampler | RandomSampler) else -1
    if isinstance(sampler, SequentialSampler) or (
        isinstance(sampler, RandomSampler) and not sampler.replacement and sampler.num_samples == size
    ):
        return range(size)
    indices = _drawn(sampler, processes)
    _check_repeats(indices, max_contributions, sampler)
    return indices


def _drawn(sampler: Iterable[Any], processes: Processes) -> list[Any]:
    with untouched_generators():
        drawn = [list(sampler)]
    if processes.world > 1:
        dist.broadcast_object_list(drawn, src=0)
    return drawn[0]


def _check_repeats(indices: Sequence[Any], max_contributions: int, sampler: object) -> None:
    most = max(Counter(int(index) for index in indices).values(), default=0)
    if not most:
        raise ValueError(f"expected records, got none from {type(sampler).__name__}")
    if most > max_contributions:
        raise ValueError(
            f"{type(sampler).__name__} gives one record {most} times, which multiplies its sensitivity: pass a loader "
            f"that gives each record once, or max_contributions={most} if it is intended"
        )


def _part(size: int, processes: Processes) -> slice:
    return slice(size * processes.rank // processes.world, size * (processes.rank + 1) // processes.world)


def _own_loader(loader: DataLoader[Any], **batching: Any) -> DataLoader[Any]:
    return DataLoader(
        loader.dataset,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        timeout=loader.timeout,
        **batching,
    )


def records_of(
    batch: Any, num_classes: int, number: int, split: SplitBatch, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Split a batch and check it; messages hold no values.

    Args:
        batch: What the loader gave.
        num_classes: C.
        number: Of the batch, for messages.
        split: ``batch -> (x, y)``.
        device: Where to.

    Returns:
        ``x [B, ...]`` float32 and ``y [B]`` int64 in 0..C-1, zeros where C is 1 and there are no labels.

    Raises:
        ValueError: ``x`` is no tensor of real numbers, or labels are no classes.
        TypeError: The batch has another form; the message tells which is expected.
    """
    if num_classes == 1 and isinstance(batch, list | tuple) and len(batch) == 1:
        batch = batch[0]
    x, y = (batch, None) if num_classes == 1 and isinstance(batch, Tensor) else split(batch)
    if not isinstance(x, Tensor) or not x.ndim or x.is_complex():
        raise ValueError(f"batch {number}: expected records as a tensor [B, ...] of numbers, got {_kind(x)}")
    if y is None:
        y = torch.zeros(len(x), dtype=torch.int64)
    return x.to(device, torch.float32), _classes(y, len(x), num_classes, number).to(device)


def _classes(y: Any, size: int, num_classes: int, number: int) -> Tensor:
    wanted = f"expected labels [B] as integers in 0..{num_classes - 1}"
    if not isinstance(y, Tensor):
        raise ValueError(f"batch {number}: {wanted}, got {_kind(y)}")
    if y.shape == (size, num_classes) and num_classes > 1:
        chosen = y.float().argmax(dim=1)
        if not torch.equal(y.float(), F.one_hot(chosen, num_classes).float()):
            raise ValueError(f"batch {number}: {wanted} or one-hot, got {_kind(y)} whose rows are not one-hot")
        return chosen
    if y.shape == (size, 1):
        y = y[:, 0]
    if y.shape != (size,):
        raise ValueError(f"batch {number}: {wanted} for {size} records, got {_kind(y)}")
    if y.is_floating_point() or y.is_complex():
        raise ValueError(f"batch {number}: {wanted}, got {_kind(y)}; is this a regression target?")
    classes: Tensor = y.long()
    if size and not (int(classes.min()) >= 0 and int(classes.max()) < num_classes):
        raise ValueError(f"batch {number}: {wanted}, got labels outside of it; is one missing, or num_classes wrong?")
    return classes


def check_finite(x: Tensor, number: int, names: Sequence[str] | None = None) -> None:
    """Raise a ValueError where a record holds NaN or infinity; it names the batch and the coordinate, no value.

    Args:
        x: ``[B, ...]``.
        number: Of the batch.
        names: Of the D coordinates, where they have names.
    """
    if bool(torch.isfinite(x).all()):
        return
    broken = ~torch.isfinite(x.flatten(1))
    place = int(broken.any(dim=0).nonzero()[0])
    where = f"column {names[place]!r}" if names and len(names) == math.prod(x.shape[1:]) else f"coordinate {place}"
    raise ValueError(
        f"batch {number}: {int(broken.any(dim=1).sum())} of {len(x)} records hold NaN or infinity, first in {where}; "
        "repair or remove such records by a rule that does not look at others"
    )


def _kind(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
