"""One call from a game to its Shapley values."""

from __future__ import annotations

from typing import Any

import torch

from lightning_eff.shapley.estimator import Progress, ShapleyEstimator, StopRule
from lightning_eff.shapley.exact import ExactShapley, LeaveOneOut
from lightning_eff.shapley.games import as_game
from lightning_eff.shapley.permutation import PermutationShapley
from lightning_eff.shapley.result import ShapleyResult

_METHODS: dict[str, type[ShapleyEstimator]] = {
    "exact": ExactShapley,
    "leave_one_out": LeaveOneOut,
    "permutation": PermutationShapley,
}


def shapley_values(
    game: Any,
    method: str | ShapleyEstimator = "auto",
    *,
    n_players: int | None = None,
    generator: torch.Generator | int | None = None,
    resume: ShapleyResult | None = None,
    stop: StopRule | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> ShapleyResult:
    """Shapley values of a game.

    Args:
        game: anything that `as_game` takes.
        method: `"exact"`, `"leave_one_out"`, `"permutation"`, an estimator, or `"auto"`, which today means exact for
            n <= 12 players and antithetic permutations beyond.
        n_players: see `as_game`.
        generator: see `ShapleyEstimator.estimate`, like `resume`, `stop` and `progress`.
        resume: see there.
        stop: see there.
        progress: see there.
        **options: constructor arguments of a method given by its name.

    Raises:
        ValueError: an unknown method, or options for a method that is not given by its name; see also `as_game` and
            the estimators.

    Example:
        >>> shapley_values({(): 0, (0,): 1, (1,): 2, (0, 1): 4}).values.tolist()
        [1.5, 2.5]
    """
    game = as_game(game, n_players)
    if isinstance(method, ShapleyEstimator) or method == "auto":
        if options:
            raise ValueError(f"options {sorted(options)} need a method given by its name: one of {sorted(_METHODS)}")
        estimator = method if isinstance(method, ShapleyEstimator) else _choose(game.n_players)
    elif method in _METHODS:
        estimator = _METHODS[method](**options)
    else:
        raise ValueError(f"method must be 'auto', one of {sorted(_METHODS)} or a ShapleyEstimator, got {method!r}")
    return estimator.estimate(game, generator=generator, resume=resume, stop=stop, progress=progress)


def _choose(n: int) -> ShapleyEstimator:
    return ExactShapley() if n <= 12 else PermutationShapley()
