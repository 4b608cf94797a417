"""One ledger for everything that looks at private data: what was done, what it cost, what that figure rests on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from scipy.optimize import brentq

from lightning_eff.accounting.gaussian import check_delta, check_epsilon
from lightning_eff.accounting.subsampled import (
    ACCOUNTANTS,
    PRV_MOST_PHASES,
    Accountant,
    PrivacyEvent,
    subsampled_epsilon,
)
from lightning_eff.arguments import check_choice, plain
from lightning_eff.documents import parsed, reading, write_text
from lightning_eff.reporting import Column, Report, Table

Adjacency = Literal["add_remove", "replace_one"]
_ADJACENCIES: dict[Adjacency, str] = {
    "add_remove": "one record more or less",
    "replace_one": "one record replaced by another, their number being public",
}
_VERSION = 1


class PrivacyBudgetExceeded(RuntimeError):
    """What was asked for would spend more than ``max_epsilon``; it has not been done."""


class PrivacyLedger(Report):
    """Every step that looked at private data, and its (epsilon, delta).

    Steps are recorded before their result is used, so that a crash overstates what was spent and never understates
    it. The ledger holds numbers and sentences only: its state goes into checkpoints and files that may be published.

    Args:
        delta: At which epsilon is told, in (0, 1).
        max_epsilon: What may be spent, > 0; ``None`` for no bound.
        accountant: ``"prv"`` or ``"rdp"`` for sample rates below 1, see
            :func:`~lightning_eff.accounting.subsampled_epsilon`. Full batches are accounted for exactly.
        adjacency: Which data sets are neighbours: ``"add_remove"``, one record more or less, or ``"replace_one"``.
            A noise multiplier is relative to the sensitivity between such neighbours.

    Attributes:
        assumptions: Sentences on which the guarantee rests.
        not_covered: Sentences on what it does not cover.
        caveats: Sentences on why it does not hold as it stands, or only nearly; reports begin with them.
    """

    def __init__(
        self,
        delta: float = 1e-5,
        *,
        max_epsilon: float | None = None,
        accountant: Accountant = "prv",
        adjacency: Adjacency = "add_remove",
    ) -> None:
        check_delta(delta)
        if max_epsilon is not None:
            check_epsilon(max_epsilon)
        check_choice("accountant", accountant, ACCOUNTANTS)
        check_choice("adjacency", adjacency, _ADJACENCIES)
        self.delta, self.max_epsilon = plain((delta, max_epsilon))  # for files and checkpoints
        self.accountant, self.adjacency = accountant, adjacency
        self.assumptions: list[str] = []
        self.not_covered: list[str] = []
        self.caveats: list[str] = []
        self._events: list[PrivacyEvent] = []

    @property
    def history(self) -> list[PrivacyEvent]:
        """What was done, in order; equal steps that follow each other are one entry."""
        return list(self._events)

    @property
    def steps(self) -> int:
        """How often private data were looked at."""
        return sum(event.steps for event in self._events)

    def record(
        self,
        noise_multiplier: float,
        sample_rate: float = 1.0,
        steps: int = 1,
        *,
        label: str = "",
        sensitivity: float = 1.0,
    ) -> None:
        """Enter steps that are about to be taken.

        Args:
            noise_multiplier: Standard deviation of the noise divided by the sensitivity, >= 0.
            sample_rate: Probability in (0, 1] with which a record takes part; 1 for a plain release.
            steps: How many equal steps, >= 1.
            label: What they are for.
            sensitivity: For the report, > 0.

        Raises:
            PrivacyBudgetExceeded: ``max_epsilon`` would be passed. Nothing was recorded.
        """
        event = self._event(noise_multiplier, sample_rate, steps, label, sensitivity)
        if self.max_epsilon is not None:
            after = self._epsilon([*self._events, event])
            if after > self.max_epsilon:
                raise PrivacyBudgetExceeded(
                    f"{label or 'this'} would bring epsilon from {self.epsilon():.4g} to {after:.4g} at delta "
                    f"{self.delta:g}, above max_epsilon = {self.max_epsilon:g}; nothing was done"
                )
        last = self._events[-1] if self._events else None
        if last is not None and _without_steps(last) == _without_steps(event):
            self._events[-1] = PrivacyEvent(noise_multiplier, sample_rate, last.steps + steps, label, sensitivity)
        else:
            self._events.append(event)

    def epsilon(self, delta: float | None = None, accountant: Accountant | None = None) -> float:
        """Epsilon spent so far, at the ledger's delta and by its accountant unless others are asked for."""
        return self._epsilon(self._events, delta, accountant)

    def epsilon_after(self, noise_multiplier: float, sample_rate: float = 1.0, steps: int = 1) -> float:
        """Epsilon as it would be after further steps; nothing is recorded."""
        return self._epsilon([*self._events, self._event(noise_multiplier, sample_rate, steps)])

    def steps_left(self, noise_multiplier: float, sample_rate: float, at_most: int) -> int:
        """How many further steps, up to ``at_most``, keep ``max_epsilon``."""
        if self.max_epsilon is None or at_most < 1:
            return max(0, at_most)

        bound = self.max_epsilon

        def room(steps: int, accountant: Accountant | None = None) -> float:
            events = [*self._events, self._event(noise_multiplier, sample_rate, steps)]
            return bound - self._epsilon(events, accountant=accountant)

        # the rdp bound is never below and costs little: it finds where the search by prv begins
        low, high = 0, at_most + 1  # low is kept, high is not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if room(middle, "rdp") >= 0 else (low, middle)
        return low if self.accountant == "rdp" else _last_kept(room, low, at_most)

    def facts(self, deltas: Sequence[float] = (1e-5, 1e-6)) -> dict[str, Any]:
        """Return everything as plain Python: figures, history, and the sentences they rest on."""
        wanted = sorted({self.delta, *deltas}, reverse=True)
        phases = {(event.noise_multiplier, event.sample_rate) for event in self._events}
        accountant = self.accountant if len(phases) <= PRV_MOST_PHASES else "rdp"
        subsampled = any(rate < 1 for _, rate in phases)
        return {
            "epsilon": self.epsilon(),
            "delta": self.delta,
            "max_epsilon": self.max_epsilon,
            "accountant": accountant if subsampled else "exact",
            "neighbours": _ADJACENCIES[self.adjacency],
            "steps": self.steps,
            "private": math.isfinite(self.epsilon()) and not self.caveats,
            "epsilons": [
                {"delta": delta, **{name: self.epsilon(delta, name) for name in ACCOUNTANTS}} for delta in wanted
            ],
            "history": [vars(event) for event in self._events],
            "caveats": list(self.caveats),
            "assumptions": list(self.assumptions),
            "not_covered": list(self.not_covered),
        }

    def preface(self) -> list[str]:
        """Return why epsilon does not hold as it stands, if so, and what was spent."""
        epsilon = self.epsilon()
        headline = f"epsilon = {epsilon:.4g} at delta = {self.delta:g}" if math.isfinite(epsilon) else "NOT PRIVATE"
        return [*self.caveats, headline]

    def tables(self) -> dict[str, Table]:
        """Return epsilon by delta and accountant, the history, and what it rests on and does not cover."""
        tables = {"spent": self._spent()}
        if self._events:
            numbers = [Column("noise multiplier", ".4g"), Column("sample rate", ".4g"), Column("steps", ",")]
            rows = [[e.label or None, e.noise_multiplier, e.sample_rate, e.steps] for e in self._events]
            tables["history"] = Table("History", [Column("for"), *numbers], rows)
        sentences = (("rests on", self.assumptions), ("does not cover", self.not_covered))
        if terms := [[kind, sentence] for kind, listed in sentences for sentence in listed]:
            tables["terms"] = Table("Terms", ["epsilon", "sentence"], terms)
        return tables

    def _spent(self) -> Table:
        facts = self.facts()
        columns = [Column("delta", ".3g")] + [Column(f"epsilon ({name})", ".4g") for name in ACCOUNTANTS]
        caption = f"{self.steps:,} steps; neighbours: {facts['neighbours']}; accountant: {facts['accountant']}."
        caption = " ".join([*self.caveats, caption])
        return Table("Privacy spent", columns, [list(row.values()) for row in facts["epsilons"]], caption)

    def to_opacus(self, accountant: Any) -> Any:
        """Append the history to an accountant of opacus, to compose it with what was done elsewhere; returns it.

        Raises:
            ValueError: The neighbours are not those of opacus.
        """
        if self.adjacency != "add_remove":
            raise ValueError(f"opacus accounts for one record more or less, this ledger for {self.adjacency!r}")
        accountant.history.extend((event.noise_multiplier, event.sample_rate, event.steps) for event in self._events)
        return accountant

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain Python."""
        return {
            "version": _VERSION,
            "delta": self.delta,
            "max_epsilon": self.max_epsilon,
            "accountant": self.accountant,
            "adjacency": self.adjacency,
            "history": [dict(vars(event)) for event in self._events],
            "assumptions": list(self.assumptions),
            "not_covered": list(self.not_covered),
            "caveats": list(self.caveats),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state; on an error nothing has changed.

        Raises:
            ValueError: It is not the state of a ledger, or of a later version.
        """
        with reading("not the state of a PrivacyLedger"):
            if state["version"] != _VERSION:
                raise ValueError(f"expected version {_VERSION}, got {state['version']!r}")
            ledger = PrivacyLedger(
                parsed(float, state["delta"], "delta"),
                max_epsilon=parsed(float | None, state["max_epsilon"], "max_epsilon"),
                accountant=state["accountant"],
                adjacency=state["adjacency"],
            )
            ledger._events = parsed(list[PrivacyEvent], state["history"], "history")
            for event in ledger._events:
                ledger._event(**vars(event))
            for name in ("assumptions", "not_covered", "caveats"):
                setattr(ledger, name, parsed(list[str], state[name], name))
        self.__dict__.update(ledger.__dict__)

    def save(self, path: str | Path) -> Path:
        """Write state and report as JSON; folders are made."""
        content = {"report": _jsonable(self.facts()), "ledger": _jsonable(self.state_dict())}
        return write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> PrivacyLedger:
        """Read a ledger that :meth:`save` wrote.

        Raises:
            ValueError: The file holds no ledger.
        """
        ledger = cls()
        with reading(f"{path} holds no privacy ledger"):
            state = json.loads(Path(path).read_text(encoding="utf-8"))["ledger"]
            if state["max_epsilon"] == "inf":
                state["max_epsilon"] = math.inf
            ledger.load_state_dict(state)
        return ledger

    def __repr__(self) -> str:
        return f"PrivacyLedger(epsilon={self.epsilon():.4g}, delta={self.delta:g}, steps={self.steps})"

    def _event(
        self,
        noise_multiplier: float,
        sample_rate: float = 1.0,
        steps: int = 1,
        label: str = "",
        sensitivity: float = 1.0,
    ) -> PrivacyEvent:
        event = PrivacyEvent(noise_multiplier, sample_rate, steps, label, sensitivity)
        if sample_rate < 1 and self.adjacency != "add_remove":
            raise ValueError(
                f"sampled steps are accounted for between data sets of one record more or less, this ledger is for "
                f"{self.adjacency!r}: use a PrivacyLedger(adjacency='add_remove')"
            )
        return event

    def _epsilon(
        self, events: Sequence[PrivacyEvent], delta: float | None = None, accountant: Accountant | None = None
    ) -> float:
        return subsampled_epsilon(events, self.delta if delta is None else delta, accountant or self.accountant)


def _last_kept(room: Callable[[int], float], low: int, at_most: int) -> int:
    """The last number up to ``at_most`` that leaves room, where ``low`` does; every question takes long."""
    high, further = low + 1, max(1, low // 32)
    while high <= at_most and room(high) >= 0:
        low, high, further = high, high + further, 2 * further
    high = min(high, at_most + 1)
    guess = (low + high) // 2
    if low and high <= at_most:  # epsilon is nearly smooth in the steps, the answer lies at the root or beside it
        guess = int(brentq(lambda steps: max(room(round(steps)), -1e9), low, high, xtol=0.5))
    further = 1
    while high - low > 1:
        guess = min(max(guess, low + 1), high - 1)
        if room(guess) >= 0:
            low, guess = guess, guess + further
        else:
            high, guess = guess, guess - further
        further *= 2
    return low


def _without_steps(event: PrivacyEvent) -> tuple[Any, ...]:
    return event.noise_multiplier, event.sample_rate, event.label, event.sensitivity


def _jsonable(value: Any) -> Any:
    """JSON has no infinity: it is written as the word."""
    if isinstance(value, Mapping):
        return {key: _jsonable(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_jsonable(entry) for entry in value]
    return "inf" if isinstance(value, float) and math.isinf(value) else value
