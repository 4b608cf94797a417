"""Estimates from sampled coalitions: all values are kept, the result is a pure function of them.

`CoalitionEstimator` is what such estimators share, `CoalitionRun` one estimate of theirs.

Shapes: `n` players, `P` units, `c` coalitions a unit (2: a coalition and its complement), `D` components, `G` groups.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from lightning_eff.shapley.coalitions import CoalitionSequence, packed_keys
from lightning_eff.shapley.estimator import Request, ShapleyEstimator, check_counts, player_count, resolve_budget
from lightning_eff.shapley.exact import ExactShapley
from lightning_eff.shapley.games import Game, evaluate
from lightning_eff.shapley.result import ShapleyResult
from lightning_eff.shapley.sampling import SampledRun

_BLOCK = 1024  # units that are unpacked together: fixed, so that sums have the same bits however units were drawn
_GROWTH = 1.25  # of the number of units between looks at the precision


@dataclass(frozen=True)
class Sampled:
    """What one group evaluated.

    Attributes:
        weight: share of the group in the game.
        packed: coalitions in bits, uint8 `[P, ceil(n / 8)]`; of a pair, the first.
        values: float64 `[P, c, D]`.
        ends: values of no player and of all, float64 `[2, D]`.
        n: number of players.
    """

    weight: float
    packed: np.ndarray[Any, Any]
    values: Tensor
    ends: Tensor
    n: int

    def sizes(self) -> Tensor:
        """Number of players of every coalition, int64 `[P]`."""
        return torch.cat([rows.sum(1).long() for rows, _ in self.blocks()])

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Coalitions as float64 `[b, n]` with their values `[b, c, D]`, some units at a time."""
        for start in range(0, len(self.packed), _BLOCK):
            bits = np.unpackbits(self.packed[start : start + _BLOCK], axis=1, count=self.n)
            yield torch.from_numpy(bits).double(), self.values[start : start + _BLOCK]


