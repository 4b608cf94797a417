"""What a scene looks like where nobody has looked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanSquaredError, Metric, MetricCollection

from lightning_eff.glimpse.tasks.base import Task


class ReconstructionTask(Task):
    """Fill in the whole scene.

    The loss is the mean squared error of pixels as the network has them. Scores and metrics are told in grey levels
    of 0 to 255: pixels times ``std`` plus ``mean``, times 255, clipped.

    Args:
        mean: Of the normalisation of images, one number or one a channel.
        std: Likewise, > 0.

    Raises:
        ValueError: A deviation is not positive.
    """

    higher_is_better = False
    mean: Tensor
    std: Tensor

    def __init__(self, mean: float | list[float] = 0.0, std: float | list[float] = 1.0) -> None:
        super().__init__()
        for name, value in {"mean": mean, "std": std}.items():
            self.register_buffer(name, torch.tensor(value).reshape(-1, 1, 1), persistent=False)
        if not bool((self.std > 0).all()):
            raise ValueError(f"std must be > 0, got {std}")

    def loss(self, prediction: Tensor, images: Tensor, target: Any = None, teacher: Tensor | None = None) -> Tensor:
        """Return the mean squared error of normalised pixels."""
        return F.mse_loss(prediction, images)

    def score(self, prediction: Tensor, images: Tensor, target: Any = None, teacher: Tensor | None = None) -> Tensor:
        """Return minus the root mean square error of each image in grey levels [B], 0 at best, -255 at worst."""
        return -image_rmse(self.grey_levels(prediction), self.grey_levels(images))

    def metrics(self) -> MetricCollection:
        """Return ``rmse`` over all pixels of all images and ``rmse_per_image``, the mean of that of each image."""
        return MetricCollection(
            {"rmse": MeanSquaredError(squared=False), "rmse_per_image": ImageRMSE()}, compute_groups=False
        )

    def metric_inputs(self, prediction: Tensor, images: Tensor, target: Any = None) -> tuple[Tensor, Tensor]:
        """Return prediction and scene in grey levels [B, C, H, W]."""
        return self.grey_levels(prediction), self.grey_levels(images)

    def grey_levels(self, images: Tensor) -> Tensor:
        """Return normalised ``images`` [B, C, H, W], bytes divided by 255, in grey levels, 0 to 255."""
        if not images.is_floating_point():
            images = images.float() / 255
        return ((images.float() * self.std + self.mean) * 255).clamp(0, 255)


class ImageRMSE(Metric):
    """Mean over images of the root mean square error of each; the score's own measure."""

    higher_is_better = False
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Take images [B, C, H, W] and what they should be."""
        self.total += image_rmse(prediction, target).sum()
        self.count += len(prediction)

    def compute(self) -> Tensor:
        """Return the mean."""
        return (self.total / self.count).float()


def image_rmse(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the root mean square error of each image [B], in the unit of ``prediction`` [B, C, H, W]."""
    return (prediction - target).square().flatten(1).mean(1).sqrt()
