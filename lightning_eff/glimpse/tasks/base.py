"""What a task says about a prediction: loss, score, confidence, metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn
from torchmetrics import MetricCollection


class Task(nn.Module, ABC):
    """What is to be learnt from glimpses.

    Attributes:
        higher_is_better: Of the task's first metric.
    """

    higher_is_better: bool = True

    @abstractmethod
    def loss(self, prediction: Tensor, images: Tensor, target: Any, teacher: Tensor | None = None) -> Tensor:
        """Return the backbone's loss, the mean over images: a scalar with a graph.

        Args:
            prediction: Of the backbone, B first.
            images: Whole scenes [B, C, H, W].
            target: Of the batch; None where the task needs none.
            teacher: The teacher's prediction from whole scenes; None without one.
        """

    @abstractmethod
    def score(self, prediction: Tensor, images: Tensor, target: Any, teacher: Tensor | None = None) -> Tensor:
        """Return how good each prediction is [B]: larger is better; its rise is the agent's reward."""

    def confidence(self, prediction: Tensor) -> Tensor | None:
        """Return how sure each prediction is, in [0, 1] [B], without the target; None if the task cannot tell."""
        return None

    @abstractmethod
    def metrics(self) -> MetricCollection:
        """Return new metrics; the first one is the one a table shows. A collection sorts them by name."""

    @abstractmethod
    def metric_inputs(self, prediction: Tensor, images: Tensor, target: Any) -> tuple[Tensor, Tensor]:
        """Return what :meth:`metrics` are updated with: predictions and what they are held against."""


def check_target(target: Any, task: str) -> Tensor:
    """Return ``target`` if it is a tensor; otherwise raise a ValueError that names ``task``."""
    if not isinstance(target, Tensor):
        raise ValueError(f"{task} needs a target, a tensor of labels; got {type(target).__name__}")
    return target
