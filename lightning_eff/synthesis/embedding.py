"""The class sums of unit-norm features: what a private release hands on and a generator is trained against.

DP-NTK (arXiv 2303.01687) reads private data once, to form the sums S_c of the features of each class c and the counts
m_c. Everything after that works on :class:`MeanEmbedding`; the class means are S_c / m_c.

``C`` classes, ``P`` stored coordinates of a feature.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(eq=False)
class MeanEmbedding:
    """Sums of features by class, and how many records each class has.

    Args:
        blocks: Class sums by parameter name, each ``(C, *stored shape of that parameter)``; ``NTKFeatures.layout``
            tells names and stored shapes. The order is that of the coordinates in :meth:`flatten`.
        counts: ``(C,)`` records by class. Released counts carry noise, so they are floating point; > 0 where a mean is
            to be taken.
        num_records: Number of records, where it is public.
        private: Whether noise was added under a finite epsilon.
        meta: What else is to be kept, plain Python only (it goes into checkpoints).
    """

    blocks: dict[str, Tensor]
    counts: Tensor
    num_records: int | None = None
    private: bool = False
    meta: dict[str, Any] = field(default_factory=dict)
    _norms: tuple[list[tuple[Tensor, int]], Tensor] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.blocks:
            raise ValueError("expected at least one block of class sums, got none")
        for name, block in self.blocks.items():
            if block.ndim < 1 or len(block) != len(self.counts):
                raise ValueError(
                    f"expected a row for each of the {len(self.counts)} classes in block {name!r}, "
                    f"got the shape {tuple(block.shape)}"
                )

    def __repr__(self) -> str:
        return (
            f"MeanEmbedding({self.num_classes} classes, {self.feature_dim} coordinates, "
            f"num_records={self.num_records}, private={self.private})"
        )

    @property
    def num_classes(self) -> int:
        """Number of classes C."""
        return len(self.counts)

    @property
    def feature_dim(self) -> int:
        """Stored coordinates P of one class."""
        return sum(math.prod(block.shape[1:]) for block in self.blocks.values())

    @property
    def layout(self) -> dict[str, tuple[int, ...]]:
        """Shape of each block without the class axis."""
        return {name: tuple(block.shape[1:]) for name, block in self.blocks.items()}

    def flatten(self) -> Tensor:
        """Return the class sums as ``(C, P)``, a copy."""
        return torch.cat([block.flatten(1) for block in self.blocks.values()], dim=1)

    def square_norms(self) -> Tensor:
        """Return ``(C,)`` squared norms of the class *sums* in float64; worked out again only when a block changed."""
        if self._norms is None or not self._unchanged(self._norms[0]):
            self._norms = [(block, block._version) for block in self.blocks.values()], self.dot(self)
        return self._norms[1]

    def _unchanged(self, seen: list[tuple[Tensor, int]]) -> bool:
        blocks = list(self.blocks.values())
        return len(seen) == len(blocks) and all(
            block is before and block._version == version for block, (before, version) in zip(blocks, seen, strict=True)
        )

    def norm(self, per_class: bool = False) -> Tensor:
        """Return the norm of all class sums together, a scalar, or of each, ``(C,)``; float64."""
        squares = self.square_norms()
        return (squares if per_class else squares.sum()).sqrt()

    def dot(self, other: MeanEmbedding) -> Tensor:
        """Return ``(C,)`` inner products with the class sums of ``other``, in float64.

        Raises:
            ValueError: the other has other blocks or classes; the first difference is named.
        """
        self.require_layout(other.layout)
        if other.num_classes != self.num_classes:
            raise ValueError(f"expected an embedding of {self.num_classes} classes, got {other.num_classes}")
        # a class at a time: no float64 copy of everything at once
        pairs = [(ours, other.blocks[name]) for name, ours in self.blocks.items()]
        total = torch.zeros(self.num_classes, dtype=torch.float64, device=self.counts.device)
        for c in range(self.num_classes):
            for ours, theirs in pairs:
                total[c] += torch.dot(ours[c].flatten().double(), theirs[c].flatten().double())
        return total

    def require_layout(self, layout: Mapping[str, tuple[int, ...]]) -> None:
        """Raise a ValueError that names the first block in which this embedding differs from ``layout``."""
        own = self.layout
        for name in dict.fromkeys([*layout, *own]):
            if own.get(name) != layout.get(name):
                raise ValueError(
                    "the embedding belongs to another feature network: "
                    f"expected block {name!r} of shape {layout.get(name, 'none')}, got {own.get(name, 'none')}"
                )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> MeanEmbedding:
        """Return it with blocks and counts on ``device``, as ``dtype``; what is already there is shared, not copied."""
        moved = {name: block.to(device=device, dtype=dtype) for name, block in self.blocks.items()}
        counts = self.counts.to(device=device, dtype=dtype)
        return MeanEmbedding(moved, counts, self.num_records, self.private, dict(self.meta))

    def state_dict(self) -> dict[str, Any]:
        """Return plain Python and tensors that :meth:`from_state_dict` takes."""
        return {
            "blocks": dict(self.blocks),
            "counts": self.counts,
            "num_records": self.num_records,
            "private": self.private,
            "meta": dict(self.meta),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> MeanEmbedding:
        """Build it from what :meth:`state_dict` returned."""
        return cls(
            dict(state["blocks"]), state["counts"], state["num_records"], bool(state["private"]), dict(state["meta"])
        )
