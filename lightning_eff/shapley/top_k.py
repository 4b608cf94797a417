"""Which players are the k best? Sampling that stops when the answer is clear, and no later.

*Comparable marginals* (arXiv 2504.02019): a random coalition S, of a size uniform on 0..n, and its n neighbours S + i
and S - i give every player a marginal contribution on the same S. Their differences vary less than each of them, and
the k-th and the next player are told apart by the interval of their difference. The bandit of A. Ghorbani, J. Zou
(Neuron Shapley, arXiv 2002.09815) spends nothing more on players whose own interval does not reach the boundary.

Shapes: `n` players, `U` units (coalitions with their neighbours).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_eff.arguments import check_choice, check_number
from lightning_eff.shapley.coalitions import SizeSequence
from lightning_eff.shapley.estimator import (
    Request,
    ShapleyEstimator,
    StopRule,
    check_counts,
    player_count,
    resolve_budget,
)
from lightning_eff.shapley.games import Game, evaluate
from lightning_eff.shapley.result import ShapleyResult
from lightning_eff.shapley.sampling import SampledRun

_FIRST_LOOK, _GROWTH = 8, 1.25  # units before the first look; growth between looks


@dataclass(frozen=True)
class TopKShapley(ShapleyEstimator):
    """Find the `k` players of highest Shapley value; `result.converged` tells whether they are clear.

    Values are unbiased estimates too (with `"bernstein"` those of players dropped early are rough); they do not add up
    to v(N) - v(empty).

    Args:
        k: number of players wanted, 1..n-1.
        level: probability that the players found are right when the estimate has converged, in (0, 1). With
            `"difference"` about that, for marginal contributions not far from normal: a rare large one that no sample
            met is not seen.
        budget: most evaluations: a number, or a multiple of the players such as `"200n"`.
        bounds: `"difference"`: Student's intervals of the differences between every player in and every player out,
            shared out over pairs and looks; `"bernstein"`: empirical Bernstein intervals, shared out over players and
            looks, which hold whatever the distribution and drop players that are clear.
        value_range: largest minus smallest possible marginal contribution (2 for an accuracy), which `"bernstein"`
            needs.
        share_coalitions: let all groups of a grouped game see the same coalitions.
        chunk_size: about how many coalitions to ask for in a call of the game.

    Raises:
        ValueError: an argument out of range; from `estimate` also a vector-valued game or k >= n.
    """

    k: int
    level: float = 0.95
    budget: int | str = "200n"
    bounds: Literal["difference", "bernstein"] = "difference"
    value_range: float | None = None
    share_coalitions: bool = False
    chunk_size: int = 256

    def __post_init__(self) -> None:
        resolve_budget(self.budget, 1)
        check_counts(self, "k", "chunk_size")
        check_number("level", self.level, above=0, below=1)
        check_choice("bounds", self.bounds, ("difference", "bernstein"))
        if self.value_range is not None and not self.value_range > 0:
            raise ValueError(f"value_range must be positive, got {self.value_range}")
        if self.bounds == "bernstein" and self.value_range is None:
            raise ValueError('bounds="bernstein" needs value_range: what marginal contributions can differ by')

    def cost(self, n: int) -> int:
        """As `ShapleyEstimator.cost`: the budget, in whole units."""
        return 2 + (resolve_budget(self.budget, n) - 2) // (n + 1) * (n + 1)

    def with_budget(self, budget: int, n: int) -> TopKShapley:
        """As `ShapleyEstimator.with_budget`; ValueError also where there are not more than `k` players."""
        if self.k >= n:
            raise ValueError(f"k must lie in 1..{n - 1} for {n} players, got {self.k}")
        if budget < n + 3:
            raise ValueError(f"one coalition of {n} players and its neighbours need {n + 3} evaluations, got {budget}")
        return replace(self, budget=budget)

    def run(self, game: Game, request: Request) -> ShapleyResult:
        """As `ShapleyEstimator.run`; `resume` adds `budget` evaluations to those of the result."""
        n = player_count(game)
        budget = resolve_budget(self.budget, n)
        self.with_budget(budget if request.resume is None else n + 3, n)
        limit = budget + (0 if request.resume is None else request.resume.n_evals)
        stop = request.stop or StopRule()
        stop = replace(stop, max_evals=min(limit, stop.max_evals or limit))
        run = _Comparable(self, game, request._replace(stop=stop))
        run.start()
        if not run.scalar:
            raise ValueError("the best players of a vector-valued game are not defined: give a game of one component")
        return run.result(run.until(run.most_units, self.chunk_size), n)


class _Comparable(SampledRun):
    """Units are coalitions with the neighbours of the players that are not clear yet."""

    looks = True

    def __init__(self, estimator: TopKShapley, game: Game, request: Request) -> None:
        n = game.n_players
        settings = {k: v for k, v in asdict(estimator).items() if k not in ("budget", "chunk_size")}
        ends = torch.tensor([[True], [False]]).expand(2, n)
        super().__init__(game, request, "top_k", ends, settings, share=estimator.share_coalitions)
        self.estimator = estimator
        self._open = torch.arange(n)

    def prepare(self) -> None:
        sizes = torch.ones(self.n + 1, dtype=torch.float64)
        self._sequences = [SizeSequence(sizes, self.seed, group) for group in range(len(self.groups))]
        self._marginals: list[list[Tensor]] = [[] for _ in self.groups]  # [U, n], NaN where nothing was evaluated
        self._counts, self._spent = [0 for _ in self.groups], 0

    @property
    def unit_cost(self) -> int:  # type: ignore[override]
        return 1 + len(self._open)

    @property
    def units_done(self) -> int:
        return self._counts[-1]

    @property
    def evaluated(self) -> int:
        return self._spent

    def advance(self, index: int, count: int) -> None:
        rows, players = self._sequences[index].take(count), self._open
        neighbours = rows[:, None].repeat(1, len(players), 1)
        neighbours[:, torch.arange(len(players)), players] ^= True
        coalitions = torch.cat([rows[:, None], neighbours], dim=1)
        values = evaluate(self.game, coalitions.flatten(0, 1), group=self.groups[index])
        values = values.reshape(count, 1 + len(players), -1)[..., 0]
        change = values[:, 1:] - values[:, :1]
        marginals = torch.full((count, self.n), torch.nan, dtype=torch.float64)
        marginals[:, players] = torch.where(rows[:, players], -change, change)
        self._add(index, marginals)

    def _add(self, index: int, marginals: Tensor) -> None:
        self._marginals[index].append(marginals)
        self._counts[index] += len(marginals)
        self._spent += len(marginals) + int((~marginals.isnan()).sum())

    def _units(self) -> Tensor:
        """Marginal contributions in the whole game, `[U, n]`."""
        groups = torch.stack([torch.cat(parts) for parts in self._marginals])
        return (self.weights[:, None, None] * groups).sum(0)

    def combine(self) -> tuple[Tensor, Tensor]:
        units = self._units()
        count = (~units.isnan()).sum(0)
        mean = units.nanmean(0)
        variance = (units - mean).square().nansum(0) / (count - 1).clamp(min=1)
        stderr = torch.where(count > 1, (variance / count).sqrt(), torch.inf)
        return mean[:, None], stderr[:, None]

    def next_look(self) -> int:
        done = self.units_done
        return next(look for look in _looks() if look > done)

    def settled(self) -> bool:
        number = 1 + sum(1 for _ in takewhile(lambda look: look < self.units_done, _looks()))
        if self.estimator.bounds == "bernstein":
            return self._narrow(self._units(), number)
        return differences_are_clear(self._units(), self.estimator.k, 1 - self.estimator.level, number)

    def _narrow(self, units: Tensor, look: int) -> bool:
        """Leave only the players that are not clear; whether there are none."""
        assert self.estimator.value_range is not None
        unclear = near_the_boundary(units, self.estimator.k, 1 - self.estimator.level, look, self.estimator.value_range)
        if len(unclear):
            self._open = unclear
        return len(unclear) == 0

    @property
    def distinct(self) -> float:
        return min(super().distinct, float(2**self.n) if self.n < 64 else math.inf)

    def save_group(self, index: int) -> Any:
        return torch.cat(self._marginals[index]).tolist()

    def load_group(self, index: int, state: Sequence[Sequence[float]]) -> None:
        self._sequences[index].take(len(state))
        self._add(index, torch.tensor(state, dtype=torch.float64))
        passed = list(takewhile(lambda look: look <= len(state), _looks()))
        if self.estimator.bounds == "bernstein" and index == len(self.groups) - 1 and passed:
            self._narrow(self._units()[: passed[-1]], len(passed))


def _looks() -> Iterator[int]:
    look = _FIRST_LOOK
    while True:
        yield look
        look = math.ceil(_GROWTH * look)


def differences_are_clear(units: Tensor, k: int, error: float, look: int) -> bool:
    """Whether the `k` best of `units` `[U, n]` are better than all others, at a chance of `error` over all looks."""
    from scipy.stats import t

    n_units, n = units.shape
    order = units.mean(0).argsort(descending=True, stable=True)
    centred = units - units.mean(0)
    covariance = centred.T @ centred / (n_units - 1)
    spread = covariance.diagonal()[:, None] + covariance.diagonal() - 2 * covariance
    inside, outside = order[:k], order[k:]
    gap = units.mean(0)[inside][:, None] - units.mean(0)[outside]
    chance = error / (look * (look + 1)) / (k * (n - k))  # sums to `error` over looks and pairs
    quantile = float(t.isf(chance, n_units - 1))
    half = quantile * (spread[inside][:, outside].clamp(min=0) / n_units).sqrt()
    return bool((gap > half).all())


def near_the_boundary(units: Tensor, k: int, error: float, look: int, value_range: float) -> Tensor:
    """Players whose empirical Bernstein interval reaches the middle between the k-th and the next value.

    Half-width sqrt(2 var ln(2/delta) / c) + 7 R ln(2/delta) / (3 (c - 1)) of c samples in a range R, with delta shared
    out over players and looks, so that all intervals hold at a chance of `error`.
    """
    count = (~units.isnan()).sum(0)
    mean = units.nanmean(0)
    variance = (units - mean).square().nansum(0) / (count - 1)
    log = math.log(2 * units.shape[1] * look * (look + 1) / error)
    half = (2 * variance * log / count).sqrt() + 7 * value_range * log / (3 * (count - 1))
    best = mean.sort(descending=True).values
    boundary = (best[k - 1] + best[k]) / 2
    return ((mean - boundary).abs() <= half).nonzero().flatten()
