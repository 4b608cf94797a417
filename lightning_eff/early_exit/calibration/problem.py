"""What thresholds are searched for: recorded scores and outcomes, the settings they allow, and the goal.

Shapes: ``N`` samples, ``E`` exits, ``K = E + 1`` outputs, the last of which is the backbone's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_eff.early_exit.evaluation.replay import replay

Array = NDArray[Any]

# relative; mean costs are sums of as many rounded terms as there are samples
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Setting:
    """Thresholds and what they lead to, in totals over the samples."""

    thresholds: tuple[float, ...]
    right: int
    cost: float
    counts: tuple[int, ...]


class Problem:
    """Recorded scores and outcomes of a data set.

    Args:
        scores: ``[E, N]``, higher is surer.
        correct: ``[K, N]``, 0 or 1.
        costs: ``[K]``, of a sample that leaves at each output.
        min_exit_samples: an exit takes none or at least that many samples.
    """

    def __init__(self, scores: Array, correct: Array, costs: Array, min_exit_samples: int = 0) -> None:
        self.scores, self.correct, self.costs, self.min_exit_samples = scores, correct, costs, min_exit_samples
        self.exits, self.samples = scores.shape

    @cached_property
    def ranking(self) -> list[tuple[Array, Array, Array]]:
        """Of each exit: samples, surest first; where a run of equal scores ends; the thresholds there."""
        rankings = []
        for scores in self.scores:
            order = np.argsort(-scores, kind="stable")
            ends = run_ends(scores[order])
            rankings.append((order, ends, scores[order[ends]]))
        return rankings

    def left_at(self, thresholds: Sequence[float]) -> Array:
        """Output at which each sample leaves, ``[N]``."""
        exits: Array = replay(self.scores, thresholds).numpy()
        return exits

    def evaluate(self, thresholds: Sequence[float]) -> Setting:
        """Replay a setting."""
        left_at = self.left_at(thresholds)
        counts = np.bincount(left_at, minlength=self.exits + 1)
        right = int(self.correct[left_at, np.arange(self.samples)].sum())
        return Setting(tuple(map(float, thresholds)), right, float(counts @ self.costs), tuple(counts.tolist()))

    def cheapest(self) -> Setting:
        """Every sample leaves at the cheapest output."""
        output = int(self.costs.argmin())
        return self.evaluate([math.inf] * output + [-math.inf] * (self.exits - output))

    def allows(self, counts: Array) -> Array:
        """Whether exits that take ``counts`` samples, of any shape, take none or enough."""
        enough: Array = (counts == 0) | (counts >= self.min_exit_samples)
        return enough


@dataclass(frozen=True)
class Goal:
    """Most accurate within a budget, or cheapest with an accuracy; one of the two is given.

    Args:
        samples: how many.
        budget: mean cost of a sample.
        accuracy: least share of right answers.
    """

    samples: int
    budget: float | None = None
    accuracy: float | None = None

    def met(self, right: Any, cost: Any) -> Any:
        """Whether totals, numbers or arrays, meet it."""
        if self.budget is not None:
            return cost <= self.samples * self.budget * (1 + TOLERANCE)
        assert self.accuracy is not None
        return right >= self.samples * self.accuracy * (1 - TOLERANCE)

    def best(self, right: Array, cost: Array, allowed: Array) -> int:
        """Position of the best of several totals, the first of equal ones; one is allowed at least."""
        met = self.met(right, cost) & allowed
        reached = bool(met.any())
        first, second = (right, -cost) if self._accuracy_first(reached) else (-cost, right)
        pool = np.flatnonzero(met if reached else allowed)
        pool = pool[first[pool] == first[pool].max()]
        return int(pool[second[pool].argmax()])

    def rank(self, setting: Setting) -> tuple[bool, float, float]:
        """Key by which better settings are larger."""
        met = bool(self.met(setting.right, setting.cost))
        pair = (setting.right, -setting.cost)
        return (met, *(pair if self._accuracy_first(met) else pair[::-1]))

    def _accuracy_first(self, met: bool) -> bool:
        # who misses a budget wants it cheap, who misses an accuracy wants it accurate
        return met == (self.budget is not None)


def run_ends(descending: Array) -> Array:
    """Positions where a run of equal values ends, those of -inf left out: such samples never leave."""
    ends = np.append(descending[1:] != descending[:-1], True) if len(descending) else np.empty(0, dtype=bool)
    return np.flatnonzero(ends & (descending > -math.inf))
