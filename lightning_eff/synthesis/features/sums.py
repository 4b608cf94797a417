"""Class sums of features, added up batch by batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_eff.synthesis.embedding import MeanEmbedding

if TYPE_CHECKING:
    from lightning_eff.synthesis.features.ntk import NTKFeatures


class ClassSums:
    """Running class sums: made by :meth:`NTKFeatures.sums`, fed batch by batch.

    Attributes:
        degenerate: Records so far whose gradient is zero; their feature is the zero vector.
    """

    def __init__(
        self, features: NTKFeatures, num_classes: int, dtype: torch.dtype, device: torch.device | str | None
    ) -> None:
        self._features = features
        self.num_classes = num_classes
        self.degenerate = 0
        self._blocks = {
            name: torch.zeros(num_classes, *shape, dtype=dtype, device=device)
            for name, shape in features.layout.items()
        }
        self._counts = torch.zeros(num_classes, dtype=dtype, device=device)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add the features of ``x`` ``(B, *input_shape)`` to the classes ``y`` ``(B,)``, integers in [0, C)."""
        sums = self._features.class_sums(x, y, self.num_classes)
        for name, block in self._blocks.items():
            block += sums.blocks[name]
        self._counts += sums.counts

    def embedding(self) -> MeanEmbedding:
        """Return what was added so far; further additions go into the same tensors."""
        return MeanEmbedding(self._blocks, self._counts)
