"""Which records a data loader would read, asked before one is read: how often each, and whether others decide that.

A sampler that repeats or weights, and a data set made of another with an index twice, would let one record enter a
release more often than its noise is made for.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence, Sized
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_eff.accounting import Adjacency
from lightning_eff.surgery.state import untouched_generators
from lightning_eff.synthesis.processes import Processes


@dataclass(frozen=True)
class Taken:
    """Records that are to be read.

    Args:
        indices: Into the loader's data set, in an order that is the same in every process.
        chosen_by: Names of what chose them from more; the choice must not depend on other records.
        fingerprint: Of the records behind the indices, to compare processes by; "" in a single process.
    """

    indices: Sequence[int]
    chosen_by: tuple[str, ...]
    fingerprint: str


def records_taken(
    loader: DataLoader[Any], *, max_contributions: int, adjacency: Adjacency, processes: Processes
) -> Taken:
    """Tell which records a loader of a map-style data set takes.

    Raises:
        ValueError: A record would be read more than ``max_contributions`` times, or what is read depends on other
            records.
    """
    plain = loader.batch_sampler is None or type(loader.batch_sampler) is BatchSampler
    sampler = loader.batch_sampler.sampler if type(loader.batch_sampler) is BatchSampler else loader.sampler
    chosen_by: list[str] = []
    if not plain:
        assert loader.batch_sampler is not None
        chosen_by.append(type(loader.batch_sampler).__name__)
        indices: Sequence[int] = [i for batch in _drawn(loader.batch_sampler, processes) for i in batch]
    else:
        whole = _whole_size(sampler, max_contributions, adjacency, processes)
        indices = _drawn(sampler, processes) if whole is None else range(whole)
        if whole is None:
            chosen_by.append(type(sampler).__name__)
    if not len(indices) and chosen_by:
        raise ValueError(f"expected records, got none from {chosen_by[0]}")
    records = _unwrapped(loader.dataset, indices, chosen_by)
    if not (isinstance(indices, range) and records is None):
        most = max(Counter(indices if records is None else records).values(), default=0)
        if most > max_contributions:
            name = chosen_by[0] if chosen_by else type(loader.dataset).__name__
            raise ValueError(
                f"{name} gives one record {most} times, which multiplies its sensitivity: pass a loader that gives "
                f"each record once, or max_contributions={most} if it is intended"
            )
    fingerprint = _fingerprint(loader.dataset, indices) if processes.world > 1 else ""
    return Taken(indices, tuple(dict.fromkeys(chosen_by)), fingerprint)


def contents_are_compared(dataset: Any) -> bool:
    """Whether fingerprints tell the records of a data set too, and not only which indices of it are read."""
    if isinstance(dataset, Subset):
        return contents_are_compared(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        return all(map(contents_are_compared, dataset.datasets))
    return type(dataset) is TensorDataset


def _whole_size(
    sampler: Iterable[int], max_contributions: int, adjacency: Adjacency, processes: Processes
) -> int | None:
    """How many records there are, where a sampler takes each of them once; ``None`` where it has to be drawn from."""
    if isinstance(sampler, WeightedRandomSampler):
        raise ValueError(
            "a WeightedRandomSampler repeats some records and, where weights follow the labels, how often depends on "
            "the other records, so no sensitivity is known: pass the loader with shuffle=True or without a sampler"
        )
    if isinstance(sampler, DistributedSampler):
        if sampler.num_replicas != processes.world:
            raise ValueError(
                f"a DistributedSampler for {sampler.num_replicas} processes pads its shards with repeated records, and "
                f"{processes.world} process reads: pass the loader without it, shards are made here"
            )
        return len(cast(Sized, sampler.dataset))
    if isinstance(sampler, SequentialSampler):
        return len(sampler.data_source)
    if not isinstance(sampler, RandomSampler):
        return None
    if sampler.replacement and max_contributions == 1:
        raise ValueError(
            "RandomSampler(replacement=True) repeats records, which multiplies their sensitivity: pass a loader "
            "without replacement, or max_contributions=, the most times one record may be read, if it is intended"
        )
    if adjacency == "add_remove" and (sampler.replacement or sampler._num_samples is not None):
        raise ValueError(
            "a RandomSampler that draws with replacement or a fixed number of records takes others where there is one "
            "record more, so under adjacency='add_remove' no sensitivity is known: pass the loader with shuffle=True "
            "or without a sampler, or take adjacency='replace_one'"
        )
    whole = not sampler.replacement and sampler.num_samples == len(sampler.data_source)
    return len(sampler.data_source) if whole else None


def _drawn(sampler: Iterable[Any], processes: Processes) -> list[Any]:
    with untouched_generators():
        drawn = [list(sampler)]
    if processes.world > 1:
        dist.broadcast_object_list(drawn, src=0)
    return drawn[0]


def _unwrapped(dataset: Any, indices: Sequence[int], chosen_by: list[str]) -> list[Hashable] | None:
    """Name the record behind each index, through data sets that are made of others; ``None`` if it is made of none."""
    if not isinstance(dataset, Subset | ConcatDataset):
        return None
    return [_record(dataset, int(index), chosen_by) for index in indices]


def _record(dataset: Any, index: int, chosen_by: list[str]) -> Hashable:
    while isinstance(dataset, Subset | ConcatDataset):
        if isinstance(dataset, Subset):
            if type(dataset).__name__ not in chosen_by:
                chosen_by.append(type(dataset).__name__)
            dataset, index = dataset.dataset, int(dataset.indices[index])
        else:
            part = bisect_right(dataset.cumulative_sizes, index)
            index -= dataset.cumulative_sizes[part - 1] if part else 0
            dataset = dataset.datasets[part]
    # the same tensors in two data sets are the same records
    return id(dataset.tensors[0] if type(dataset) is TensorDataset else dataset), index


def _fingerprint(dataset: Any, indices: Sequence[int]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    _digest(dataset, digest)
    digest.update(repr(indices if isinstance(indices, range) else list(indices)).encode())
    return str(digest.hexdigest())


def _digest(dataset: Any, digest: Any) -> None:
    digest.update(f"{type(dataset).__name__} {len(dataset) if hasattr(dataset, '__len__') else ''}".encode())
    if isinstance(dataset, Subset):
        digest.update(repr([int(index) for index in dataset.indices]).encode())
        _digest(dataset.dataset, digest)
    elif isinstance(dataset, ConcatDataset):
        for part in dataset.datasets:
            _digest(part, digest)
    elif type(dataset) is TensorDataset:
        for tensor in dataset.tensors:
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