def over_groups(
    samples: Sequence[Sampled], of_group: Callable[[Sampled], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Values and standard errors `[n, D]` of the game from values and squared standard errors of every group."""
    weight = torch.tensor([sampled.weight for sampled in samples], dtype=torch.float64)[:, None, None]
    values, squared_error = (torch.stack(part) for part in zip(*map(of_group, samples), strict=True))
    return (weight * values).sum(0), (weight**2 * squared_error).sum(0).sqrt()


@dataclass(frozen=True)
class CoalitionEstimator(ShapleyEstimator):
    """Base of the estimators that evaluate a sample of coalitions.

    Args:
        budget: evaluations: a number, or a multiple of the players such as `"20n"`.
        share_coalitions: let all groups of a grouped game see the same coalitions.
        chunk_size: most coalitions a call of the game; it has no influence on the values.

    Raises:
        ValueError: an argument out of range.
    """

    budget: int | str = "20n"
    share_coalitions: bool = False
    chunk_size: int = 256

    def __post_init__(self) -> None:
        resolve_budget(self.budget, 1)
        check_counts(self, "chunk_size", least=2)

    # What an estimator has to say.

    method: ClassVar[str]
    not_resumed: ClassVar[tuple[str, ...]] = ("budget", "chunk_size")  # fields that a resumed estimate may change
    small: ClassVar[int] = 1  # up to so many players all coalitions are evaluated

    @abstractmethod
    def sequence(self, n: int, seed: int, group: int) -> CoalitionSequence:
        """Coalitions of one group."""

    @abstractmethod
    def fit(self, samples: Sequence[Sampled]) -> tuple[Tensor, Tensor]:
        """Values and standard errors `[n, D]` from the samples of all groups."""

    def least_units(self, n: int) -> int:
        """Fewest units that give an estimate."""
        return 1

    @property
    def unit_cost(self) -> int:
        """Coalitions a unit: 2 for a coalition and its complement."""
        return 2

    # What follows from it.

    def cost(self, n: int) -> int:
        """As `ShapleyEstimator.cost`."""
        if n <= self.small:
            return int(2**n)
        units = min((resolve_budget(self.budget, n) - 2) // self.unit_cost, self.sequence(n, 0, 0).length)
        return 2 + units * self.unit_cost

    def with_budget(self, budget: int, n: int) -> Self:
        """As `ShapleyEstimator.with_budget`."""
        self._check_enough(budget, n)
        return replace(self, budget=budget)

    def run(self, game: Game, request: Request) -> ShapleyResult:
        """As `ShapleyEstimator.run`; `resume` adds `budget` evaluations to those of the result.

        Warns:
            ShapleyWarning: the game does not react, or the coalitions do not determine all values.
        """
        n = player_count(game)
        budget = resolve_budget(self.budget, n)
        if request.resume is None:
            self._check_enough(budget, n)
        if n <= self.small:
            return ExactShapley().run(game, request)
        run = CoalitionRun(self, game, request)
        run.start()
        asked = (budget - (2 if request.resume is None else 0)) // self.unit_cost
        return run.result(run.until(run.units_done + asked, self.chunk_size), n)

    def _check_enough(self, budget: int, n: int) -> None:
        least = 2**n if n <= self.small else 2 + self.least_units(n) * self.unit_cost
        if budget < least:
            raise ValueError(
                f"{self.method} of {n} players needs at least {least} evaluations, the budget is {budget}; "
                f"LeaveOneOut needs {n + 1}, a pair of walks of PermutationShapley {2 * n}"
            )


class CoalitionRun(SampledRun):
    """One estimate; units are coalitions of a sequence, or pairs of a coalition and its complement."""

    def __init__(self, estimator: CoalitionEstimator, game: Game, request: Request) -> None:
        n = game.n_players
        options = {name: value for name, value in asdict(estimator).items() if name not in estimator.not_resumed}
        ends = torch.tensor([[True], [False]]).expand(2, n)
        share = estimator.share_coalitions
        super().__init__(game, request, estimator.method, ends, options, share=share)
        self._estimator = estimator
        self.least_units, self.unit_cost = estimator.least_units(n), estimator.unit_cost
        self.most_units = estimator.sequence(n, 0, 0).length

    def prepare(self) -> None:
        """As `SampledRun.prepare`."""
        groups = range(len(self.groups))
        self._sequences = [self._estimator.sequence(self.n, self.seed, group) for group in groups]
        self._packed: list[list[np.ndarray[Any, Any]]] = [[] for _ in groups]
        self._values: list[list[Tensor]] = [[] for _ in groups]
        self._counts = [0 for _ in groups]

    @property
    def units_done(self) -> int:
        """As `SampledRun.units_done`."""
        return self._counts[-1]

    @property
    def evaluated(self) -> int:
        """As `SampledRun.evaluated`."""
        return sum(self._counts) * self.unit_cost

    @property
    def distinct(self) -> float:
        """As `SampledRun.distinct`."""
        keys = [set(packed_keys(self._coalitions(self.rows(index)))) for index in range(len(self.groups))]
        return sum(map(len, keys)) / len(self.groups)

    def rows(self, index: int) -> Tensor:
        """Coalitions of one group, of pairs the first: bool `[P, n]`."""
        packed = np.concatenate([np.zeros((0, -(-self.n // 8)), np.uint8), *self._packed[index]])
        return torch.from_numpy(np.unpackbits(packed, axis=1, count=self.n)).bool()

    def advance(self, index: int, count: int) -> None:
        """As `SampledRun.advance`."""
        rows = self._sequences[index].take(count)
        values = evaluate(self.game, self._coalitions(rows), group=self.groups[index])
        self._packed[index].append(np.packbits(rows.numpy(), axis=1))
        self._values[index].append(values.reshape(len(rows), self.unit_cost, -1))
        self._counts[index] += len(rows)

    def _coalitions(self, rows: Tensor) -> Tensor:
        return torch.stack([rows, ~rows], dim=1).flatten(0, 1) if self.unit_cost == 2 else rows

    def combine(self) -> tuple[Tensor, Tensor]:
        """As `SampledRun.combine`."""
        return self._estimator.fit(
            [
                Sampled(float(weight), np.concatenate(packed), torch.cat(values), ends.flip(0), self.n)
                for weight, packed, values, ends in zip(
                    self.weights, self._packed, self._values, self.ends, strict=True
                )
            ]
        )

    def next_look(self) -> int:
        """As `SampledRun.next_look`."""
        look, done = self.least_units, self.units_done
        while look <= done:
            look = int(_GROWTH * look) + 1
        return look

    def save_group(self, index: int) -> Any:
        """As `SampledRun.save_group`: the values, from which the coalitions follow."""
        return torch.cat(self._values[index]).flatten(1).tolist()

    def load_group(self, index: int, state: Any) -> None:
        """As `SampledRun.load_group`."""
        rows = self._sequences[index].take(len(state))
        self._packed[index] = [np.packbits(rows.numpy(), axis=1)]
        self._counts[index] = len(rows)
        self._values[index] = [torch.tensor(state, dtype=torch.float64).reshape(len(state), self.unit_cost, -1)]
