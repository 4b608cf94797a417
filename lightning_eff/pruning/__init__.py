"""Structured pruning callbacks: remove whole channels, keep training, ship the smaller network."""

from lightning_eff.pruning.callback import StructuredPruningCallback
from lightning_eff.pruning.criteria import CRITERIA, importance, register_criterion
from lightning_eff.pruning.dirichlet.callback import DirichletPruneCallback
from lightning_eff.pruning.dirichlet.figures import cut_figure, feature_figure, posterior_figure, share_figure
from lightning_eff.pruning.dirichlet.options import PUBLISHED, DirichletOptions, Draws, Gate, Prior
from lightning_eff.pruning.dirichlet.posterior import DirichletPosterior, dirichlet_kl
from lightning_eff.pruning.dirichlet.scoring import dirichlet_scores
from lightning_eff.pruning.random_channel import (
    ComparisonReport,
    SearchResult,
    compare_criteria,
    random_search,
    sample_configs,
)
from lightning_eff.pruning.random_channel.callback import RandomChannelPruningCallback, Search
from lightning_eff.pruning.random_channel.scratch import ScratchResult, search_from_scratch
from lightning_eff.pruning.repair import Repair
from lightning_eff.pruning.report import PruneReport, Scores
from lightning_eff.pruning.samples import Samples
from lightning_eff.pruning.scoring import Scoring
from lightning_eff.pruning.settings import Allocation, Calibration, Layers, Schedule
from lightning_eff.pruning.shapley.callback import ShapleyPruningCallback
from lightning_eff.pruning.shapley.channel_game import ChannelGame, GameOptions
from lightning_eff.pruning.values import Accuracy, NegativeLoss

__all__ = [
    "CRITERIA",
    "PUBLISHED",
    "Accuracy",
    "Allocation",
    "Calibration",
    "ChannelGame",
    "ComparisonReport",
    "DirichletOptions",
    "DirichletPosterior",
    "DirichletPruneCallback",
    "Draws",
    "GameOptions",
    "Gate",
    "Layers",
    "NegativeLoss",
    "Prior",
    "PruneReport",
    "RandomChannelPruningCallback",
    "Repair",
    "Samples",
    "Schedule",
    "Scores",
    "Scoring",
    "ScratchResult",
    "Search",
    "SearchResult",
    "ShapleyPruningCallback",
    "StructuredPruningCallback",
    "compare_criteria",
    "cut_figure",
    "dirichlet_kl",
    "dirichlet_scores",
    "feature_figure",
    "importance",
    "posterior_figure",
    "random_search",
    "register_criterion",
    "sample_configs",
    "search_from_scratch",
    "share_figure",
]
