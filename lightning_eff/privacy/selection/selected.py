"""What of one tensor takes part in a private step, and the small block that holds only that.

An active coordinate lies in the chosen rows, in the chosen columns and in the mask. The *block* of a tensor is what the
chosen rows and columns cut out of it, zero where the mask is False; *packed* values are the active coordinates alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Selection:
    """The active coordinates of one tensor.

    Args:
        shape: of the whole tensor.
        rows: indices of dimension 0, int64, ascending; None is all of them.
        columns: indices of dimension 1, int64, ascending; None is all of them.
        mask: bool, of the whole tensor's shape; None is all True.

    Raises:
        ValueError: indices or mask do not fit the shape.
    """

    shape: torch.Size
    rows: Tensor | None = None
    columns: Tensor | None = None
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", torch.Size(self.shape))
        for axis, (name, index) in enumerate((("rows", self.rows), ("columns", self.columns))):
            if index is None:
                continue
            if len(self.shape) <= axis:
                raise ValueError(f"a tensor of shape {list(self.shape)} has no {name} to select")
            if index.dtype != torch.int64 or index.ndim != 1:
                raise ValueError(f"expected {name} as int64 [k], got {index.dtype} {list(index.shape)}")
        if self.mask is not None and (self.mask.dtype != torch.bool or self.mask.shape != self.shape):
            raise ValueError(
                f"expected a bool mask of shape {list(self.shape)}, got {self.mask.dtype} {list(self.mask.shape)}"
            )

    @classmethod
    def all(cls, shape: Sequence[int]) -> Selection:
        """Every coordinate."""
        return cls(torch.Size(shape))

    @classmethod
    def none(cls, shape: Sequence[int], device: torch.device | None = None) -> Selection:
        """No coordinate."""
        if not shape:
            return cls(torch.Size(), mask=torch.zeros((), dtype=torch.bool, device=device))
        return cls(torch.Size(shape), rows=torch.empty(0, dtype=torch.int64, device=device))

    @cached_property
    def block_shape(self) -> torch.Size:
        """Shape of the block."""
        sizes = list(self.shape)
        for axis, index in enumerate((self.rows, self.columns)):
            if index is not None:
                sizes[axis] = len(index)
        return torch.Size(sizes)

    @cached_property
    def block_mask(self) -> Tensor | None:
        """The mask inside of the block, bool; None where every coordinate of the block is active."""
        return None if self.mask is None else self._cut(self.mask)

    @cached_property
    def positions(self) -> Tensor | None:
        """Where the active coordinates lie in the flattened block, int64, ascending; None where that is everywhere."""
        return None if self.block_mask is None else flat_positions(self.block_mask)

    @cached_property
    def count(self) -> int:
        """Number of active coordinates."""
        if self.block_mask is None:
            return math.prod(self.block_shape)
        return count_true(self.block_mask)

    @property
    def is_all(self) -> bool:
        """Whether every coordinate of the tensor is active."""
        return self.count == math.prod(self.shape)

    @property
    def is_empty(self) -> bool:
        """Whether no coordinate is active."""
        return self.count == 0

    def compact(self, full: Tensor) -> Tensor:
        """Cut the block out of a tensor of the whole shape; where the mask is False it is zero.

        Where everything is active, this is ``full`` itself and no copy.
        """
        block = self._cut(full)
        return block if self.block_mask is None else block.masked_fill(~self.block_mask, 0)

    def expand(self, block: Tensor) -> Tensor:
        """Put a block into a new tensor of the whole shape that is zero elsewhere.

        Where rows and columns are all chosen, this is ``block`` itself and no copy.
        """
        if self.rows is None and self.columns is None:
            return block
        return self._paste(block.new_zeros(self.shape), block)

    def pack(self, block: Tensor) -> Tensor:
        """Take the active coordinates of a block, ``[count]``, in the order of the flattened block."""
        flat = block.reshape(-1)
        return flat if self.positions is None else flat.index_select(0, self.positions)

    def unpack(self, flat: Tensor) -> Tensor:
        """Make the block whose active coordinates are ``flat`` ``[count]`` and whose others are zero."""
        if self.positions is None:
            return flat.reshape(self.block_shape)
        block = flat.new_zeros(math.prod(self.block_shape))
        return block.index_copy_(0, self.positions, flat).reshape(self.block_shape)

    @torch.no_grad()
    def put_back(self, tensor: Tensor, before: Tensor) -> None:
        """Give every coordinate of ``tensor`` that is not active its value from ``before``, bit for bit, in place."""
        if self.rows is None and self.columns is None:
            if self.mask is not None:
                torch.where(self.mask, tensor, before, out=tensor)
            return
        block = self._cut(tensor)
        if self.block_mask is not None:
            block = torch.where(self.block_mask, block, self._cut(before))
        self._paste(tensor.copy_(before), block)

    def full_mask(self, device: torch.device | None = None) -> Tensor:
        """Bool of the whole shape, True at active coordinates."""
        index = next((index for index in (self.rows, self.columns, self.mask) if index is not None), None)
        device = device if index is None else index.device
        block = self.block_mask
        if block is None:
            block = torch.ones(self.block_shape, dtype=torch.bool, device=device)
        return self.expand(block)

    def intersect(self, static_mask: Tensor) -> Selection:
        """Keep of this selection what ``static_mask`` (bool, whole shape) allows."""
        mask = static_mask if self.mask is None else self.mask & static_mask
        return Selection(self.shape, self.rows, self.columns, mask)

    def equals(self, other: Selection) -> bool:
        """Whether both have the same active coordinates."""
        return self.shape == other.shape and torch.equal(self.full_mask(), other.full_mask())

    def to(self, device: torch.device | str) -> Selection:
        """Move indices and mask."""
        moved = [part if part is None else part.to(device) for part in (self.rows, self.columns, self.mask)]
        return Selection(self.shape, *moved)

    def state(self) -> dict[str, Any]:
        """Plain Python and tensors on the CPU; masks are packed to bits."""
        return {
            "shape": list(self.shape),
            "rows": None if self.rows is None else self.rows.cpu(),
            "columns": None if self.columns is None else self.columns.cpu(),
            "mask": None if self.mask is None else pack_bits(self.mask),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Selection:
        """Make what :meth:`state` described, on the CPU."""
        shape = torch.Size(state["shape"])
        mask = None if state["mask"] is None else unpack_bits(state["mask"], shape)
        return cls(shape, state["rows"], state["columns"], mask)

    def _cut(self, full: Tensor) -> Tensor:
        if self.rows is not None:
            full = full.index_select(0, self.rows)
        return full if self.columns is None else full.index_select(1, self.columns)

    def _paste(self, full: Tensor, block: Tensor) -> Tensor:
        if self.columns is None:
            return full if self.rows is None else full.index_copy_(0, self.rows, block)
        if self.rows is None:
            return full.index_copy_(1, self.columns, block)
        full[self.rows.unsqueeze(1), self.columns] = block
        return full


def count_true(mask: Tensor) -> int:
    """Count True; NumPy does it several times faster than torch where it can."""
    if mask.device.type == "cpu":
        return int(np.count_nonzero(mask.numpy()))
    return int(mask.count_nonzero())


def flat_positions(mask: Tensor) -> Tensor:
    """Where a mask is True in its flattened form, int64, ascending."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.reshape(-1).nonzero().squeeze(1)


def pack_bits(mask: Tensor) -> Tensor:
    """Pack bools to bits, uint8 ``[ceil(numel / 8)]``, on the CPU."""
    return torch.from_numpy(np.packbits(mask.reshape(-1).cpu().numpy()))


def unpack_bits(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """Make the mask of which :func:`pack_bits` packed the bits, on the CPU."""
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=math.prod(shape)).astype(bool)).reshape(shape)
