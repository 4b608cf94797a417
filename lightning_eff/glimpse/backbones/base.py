"""What every backbone that learns from glimpses offers, and what has been seen so far.

Letters: B images, n patches seen of each, C channels, p patch side, t glimpses taken, D latent width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Glimpse:
    """One glimpse of each of B images.

    Attributes:
        view: y0, x0 and side of the field of view in pixels of the scene [B, 3].
        patches: Its patches, row by row [B, k, C, p, p].
        boxes: y0, x0, y1, x1 of the patches in pixels of the scene [B, k, 4].
    """

    view: Tensor
    patches: Tensor
    boxes: Tensor


@dataclass(frozen=True)
class Seen:
    """What has been seen of B images; every image has had the same number of glimpses.

    Attributes:
        views: Fields of view [B, t, 3].
        patches: [B, n, C, p, p].
        boxes: [B, n, 4], pixels.
        memory: What the backbone keeps besides, first axis B; None if nothing.
    """

    views: Tensor
    patches: Tensor
    boxes: Tensor
    memory: Tensor | None = None

    def take(self, images: Tensor) -> Seen:
        """Return what has been seen of these images [A], int64."""
        memory = None if self.memory is None else self.memory[images]
        return Seen(self.views[images], self.patches[images], self.boxes[images], memory)


@dataclass(frozen=True)
class Encoded:
    """What a backbone makes of what has been seen.

    Attributes:
        pooled: One vector, map or canvas an image, what predictions are made of [B, ...].
        latents: One vector a patch [B, n, D]; None if the backbone has none.
        importance: Of each patch [B, n, 1], sums to 1; None if the backbone has none, or was not asked.
    """

    pooled: Tensor
    latents: Tensor | None = None
    importance: Tensor | None = None


class GlimpseBackbone(nn.Module, ABC):
    """A network that predicts from glimpses of any place and scale, none at all included.

    A subclass implements :meth:`encode` and :meth:`predict`; one with a memory (a canvas) also :meth:`begin` and
    :meth:`observe`, each of which returns a new ``Seen`` and leaves the one given alone.

    Attributes:
        channels: C, of scenes and patches.
        latent_dim: D, width of latents; 0 if it has none.
        has_importance: Whether :meth:`encode` can tell the importance of patches.
        least_glimpses: Fewest glimpses it is trained on; 0 if no glimpse at all teaches it something.
    """

    channels: int
    latent_dim: int = 0
    has_importance: bool = False
    least_glimpses: int = 0

    def begin(self, images: Tensor, patch_size: int) -> Seen:
        """Return what has been seen before the first glimpse: nothing.

        Args:
            images: Whole scenes [B, C, H, W], looked at for shape, dtype and device only.
            patch_size: p.
        """
        batch, channels = images.shape[:2]
        return Seen(
            images.new_zeros(batch, 0, 3),
            images.new_zeros(batch, 0, channels, patch_size, patch_size),
            images.new_zeros(batch, 0, 4),
        )

    def observe(self, seen: Seen, glimpse: Glimpse) -> Seen:
        """Return what has been seen after one more glimpse of each image."""
        return Seen(
            torch.cat([seen.views, glimpse.view.unsqueeze(1)], 1),
            torch.cat([seen.patches, glimpse.patches], 1),
            torch.cat([seen.boxes, glimpse.boxes], 1),
            seen.memory,
        )

    @abstractmethod
    def encode(self, seen: Seen, importance: bool = False) -> Encoded:
        """Encode all that has been seen; ``importance`` asks for that of patches."""

    @abstractmethod
    def predict(self, encoded: Encoded, seen: Seen) -> Tensor:
        """Return logits [B, classes], an image [B, C, H, W], or logits a pixel [B, classes, H, W]."""
