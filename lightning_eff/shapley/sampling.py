"""What every sampled estimate has in common: groups, seed, budget, looks at the precision, resume.

An estimate is made of *units*, independent samples of which each group draws its own sequence. Unit u depends on (seed,
group, u) and the units before it, never on how many are drawn at a time, so that chunks leave no trace and a resumed
estimate has the bits of an uninterrupted one.
"""

from __future__ import annotations

import math
import operator
import sys
import time
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_eff.documents import parsed, reading
from lightning_eff.shapley.estimator import Request, StopRule, warn_if_incomplete, warn_if_silent
from lightning_eff.shapley.games import Game, evaluate, group_weights
from lightning_eff.shapley.result import ShapleyResult


class SampledRun(ABC):
    """One estimate, the state that grows from call to call.

    Args:
        game: the game.
        request: what was asked for.
        method: name of the method, for the result.
        ends: bool `[E, n]`, coalitions that are evaluated once, in every group.
        settings: what a resumed result must agree with; plain Python.
        share: let all groups of a grouped game see the same coalitions.
    """

    def __init__(
        self,
        game: Game,
        request: Request,
        method: str,
        ends: Tensor,
        settings: dict[str, Any],
        *,
        share: bool,
    ) -> None:
        self.game, self.n, self.method, self.request = game, game.n_players, method, request
        self.stop = request.stop or StopRule()
        weights = None if share else group_weights(game)
        counted = [] if weights is None else weights.nonzero().flatten().tolist()  # a weight of 0 is not evaluated
        self.weights = torch.ones(1, dtype=torch.float64) if weights is None else weights[counted]  # [G]
        self.groups: list[int | None] = [None] if weights is None else counted
        self.settings = {"n": self.n, "groups": len(self.groups), **settings}
        self._end_coalitions = ends
        self.ends = torch.zeros(len(self.groups), len(ends), 1, dtype=torch.float64)  # [G, E, D], evaluated by `start`
        self.scalar = True
        self.seed = 0
        self._previous: Tensor | None = None  # values at the last look
        self._clock, self._seconds_before, self._reported = time.perf_counter(), 0.0, 0

    # What a kind of unit has to say about itself.

    unit_cost: int  # evaluations of a unit, at most
    least_units = 1  # the fewest that give an estimate
    most_units = sys.maxsize  # all there are
    looks = False  # whether `settled` may end the estimate

    @abstractmethod
    def prepare(self) -> None:
        """Set up the empty state, once `seed` and `ends` are known."""

    @property
    @abstractmethod
    def units_done(self) -> int:
        """Units that every group has."""

    @property
    def evaluated(self) -> int:
        """Evaluations of all units, added over the groups."""
        return self.units_done * self.unit_cost * len(self.groups)

    @abstractmethod
    def advance(self, index: int, count: int) -> None:
        """Draw and evaluate `count` more units of group number `index`."""

    @abstractmethod
    def combine(self) -> tuple[Tensor, Tensor]:
        """Values and standard errors `[n, D]`, a function of the units done and of nothing else."""

    @abstractmethod
    def next_look(self) -> int:
        """Number of units at which a precision rule looks next: a fixed rhythm, whatever the chunks."""

    def settled(self) -> bool:
        """Whether the question is answered; asked at every look where `looks` is set."""
        return False

    @abstractmethod
    def save_group(self, index: int) -> Any:
        """Plain Python from which `load_group` goes on."""

    @abstractmethod
    def load_group(self, index: int, state: Any) -> None:
        """Take back what `save_group` gave."""

    @property
    def distinct(self) -> float:
        """Distinct coalitions among the units, a mean over the groups."""
        return self.evaluated / len(self.groups)

    # The estimate.

    def start(self) -> None:
        """Begin from nothing, or from where the result to resume ended.

        Raises:
            ValueError: the budget is below the smallest estimate, or the result to resume does not fit.
        """
        if self.request.resume is not None:
            self._go_on(self.request.resume)
            return
        least = len(self._end_coalitions) + self.least_units * self.unit_cost
        if self.stop.max_evals is not None and self.stop.max_evals < least:
            raise ValueError(
                f"the smallest {self.method} estimate of {self.n} players needs {least} evaluations, the budget is "
                f"{self.stop.max_evals}; LeaveOneOut needs {self.n + 1}"
            )
        if len(self._end_coalitions):
            ends = torch.stack([evaluate(self.game, self._end_coalitions, group=group) for group in self.groups])
            self.scalar = ends.ndim == 2
            self.ends = ends.reshape(*ends.shape[:2], -1)
        self.seed = seed_of(self.request.generator)
        self.prepare()
        self._report()

    def _go_on(self, resume: ShapleyResult) -> None:
        generator = self.request.generator
        state: dict[str, Any] = resume.state or {}
        if resume.method != self.method or state.get("settings") != self.settings or "beta" in state:
            raise ValueError(
                f"resume does not fit: it was made by {resume.method!r} with {state.get('settings')}, this estimate "
                f"is {self.method!r} with {self.settings}"
            )
        with reading("resume does not hold what its estimate goes on from"):
            self.scalar, self.seed = resume.values.ndim == 1, parsed(int, state["seed"], "seed")
            if generator is not None and generator != self.seed:
                raise ValueError(
                    f"resume goes on with its own seed {self.seed}: leave generator out, or pass that seed"
                )
            ends = torch.tensor(state["ends"], dtype=torch.float64)
            self.ends = ends.reshape(*self.ends.shape[:2], parsed(int, state["components"], "components"))
            if state["previous"] is not None:
                self._previous = torch.tensor(state["previous"], dtype=torch.float64)
                if self._previous.shape != (self.n, self.ends.shape[-1]):
                    raise ValueError(f"expected previous values of {self.n} players, got {[*self._previous.shape]}")
            if resume.values.shape != (self.n, *([] if self.scalar else [self.ends.shape[-1]])):
                raise ValueError(f"expected values of {self.n} players, got {[*resume.values.shape]}")
            self.prepare()
            for index, group in zip(range(len(self.groups)), state["groups"], strict=True):
                self.load_group(index, group)
        self._seconds_before, self._reported = resume.seconds, self.n_evals

    @property
    def n_evals(self) -> int:
        """Forwards over all groups, divided by their number."""
        return len(self._end_coalitions) + math.ceil(self.evaluated / len(self.groups))

    @property
    def seconds(self) -> float:
        """Wall-clock time, that of resumed parts included."""
        return self._seconds_before + time.perf_counter() - self._clock

    def until(self, target: int, chunk_size: int) -> bool:
        """Draw units until `target` are done or the stop rule says so; whether that was what was wanted."""
        stop = self.stop
        target = min(target, self.most_units)
        looks = self.looks or stop.asks_precision
        enough = False
        while self.units_done < target and not enough:
            look = self.next_look()
            per_call = max(1, chunk_size // max(self.unit_cost, 1))
            batch = min(per_call, target - self.units_done, self._affordable())
            if looks:
                batch = min(batch, look - self.units_done)
            late = stop.max_seconds is not None and self.seconds > stop.max_seconds
            if batch < 1 or (late and self.units_done >= self.least_units):
                break
            for index in range(len(self.groups)):
                self.advance(index, batch)
                self._report()
            if looks and self.units_done == look:
                enough = self.looks and self.settled()
                if stop.asks_precision:
                    values, stderr = self.combine()
                    enough |= stop.precise_enough(values, stderr, self._previous)
                    self._previous = values
        if stop.asks_precision and not enough and self.units_done == self.most_units:  # all there is: no look was left
            enough = stop.precise_enough(*self.combine(), self._previous)
        return enough if looks else self.units_done >= target

    def result(self, converged: bool, depth: int, *, remove: bool = True, truncated: float = 0.0) -> ShapleyResult:
        """The result so far; `ends` are those of removing (all, none), or of adding (none, all)."""
        values, stderr = self.combine()
        shape = (self.n,) if self.scalar else values.shape
        ends = [end.reshape(shape[1:]) for end in (self.weights[:, None, None] * self.ends).sum(0)]
        v_start, v_end = (*ends, None, None)[:2]
        result = ShapleyResult(
            values=values.reshape(shape),
            stderr=stderr.reshape(shape),
            n_evals=self.n_evals,
            n_unique=len(ends) + math.ceil(self.distinct),
            v_empty=v_end if remove else v_start,
            v_full=v_start if remove else v_end,
            method=self.method,
            depth=depth,
            seconds=self.seconds,
            converged=converged,
            truncated=truncated,
            names=getattr(self.game, "names", None),
            state={
                "seed": self.seed,
                "settings": self.settings,
                "ends": self.ends.tolist(),
                "components": self.ends.shape[2],
                "previous": None if self._previous is None else self._previous.tolist(),
                "groups": [self.save_group(index) for index in range(len(self.groups))],
            },
        )
        return warn_if_silent(warn_if_incomplete(result))

    def _affordable(self) -> int:
        if self.stop.max_evals is None:
            return sys.maxsize
        return (self.stop.max_evals - self.n_evals) // max(self.unit_cost, 1)

    def _report(self) -> None:
        if self.request.progress is not None:
            self.request.progress(self.n_evals - self._reported)
            self._reported = self.n_evals


def seed_of(generator: torch.Generator | int | None) -> int:
    """The seed that `generator` stands for; None takes a fresh one."""
    if generator is not None and not isinstance(generator, torch.Generator):
        try:
            generator = operator.index(generator)
        except TypeError:
            raise TypeError(
                f"generator must be a seed, a torch.Generator or None, got {type(generator).__name__}"
            ) from None
        if generator < 0:
            raise ValueError(f"a seed must be >= 0, got {generator}")
        return generator
    fresh = torch.Generator()
    if generator is None:
        fresh.seed()
    return int(torch.randint(2**62, (), generator=fresh if generator is None else generator))


def generator_of(seed: int, *place: int) -> torch.Generator:
    """An independent generator for every place (group, block ...) of the randomness that `seed` stands for."""
    state = np.random.SeedSequence([seed, *place]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))
