"""What a Trainer must be to train agent and backbone together, and how much of its work is done."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.plugins import HalfPrecision, MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_eff.glimpse.config import AgentConfig


def check_trainer(trainer: Trainer, agent: AgentConfig) -> None:
    """Raise a ValueError, before any work is done, if ``trainer`` cannot train an agent."""
    strategy, precision = trainer.strategy, trainer.precision_plugin
    if isinstance(strategy, DDPStrategy):
        if not strategy._ddp_kwargs.get("find_unused_parameters"):
            raise ValueError(
                "agent and backbone have losses of their own, in which not every parameter takes part: use "
                'strategy="ddp_find_unused_parameters_true", or DDPStrategy(find_unused_parameters=True)'
            )
    elif not isinstance(strategy, SingleDeviceStrategy):
        raise ValueError(
            f"{type(strategy).__name__} splits or wraps parameters that Stable-Baselines3 holds itself: use one device "
            'or strategy="ddp_find_unused_parameters_true"'
        )
    if isinstance(precision, HalfPrecision):
        raise ValueError(
            f"the agent learns in single precision, got precision={precision.precision!r}: use 'bf16-mixed', which "
            "is for the backbone alone"
        )
    if isinstance(precision, MixedPrecision) and precision.scaler is not None:
        if agent.update == "sb3":
            raise ValueError(
                f"update='sb3' steps three times with losses of its own, and precision={precision.precision!r} scales "
                "losses for one: use update='fused', or precision='bf16-mixed'"
            )
        if agent.gradient_clip is not None:
            raise ValueError(
                f"gradient_clip would clip gradients that precision={precision.precision!r} has scaled: use "
                "precision='bf16-mixed', or gradient_clip=None"
            )


def refuse_averages_of_one_optimizer(trainer: Trainer) -> None:
    """Raise a ValueError for a callback that averages what a single optimizer trains."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(callback, StochasticWeightAveraging) for callback in callbacks):
        raise ValueError(
            "StochasticWeightAveraging averages what one optimizer trains, and agent and backbone have optimizers of "
            "their own: use EMAWeightAveraging"
        )


def tell_of_missed_checkpoints(trainer: Trainer) -> None:
    """Warn of checkpoints that are to be written at a number of steps that no batch may end at."""
    for callback in trainer.checkpoint_callbacks:
        every = callback._every_n_train_steps if isinstance(callback, ModelCheckpoint) else 0
        if every > 1:
            rank_zero_warn(
                f"ModelCheckpoint(every_n_train_steps={every}) saves where global_step is a multiple of {every} at the "
                "end of a batch, and each batch takes several steps: it may save seldom or never; use every_n_epochs "
                "or train_time_interval"
            )


def share_buffers(module: nn.Module) -> None:
    """Give all processes the first one's buffers.

    DistributedDataParallel does so before the next batch: until then statistics of BatchNorm would differ, and with
    them what the processes validate.
    """
    for buffer in module.buffers():
        torch.distributed.broadcast(buffer, 0)


def progress(trainer: Trainer, batch_idx: int) -> float | None:
    """Return the share of training done in the middle of a batch, in [0, 1]; None if it has no known end."""
    shares = []
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        batches = trainer.num_training_batches
        within = (batch_idx + 0.5) / batches if 0 < batches < math.inf else 0.0
        shares.append((trainer.current_epoch + within) / trainer.max_epochs)
    if trainer.max_steps > 0:
        shares.append(trainer.global_step / trainer.max_steps)
    return min(max(shares), 1.0) if shares else None
