"""One sample, one row: what bounds the part that anybody has in a step.

The bound C holds for a row of a batch. It holds for a sample if a sample makes at most one row of a step, and if no
sample is in the data set twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

_REMEDY = (
    "one person would count several times in a step, and epsilon would be too small. Give every sample one row of the "
    "batch; several views or windows of it go into the second dimension"
)


def check_rows(rows: int, drawn: int, of_one: int = 1) -> None:
    """Refuse batches in which a sample has several rows.

    Args:
        rows: Rows of the batch that reached the step.
        drawn: Samples that were drawn for it; fewer rows are fine, as ``collate_fn`` may leave samples out.
        of_one: Rows that a batch of one sample has.

    Raises:
        ValueError: There are more rows than samples.
    """
    if rows > drawn or of_one > 1:
        told = f"{rows} rows, of {drawn} samples" if rows > drawn else f"{of_one} rows, of a single sample"
        raise ValueError(
            f"collate_fn and the batch transfer hooks made a batch of {told}. What is not the first dimension cannot "
            f"tell the samples apart (as in [T, B, ...]), or a sample makes several rows: {_REMEDY}"
        )


def check_each_record_once(dataset: Any) -> None:
    """Refuse a data set in which a sample is found twice: through subsets, concatenations and copies of a data set.

    Equal values in different places are not looked for.

    Raises:
        ValueError: Says where.
    """
    seen: list[tuple[Any, np.ndarray]] = []
    for piece, places in _pieces(dataset, None):
        taken = np.arange(len(piece)) if places is None else np.unique(places)
        if places is not None and len(taken) < len(places):
            raise ValueError(f"a Subset of {type(piece).__name__} takes some of its samples several times: {_REPEATED}")
        for other, others in seen:
            if _same_records(piece, other) and len(np.intersect1d(taken, others)):
                raise ValueError(f"a ConcatDataset holds samples of a {type(piece).__name__} twice: {_REPEATED}")
        seen.append((piece, taken))


_REPEATED = (
    "whoever is drawn twice moves a step twice as far, and epsilon would be too small. Train on each sample once; to "
    "weigh samples, weigh their losses; to augment, transform at random"
)


def _pieces(dataset: Any, places: np.ndarray | None) -> Iterator[tuple[Any, np.ndarray | None]]:
    """Data sets at the bottom, and the places taken of each; None is all of them."""
    if isinstance(dataset, Subset):
        indices = np.asarray(list(map(int, dataset.indices)), dtype=np.int64)
        if (indices < 0).any():
            indices %= len(dataset.dataset)  # type: ignore[arg-type]
        yield from _pieces(dataset.dataset, indices if places is None else indices[places])
    elif isinstance(dataset, ConcatDataset):
        begin = 0
        for part, end in zip(dataset.datasets, dataset.cumulative_sizes, strict=True):
            if places is None:
                yield from _pieces(part, None)
            else:
                yield from _pieces(part, places[(places >= begin) & (places < end)] - begin)
            begin = end
    else:
        yield dataset, places


def _same_records(one: Any, other: Any) -> bool:
    """Whether two data sets hold the same samples: the same object, or equal arrays with an entry for each sample."""
    if one is other:
        return True
    return len(one) == len(other) and any(
        _equal(a, b) for a in _columns(one) for b in _columns(other) if type(a) is type(b)
    )


def _columns(dataset: Any) -> list[Tensor | np.ndarray]:
    values = [*getattr(dataset, "tensors", ()), *getattr(dataset, "__dict__", {}).values()]
    # labels alone may well be equal
    return [
        value
        for value in values
        if isinstance(value, Tensor | np.ndarray) and value.ndim > 1 and len(value) == len(dataset)
    ]


def _equal(one: Any, other: Any) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(np.array_equal(one, other))
