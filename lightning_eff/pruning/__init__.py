"""Structured pruning callbacks: remove whole channels, keep training, ship the smaller network."""

from lightning_eff.pruning.callback import StructuredPruningCallback
from lightning_eff.pruning.channel_game import ChannelGame, GameOptions
from lightning_eff.pruning.report import PruneReport, Scores
from lightning_eff.pruning.samples import Samples
from lightning_eff.pruning.scoring import Scoring
from lightning_eff.pruning.settings import Allocation, Calibration, Layers, Schedule
from lightning_eff.pruning.shapley import ShapleyPruningCallback
from lightning_eff.pruning.values import Accuracy, NegativeLoss

__all__ = [
    "Accuracy",
    "Allocation",
    "Calibration",
    "ChannelGame",
    "GameOptions",
    "Layers",
    "NegativeLoss",
    "PruneReport",
    "Samples",
    "Schedule",
    "Scores",
    "Scoring",
    "ShapleyPruningCallback",
    "StructuredPruningCallback",
]
