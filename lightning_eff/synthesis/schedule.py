"""The learning rate of a generator in the course of its training."""

from __future__ import annotations

import math

from lightning.pytorch import Trainer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, StepLR

from lightning_eff.steps import planned_steps
from lightning_eff.synthesis.options import MatchingOptions


def lr_scheduler(optimizer: Optimizer, matching: MatchingOptions, trainer: Trainer) -> LRScheduler | None:
    """Make the schedule that was asked for, counted in steps; ``None`` for a constant rate.

    Args:
        optimizer: Of the generator.
        matching: Says which.
        trainer: Knows how many steps there will be.

    Raises:
        ValueError: A cosine, and training has no end.
    """
    if matching.lr_schedule == "step":
        return StepLR(optimizer, matching.lr_period, 0.9)
    if matching.lr_schedule == "constant":
        return None
    total = planned_steps(trainer)
    if math.isinf(total):
        raise ValueError(
            "a cosine schedule ends where training ends: set max_epochs or max_steps of the Trainer, or "
            "MatchingOptions(lr_schedule='constant')"
        )
    return CosineAnnealingLR(optimizer, max(1, int(total)))
