"""The moving parts of permutation sampling: orders to walk, what players were paid, coalitions seen so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_eff.documents import parsed
from lightning_eff.shapley.sampling import generator_of


@dataclass(frozen=True)
class Units:
    """The shape of an independent unit: `walks` walks of `depth` removals among `n` players."""

    n: int
    depth: int
    walks: int

    @property
    def is_full(self) -> bool:
        """Whether walks go to the far end."""
        return self.depth == self.n

    @property
    def steps(self) -> int:
        """Evaluations of a walk: a full one ends at a coalition that is known."""
        return self.n - 1 if self.is_full else self.depth

    @property
    def evaluations(self) -> int:
        """Evaluations of a unit."""
        return self.walks * self.steps

    def missing(self, steps: Tensor) -> int:
        """Marginal contributions that walks of `steps` `[P]` evaluations left out; a full walk's last step is known."""
        return int((self.depth - steps[steps < self.steps]).sum())


class UnitOrders:
    """Random orders of one group, unit after unit.

    Unit u depends on (seed, group, u) and, at a partial depth, on the units before it.
    """

    def __init__(self, units: Units, seed: int, group: int) -> None:
        self.units, self.seed, self.group = units, seed, group
        self.drawn = 0
        self.times = torch.zeros(units.n, dtype=torch.int64)  # how often each player went so far

    def draw(self, count: int) -> Tensor:
        """The next `count` units: int64 `[count, T, K]`."""
        return torch.stack([self._next() for _ in range(count)])

    def _next(self) -> Tensor:
        generator = generator_of(self.seed, self.group, self.drawn)
        self.drawn += 1
        order = torch.randperm(self.units.n, generator=generator)
        if self.units.is_full:
            return torch.stack([order, order.flip(0)][: self.units.walks])
        went_least = order[self.times[order].argsort(stable=True)][: self.units.walks * self.units.depth]
        self.times[went_least] += 1
        shuffled = went_least[torch.randperm(len(went_least), generator=generator)]
        return shuffled.view(self.units.walks, self.units.depth)


class Accumulator:
    """Mean and squared deviations of what each player was paid (Welford 1962), unit by unit: chunks leave no trace."""

    def __init__(self, n: int, components: int) -> None:
        self._count = torch.zeros(n, 1, dtype=torch.float64)
        self._mean = torch.zeros(n, components, dtype=torch.float64)
        self._deviations = torch.zeros(n, components, dtype=torch.float64)
        self.units = 0
        self.steps = torch.zeros(0, dtype=torch.int64)  # evaluations of each walk so far

    def add(self, orders: Tensor, paid: Tensor, steps: Tensor) -> None:
        """Add units: who went `[U, T, K]`, what he was paid `[U, T, K, D]`, evaluated steps of the walks `[U*T]`."""
        for walks, amounts in zip(orders.flatten(1), paid.flatten(1, 2), strict=True):
            times = torch.bincount(walks, minlength=len(self._count))[:, None]
            # at most two amounts a player, whose sum has the same bits in either order
            sample = torch.zeros_like(self._mean).index_add_(0, walks, amounts) / times.clamp(min=1)
            went = times > 0
            self._count += went
            delta = sample - self._mean
            self._mean += torch.where(went, delta / self._count.clamp(min=1), 0.0)
            self._deviations += torch.where(went, delta * (sample - self._mean), 0.0)
        self.units += len(orders)
        self.steps = torch.cat([self.steps, steps])

    def mean(self) -> Tensor:
        """`[n, D]`, NaN for a player that never went."""
        return torch.where(self._count > 0, self._mean, torch.nan)

    def squared_error(self) -> Tensor:
        """Squared standard error of the mean `[n, D]`, inf below two samples."""
        return torch.where(
            self._count > 1, self._deviations / (self._count - 1).clamp(min=1) / self._count.clamp(min=1), torch.inf
        )

    def state(self) -> dict[str, Any]:
        """Plain Python that `load` takes back to the bit."""
        return {
            "count": self._count.flatten().tolist(),
            "mean": self._mean.tolist(),
            "deviations": self._deviations.tolist(),
            "units": self.units,
            "steps": self.steps.tolist(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave; ValueError for sums of other players."""
        count = torch.tensor(state["count"], dtype=torch.float64)[:, None]
        mean, deviations = (torch.tensor(state[name], dtype=torch.float64) for name in ("mean", "deviations"))
        if count.shape != self._count.shape or not mean.shape == deviations.shape == self._mean.shape:
            raise ValueError(f"expected sums of {len(self._mean)} players, got {[*count.shape]}, {[*mean.shape]}")
        self._count, self._mean, self._deviations = count, mean, deviations
        self.units = parsed(int, state["units"], "units")
        self.steps = torch.tensor(parsed(list[int], state["steps"], "steps"), dtype=torch.int64)


class DistinctCoalitions:
    """Counts distinct coalitions by Zobrist keys: the exclusive or of random 63-bit codes of the players moved."""

    def __init__(self, n: int) -> None:
        self._codes = np.random.default_rng(0).integers(2**63, size=n)
        self._seen: set[int] = set()

    def __len__(self) -> int:
        return len(self._seen)

    def add(self, walks: Tensor, steps: Tensor) -> None:
        """Add the coalitions after each of the first `steps` `[P]` steps of walks, int64 `[P, E]`."""
        keys = np.bitwise_xor.accumulate(self._codes[walks.numpy()], axis=1)
        evaluated = np.arange(keys.shape[1]) < steps.numpy()[:, None]
        self._seen.update(keys[evaluated].tolist())
