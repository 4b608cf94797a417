"""How many optimizer steps a fit has, also where the accumulation of batches changes between epochs.

Lightning's own estimate knows ``Trainer(accumulate_grad_batches=...)`` and no ``GradientAccumulationScheduler``.
"""

from __future__ import annotations

import math

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler


def accumulated_batches(trainer: Trainer, epoch: int) -> int:
    """Return how many batches an optimizer step takes in an epoch, counted from 0."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler):
            return callback.get_accumulate_grad_batches(epoch)
    return trainer.accumulate_grad_batches


def steps_of_epoch(trainer: Trainer, epoch: int) -> int | None:
    """Return the optimizer steps of an epoch, counted from 0; None where the training data, set up, have no length."""
    batches = trainer.num_training_batches
    # the last step of an epoch may see fewer batches
    return None if batches == math.inf else math.ceil(batches / accumulated_batches(trainer, epoch))


def planned_steps(trainer: Trainer) -> int | float:
    """Return the optimizer steps of the whole fit; inf, or -1 for data without a length, where there is no end."""
    set_up_here = trainer.train_dataloader is None
    planned = trainer.estimated_stepping_batches  # sets up the data
    if set_up_here and trainer.ckpt_path is not None:
        # Lightning hands loaders their place in the epoch where it sets them up; it has yet to read it
        trainer.fit_loop._combined_loader = None
    epochs = trainer.max_epochs
    if epochs is None or epochs < 0 or trainer.num_training_batches == math.inf:
        return planned
    steps = sum(steps_of_epoch(trainer, epoch) or 0 for epoch in range(max(epochs, 1)))
    return steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)
