"""Backbones that learn from glimpses of any place and scale."""

from lightning_eff.glimpse.backbones.base import Encoded, Glimpse, GlimpseBackbone, Seen
from lightning_eff.glimpse.backbones.canvas import CanvasBackbone
from lightning_eff.glimpse.backbones.heads import ClassHead, ImageDecoder, SegmentationHead, TokenHead
from lightning_eff.glimpse.backbones.vit import ElasticViT

__all__ = [
    "CanvasBackbone",
    "ClassHead",
    "ElasticViT",
    "Encoded",
    "Glimpse",
    "GlimpseBackbone",
    "ImageDecoder",
    "Seen",
    "SegmentationHead",
    "TokenHead",
]
