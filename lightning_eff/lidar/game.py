"""The lines of a lidar as players of a cooperative game: what a depth completion loses without some of them.

v_f(S) = e_f(no line) - e_f(S), where e_f(S) is the error of the completion of frame f with only the lines S left in its
sparse depth, measured where ground truth is valid; v is the mean over the frames. After "Lidar Line Selection with
Spatially-Aware Shapley Value" (arXiv 2303.11720).

Shapes: `F` frames, `H`, `W` of the image, `L` lines of the sensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

NO_LINE = 255  # in `line_idx`: a pixel that belongs to no line


@dataclass(frozen=True, eq=False)
class Frame:
    """One image with its sparse depth: a group of the game.

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
    """The frames of a batch that `split_batch` split.

    Args:
        inputs: `rgb` `[B, 3, H, W]`, `sparse` and `line_idx` `[B, 1, H, W]`, optionally `sample_id` and `sequence` (a
            list or tensor of `B`).
        gt: `[B, 1, H, W]`.
        first: number of the first frame, for batches without `sample_id`.

    Returns:
        `B` frames; they share memory with the batch.
    """
    count = len(inputs["rgb"])
    ids = [_plain(id_) for id_ in inputs.get("sample_id", range(first, first + count))]
    sequences = inputs.get("sequence") or [None] * count
    columns = inputs["rgb"], inputs["sparse"], gt, inputs["line_idx"], ids, sequences
    return [Frame(*entries) for entries in zip(*columns, strict=True)]


def _plain(sample_id: Any) -> str | int:
    return sample_id if isinstance(sample_id, str) else int(sample_id)
