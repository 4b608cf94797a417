"""Cooperative games and their Shapley values: torch only, no network, no Lightning."""

from lightning_eff.shapley.cache import CachedGame
from lightning_eff.shapley.estimator import ShapleyEstimator, ShapleyWarning, StopRule
from lightning_eff.shapley.exact import ExactShapley, LeaveOneOut
from lightning_eff.shapley.games import Game, GroupedGame, TableGame, WalkableGame, as_game, evaluate, evaluate_walks
from lightning_eff.shapley.greedy import GreedyBackward
from lightning_eff.shapley.permutation import PermutationShapley
from lightning_eff.shapley.regression import RegressionShapley
from lightning_eff.shapley.result import ShapleyResult
from lightning_eff.shapley.stratified import StratifiedShapley
from lightning_eff.shapley.top_k import TopKShapley
from lightning_eff.shapley.unbiased import UnbiasedKernelShapley
from lightning_eff.shapley.values import choose_estimator, shapley_values

__all__ = [
    "CachedGame",
    "ExactShapley",
    "Game",
    "GreedyBackward",
    "GroupedGame",
    "LeaveOneOut",
    "PermutationShapley",
    "RegressionShapley",
    "ShapleyEstimator",
    "ShapleyResult",
    "ShapleyWarning",
    "StopRule",
    "StratifiedShapley",
    "TableGame",
    "TopKShapley",
    "UnbiasedKernelShapley",
    "WalkableGame",
    "as_game",
    "choose_estimator",
    "evaluate",
    "evaluate_walks",
    "shapley_values",
]
