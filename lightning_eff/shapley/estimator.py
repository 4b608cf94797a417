"""What all estimators share: the call, the rule that ends it early, and the warnings about games that tell nothing."""

from __future__ import annotations

import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_eff.arguments import check_choice, check_number, check_whole
from lightning_eff.shapley.games import Game
from lightning_eff.shapley.result import ShapleyResult

Depth = int | Literal["full", "matched"]
Direction = Literal["remove", "add"]
Progress = Callable[[int], None]


class ShapleyWarning(UserWarning):
    """A result that is correct but says less than it seems to."""


@dataclass(frozen=True)
class StopRule:
    """When to stop before all requested work is done. Whatever is reached first ends the estimate.

    Args:
        max_evals: most evaluations, those of a resumed result included; never exceeded.
        max_seconds: wall-clock limit, resumed parts included; looked at between calls of the game.
        rel_stderr: enough when the largest standard error / (largest - smallest value) is at most this.
        rank_stability: enough when Kendall's tau between the rankings of two successive looks is at least this, in
            (-1, 1].

    Raises:
        ValueError: a limit that is not positive, or `rank_stability` outside (-1, 1].
    """

    max_evals: int | None = None
    max_seconds: float | None = None
    rel_stderr: float | None = None
    rank_stability: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_evals", "max_seconds", "rel_stderr"):
            limit = getattr(self, name)
            if limit is not None and not limit > 0:
                raise ValueError(f"{name} must be > 0, got {limit}")
        if self.rank_stability is not None:
            check_number("rank_stability", self.rank_stability, above=-1, most=1)

    @property
    def asks_precision(self) -> bool:
        """Whether the rule looks at the values, not only at what they cost."""
        return self.rel_stderr is not None or self.rank_stability is not None

    def precise_enough(self, values: Tensor, stderr: Tensor, previous: Tensor | None) -> bool:
        """Whether `values` with `stderr`, both `[n, D]`, will do; `previous` are the values of the look before."""
        if bool(values.isnan().any()):
            return False
        if self.rel_stderr is not None:
            spread = values.amax(0) - values.amin(0)
            if bool((stderr.amax(0) <= self.rel_stderr * spread).all()):
                return True
        if self.rank_stability is not None and previous is not None and not bool(previous.isnan().any()):
            return min(map(kendall_tau, previous.T, values.T)) >= self.rank_stability
        return False


class Request(NamedTuple):
    """What `ShapleyEstimator.estimate` was asked for, beside the game."""

    generator: torch.Generator | int | None = None
    resume: ShapleyResult | None = None
    stop: StopRule | None = None
    progress: Progress | None = None


class ShapleyEstimator(ABC):
    """A way to compute or estimate Shapley values."""

    def estimate(
        self,
        game: Game,
        *,
        generator: torch.Generator | int | None = None,
        resume: ShapleyResult | None = None,
        stop: StopRule | None = None,
        progress: Progress | bool | None = None,
    ) -> ShapleyResult:
        """Values of all players.

        Args:
            game: the game; see `as_game` for plain functions and tables.
            generator: source of all randomness: a seed, or a generator from which one seed is drawn; None takes a
                fresh seed (it is found in `result.state["seed"]`). Methods that draw nothing ignore it.
            resume: an earlier result of the same estimator and game to go on from.
            stop: reasons to stop early.
            progress: called with the number of evaluations just done; True shows a bar with the number expected.

        Raises:
            ValueError: a game without players or with invalid values, a budget too small for a single sample, a
                `resume` with other settings or of another kind (whether it is of the same game, the caller knows).
        """
        if not isinstance(game, Game):
            raise TypeError(
                f"expected a Game, got {type(game).__name__}: as_game(...) makes one of functions and tables"
            )
        request = Request(generator, resume, stop, None if isinstance(progress, bool) else progress)
        if progress is not True:
            return self.run(game, request)
        from lightning_eff.reporting import progress as bar

        with bar(f"Shapley values of {game.n_players} players", self.cost(player_count(game))) as shown:
            return self.run(game, request._replace(progress=shown.advance))

    @abstractmethod
    def run(self, game: Game, request: Request) -> ShapleyResult:
        """What `estimate` does; subclasses write it."""

    @abstractmethod
    def cost(self, n: int) -> int:
        """Number of evaluations that `estimate` needs for `n` players without early stopping."""

    def with_budget(self, budget: int, n: int) -> ShapleyEstimator:
        """The same estimator with as much work as `budget` evaluations allow for `n` players.

        Methods whose cost follows from `n` alone return themselves.

        Raises:
            ValueError: the budget does not suffice for the smallest estimate.
        """
        return self


