"""One call from a game to its Shapley values, and the choice of a method."""

from __future__ import annotations

from typing import Any

import torch

from lightning_eff.shapley.estimator import Depth, Progress, ShapleyEstimator, StopRule, player_count, resolve_budget
from lightning_eff.shapley.exact import ExactShapley, LeaveOneOut
from lightning_eff.shapley.games import as_game
from lightning_eff.shapley.greedy import GreedyBackward
from lightning_eff.shapley.permutation import PermutationShapley
from lightning_eff.shapley.regression import RegressionShapley
from lightning_eff.shapley.result import ShapleyResult
from lightning_eff.shapley.stratified import StratifiedShapley
from lightning_eff.shapley.top_k import TopKShapley
from lightning_eff.shapley.unbiased import UnbiasedKernelShapley

_METHODS: dict[str, type[ShapleyEstimator]] = {
    "exact": ExactShapley,
    "leave_one_out": LeaveOneOut,
    "permutation": PermutationShapley,
    "regression": RegressionShapley,
    "stratified": StratifiedShapley,
    "unbiased_kernel": UnbiasedKernelShapley,
    "top_k": TopKShapley,
    "greedy_backward": GreedyBackward,
}
_EXACT_PLAYERS = 12  # a function of the user is asked 4,096 times without asking him
_REGRESSION_BUDGET = 4  # evaluations a player: below, antithetic walks


def shapley_values(
    game: Any,
    method: str | ShapleyEstimator = "auto",
    *,
    n_players: int | None = None,
    generator: torch.Generator | int | None = None,
    resume: ShapleyResult | None = None,
    stop: StopRule | None = None,
    progress: Progress | bool | None = None,
    **options: Any,
) -> ShapleyResult:
    """Shapley values of a game.

    Args:
        game: anything that `as_game` takes.
        method: `"exact"`, `"leave_one_out"`, `"permutation"`, `"regression"`, `"stratified"`, `"unbiased_kernel"`,
            `"top_k"`, `"greedy_backward"`, an estimator, or `"auto"`: exact for n <= 12 players, regression beyond.
        n_players: see `as_game`.
        generator: see `ShapleyEstimator.estimate`, like `resume` and `stop`.
        resume: see there.
        stop: see there.
        progress: True shows a bar with the number of evaluations expected; or see there.
        **options: constructor arguments of a method given by its name.

    Raises:
        ValueError: an unknown method, or options for a method that is not given by its name; see also `as_game` and
            the estimators.

    Example:
        >>> shapley_values({(): 0, (0,): 1, (1,): 2, (0, 1): 4}).values.tolist()
        [1.5, 2.5]
    """
    game = as_game(game, n_players)
    player_count(game)
    if isinstance(method, ShapleyEstimator) or method == "auto":
        if options:
            raise ValueError(f"options {sorted(options)} need a method given by its name: one of {sorted(_METHODS)}")
        estimator = method if isinstance(method, ShapleyEstimator) else choose_estimator(game.n_players)
    elif method in _METHODS:
        estimator = _METHODS[method](**options)
    else:
        raise ValueError(f"method must be 'auto', one of {sorted(_METHODS)} or a ShapleyEstimator, got {method!r}")
    return estimator.estimate(game, generator=generator, resume=resume, stop=stop, progress=progress)


def automatic_budget(n: int) -> int:
    """Evaluations that `budget="auto"` stands for: 20 a player, and all coalitions of up to 12 players."""
    return max(20 * n, 2**n if n <= _EXACT_PLAYERS else 0)


def choose_estimator(n: int, budget: int | str = "auto", depth: Depth = "full") -> ShapleyEstimator:
    """The estimator that `"auto"` stands for.

    Exact values where the budget allows all coalitions; else antithetic walks for a partial value and for small
    budgets; else regression, whose error at equal evaluations was small on every game it was measured on.

    Args:
        n: number of players.
        budget: evaluations: a number, a multiple of the players such as `"20n"`, or `"auto"`: `"20n"`, and for full
            values all 2**n of up to 12 players.
        depth: of the value, as in `PermutationShapley`; `"matched"` takes as many walks as the budget has full ones.

    Raises:
        ValueError: the budget is below that of two walks.
    """
    evaluations = resolve_budget(budget, n, auto=automatic_budget(n) if depth == "full" else "20n")
    if depth == "matched":
        return PermutationShapley(max(2, evaluations // n), depth=depth)
    if depth != "full":
        exact = ExactShapley(depth=depth)
        return exact if exact.cost(n) <= evaluations else PermutationShapley(depth=depth).with_budget(evaluations, n)
    if 2**n <= evaluations:
        return ExactShapley()
    if n == 1:
        raise ValueError(f"a single player needs 2 evaluations, the budget is {evaluations}")
    if evaluations < max(_REGRESSION_BUDGET * n, 30):
        return PermutationShapley().with_budget(evaluations, n)
    return RegressionShapley(evaluations)
