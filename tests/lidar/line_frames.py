"""Small frames and networks for tests of the game of lines."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_eff.lidar.batches import NO_LINE
from lightning_eff.lidar.completion.hole_filling import pull_push
from lightning_eff.lidar.frames import Frame, frames_of
from lightning_eff.lidar.synthetic import SyntheticLidarDataset


def toy_frame(id_: str | int = 0, lines: int = 8, *, missing: tuple[int, ...] = (), first: int = 3) -> Frame:
    """A frame of `lines` lines, numbered from `first`, in every second row; depth falls towards the bottom.

    Args:
        id_: of the frame, and the seed of its depth.
        lines: number of lines.
        missing: lines without any pixel, counted from 0.
        first: number of the first line.
    """
    generator = torch.Generator().manual_seed(sum(map(ord, str(id_))))
    height, width = 2 * lines, 24
    gt = 60 / (1 + torch.arange(height)[:, None]) + 3 * torch.rand(height, width, generator=generator)
    line_idx = torch.full((height, width), NO_LINE, dtype=torch.uint8)
    for line in range(lines):
        if line not in missing:
            line_idx[2 * line, line % 2 :: 2] = line + first
    sparse = torch.where(line_idx != NO_LINE, gt, 0.0)
    rgb = torch.rand(3, height, width, generator=generator)
    return Frame(rgb, sparse[None], gt[None], line_idx[None], id_)


def street(index: int = 0, scale: int = 8) -> Frame:
    """A synthetic street at 1 / `scale` of KITTI's resolution."""
    sample = SyntheticLidarDataset(index + 1, "val", scale=scale)[index]
    batch = {key: entry[None] for key, entry in sample.items() if isinstance(entry, Tensor)}
    return frames_of(batch | {"sample_id": [sample["sample_id"]]}, batch["gt"])[0]


class Counting(nn.Module):
    """Pull and push, brightened by the image; it counts what it is asked.

    Attributes:
        sizes: coalitions of every forward.
        encoded: images encoded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.sizes: list[int] = []
        self.encoded = 0

    def encode_image(self, rgb: Tensor) -> Tensor:
        self.encoded += 1
        return self.norm(rgb).mean(1, keepdim=True)

    def decode(self, features: Tensor, sparse: Tensor) -> Tensor:
        self.sizes.append(len(sparse))
        return pull_push(sparse) * (1 + 0.1 * features)

    def forward(self, rgb: Tensor, sparse: Tensor) -> Tensor:
        return self.decode(self.encode_image(rgb), sparse)
