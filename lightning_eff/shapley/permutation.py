"""Shapley values from random walks: players leave (or join) in random order, each is paid the change it makes.

Full walks come in antithetic pairs (an order and its reverse; Mitchell et al. 2022, arXiv 2104.12199). Partial
walks, of depth K < n, come in *rounds*: a random order is cut into floor(n/K) disjoint walks, so that every player
goes at most once a round, and the players that went least often so far are taken first. Players are at a uniformly
random depth of a uniformly random coalition each time they go, hence the mean over a player's occurrences is an
unbiased estimate of its partial value. (Latin squares made of the cyclic shifts of one order balance the depths too,
but their walks run through nested coalitions and err more at equal cost: a test compares them.)

The independent unit of the standard error is a pair, a single full walk without `antithetic`, or an occurrence in a
round.

Shapes: `n` players, `D` components of a value, `G` groups, `U` units, `T` walks a unit, `P = U T` walks, `K` depth,
`E <= K` evaluated steps.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_eff.shapley.accumulator import Accumulator, DistinctCoalitions, UnitOrders, Units
from lightning_eff.shapley.estimator import (
    Depth,
    Direction,
    Progress,
    ShapleyEstimator,
    StopRule,
    check_depth,
    check_direction,
    player_count,
    resolve_depth,
    warn_if_incomplete,
    warn_if_silent,
)
from lightning_eff.shapley.exact import LeaveOneOut
from lightning_eff.shapley.games import Game, evaluate, evaluate_walks, group_weights, nested_coalitions
from lightning_eff.shapley.result import ShapleyResult

_UNITS_BETWEEN_LOOKS = 4  # a fixed rhythm, so that the size of a chunk does not decide where a precision rule stops


@dataclass(frozen=True)
class PermutationShapley(ShapleyEstimator):
    """Sampled (partial) Shapley values from random walks.

    A full walk costs n - 1 evaluations and satisfies efficiency exactly. With a `GroupedGame` every group walks its
    own orders at the cost of one shared set. The same seed gives the same bits for any `chunk_size`, and an estimate
    that is resumed gives the bits of one uninterrupted estimate with as many units, provided that the game's values
    do not depend on what else is in a call.

    Args:
        walks: number of walks (in each group), rounded up to whole units; at a partial depth at least as many
            as let every player go twice.
        depth: `"full"` for the Shapley value; K: the mean over the first K removals only; `"matched"`: to be
            replaced by the caller who knows how many players will go, `dataclasses.replace(estimator, depth=k)`.
            Depth 1 leaves nothing to sample: it is `LeaveOneOut`.
        direction: walk from all players, removing, or from none, adding.
        antithetic: follow each full walk by its reverse. Partial walks are balanced in rounds instead.
        tolerance: end a walk when its value stayed within this fraction of |v(N) - v(empty)| from the value at its
            far end for `patience` steps; the rest of its players are paid 0. Biased, hence 0 (never) by default.
            Steps are then evaluated one at a time, without `game.walk`.
        patience: number of consecutive steps for `tolerance`.
        share_coalitions: let all groups of a grouped game walk the same orders.
        chunk_size: about how many coalitions to ask for in a call of the game, whole units at least.

    Raises:
        ValueError: an argument out of range.
    """

    walks: int = 32
    depth: Depth = "full"
    direction: Direction = "remove"
    antithetic: bool = True
    tolerance: float = 0.0
    patience: int = 3
    share_coalitions: bool = False
    chunk_size: int = 256

    def __post_init__(self) -> None:
        for name in ("walks", "patience", "chunk_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance must lie in [0, 1), got {self.tolerance}")
        check_depth(self.depth)
        check_direction(self.direction)

    def cost(self, n: int) -> int:
        """As `ShapleyEstimator.cost`."""
        depth = resolve_depth(self.depth, n)
        if depth == 1:
            return LeaveOneOut().cost(n)
        units = self._units(n, depth)
        return self._ends(units) + self._requested(units) * units.evaluations

    def estimate(
        self,
        game: Game,
        *,
        generator: torch.Generator | int | None = None,
        resume: ShapleyResult | None = None,
        stop: StopRule | None = None,
        progress: Progress | None = None,
    ) -> ShapleyResult:
        """As `ShapleyEstimator.estimate`; `resume` adds `walks` walks to those of the result and takes its seed.

        Warns:
            ShapleyWarning: the game does not react, or the budget left players with fewer than two occurrences.
        """
        n = player_count(game)
        depth = resolve_depth(self.depth, n)
        if depth == 1:
            return LeaveOneOut(self.direction).estimate(game, resume=resume, stop=stop, progress=progress)
        units = self._units(n, depth)
        weights = None if self.share_coalitions else group_weights(game)
        run = _Run(self, game, units, weights, stop or StopRule(), progress)
        if resume is None:
            run.begin(_seed_of(generator))
        else:
            run.go_on(resume, generator)
        return run.until(run.units_done + self._requested(units))

    def _units(self, n: int, depth: int) -> Units:
        return Units(n, depth, (2 if self.antithetic else 1) if depth == n else n // depth)

    def _requested(self, units: Units) -> int:
        asked = math.ceil(self.walks / units.walks)
        return asked if units.is_full else max(asked, math.ceil(2 * units.n / (units.walks * units.depth)))

    def _ends(self, units: Units) -> int:
        """How many of v(N) and v(empty) are needed."""
        return 2 if units.is_full or self.tolerance > 0 else 1


class _Run:
    """One estimate: the state that grows from call to call."""

    def __init__(
        self,
        estimator: PermutationShapley,
        game: Game,
        units: Units,
        weights: Tensor | None,
        stop: StopRule,
        progress: Progress | None,
    ) -> None:
        self.estimator, self.game, self.units, self.stop, self.progress = estimator, game, units, stop, progress
        self.weights = torch.ones(1, dtype=torch.float64) if weights is None else weights  # [G]
        self.groups: list[int | None] = [None] if weights is None else list(range(len(weights)))
        self.settings = {
            "n": units.n,
            "depth": units.depth,
            "groups": len(self.groups),
            **{
                name: value for name, value in asdict(estimator).items() if name not in ("walks", "depth", "chunk_size")
            },
        }
        self.clock = time.perf_counter()
        self.seconds_before = 0.0
        self.reported = 0

    def begin(self, seed: int) -> None:
        """Start from nothing: evaluate the ends that the walks share."""
        n_ends = self.estimator._ends(self.units)
        if self.stop.max_evals is not None and self.stop.max_evals < n_ends + self.units.evaluations:
            raise ValueError(
                f"the smallest estimate of {self.units.n} players at depth {self.units.depth} needs "
                f"{n_ends + self.units.evaluations} evaluations, the budget is {self.stop.max_evals}; "
                f"LeaveOneOut needs {self.units.n + 1}"
            )
        first = self.estimator.direction == "remove"
        coalitions = torch.tensor([[first], [not first]])[:n_ends].expand(-1, self.units.n)
        ends = torch.stack([evaluate(self.game, coalitions, group=group) for group in self.groups])
        self.scalar = ends.ndim == 2
        self._set(seed, ends.reshape(len(self.groups), n_ends, -1))
        self._report()

    def go_on(self, resume: ShapleyResult, generator: torch.Generator | int | None) -> None:
        """Start from where `resume` ended."""
        state: dict[str, Any] = resume.state or {}
        if state.get("settings") != self.settings:
            raise ValueError(
                f"resume does not fit: it was made with {state.get('settings')}, this estimate has {self.settings}"
            )
        if generator is not None and generator != state["seed"]:
            raise ValueError(
                f"resume goes on with its own seed {state['seed']}: leave generator out, or pass that seed"
            )
        self.scalar = resume.values.ndim == 1
        self._set(state["seed"], torch.tensor(state["ends"], dtype=torch.float64))
        self.seconds_before = resume.seconds
        for index, accumulator in enumerate(self.sums):
            accumulator.load(state["groups"][index])
            orders = self.orders[index].draw(accumulator.units)
            self.distinct[index].add(orders[..., : self.units.steps].flatten(0, 1), accumulator.steps)
        self.reported = self.n_evals

    def _set(self, seed: int, ends: Tensor) -> None:
        self.seed, self.ends = seed, ends  # ends [G, 1 or 2, D]: v(start), v(far end)
        self.orders = [UnitOrders(self.units, seed, group) for group in range(len(self.groups))]
        self.sums = [Accumulator(self.units.n, ends.shape[2]) for _ in self.groups]
        self.distinct = [DistinctCoalitions(self.units.n) for _ in self.groups]

    @property
    def units_done(self) -> int:
        return self.sums[0].units

    @property
    def n_evals(self) -> int:
        """Forwards over all groups, divided by their number."""
        return self.ends.shape[1] + math.ceil(self._walked() / len(self.groups))

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.clock

    def until(self, target: int) -> ShapleyResult:
        """Walk until `target` units are done or the stop rule says so."""
        precise, previous = False, None
        per_call = max(1, self.estimator.chunk_size // self.units.evaluations)
        while self.units_done < target and not precise:
            batch = min(per_call, target - self.units_done, self._affordable())
            if self.stop.asks_precision:
                batch = min(batch, _UNITS_BETWEEN_LOOKS - self.units_done % _UNITS_BETWEEN_LOOKS)
            if batch < 1 or (self.units_done > 0 and self.seconds > self._seconds_allowed()):
                break
            for index in range(len(self.groups)):
                self._walk(index, batch)
                self._report()
            if self.stop.asks_precision and self.units_done % _UNITS_BETWEEN_LOOKS == 0:
                values, stderr = self._combine()
                precise = self.stop.precise_enough(values, stderr, previous)
                previous = values
        return self._result(precise if self.stop.asks_precision else self.units_done >= target)

    def _affordable(self) -> int:
        if self.stop.max_evals is None:
            return sys.maxsize
        return (self.stop.max_evals - self.n_evals) // self.units.evaluations

    def _seconds_allowed(self) -> float:
        return math.inf if self.stop.max_seconds is None else self.stop.max_seconds

    def _walk(self, index: int, batch: int) -> None:
        """Walk `batch` units of group number `index` and add what the players are paid."""
        units, remove = self.units, self.estimator.direction == "remove"
        orders = self.orders[index].draw(batch)  # [U, T, K]
        walks = orders.flatten(0, 1)  # [P, K]
        if self.estimator.tolerance > 0:
            values, steps = self._truncated(index, walks[:, : units.steps])
        else:
            values = evaluate_walks(
                self.game,
                walks[:, : units.steps],
                start="full" if remove else "empty",
                group=self.groups[index],
                chunk_size=self.estimator.chunk_size,
            ).reshape(len(walks), units.steps, -1)
            steps = torch.full((len(walks),), units.steps)
        start = self.ends[index, :1].expand(len(walks), 1, -1)
        if units.is_full:  # the last step ends where every walk ends, unless the walk was cut short
            cut = (steps < units.steps)[:, None, None]
            values = torch.cat([values, torch.where(cut, values[:, -1:], self.ends[index, 1])], dim=1)
        path = torch.cat([start, values], dim=1)  # [P, K + 1, D]
        paid = path[:, :-1] - path[:, 1:] if remove else path[:, 1:] - path[:, :-1]
        self.sums[index].add(orders, paid.reshape(batch, units.walks, units.depth, -1), steps)
        self.distinct[index].add(walks[:, : units.steps], steps)

    def _truncated(self, index: int, walks: Tensor) -> tuple[Tensor, Tensor]:
        """Values `[P, E, D]` of walks `[P, E]`, constant from where the tolerance ends one, and steps walked `[P]`."""
        n_walks, n_steps = walks.shape
        start, end = self.ends[index]
        coalitions = nested_coalitions(walks, self.units.n, "full" if self.estimator.direction == "remove" else "empty")
        values = torch.empty(n_walks, n_steps, len(end), dtype=torch.float64)
        steps, near_end = torch.full((n_walks,), n_steps), torch.zeros(n_walks, dtype=torch.int64)
        walking = torch.arange(n_walks)
        for step in range(n_steps):
            if len(walking) == 0:
                break
            now = evaluate(self.game, coalitions[walking, step], group=self.groups[index]).reshape(len(walking), -1)
            values[walking, step:] = now[:, None]
            near = ((now - end).abs() <= self.estimator.tolerance * (start - end).abs()).all(1)
            near_end[walking] = torch.where(near, near_end[walking] + 1, 0)
            stopping = near_end[walking] >= self.estimator.patience
            steps[walking[stopping]] = step + 1
            walking = walking[~stopping]
        return values, steps

    def _combine(self) -> tuple[Tensor, Tensor]:
        """Values and standard errors `[n, D]` over all groups: phi = sum_g w_g phi_g, se^2 = sum_g w_g^2 se_g^2.

        A player with a single sample in some group has no se_g; the spread between groups then stands in, se^2 =
        G/(G-1) sum_g w_g^2 (phi_g - phi)^2, which contains the true differences between groups and so errs on the
        safe side.
        """
        weight = self.weights[:, None, None]
        mean = torch.stack([accumulator.mean() for accumulator in self.sums])  # [G, n, D]
        values = (weight * mean).sum(0)
        within = (weight**2 * torch.stack([accumulator.squared_error() for accumulator in self.sums])).sum(0)
        n_groups = len(self.groups)
        if n_groups > 1:
            between = n_groups / (n_groups - 1) * (weight**2 * (mean - values) ** 2).sum(0)
            within = torch.where(within.isinf(), between.nan_to_num(nan=math.inf), within)
        return values, within.sqrt()

    def _result(self, converged: bool) -> ShapleyResult:
        values, stderr = self._combine()
        ends = (self.weights[:, None, None] * self.ends).sum(0)  # [1 or 2, D]
        shape = (self.units.n,) if self.scalar else values.shape
        v_start, v_end = ends[0].reshape(shape[1:]), ends[1].reshape(shape[1:]) if len(ends) > 1 else None
        remove = self.estimator.direction == "remove"
        walks = sum(len(accumulator.steps) for accumulator in self.sums)
        planned = walks * self.units.depth
        missing = sum(self.units.missing(accumulator.steps) for accumulator in self.sums)
        distinct = sum(map(len, self.distinct))
        result = ShapleyResult(
            values=values.reshape(shape),
            stderr=stderr.reshape(shape),
            n_evals=self.n_evals,
            n_unique=len(ends) + math.ceil(distinct / len(self.groups)),
            v_empty=v_end if remove else v_start,
            v_full=v_start if remove else v_end,
            method="permutation",
            depth=self.units.depth,
            seconds=self.seconds,
            converged=converged,
            truncated=missing / planned,
            names=getattr(self.game, "names", None),
            state={
                "seed": self.seed,
                "settings": self.settings,
                "ends": self.ends.tolist(),
                "groups": [accumulator.state() for accumulator in self.sums],
            },
        )
        return warn_if_silent(warn_if_incomplete(result))

    def _walked(self) -> int:
        return sum(int(accumulator.steps.sum()) for accumulator in self.sums)

    def _report(self) -> None:
        if self.progress is not None:
            done = self.ends.shape[1] + self._walked() // len(self.groups)
            self.progress(done - self.reported)
            self.reported = done


def _seed_of(generator: torch.Generator | int | None) -> int:
    if isinstance(generator, int):
        if generator < 0:
            raise ValueError(f"a seed must be >= 0, got {generator}")
        return generator
    fresh = torch.Generator()
    if generator is None:
        fresh.seed()
    return int(torch.randint(2**62, (), generator=fresh if generator is None else generator))
