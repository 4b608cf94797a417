"""Values without sampling: enumeration of all coalitions (up to a depth), and leave-one-out.

With L_i(r) the mean marginal loss of player i over all removed sets R of size r without i, the partial value of depth
K is (1/K) sum_{r<K} L_i(r): K = n is the Shapley value (Shapley 1953), K = 1 is leave-one-out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, combinations

import numpy as np
import torch
from torch import Tensor

from lightning_eff.shapley.estimator import (
    Depth,
    Direction,
    Request,
    ShapleyEstimator,
    check_counts,
    check_depth,
    check_direction,
    player_count,
    resolve_depth,
    warn_if_silent,
)
from lightning_eff.shapley.games import Game, evaluate, evaluate_tour, evaluate_walks
from lightning_eff.shapley.result import ShapleyResult
from lightning_eff.shapley.table import coalitions_of

SEGMENT = 4096  # coalitions of a tour that one call of the game makes
_YEAR = 31557600.0  # seconds


@dataclass(frozen=True)
class ExactShapley(ShapleyEstimator):
    """Exact (partial) Shapley values from every coalition: 2**n evaluations, sum over r <= K of C(n, r) at depth K.

    Args:
        max_players: most players for full depth; 2**max_players evaluations is the limit for a partial depth too.
        depth: `"full"` for the Shapley value; K: the mean over the first K removals only; `"matched"`: to be replaced
            by the caller, as in `PermutationShapley`.
        direction: which end a partial depth starts from: all players, removing, or none, adding. Without meaning at
            full depth.
        chunk_size: most coalitions a call of the game; it has no influence on the values. A game with a `tour` is
            toured at full depth, 4,096 coalitions a call.

    Raises:
        ValueError: an argument out of range.
    """

    max_players: int = 20
    depth: Depth = "full"
    direction: Direction = "remove"
    chunk_size: int = 4096

    def __post_init__(self) -> None:
        check_counts(self, "max_players", "chunk_size")
        check_depth(self.depth)
        check_direction(self.direction)

    def cost(self, n: int) -> int:
        """As `ShapleyEstimator.cost`."""
        return sum(math.comb(n, size) for size in range(resolve_depth(self.depth, n) + 1))

    def run(self, game: Game, request: Request) -> ShapleyResult:
        """As `ShapleyEstimator.run`; there is nothing to resume, and a budget below `cost` is a ValueError.

        Raises:
            ValueError: also when more evaluations are needed than `max_players` allows.
            TimeoutError: `stop.max_seconds` passed before all coalitions were evaluated.
        """
        n = player_count(game)
        depth = resolve_depth(self.depth, n)
        self._check_size(game, n)
        work = Enumeration(self.cost(n), request)
        if depth == n:
            return self._full(game, n, work)

        # L_i(r) = mean of v over sets of size r without i, minus the mean over sets of size r + 1 with i
        total, without_player, origin = torch.zeros(n, 1, dtype=torch.float64), torch.empty(0), torch.empty(0)
        for size in range(depth + 1):
            moved = _subsets(n, size)
            coalitions = ~moved if self.direction == "remove" else moved
            values = torch.cat([work.done(evaluate(game, part)) for part in torch.split(coalitions, self.chunk_size)])
            if size == 0:
                origin = values[0]
            change = (values - origin).reshape(len(values), -1)
            if size > 0:
                with_player = torch.stack([change[moved[:, i]].sum(0) for i in range(n)])
                total = total + (with_player - without_player) / math.comb(n - 1, size - 1)
            without_player = torch.stack([change[~moved[:, i]].sum(0) for i in range(n)])
        sign = -1 if self.direction == "remove" else 1
        shapley = (sign * total / depth + 0.0).reshape(n, *origin.shape)  # + 0.0 turns -0 into 0
        return work.result(game, shapley, "exact", depth, self.direction, origin, None)

    def _full(self, game: Game, n: int, work: Enumeration) -> ShapleyResult:
        table = (_toured if getattr(game, "tour", None) is not None else self._listed)(game, n, work)
        values = shapley_of_table(table)
        first, last = (table[-1], table[0]) if self.direction == "remove" else (table[0], table[-1])
        return work.result(game, values, "exact", n, self.direction, first, last)

    def _listed(self, game: Game, n: int, work: Enumeration) -> Tensor:
        """All values, `[2**n]` or `[2**n, D]`, in the order of their codes: bit i is player i."""
        table = torch.empty(0)
        for begin in range(0, 2**n, self.chunk_size):
            codes = torch.arange(begin, min(begin + self.chunk_size, 2**n))
            values = work.done(evaluate(game, coalitions_of(codes, n)))
            if begin == 0:
                table = torch.empty(2**n, *values.shape[1:], dtype=torch.float64)
            table[codes] = values
        return table

    def _check_size(self, game: Game, n: int) -> None:
        evaluations = self.cost(n)
        if evaluations <= 2**self.max_players:
            return
        evaluate(game, torch.ones(1, n, dtype=torch.bool))  # the first call may prepare something
        begin = time.perf_counter()
        evaluate(game, torch.zeros(1, n, dtype=torch.bool))
        log_years = math.log(evaluations) + math.log(time.perf_counter() - begin) - math.log(_YEAR)
        seconds = math.exp(min(log_years, 100.0)) * _YEAR
        number = f"{evaluations:,}" if n <= 64 else f"{math.log10(evaluations):.0f}-digit number of"
        needs = f"2**{n}" if n > 64 and self.depth == "full" else number
        needs = f"2**{n} = {evaluations:,}" if n <= 64 and self.depth == "full" else needs
        raise ValueError(
            f"exact values of {n} players at depth {self.depth} need {needs} evaluations, "
            f"about {_duration(seconds)}; max_players={self.max_players} allows {2**self.max_players:,}; "
            f"use PermutationShapley (about {n} evaluations a walk), ExactShapley(depth=2) "
            f"({1 + n + math.comb(n, 2):,} evaluations), LeaveOneOut ({n + 1}), or raise max_players"
        )


@dataclass(frozen=True)
class LeaveOneOut(ShapleyEstimator):
    """What the game loses when one player goes alone, v(N) - v(N without i): depth 1, n + 1 evaluations.

    Args:
        direction: `"remove"`, or `"add"` for what it gains when one player comes alone, v({i}) - v(none).
        chunk_size: most coalitions a call of the game; it has no influence on the values.

    Raises:
        ValueError: an argument out of range.
    """

    direction: Direction = "remove"
    chunk_size: int = 256

    def __post_init__(self) -> None:
        check_direction(self.direction)
        check_counts(self, "chunk_size")

    def cost(self, n: int) -> int:
        """As `ShapleyEstimator.cost`."""
        return n + 1

    def run(self, game: Game, request: Request) -> ShapleyResult:
        """As `ExactShapley.run`, and raises likewise."""
        n = player_count(game)
        work = Enumeration(self.cost(n), request)
        remove = self.direction == "remove"
        origin = work.done(evaluate(game, torch.full((1, n), remove)))[0]
        first_steps = [
            work.done(evaluate_walks(game, part, start="full" if remove else "empty", chunk_size=self.chunk_size)[:, 0])
            for part in torch.split(torch.arange(n)[:, None], self.chunk_size)
        ]
        values = torch.cat(first_steps)
        change = origin - values if remove else values - origin
        return work.result(game, change, "leave_one_out", 1, self.direction, origin, values[0] if n == 1 else None)


class Enumeration:
    """Bookkeeping of an enumeration that is worth nothing before it is complete."""

    def __init__(self, cost: int, request: Request) -> None:
        stop = request.stop
        if request.resume is not None:
            raise ValueError("an exact result is complete, nothing is left to resume; CachedGame keeps evaluations")
        if stop is not None and stop.max_evals is not None and stop.max_evals < cost:
            raise ValueError(
                f"this needs {cost:,} evaluations, the budget is {stop.max_evals:,}; PermutationShapley samples"
            )
        self.cost, self.progress, self.begin = cost, request.progress, time.perf_counter()
        self.limit = math.inf if stop is None or stop.max_seconds is None else stop.max_seconds
        self.n_evals = 0

    def done(self, values: Tensor) -> Tensor:
        """Count `values` `[M]` or `[M, D]` as evaluated, and pass them on."""
        self.n_evals += len(values)
        if self.progress is not None:
            self.progress(len(values))
        if time.perf_counter() - self.begin > self.limit and self.n_evals < self.cost:
            raise TimeoutError(
                f"{self.n_evals:,} of {self.cost:,} evaluations in {self.limit} s; CachedGame keeps them"
            )
        return values

    def result(
        self,
        game: Game,
        values: Tensor,
        method: str,
        depth: int,
        direction: Direction,
        origin: Tensor,
        end: Tensor | None,
    ) -> ShapleyResult:
        """The finished result; `origin` and `end` are the values of the first and of the last coalition."""
        full, empty = (origin, end) if direction == "remove" else (end, origin)
        return warn_if_silent(
            ShapleyResult(
                values=values,
                stderr=torch.zeros_like(values),
                n_evals=self.n_evals,
                n_unique=self.n_evals,
                v_empty=empty,
                v_full=full,
                method=method,
                depth=depth,
                seconds=time.perf_counter() - self.begin,
                converged=True,
                names=getattr(game, "names", None),
            )
        )


def shapley_of_table(table: Tensor) -> Tensor:
    """Shapley values of all 2**n values of a game: phi_i = sum_S s! (n-s-1)! / n! (v(S+i) - v(S)) over S without i.

    A player who changes nothing gets exactly 0. Memory is that of the table.

    Args:
        table: float64 `[2**n]` or `[2**n, D]`; bit i of an entry's number is player i.

    Returns:
        float64 `[n]` or `[n, D]`.
    """
    n = len(table).bit_length() - 1
    by_size = torch.tensor([1 / (n * math.comb(n - 1, size)) for size in range(n)], dtype=torch.float64)
    size = torch.zeros(1, dtype=torch.int64)  # of the coalition with each code of n - 1 bits
    for _ in range(n - 1):
        size = torch.cat([size, size + 1])
    weights = by_size[size]
    values = []
    for player in range(n):
        without, joined = table.view(2 ** (n - 1 - player), 2, 2**player, -1).unbind(1)
        values.append(weights @ (joined - without).flatten(0, 1))
    return torch.stack(values).reshape(n, *table.shape[1:]) + 0.0  # + 0.0 turns -0 into 0


def _toured(game: Game, n: int, work: Enumeration) -> Tensor:
    """All values in the order of their codes, evaluated in Gray's: one player changes sides at each step."""
    table = torch.empty(0)
    for begin in range(0, 2**n, SEGMENT):
        count = torch.arange(begin, min(begin + SEGMENT, 2**n))
        codes = count ^ (count >> 1)
        flips = (codes[1:] ^ codes[:-1]).double().log2().long()
        values = work.done(evaluate_tour(game, coalitions_of(codes[:1], n)[0], flips))
        if begin == 0:
            table = torch.empty(2**n, *values.shape[1:], dtype=torch.float64)
        table[codes] = values
    return table


def _duration(seconds: float) -> str:
    for unit, length in (("years", _YEAR), ("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.0f} {unit}"
    return f"{seconds:.1g} seconds" if seconds < 10 else f"{seconds:.0f} seconds"


def _subsets(n: int, size: int) -> Tensor:
    """All subsets of `size` of `n` players, bool `[C(n, size), n]`, in lexicographic order.

    The order matters: it lists S and S + i alike, so that the sums of a null player cancel to the last bit.
    """
    count = math.comb(n, size)
    members: Iterator[int] = chain.from_iterable(combinations(range(n), size))
    index = torch.from_numpy(np.fromiter(members, np.int64, count * size)).view(count, size)
    return torch.zeros(count, n, dtype=torch.bool).scatter_(1, index, True)
