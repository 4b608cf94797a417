"""What every pixel of a scene belongs to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from lightning_eff.glimpse.tasks.base import Task, check_target

# the paper's weight of the divergence from the teacher
_TEACHER_WEIGHT = 10.0


class SegmentationTask(Task):
    """Name the class of every pixel.

    The loss of an image is the mean over pixels of the cross-entropy, or with a teacher of 10 KL(teacher || student);
    the score is minus that loss.

    Args:
        num_classes: K >= 2.
        ignore_index: Label of pixels that count nowhere; outside of 0 ... K - 1.

    Raises:
        ValueError: An argument lies outside its range.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes must be >= 2, got {num_classes}")
        if 0 <= ignore_index < num_classes:
            raise ValueError(
                f"ignore_index must lie outside of the classes 0 ... {num_classes - 1}, got {ignore_index}"
            )
        self.num_classes, self.ignore_index = num_classes, ignore_index

    def loss(self, prediction: Tensor, images: Tensor, target: Any, teacher: Tensor | None = None) -> Tensor:
        """Return the mean over images of the loss of each; see :meth:`score` for what is raised."""
        return -self.score(prediction, images, target, teacher).mean()

    def score(self, prediction: Tensor, images: Tensor, target: Any, teacher: Tensor | None = None) -> Tensor:
        """Return minus the loss of each image [B]; 0 where every pixel is ignored.

        Args:
            prediction: Logits [B, K, H, W].
            images: Scenes, not looked at.
            target: Labels [B, H, W], int64; not looked at beside a teacher.
            teacher: Logits of the teacher [B, K, H, W].

        Raises:
            ValueError: A label is neither a class nor ``ignore_index``.
        """
        if teacher is not None:
            known = teacher.float().log_softmax(1)
            divergence = (known.exp() * (known - prediction.float().log_softmax(1))).sum(1)
            return -_TEACHER_WEIGHT * divergence.flatten(1).mean(1)
        labels = self._labels(target)
        pixels = F.cross_entropy(prediction.float(), labels, ignore_index=self.ignore_index, reduction="none")
        counted = (labels != self.ignore_index).flatten(1).sum(1).clamp(min=1)
        return -pixels.flatten(1).sum(1) / counted

    def metrics(self) -> MetricCollection:
        """Return ``iou`` (mean over classes), ``pixel_accuracy`` and ``mean_accuracy`` (mean over classes)."""
        classes, ignored = self.num_classes, self.ignore_index
        return MetricCollection(
            {
                "iou": MulticlassJaccardIndex(classes, average="macro", ignore_index=ignored),
                "pixel_accuracy": MulticlassAccuracy(classes, average="micro", ignore_index=ignored),
                "mean_accuracy": MulticlassAccuracy(classes, average="macro", ignore_index=ignored),
            }
        )

    def metric_inputs(self, prediction: Tensor, images: Tensor, target: Any) -> tuple[Tensor, Tensor]:
        """Return classes and labels [B, H, W]."""
        return prediction.argmax(1), self._labels(target)

    def _labels(self, target: Any) -> Tensor:
        labels = check_target(target, "SegmentationTask")
        wrong = ((labels < 0) | (labels >= self.num_classes)) & (labels != self.ignore_index)
        if bool(wrong.any()):
            found = torch.unique(labels[wrong]).tolist()
            raise ValueError(
                f"SegmentationTask expects labels 0 ... {self.num_classes - 1} and ignore_index={self.ignore_index}, "
                f"got {found[:5]}{' ...' if len(found) > 5 else ''}"
            )
        return labels.long()
