"""What a ranking rule is given to work with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_eff.pruning.report import Scores
from lightning_eff.pruning.samples import Samples
from lightning_eff.pruning.trainer_data import TrainerData
from lightning_eff.surgery import ChannelGraph


@dataclass(frozen=True)
class Scoring:
    """What a ranking rule has to work with.

    Attributes:
        trainer: the running Trainer.
        pl_module: the user's module.
        model: the part of it that is pruned.
        graph: its channel graph.
        samples: calibration samples on the model's device; none for rules that take whole batches from ``data``.
        data: the calibration loader's batches.
        expected: channels each group will about keep after this step; exact unless the allocation needs the scores.
        curves: also give sensitivity curves.
        seed: of this step.
        verbose: show progress.
        remembered: ``remembered(name, compute)`` returns the scores of a group from an interrupted earlier run over
            the same network and data, or computes and stores them.
    """

    trainer: Trainer
    pl_module: LightningModule
    model: nn.Module
    graph: ChannelGraph
    samples: Samples
    data: TrainerData
    expected: Mapping[str, int]
    curves: bool
    seed: int
    verbose: bool
    remembered: Callable[[str, Callable[[], Scores]], Scores]
