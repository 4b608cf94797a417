"""Calibration samples, in groups that may each see other coalitions, on one process or shared by several."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_eff.batch import SplitBatch, batch_size, take
from lightning_eff.batch import split_batch as split_pair

MAX_GROUPS, MIN_GROUP = 16, 32  # more groups estimate better, smaller ones run slower (both measured)


def alone(values: Tensor) -> Tensor:
    """Sum over processes where there is only one."""
    return values


def length_of(loader: Any) -> int | None:
    """Batches in a loader, or samples in a data set; None where that is unknown."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def samples_in(loader: Any) -> int | None:
    """Samples in the data set of a loader; None where that is unknown, or where its items are whole batches."""
    whole_batches = getattr(loader, "batch_size", 1) is None and getattr(loader, "batch_sampler", None) is None
    return None if whole_batches else length_of(getattr(loader, "dataset", None))


@dataclass(frozen=True)
class Samples:
    """Batches for scoring.

    Attributes:
        groups: for each group the batches ``(inputs, target)`` of this process.
        reduce: sums a float64 tensor over all processes.
    """

    groups: Sequence[Sequence[tuple[Any, Any]]]
    reduce: Callable[[Tensor], Tensor] = alone

    @property
    def counts(self) -> Tensor:
        """Samples per group over all processes, float64 ``[G]``."""
        local = [float(sum(batch_size(inputs) for inputs, _ in group)) for group in self.groups]
        return self.reduce(torch.tensor(local, dtype=torch.float64))

    @property
    def example(self) -> Any:
        """Inputs of at most two samples."""
        return take(self.groups[0][0][0], slice(0, 2))

    @classmethod
    def collect(
        cls,
        batches: Iterable[Any],
        samples: int,
        split_batch: SplitBatch | None = None,
        *,
        groups: int | None = None,
        reduce: Callable[[Tensor], Tensor] = alone,
        world_size: int = 1,
    ) -> Samples:
        """Take the first ``samples`` samples (over all processes) of ``batches`` and deal them into groups.

        Args:
            batches: batches as the model takes them, already on its device.
            samples: number wanted; all there are when there are fewer.
            split_batch: ``batch -> (inputs, target)``, for batches of another form.
            groups: number of groups; by default 16, with at least 32 samples each.
            reduce: sums a tensor over all processes.
            world_size: number of processes that collect.

        Raises:
            ValueError: there is not a single sample.
        """
        mine = -(-samples // world_size)
        taken = list(_first(map(split_batch or split_pair, batches), mine))
        count = sum(batch_size(inputs) for inputs, _ in taken)
        total, empty = reduce(torch.tensor([count, count == 0], dtype=torch.float64)).int().tolist()
        if empty:  # on every process, so that none waits for another
            raise ValueError(
                "the calibration loader gave no sample" + (f" on {empty} processes" if world_size > 1 else "")
            )
        wanted = groups or max(1, min(MAX_GROUPS, total // MIN_GROUP))
        wanted = max(1, min(wanted, total // world_size))  # no group without a sample
        joined = _joined(taken)
        if joined is None:  # samples of different shapes: the loader's batches are the groups
            dealt = [[batch] for batch in taken] if world_size == 1 else [taken]
        else:
            bounds = [round(i * count / wanted) for i in range(wanted + 1)]
            spans = [slice(a, b) for a, b in pairwise(bounds)]
            dealt = [[take(joined, span)] for span in spans]
        return cls(dealt, reduce)


def _first(batches: Iterator[tuple[Any, Any]], samples: int) -> Iterator[tuple[Any, Any]]:
    left = samples
    for batch in batches:
        size = batch_size(batch[0])
        if size:
            yield batch if size <= left else take(batch, slice(0, left))
        left -= size
        if left <= 0:
            return


def _joined(batches: Sequence[tuple[Any, Any]]) -> tuple[Any, Any] | None:
    """One batch of all samples; None where tensors do not fit together or other things are in the batches."""
    trees = [pytree.tree_flatten(batch) for batch in batches]
    leaves = [flat for flat, _ in trees]
    if any(not isinstance(leaf, Tensor) or not leaf.ndim for flat in leaves for leaf in flat):
        return None
    shapes = {tuple((leaf.shape[1:], leaf.dtype) for leaf in flat) for flat in leaves}
    sizes_agree = all(len({leaf.size(0) for leaf in flat}) == 1 for flat in leaves)
    if len(shapes) > 1 or not sizes_agree:
        return None
    joined: tuple[Any, Any] = pytree.tree_unflatten(
        [torch.cat(parts) for parts in zip(*leaves, strict=True)], trees[0][1]
    )
    return joined
