"""How far two samples lie apart in the features of a network, as a torchmetrics metric."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_eff.arguments import check_choice, check_whole
from lightning_eff.synthesis.embedding import MeanEmbedding
from lightning_eff.synthesis.features import NTKFeatures
from lightning_eff.synthesis.features.objective import Estimator


class NTKMMD(Metric):
    """Squared maximum mean discrepancy between real and synthetic samples, class by class, averaged over classes.

    ``update(x, y, real=True)`` takes real samples, ``real=False`` synthetic ones; or give the real side once as
    ``target``, for example the embedding of a private release, which costs no more privacy. Real samples given to
    ``update`` are *not* protected: the value then depends on them without noise.

    Args:
        features: Its kernel is the one compared under; best not the one a generator was trained with.
        num_classes: Classes C; 1, the default, ignores labels.
        target: Class sums and counts of the real side, noisy or not.
        estimator: ``"u"`` leaves out each sample's product with itself on the sides that are samples: unbiased, can be
            slightly negative. ``"v"`` keeps it.
        kwargs: See ``torchmetrics.Metric``.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    def __init__(
        self,
        features: NTKFeatures,
        num_classes: int = 1,
        *,
        target: MeanEmbedding | None = None,
        estimator: Estimator = "u",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_choice("estimator", estimator, ("u", "v"))
        check_whole("num_classes", num_classes)
        if target is not None:
            target.require_layout(features.layout)
            if target.num_classes != num_classes:
                raise ValueError(f"expected a target of {num_classes} classes, got {target.num_classes}")
        self.features = features
        self.num_classes = num_classes
        self.target = target
        self.estimator = estimator
        for side in ("real", "synthetic") if target is None else ("synthetic",):
            self.add_state(f"{side}_counts", torch.zeros(num_classes, dtype=torch.float64), dist_reduce_fx="sum")
            for index, shape in enumerate(features.layout.values()):
                zeros = torch.zeros(num_classes, *shape, dtype=torch.float64)
                self.add_state(f"{side}_{index}", zeros, dist_reduce_fx="sum")

    def update(self, x: Tensor, y: Tensor | None = None, *, real: bool = False) -> None:
        """Add samples to one side.

        Args:
            x: ``(B, *input_shape)``.
            y: ``(B,)`` classes, integers in [0, C); not needed with one class.
            real: Which side they belong to.
        """
        if real and self.target is not None:
            raise ValueError("the real side was given as target: only synthetic samples can be added")
        if y is None and self.num_classes > 1:
            raise ValueError(f"expected labels, as there are {self.num_classes} classes")
        if y is None or self.num_classes == 1:
            y = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        added = self.features.sums(self.num_classes)
        added.add(x.detach(), y)
        sums = added.embedding()
        side = "real" if real else "synthetic"
        getattr(self, f"{side}_counts").add_(sums.counts.to(torch.float64))
        for index, block in enumerate(sums.blocks.values()):
            getattr(self, f"{side}_{index}").add_(block)

    def compute(self) -> Tensor:
        """Return the average over the classes that both sides have, a float64 scalar.

        Raises:
            ValueError: no class has samples enough on both sides.
        """
        synthetic = self._embedding("synthetic")
        real = self._embedding("real") if self.target is None else self.target.to(synthetic.counts.device)
        needed = 2 if self.estimator == "u" else 1
        enough = (synthetic.counts >= needed) & (real.counts >= needed)
        if not bool(enough.any()):
            raise ValueError(
                f"expected a class with at least {needed} real and {needed} synthetic samples, got counts "
                f"{real.counts.tolist()} and {synthetic.counts.tolist()}: update with both sides"
            )
        cross = real.dot(synthetic) / (real.counts * synthetic.counts)
        values = self._square(real, is_sample=self.target is None) - 2 * cross + self._square(synthetic, is_sample=True)
        return values[enough].mean()

    def _embedding(self, side: str) -> MeanEmbedding:
        blocks = {name: getattr(self, f"{side}_{index}") for index, name in enumerate(self.features.layout)}
        return MeanEmbedding(blocks, getattr(self, f"{side}_counts"))

    def _square(self, embedding: MeanEmbedding, *, is_sample: bool) -> Tensor:
        """Return squared norms of the means; for samples without each one's product with itself, which is 1."""
        n = embedding.counts.double()
        if is_sample and self.estimator == "u":
            return (embedding.square_norms() - n) / (n * (n - 1))
        return embedding.square_norms() / n.square()
