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
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_eff.arguments import check_number
from lightning_eff.shapley.accumulator import Accumulator, DistinctCoalitions, UnitOrders, Units
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
)
from lightning_eff.shapley.exact import LeaveOneOut
from lightning_eff.shapley.games import Game, evaluate, evaluate_walks, nested_coalitions
from lightning_eff.shapley.result import ShapleyResult
from lightning_eff.shapley.sampling import SampledRun

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
        check_counts(self, "walks", "patience", "chunk_size")
        check_number("tolerance", self.tolerance, least=0, below=1)
        check_depth(self.depth)
        check_direction(self.direction)

    def cost(self, n: int) -> int:
        """As `ShapleyEstimator.cost`."""
        depth = resolve_depth(self.depth, n)
        if depth == 1:
            return LeaveOneOut().cost(n)
        units = self._units(n, depth)
        return self._ends(units) + self._requested(units) * units.evaluations

    def with_budget(self, budget: int, n: int) -> PermutationShapley:
        """As `ShapleyEstimator.with_budget`."""
        depth = resolve_depth(self.depth, n)
        if depth == 1:
            return self
        units = self._units(n, depth)
        least = replace(self, walks=1).cost(n)
        if budget < least:
            raise ValueError(f"{n} players at depth {depth} need at least {least} evaluations, the budget is {budget}")
        count = (budget - self._ends(units)) // max(units.evaluations, 1)
        return replace(self, walks=max(count, 1) * units.walks)

    def run(self, game: Game, request: Request) -> ShapleyResult:
        """As `ShapleyEstimator.run`; `resume` adds `walks` walks to those of the result and takes its seed.

        Warns:
            ShapleyWarning: the game does not react, or the budget left players with fewer than two occurrences.
        """
        n = player_count(game)
        depth = resolve_depth(self.depth, n)
        if depth == 1:
            return LeaveOneOut(self.direction).run(game, request)
        units = self._units(n, depth)
        run = _Walks(self, game, units, request)
        run.start()
        converged = run.until(run.units_done + self._requested(units), self.chunk_size)
        return run.result(converged, depth, remove=self.direction == "remove", truncated=run.truncated)

    def _units(self, n: int, depth: int) -> Units:
        return Units(n, depth, (2 if self.antithetic else 1) if depth == n else n // depth)

    def _requested(self, units: Units) -> int:
        asked = math.ceil(self.walks / units.walks)
        return asked if units.is_full else max(asked, math.ceil(2 * units.n / (units.walks * units.depth)))

    def _ends(self, units: Units) -> int:
        """How many of v(N) and v(empty) are needed."""
        return 2 if units.is_full or self.tolerance > 0 else 1


class _Walks(SampledRun):
    """Units of walks; `ends` are v(start) and, where it is needed, v at the far end."""

    def __init__(
        self,
        estimator: PermutationShapley,
        game: Game,
        units: Units,
        request: Request,
    ) -> None:
        first = estimator.direction == "remove"
        ends = torch.tensor([[first], [not first]])[: estimator._ends(units)].expand(-1, units.n)
        options = {name: value for name, value in asdict(estimator).items() if name not in ("walks", "chunk_size")}
        settings = {**options, "depth": units.depth}
        super().__init__(game, request, "permutation", ends, settings, share=estimator.share_coalitions)
        self.estimator, self.units, self.unit_cost = estimator, units, units.evaluations

    def prepare(self) -> None:
        groups = range(len(self.groups))
        self.orders = [UnitOrders(self.units, self.seed, group) for group in groups]
        self.sums = [Accumulator(self.units.n, self.ends.shape[2]) for _ in groups]
        self.coalitions = [DistinctCoalitions(self.units.n) for _ in groups]

    @property
    def units_done(self) -> int:
        return self.sums[0].units

    @property
    def evaluated(self) -> int:
        return sum(int(accumulator.steps.sum()) for accumulator in self.sums)

    @property
    def distinct(self) -> float:
        return sum(map(len, self.coalitions)) / len(self.groups)

    @property
    def truncated(self) -> float:
        """Fraction of marginal contributions that were not evaluated."""
        planned = sum(len(accumulator.steps) for accumulator in self.sums) * self.units.depth
        return sum(self.units.missing(accumulator.steps) for accumulator in self.sums) / planned

    def next_look(self) -> int:
        return self.units_done - self.units_done % _UNITS_BETWEEN_LOOKS + _UNITS_BETWEEN_LOOKS

    def save_group(self, index: int) -> Any:
        return self.sums[index].state()

    def load_group(self, index: int, state: Any) -> None:
        self.sums[index].load(state)
        if len(self.sums[index].steps) != self.sums[index].units * self.units.walks:
            raise ValueError(f"expected {self.units.walks} walks a unit, got {self.sums[index].units} units")
        orders = self.orders[index].draw(self.sums[index].units)
        self.coalitions[index].add(orders[..., : self.units.steps].flatten(0, 1), self.sums[index].steps)

    def advance(self, index: int, count: int) -> None:
        units, remove = self.units, self.estimator.direction == "remove"
        orders = self.orders[index].draw(count)  # [U, T, K]
        walks = orders.flatten(0, 1)  # [P, K]
        if self.estimator.tolerance > 0:
            values, steps = self._truncate(index, walks[:, : units.steps])
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
        self.sums[index].add(orders, paid.reshape(count, units.walks, units.depth, -1), steps)
        self.coalitions[index].add(walks[:, : units.steps], steps)

    def _truncate(self, index: int, walks: Tensor) -> tuple[Tensor, Tensor]:
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

    def combine(self) -> tuple[Tensor, Tensor]:
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
