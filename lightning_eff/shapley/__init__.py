"""Cooperative games and their Shapley values: torch only, no network, no Lightning."""

from lightning_eff.shapley.cache import CachedGame
from lightning_eff.shapley.estimator import ShapleyEstimator, ShapleyWarning, StopRule
from lightning_eff.shapley.exact import ExactShapley, LeaveOneOut
from lightning_eff.shapley.games import Game, GroupedGame, TableGame, WalkableGame, as_game, evaluate, evaluate_walks
from lightning_eff.shapley.permutation import PermutationShapley
from lightning_eff.shapley.result import ShapleyResult
from lightning_eff.shapley.values import shapley_values

__all__ = [
    "CachedGame",
    "ExactShapley",
    "Game",
    "GroupedGame",
    "LeaveOneOut",
    "PermutationShapley",
    "ShapleyEstimator",
    "ShapleyResult",
    "ShapleyWarning",
    "StopRule",
    "TableGame",
    "WalkableGame",
    "as_game",
    "evaluate",
    "evaluate_walks",
    "shapley_values",
]
