"""Cooperative games and their Shapley values: torch only, no network, no Lightning."""

from lightning_eff.shapley.cache import CachedGame
from lightning_eff.shapley.control_variate import ControlVariate
from lightning_eff.shapley.diagnostics import (
    ConvergenceCurve,
    CostBenefit,
    RankStability,
    convergence_curve,
    cost_benefit,
    rank_stability,
)
from lightning_eff.shapley.estimator import Request, ShapleyEstimator, ShapleyWarning, StopRule
from lightning_eff.shapley.exact import ExactShapley, LeaveOneOut
from lightning_eff.shapley.figures import histogram_figure, values_figure
from lightning_eff.shapley.games import (
    Game,
    GroupedGame,
    TableGame,
    TourableGame,
    WalkableGame,
    as_game,
    evaluate,
    evaluate_tour,
    evaluate_walks,
)
from lightning_eff.shapley.greedy import GreedyBackward
from lightning_eff.shapley.interaction import shapley_interaction, shapley_interactions
from lightning_eff.shapley.oracle import OracleSets, RankReport, compare_ranks, oracle_rank, oracle_sets
from lightning_eff.shapley.permutation import PermutationShapley
from lightning_eff.shapley.regression import RegressionShapley
from lightning_eff.shapley.result import ShapleyResult
from lightning_eff.shapley.stratified import StratifiedShapley
from lightning_eff.shapley.top_k import TopKShapley
from lightning_eff.shapley.unbiased import UnbiasedKernelShapley
from lightning_eff.shapley.values import choose_estimator, shapley_values

__all__ = [
    "CachedGame",
    "ControlVariate",
    "ConvergenceCurve",
    "CostBenefit",
    "ExactShapley",
    "Game",
    "GreedyBackward",
    "GroupedGame",
    "LeaveOneOut",
    "OracleSets",
    "PermutationShapley",
    "RankReport",
    "RankStability",
    "RegressionShapley",
    "Request",
    "ShapleyEstimator",
    "ShapleyResult",
    "ShapleyWarning",
    "StopRule",
    "StratifiedShapley",
    "TableGame",
    "TopKShapley",
    "TourableGame",
    "UnbiasedKernelShapley",
    "WalkableGame",
    "as_game",
    "choose_estimator",
    "compare_ranks",
    "convergence_curve",
    "cost_benefit",
    "evaluate",
    "evaluate_tour",
    "evaluate_walks",
    "histogram_figure",
    "oracle_rank",
    "oracle_sets",
    "rank_stability",
    "shapley_interaction",
    "shapley_interactions",
    "shapley_values",
    "values_figure",
]