def player_count(game: Game) -> int:
    """Number of players; ValueError for a game without any."""
    if game.n_players < 1:
        raise ValueError(f"a game needs at least one player, got n_players = {game.n_players}")
    return game.n_players


def check_counts(settings: object, *names: str, least: int = 1) -> None:
    """Raises ValueError unless the attributes `names` are ints of at least `least`."""
    for name in names:
        check_whole(name, getattr(settings, name), least)


def check_depth(depth: Depth) -> None:
    """Raises ValueError unless `depth` is a positive int, "full" or "matched"."""
    if depth in ("full", "matched"):
        return
    if not isinstance(depth, int) or isinstance(depth, bool) or depth < 1:
        raise ValueError(f'depth must be "full", "matched" or an int >= 1, got {depth!r}')


def check_direction(direction: str) -> None:
    """Raises ValueError unless `direction` is "remove" or "add"."""
    check_choice("direction", direction, ("remove", "add"))


def resolve_budget(budget: int | str, n: int, auto: int | str | None = None) -> int:
    """Evaluations that a budget stands for, the one reading of all budgets.

    Args:
        budget: an int; a multiple of the players such as "20n"; or "auto" where the caller says what that is.
        n: number of players.
        auto: the budget that "auto" stands for; None where it stands for nothing.

    Raises:
        ValueError: anything else.
    """
    text = str(auto if budget == "auto" and auto is not None else budget)
    number = text.removesuffix("n")
    try:
        evaluations = int(float(number) * n) if text.endswith("n") else int(number)
    except (ValueError, OverflowError):
        evaluations = 0
    if isinstance(budget, bool) or evaluations < 1:
        more = "" if auto is None else ' or "auto"'
        raise ValueError(f'budget must be an int >= 1 or a multiple of the players such as "20n"{more}, got {budget!r}')
    return evaluations


def resolve_depth(depth: Depth, n: int) -> int:
    """Number of steps that `depth` stands for with `n` players; ValueError for "matched" and beyond n."""
    if depth == "matched":
        raise ValueError(
            'depth="matched" stands for the number of players that will be removed, which only the caller knows: '
            "use dataclasses.replace(estimator, depth=that_number)"
        )
    steps = n if depth == "full" else int(depth)
    if not 1 <= steps <= n:
        raise ValueError(f"depth must lie in 1..{n} (the number of players), got {steps}")
    return steps


def warn_if_silent(result: ShapleyResult) -> ShapleyResult:
    """Pass `result` on; warn where the game did not react to its players, or reacted without any variation."""
    if bool((result.stderr != 0).any()) or result.method == "greedy_backward":
        return result
    if bool((result.values == 0).all()):
        ends = result.v_full, result.v_empty
        if ends[0] is not None and ends[1] is not None and torch.equal(ends[0], ends[1]):
            warn(f"no signal: v(all) = v(none) = {ends[0].tolist()} and every value is 0")
        else:
            warn(
                f"no signal: nothing up to depth {result.depth} changed the value; a saturated accuracy does this: "
                'use value="neg_loss", more samples or a larger depth'
            )
    elif result.method == "permutation":
        warn(
            "zero variance: every sample (a walk or an antithetic pair) paid each player the same: all errors are 0; "
            "additive games do this (to pairs, games of pairwise interactions too), and accuracies of too few samples: "
            'for those use value="neg_loss" or more samples'
        )
    return result


def warn_if_incomplete(result: ShapleyResult) -> ShapleyResult:
    """Pass `result` on; warn where the budget ended before each player had the two samples an error bar needs."""
    unsure = result.stderr.isinf().reshape(len(result.stderr), -1).any(1).nonzero().flatten().tolist()
    if unsure:
        warn(
            f"{len(unsure)} of {len(result.values)} players have fewer than two samples, hence no error bar "
            f"(value NaN: no sample at all): {unsure[:20]}; go on with estimate(resume=result) or a larger budget"
        )
    return result


def warn(text: str) -> None:
    """Warn, naming the line outside of this room that asked for the estimate."""
    frame, depth = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("lightning_eff.shapley"):
        frame, depth = frame.f_back, depth + 1
    warnings.warn(text, ShapleyWarning, stacklevel=depth - 1)


def kendall_tau(a: Tensor, b: Tensor) -> float:
    """Kendall's tau between the rankings that two score vectors `[n]` give (equal scores ranked by index)."""
    positions = [scores.argsort(descending=True, stable=True).argsort().double() for scores in (a, b)]
    signs = [torch.sign(position[:, None] - position[None, :]) for position in positions]
    n = len(a)
    return float((signs[0] * signs[1]).sum()) / (n * (n - 1)) if n > 1 else 1.0
