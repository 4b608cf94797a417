"""Frames of a lidar and a camera, and which of the sensor's lines they show.

Shapes: `F` frames, `B` of a batch, `H`, `W` of the image, `L` lines of the sensor.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_eff.lidar.batches import NO_LINE, check_lines
from lightning_eff.lidar.lines import LidarWarning

Candidates = Literal["visible", "all"] | list[int]
Unassigned = Literal["drop", "always_keep", "error"]

_MANY_UNASSIGNED = 0.05


@dataclass(frozen=True, eq=False)
class Frame:
    """One image with its sparse depth.

    Attributes:
        rgb: image, float `[3, H, W]`.
        sparse: depth of the lidar, float `[1, H, W]` in metres, 0 = none.
        gt: ground truth, float `[1, H, W]` in metres, 0 = none.
        line_idx: line of every sparse pixel, uint8 (or another integer type) `[1, H, W]`, 0 = highest elevation, 255 =
            none.
        id: name or number of the frame, unique within a calibration set; the coalitions drawn for the frame depend on
            it.
        sequence: name of the drive it belongs to.

    Raises:
        ValueError: shapes that do not fit each other, or `line_idx` that is no integer tensor.
    """

    rgb: Tensor
    sparse: Tensor
    gt: Tensor
    line_idx: Tensor
    id: str | int = 0
    sequence: str | None = None

    def __post_init__(self) -> None:
        height, width = self.rgb.shape[-2:]
        for name in ("sparse", "gt", "line_idx"):
            if list(getattr(self, name).shape) != [1, height, width]:
                raise ValueError(
                    f"frame {self.id!r}: {name} must be {[1, height, width]} to fit the image "
                    f"{list(self.rgb.shape)}, got {list(getattr(self, name).shape)}"
                )
        if self.line_idx.is_floating_point() or self.line_idx.dtype == torch.bool:
            seen = f", values {float(self.line_idx.min())} to {float(self.line_idx.max())}"
            raise ValueError(f"frame {self.id!r}: line_idx must be an integer tensor, got {self.line_idx.dtype}{seen}")

    def to(self, device: torch.device | str) -> Frame:
        """The frame on `device`."""
        return replace(
            self,
            rgb=self.rgb.to(device),
            sparse=self.sparse.to(device),
            gt=self.gt.to(device),
            line_idx=self.line_idx.to(device),
        )


def frames_of(inputs: Mapping[str, Any], gt: Tensor, first: int = 0) -> list[Frame]:
    """The frames of a batch that `LidarKeys` split.

    Args:
        inputs: `rgb` `[B, 3, H, W]`, `sparse` and `line_idx` `[B, 1, H, W]`, optionally `sample_id` and `sequence` (a
            list or tensor of `B`).
        gt: `[B, 1, H, W]`.
        first: number of the first frame, for batches without `sample_id`.

    Returns:
        `B` frames; they share memory with the batch.
    """
    count = len(inputs["rgb"])
    ids = [id_ if isinstance(id_, str) else int(id_) for id_ in inputs.get("sample_id", range(first, first + count))]
    drives = inputs.get("sequence", [None] * count)
    sequences = [drive if drive is None or isinstance(drive, str) else str(int(drive)) for drive in drives]
    columns = inputs["rgb"], inputs["sparse"], gt, inputs["line_idx"], ids, sequences
    return [Frame(*entries) for entries in zip(*columns, strict=True)]


@dataclass(frozen=True, eq=False)
class LinePixels:
    """How many pixels of sparse depth every line has; those of several frames add up.

    Attributes:
        per_line: int64 `[L]`.
        unassigned: pixels with depth that belong to no line.
    """

    per_line: Tensor
    unassigned: int = 0

    @classmethod
    def count(cls, frames: Iterable[Frame], num_lines: int = 64) -> LinePixels:
        """Count; ValueError where a line lies outside the sensor's, naming the frame."""
        counted = cls(torch.zeros(num_lines, dtype=torch.int64))
        for frame in frames:
            try:
                check_lines(frame.line_idx, num_lines)
            except ValueError as error:
                raise ValueError(f"frame {frame.id!r}: {error}") from None
            lines = frame.line_idx[frame.sparse > 0].long().cpu()
            pixels = torch.bincount(lines, minlength=NO_LINE + 1)
            counted += cls(pixels[:num_lines], int(pixels[NO_LINE]))
        return counted

    def __add__(self, other: LinePixels) -> LinePixels:
        return LinePixels(self.per_line + other.per_line, self.unassigned + other.unassigned)

    @property
    def share_unassigned(self) -> float:
        """Share of the pixels that belong to no line."""
        return self.unassigned / max(1, self.unassigned + int(self.per_line.sum()))

    def candidates(self, which: Candidates = "visible", min_pixels: int = 1) -> list[int]:
        """The lines that are players, in increasing order.

        Args:
            which: `"visible"`: lines with at least `min_pixels` pixels; `"all"` lines of the sensor; or their numbers.
            min_pixels: see there.

        Raises:
            ValueError: no line is left, or numbers that are no distinct lines of the sensor.
        """
        num_lines = len(self.per_line)
        if which == "all":
            return list(range(num_lines))
        if which == "visible":
            visible = (self.per_line >= min_pixels).nonzero().flatten().tolist()
            if not visible:
                raise ValueError(
                    f"no line has {min_pixels} pixels with depth ({int(self.per_line.sum())} pixels belong to a line, "
                    f"{self.unassigned} to none): check line_idx, or lower min_pixels"
                )
            return visible
        if not which or len(set(which)) < len(which):
            raise ValueError(f'candidates must be "visible", "all" or distinct lines, got {which!r}')
        if not all(isinstance(line, int) and 0 <= line < num_lines for line in which):
            raise ValueError(f"candidates must be lines in 0..{num_lines - 1}, got {list(which)}")
        return sorted(which)

    def check(self, unassigned: Unassigned) -> None:
        """Warn where more than 5 % of the pixels belong to no line; with `"error"`, ValueError where any does."""
        if not self.unassigned:
            return
        share = f"{self.unassigned} pixels with depth ({100 * self.share_unassigned:.1f} %) belong to no line"
        if unassigned == "error":
            raise ValueError(f'{share}: assign lines to them, or take unassigned="drop" or "always_keep"')
        if self.share_unassigned > _MANY_UNASSIGNED:
            done = "left out everywhere" if unassigned == "drop" else "kept everywhere"
            warnings.warn(f"{share}; they are {done}", LidarWarning, stacklevel=3)
