"""Read private records once each: which form the data may have, what is refused, and who reads which share.

The sensitivity of a release rests on how often one record may enter it. A data loader that repeats, weights or pads
would break that without a sign, so map-style data sets are read by a loader of our own, in order and in disjoint
shards without padding, samplers are asked beforehand which records they would take, and what was read is counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate

from lightning_eff.accounting import Adjacency
from lightning_eff.batch import SplitBatch
from lightning_eff.synthesis.processes import ONE_RELEASE, Processes
from lightning_eff.synthesis.samplers import contents_are_compared, records_taken
from lightning_eff.synthesis.tables import Rows, TableSchema

PrivateData = DataLoader[Any] | Dataset[Any] | tuple[Tensor, Tensor] | Iterable[Any]


@dataclass(frozen=True)
class Shard:
    """What this process reads.

    Args:
        batches: Its batches.
        records: How many records all processes read together; ``None`` where only reading tells.
        mine: Records among them that this process reads.
        most: How many it may find in its batches, where each record may come several times.
        assumptions: Sentences on what could not be seen beforehand, and the guarantee rests on.
        fingerprint: Of all records, which must be the same in every process.
    """

    batches: Iterable[Any]
    records: int | None
    mine: int | None
    most: int | None = None
    assumptions: tuple[str, ...] = ()
    fingerprint: str = ""

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def check_number(self, read: int) -> None:
        """Raise a ValueError where the batches held other records than the ones asked for, by their number."""
        if self.mine is None or self.most is None or self.mine <= read <= self.most:
            return
        wanted = f"{self.mine}" if self.most == self.mine else f"{self.mine} to {self.most}"
        raise ValueError(
            f"expected {wanted} records in the batches of this process, got {read}: collate_fn or split_batch must "
            "give every record once; where it makes several of one, max_contributions= says how many at most"
        )


def shard_of(
    data: PrivateData,
    *,
    batch_size: int,
    max_contributions: int = 1,
    adjacency: Adjacency = "replace_one",
    processes: Processes | None = None,
) -> Shard:
    """Split private data among the processes: disjoint, complete, without padding. No record is read here.

    Args:
        data: A data loader, a map-style data set of ``(x, y)``, tensors or arrays ``(x [n, ...], y [n])``, or, in one
            process, any iterable of batches.
        batch_size: Records read at a time, of map-style data sets.
        max_contributions: How often one record may be read.
        adjacency: Which data sets are neighbours; where they differ in size, samplers that fix it are refused.
        processes: By default those of the running process group.

    Raises:
        ValueError: The data would give records more than ``max_contributions`` times, in numbers that depend on other
            records, or not in disjoint shards.
    """
    processes = processes or Processes.running()
    if isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, Tensor | np.ndarray) for part in data):
        if len(data[0]) != len(data[1]):
            raise ValueError(f"expected as many labels as records, got {len(data[1])} and {len(data[0])}")
        data = TensorDataset(*map(_tensor, data))
    if isinstance(data, Tensor | np.ndarray):
        data = TensorDataset(_tensor(data))
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        data = DataLoader(data, batch_size=batch_size)
    if isinstance(data, DataLoader) and data.drop_last:
        rank_zero_warn("drop_last=True is for training and would leave records out: all are read")
    if isinstance(data, DataLoader) and not isinstance(data.dataset, IterableDataset):
        return _shard_of_loader(data, batch_size, max_contributions, adjacency, processes)
    return _shard_of_iterable(data, batch_size, processes)


def _shard_of_loader(
    loader: DataLoader[Any], batch_size: int, max_contributions: int, adjacency: Adjacency, processes: Processes
) -> Shard:
    taken = records_taken(loader, max_contributions=max_contributions, adjacency=adjacency, processes=processes)
    share = taken.indices[_part(len(taken.indices), processes)]
    assumptions = [
        f"Which records {name} takes does not depend on other records; that could not be checked."
        for name in taken.chosen_by
    ]
    if processes.world > 1 and not contents_are_compared(loader.dataset):
        assumptions.append("All processes hold the same records in the same order; their number alone was compared.")
    if loader.batch_sampler is None:  # the data set itself gives batches
        assumptions.append("The batches of the data set hold every record once; that could not be checked.")
        batches = _own_loader(loader, sampler=share, batch_size=None)
        return Shard(batches, None, None, None, tuple(assumptions), taken.fingerprint)
    if loader.collate_fn is not default_collate:
        assumptions.append("The collate_fn gives records one by one, unmixed; that could not be checked.")
    parts = [list(share[start : start + batch_size]) for start in range(0, len(share), batch_size)]
    if type(loader.dataset) is TensorDataset and loader.collate_fn is default_collate:
        # a tensor gives a batch at once, a hundred times faster than record by record
        batches = DataLoader(loader.dataset, batch_size=None, sampler=parts)
    else:
        batches = _own_loader(loader, batch_sampler=parts)
    # of a record that the sampler takes several times, its copies in the batches count as well
    most = len(share) if max_contributions == 1 else max(len(share), len(set(share)) * max_contributions)
    return Shard(batches, len(taken.indices), len(share), most, tuple(assumptions), taken.fingerprint)


def _shard_of_iterable(data: Any, batch_size: int, processes: Processes) -> Shard:
    if not isinstance(data, Iterable) or isinstance(data, dict | str):
        raise ValueError(
            "expected private data as a DataLoader, a data set of (x, y), tensors or arrays (x, y) or an iterable of "
            f"batches, got a {type(data).__name__}"
        )
    if isinstance(data, list | tuple) and any(isinstance(part, DataLoader) for part in data):
        raise ValueError(f"expected one data loader, got {len(data)}: join their data sets with ConcatDataset")
    if processes.world > 1:
        raise ValueError(
            "an iterable cannot be shown to give each process other records: pass a map-style data set or its loader; "
            f"{ONE_RELEASE}"
        )
    if isinstance(data, IterableDataset):
        data = DataLoader(data, batch_size=batch_size)
    if isinstance(data, DataLoader) and data.num_workers > 1:
        raise ValueError(
            f"{data.num_workers} workers may each give all records of an IterableDataset, which multiplies their "
            "sensitivity: take num_workers of 0 or 1"
        )
    if isinstance(data, DataLoader) and data.drop_last:
        data = _own_loader(data, batch_size=data.batch_size)
    believed = "The iterable that was read gave every record once; that could not be checked."
    return Shard(data, None, None, assumptions=(believed,))


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
    batch: Any, num_classes: int, number: int, split_batch: SplitBatch, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Split a batch and check it; messages hold no values.

    Args:
        batch: What the loader gave.
        num_classes: C.
        number: Of the batch, for messages.
        split_batch: ``batch -> (x, y)``.
        device: Where to.

    Returns:
        ``x [B, ...]`` float32 and ``y [B]`` int64 in 0..C-1, zeros where C is 1 and there are no labels.

    Raises:
        ValueError: ``x`` is no tensor of real numbers, or labels are no classes.
        TypeError: The batch has another form; the message tells which is expected.
    """
    if num_classes == 1 and isinstance(batch, list | tuple) and len(batch) == 1:
        batch = batch[0]
    x, y = (batch, None) if num_classes == 1 and isinstance(batch, Tensor) else split_batch(batch)
    x, y = map(_tensor, (x, y))
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
        if num_classes == 1:
            raise ValueError(
                f"batch {number}: num_classes=1 is for records without labels, got labels of several classes: leave "
                "them out with split_batch=lambda batch: (batch[0], None), or say how many classes there are"
            )
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


def _tensor(value: Any) -> Any:
    # a copy: arrays that must not be written to would be warned of
    return torch.tensor(value) if isinstance(value, np.ndarray) else value


def _kind(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def encoded(data: PrivateData | Rows, schema: TableSchema | None) -> PrivateData:
    """What a release reads of what was handed to it: rows of a table in the coordinates of their schema.

    Raises:
        ValueError: It is a file's name or a data module, which are read elsewhere; or rows do not fit the schema.
    """
    if isinstance(data, str | Path | LightningDataModule):
        raise ValueError(
            "release reads rows, tensors, a data set or a loader, got a "
            f"{'file name' if isinstance(data, str | Path) else 'data module'}: call "
            "release(read_csv(path)), with read_csv of lightning_eff.synthesis.tables, or "
            "trainer.fit(model, datamodule=...)"
        )
    return schema.encode(data) if schema is not None and _are_rows(data) else data


def _are_rows(data: Any) -> bool:
    """Whether data are a table's rows: by column, one mapping a row, or a data frame."""
    if isinstance(data, Mapping) or hasattr(data, "columns"):
        return True
    return isinstance(data, list | tuple) and bool(data) and isinstance(data[0], Mapping) and "x" not in data[0]
