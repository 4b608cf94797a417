"""The task's metrics after every number of glimpses, of one policy, batch by batch and over all processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection

from lightning_eff.glimpse.exploration import needs_scores, steps_of
from lightning_eff.glimpse.policies.base import PolicyLike
from lightning_eff.glimpse.world import GlimpseWorld


class PolicyMetrics:
    """What one policy reaches on a data set.

    Images that stopped count with their last prediction.

    Args:
        world: Backbone, task, camera and scene.
        every_glimpse: Whether to predict after every glimpse, or after the last one of an image alone.
    """

    def __init__(self, world: GlimpseWorld, every_glimpse: bool = True) -> None:
        self.world, self.every_glimpse = world, every_glimpse
        last = world.config.num_glimpses
        shown = range(1, last + 1) if every_glimpse else (last,)
        self.metrics: dict[int, MetricCollection] = {t: world.task.metrics() for t in shown}
        self.glimpses = MeanMetric()

    @torch.no_grad()
    def update(self, policy: PolicyLike, images: Tensor, target: Any, teacher: Tensor | None = None) -> None:
        """Let a policy look at images [B, C, H, W]."""
        world = self.world
        world.reset(images, target, teacher, scored=needs_scores(policy))
        images, prediction, taken = world.images, None, torch.zeros(len(images), device=images.device)
        for step in steps_of(world, policy, True if self.every_glimpse else "last"):
            taken[step.rows] += 1
            if step.prediction is not None:
                if prediction is None:
                    prediction = step.prediction.new_empty(len(images), *step.prediction.shape[1:])
                prediction[step.rows] = step.prediction
            if world.active:
                self._judge(world.taken, prediction, images, target)
        for t in range(world.taken, world.config.num_glimpses + 1):  # no image takes another one
            self._judge(t, prediction, images, target)
        self.glimpses.to(images.device).update(taken)

    def compute(self) -> dict[str, Tensor]:
        """Return metrics by name, ``name@t`` after t glimpses and ``name`` after the last one, and what they cost."""
        values: dict[str, Tensor] = {}
        for t, metrics in self.metrics.items():
            last = t == self.world.config.num_glimpses
            for name, value in metrics.compute().items():
                values |= {f"{name}@{t}": value} | ({name: value} if last else {})
        glimpses = self.glimpses.compute()
        percent = self.world.config.pixel_percent(1)
        return values | {"avg_glimpses": glimpses, "pixel_percent": glimpses * percent}

    def _judge(self, taken: int, prediction: Tensor | None, images: Tensor, target: Any) -> None:
        if taken in self.metrics:
            assert prediction is not None
            judged = self.world.task.metric_inputs(prediction, images, target)
            self.metrics[taken].to(images.device).update(*judged)
