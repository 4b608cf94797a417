"""Backbones that learn from glimpses of any place and scale."""

from lightning_eff.glimpse.backbones.base import Encoded, Glimpse, GlimpseBackbone, Seen
from lightning_eff.glimpse.backbones.canvas import CanvasBackbone

__all__ = ["CanvasBackbone", "Encoded", "Glimpse", "GlimpseBackbone", "Seen"]
