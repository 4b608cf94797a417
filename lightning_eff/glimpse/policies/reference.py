"""What a camera without a gaze sees: the whole scene at once, with as many pixels as all glimpses have together."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F

from lightning_eff.arguments import check_whole
from lightning_eff.glimpse.config import GlimpseConfig


class UniformLowRes:
    """One even view with the pixels of some glimpses. No glimpse is like it: it is a reference, not a policy.

    Args:
        config: Camera and scene.
        glimpses: Whose pixels it may spend, >= 1; None for all of an episode.

    Raises:
        ValueError: ``glimpses`` is less than 1.
    """

    name = "uniform_low_res"

    def __init__(self, config: GlimpseConfig, glimpses: int | None = None) -> None:
        self.config = config
        self.glimpses = config.num_glimpses if glimpses is None else glimpses
        check_whole("glimpses", self.glimpses)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels; at most those of the scene."""
        height, width = self.config.scene
        share = min(1.0, math.sqrt(self.config.pixel_percent(self.glimpses) / 100))
        return max(1, int(height * share + 1e-9)), max(1, int(width * share + 1e-9))

    def view(self, images: Tensor) -> Tensor:
        """Return scenes [B, C, H, W], bytes divided by 255, shrunk with a filter to :attr:`size`."""
        if not images.is_floating_point():
            images = images.float() / 255
        return F.interpolate(images, size=self.size, mode="bilinear", antialias=True, align_corners=False)

    def reconstruct(self, images: Tensor) -> Tensor:
        """Return what is left of scenes [B, C, H, W] when they are shrunk and enlarged again."""
        return F.interpolate(self.view(images), size=images.shape[-2:], mode="bilinear", align_corners=False)
