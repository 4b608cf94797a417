"""Class sums of features, added up batch by batch; the pass that reads data.

``C`` classes, ``P`` stored coordinates.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_eff.arguments import check_whole
from lightning_eff.synthesis.embedding import MeanEmbedding
from lightning_eff.synthesis.features.uses import Part

AddParts = Callable[[Tensor, Sequence[Part], Mapping[str, Tensor]], Tensor]


class ClassSums:
    """Running class sums: made by ``NTKFeatures.sums``, fed batch by batch.

    Nothing of the size of a batch times P is made. What the network gives for a record is made into a feature and
    added up in float64, so the norm of what is added is at most 1 and a record more changes the sums by its feature
    alone, however many there are.

    Args:
        add_parts: Adds features of samples sorted by class to blocks and returns the samples' squared gradient norms,
            0 where the feature is zero.
        layout: Stored shape of each block.
        num_classes: Classes C, >= 1.
        dtype: Of the totals.
        like: A tensor on the device of the network.

    Attributes:
        records: Records so far.
        degenerate: Records so far whose gradient is zero or next to it; their feature is the zero vector.

    Raises:
        ValueError: the sums would not fit into memory; told before anything is allocated.
    """

    def __init__(
        self,
        add_parts: AddParts,
        layout: Mapping[str, tuple[int, ...]],
        num_classes: int,
        dtype: torch.dtype,
        like: Tensor,
    ) -> None:
        check_whole("num_classes", num_classes)
        self.num_classes = num_classes
        self.records = 0
        self.degenerate = 0
        self._add_parts = add_parts
        _require_room(layout, num_classes, dtype.itemsize, like.device)
        self._total = {n: like.new_zeros(num_classes, *shape, dtype=dtype) for n, shape in layout.items()}
        self._counts = torch.zeros(num_classes, dtype=torch.int64)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add records to the sums of their classes.

        Args:
            x: ``(B, *input_shape)``, or the same numbers in another shape; finite.
            y: ``(B,)`` classes, integers in [0, C).

        Raises:
            ValueError: labels are not integers in range, or a feature is not finite (NaN, infinite or very large
                numbers); sums may then hold part of the batch and are not to be used.
        """
        x, counts = sorted_by_class(x, y, self.num_classes)
        if not len(x):
            return
        square_norms = self._add_parts(x, _class_parts(counts), self._total)
        if not bool(square_norms.isfinite().all()):
            raise ValueError("a record has no finite feature: it holds NaN, infinite or very large numbers")
        self.degenerate += int((square_norms == 0).sum())
        self.records += len(x)
        self._counts += torch.tensor(counts)

    def embedding(self) -> MeanEmbedding:
        """Return what was added so far, in the same tensors that later additions go to."""
        some = next(iter(self._total.values()))
        return MeanEmbedding(dict(self._total), self._counts.to(some))


def sorted_by_class(x: Tensor, y: Tensor, num_classes: int) -> tuple[Tensor, list[int]]:
    """Return the samples in ascending order of their classes, and how many each class has."""
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool or y.shape != x.shape[:1]:
        raise ValueError(
            f"expected integer labels of shape ({len(x)},), one for each sample, got {y.dtype} of {tuple(y.shape)}"
        )
    if not len(y):
        return x, [0] * num_classes
    low, high = (int(bound) for bound in torch.aminmax(y))
    if low < 0 or high >= num_classes:
        raise ValueError(f"expected labels from 0 to {num_classes - 1}, got labels from {low} to {high}")
    counts: list[int] = torch.bincount(y, minlength=num_classes).tolist()
    if bool((y[1:] < y[:-1]).any()):
        x = x.index_select(0, torch.argsort(y, stable=True).to(x.device))
    return x, counts


def _class_parts(counts: Sequence[int]) -> list[Part]:
    parts, start = [], 0
    for label, count in enumerate(counts):
        if count:
            parts.append(Part(label, start, start + count))
        start += count
    return parts


def _require_room(layout: Mapping[str, tuple[int, ...]], classes: int, itemsize: int, device: torch.device) -> None:
    numbers = sum(math.prod(shape) for shape in layout.values())
    needed, there = classes * numbers * itemsize, memory_bytes(device)
    if there is not None and needed > there:
        raise ValueError(
            f"class sums of {classes} classes times {numbers} coordinates need {needed:,} bytes, {device.type} memory "
            f"is {there:,}: take a narrower feature network, or pass sketch_dim="
        )


def memory_bytes(device: torch.device) -> int | None:
    """Return the memory of a device in bytes, for a GPU what is free of it; ``None`` where it cannot be told."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "cpu" and hasattr(os, "sysconf"):
        return int(os.sysconf("SC_PAGE_SIZE")) * int(os.sysconf("SC_PHYS_PAGES"))
    return None
