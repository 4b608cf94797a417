"""What a transformer's tokens are made into: logits of classes, a whole image, logits of every pixel.

Letters: B images, n patches seen, D width of tokens, C channels, H x W scene, p patch side, K classes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_eff.glimpse.backbones.transformer import NORM_EPS, Block, initialise
from lightning_eff.glimpse.config import ViTSize
from lightning_eff.glimpse.position import box_codes, cell_boxes, cells_of

#: The decoder of masked autoencoders.
DECODER = ViTSize(512, 8, 16)


@dataclass(frozen=True)
class TokenShape:
    """What a head must know of the encoder.

    Attributes:
        dim: D.
        scene: H, W in pixels.
        patch_size: p in pixels.
        channels: C.
    """

    dim: int
    scene: tuple[int, int]
    patch_size: int
    channels: int


class TokenHead(nn.Module, ABC):
    """A prediction made of tokens; the backbone it is given to tells it their shape."""

    @abstractmethod
    def attach(self, shape: TokenShape) -> None:
        """Make the layers; once."""

    @abstractmethod
    def forward(self, summary: Tensor, latents: Tensor, boxes: Tensor) -> Tensor:
        """Predict.

        Args:
            summary: The class token [B, D].
            latents: Of patches [B, n, D]; n may be 0.
            boxes: Of patches [B, n, 4] in pixels.
        """


class ClassHead(TokenHead):
    """Logits of classes from the class token, or from the mean of all tokens.

    Args:
        num_classes: K >= 2.
        pool: ``"token"`` or ``"mean"``.

    Raises:
        ValueError: An argument lies outside its range.
    """

    def __init__(self, num_classes: int, pool: Literal["token", "mean"] = "token") -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes must be >= 2, got {num_classes}")
        if pool not in ("token", "mean"):
            raise ValueError(f"pool must be 'token' or 'mean', got {pool!r}")
        self.num_classes, self.pool = num_classes, pool

    def attach(self, shape: TokenShape) -> None:
        """Make the layer."""
        self.head = nn.Linear(shape.dim, self.num_classes)

    def forward(self, summary: Tensor, latents: Tensor, boxes: Tensor) -> Tensor:
        """Return logits [B, K]."""
        if self.pool == "mean":
            summary = torch.cat([summary.unsqueeze(1), latents], dim=1).mean(1)
        return self.head(summary)  # type: ignore[no-any-return]


class ImageDecoder(TokenHead):
    """Decode a whole scene from the patches seen, as masked autoencoders do; arXiv 2111.06377.

    A mask token for every cell of p x p pixels, those seen included, since glimpses do not lie on a grid, is decoded
    beside the tokens of patches; all of them know their boxes.

    Args:
        size: Of the decoder.
    """

    mask_token: Tensor
    cells: Tensor

    def __init__(self, size: ViTSize = DECODER) -> None:
        super().__init__()
        self.size = size

    def attach(self, shape: TokenShape) -> None:
        """Make the layers."""
        self.shape = shape
        self._attach_blocks(shape)
        self.pixels = nn.Linear(self.size.dim, shape.patch_size**2 * shape.channels)
        self.apply(initialise)

    def forward(self, summary: Tensor, latents: Tensor, boxes: Tensor) -> Tensor:
        """Return images [B, C, H, W]."""
        side, (rows, columns) = self.shape.patch_size, cells_of(self.shape.scene, self.shape.patch_size)
        pixels = self.pixels(self.decode(summary, latents, boxes))
        cells = pixels.view(len(pixels), rows, columns, self.shape.channels, side, side).permute(0, 3, 1, 4, 2, 5)
        return _cut(cells.reshape(len(pixels), self.shape.channels, rows * side, columns * side), self.shape.scene)

    def decode(self, summary: Tensor, latents: Tensor, boxes: Tensor) -> Tensor:
        """Return the decoded tokens of all cells, row by row [B, cells, size.dim]."""
        tokens = self._tokens(summary, latents, boxes)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens[:, -len(self.cells) :])  # type: ignore[no-any-return]

    @torch.no_grad()
    def cell_entropy(self, summary: Tensor, latents: Tensor, boxes: Tensor) -> Tensor:
        """Return how undecided the decoder's last block is about each cell: entropy of its attention in nats.

        Attention-driven exploration looks where it is largest; A. Pardyl et al., arXiv:2303.13594.

        Returns:
            Entropy of the mean over heads of what each cell attends to [B, rows, columns].
        """
        tokens = self._tokens(summary, latents, boxes)
        *blocks, last = self.blocks
        for block in blocks:
            tokens = block(tokens)
        assert isinstance(last, Block)
        weights = last.attention(tokens)[:, -len(self.cells) :]
        entropy: Tensor = torch.special.entr(weights).sum(-1)
        return entropy.view(-1, *cells_of(self.shape.scene, self.shape.patch_size))

    def _attach_blocks(self, shape: TokenShape) -> None:
        dim = self.size.dim
        self.embed = nn.Linear(shape.dim, dim)
        self.mask_token = nn.Parameter(torch.randn(dim) * 0.02)
        self.blocks = nn.ModuleList(Block(dim, self.size.heads) for _ in range(self.size.depth))
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        cells = box_codes(cell_boxes(shape.scene, shape.patch_size), dim, unit=shape.patch_size)
        self.register_buffer("cells", cells, persistent=False)

    def _tokens(self, summary: Tensor, latents: Tensor, boxes: Tensor) -> Tensor:
        seen = self.embed(torch.cat([summary.unsqueeze(1), latents], dim=1))
        codes = box_codes(boxes, self.size.dim, unit=self.shape.patch_size).to(seen.dtype)
        cells = (self.mask_token + self.cells).to(seen.dtype).expand(len(seen), -1, -1)
        return torch.cat([seen + F.pad(codes, (0, 0, 1, 0)), cells], dim=1)


class SegmentationHead(ImageDecoder):
    """Logits of every pixel: the decoder's cells, made larger by convolutions.

    Five convolutions, with up to four doublings between them, as many as a patch takes, and one that names classes.

    Args:
        num_classes: K >= 2.
        size: Of the decoder.
        width: Channels of the convolutions, >= 1.

    Raises:
        ValueError: An argument lies outside its range.
    """

    def __init__(self, num_classes: int, size: ViTSize = DECODER, width: int = 256) -> None:
        super().__init__(size)
        if num_classes < 2 or width < 1:
            raise ValueError(f"num_classes must be >= 2 and width >= 1, got {num_classes} and {width}")
        self.num_classes, self.width = num_classes, width

    def attach(self, shape: TokenShape) -> None:
        """Make the layers."""
        self.shape = shape
        self._attach_blocks(shape)
        self.apply(initialise)
        doublings = min(4, int(math.log2(shape.patch_size)))
        layers: list[nn.Module] = []
        for number in range(5):
            layers += [
                nn.Conv2d(self.width if number else self.size.dim, self.width, 3, padding=1, bias=False),
                nn.BatchNorm2d(self.width),
                nn.GELU(),
            ]
            if number < doublings:
                layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
        self.convolutions = nn.Sequential(*layers, nn.Conv2d(self.width, self.num_classes, 1))

    def forward(self, summary: Tensor, latents: Tensor, boxes: Tensor) -> Tensor:
        """Return logits [B, K, H, W]."""
        rows, columns = cells_of(self.shape.scene, self.shape.patch_size)
        cells = self.decode(summary, latents, boxes).mT.reshape(len(summary), self.size.dim, rows, columns)
        logits = self.convolutions(cells)
        whole = (rows * self.shape.patch_size, columns * self.shape.patch_size)
        if logits.shape[2:] != whole:
            logits = F.interpolate(logits, size=whole, mode="bilinear", align_corners=False)
        return _cut(logits, self.shape.scene)


def _cut(image: Tensor, scene: tuple[int, int]) -> Tensor:
    """Cut off what sticks out of the scene because its sides are no multiples of the patch's."""
    return image[..., : scene[0], : scene[1]]
