"""The books of a private training run: what it may spend, what it has spent, and how that goes on after a stop."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_eff.accounting import Accountant, PrivacyEvent, PrivacyLedger
from lightning_eff.documents import whole_state
from lightning_eff.privacy.planning import PrivacyPlan, default_delta

_VERSION = 1
# more steps than anybody takes, where the Trainer sets no end
_NO_END = 1 << 24

NO_NOISE = "There was no noise in some steps: nothing is private."
SEEDED = "noise_seed was set in some steps: whoever knows it can take the noise away, nothing is private."
SHUFFLED = (
    "Epsilon is approximate: batches were shuffled and not drawn by Poisson sampling, which is what the accountant "
    "accounts for."
)
UNACCOUNTED = "Training went on from a checkpoint that does not tell what was spent before."
OTHER_DATA = "Training went on from a checkpoint that was trained on another data set; steps on both are added up."


@dataclass(frozen=True)
class PrivateData:
    """What of the training data the accounting needs, none of which is private.

    Args:
        num_samples: N.
        expected_batch: q N, of all processes.
        steps_per_epoch: Batches that an epoch of the loader has.
        dataset: Type of the data set.
    """

    num_samples: int
    expected_batch: float
    steps_per_epoch: int
    dataset: str


class Budget:
    """Ledger, noise and the steps that are left.

    Args:
        noise_multiplier: sigma, or ``None`` to find it.
        target_epsilon: Epsilon at which the planned steps shall end, or ``None``.
        delta: ``None`` for :func:`default_delta` of the training data.
        max_epsilon: Never to be passed, or ``None``.
        accountant: ``"prv"`` or ``"rdp"``.
        ledger: Where the steps are entered; its delta, bound and accountant hold. ``None`` makes one.

    Raises:
        ValueError: The target lies above the bound, or the ledger does not fit what else is given.
    """

    def __init__(
        self,
        noise_multiplier: float | None,
        target_epsilon: float | None,
        delta: float | None,
        max_epsilon: float | None,
        accountant: Accountant,
        ledger: PrivacyLedger | None = None,
    ) -> None:
        if ledger is None:
            ledger = PrivacyLedger(1e-5 if delta is None else delta, max_epsilon=max_epsilon, accountant=accountant)
        else:
            _check_given(ledger, delta, max_epsilon)
            delta = ledger.delta
        if target_epsilon is not None and ledger.max_epsilon is not None and target_epsilon > ledger.max_epsilon:
            raise ValueError(
                f"target_epsilon = {target_epsilon:g} lies above max_epsilon = {ledger.max_epsilon:g}, so that "
                "training would stop before its end: leave max_epsilon out, or take a target up to it"
            )
        self.target_epsilon = target_epsilon
        self.ledger = ledger
        self.noise_multiplier = noise_multiplier
        self.data: PrivateData | None = None
        self.plan: PrivacyPlan | None = None
        self.steps_left = 0
        self.given_delta = delta
        self.given_noise = noise_multiplier
        self._ends_early = False
        self._steps_entered = 0
        self._resumed_data: Mapping[str, Any] | None = None

    def begin(
        self, data: PrivateData, steps: int | None, at_least: int = 0, allow_other_data: bool = False
    ) -> PrivacyPlan:
        """Get ready for steps on ``data``: find the noise, count the steps that are left.

        Args:
            data: What is trained on.
            steps: Steps that are planned from now on; ``None`` where there is no end.
            at_least: Steps that the Trainer takes in any case (``min_epochs``, ``min_steps``).
            allow_other_data: Add up over data sets.

        Raises:
            ValueError: The target is out of reach, the plan passes it, ``max_epsilon`` forbids the first step or steps
                that have to be taken, or a checkpoint was of another data set.
        """
        self._compare_data(data, allow_other_data)
        self.data = data
        if self.given_delta is None:
            self.ledger.delta = default_delta(data.num_samples)
        elif self.given_delta >= 1 / data.num_samples:
            rank_zero_warn(
                f"delta = {self.given_delta:g} is not below 1/N = {1 / data.num_samples:.2g}: publishing one sample "
                "out of N would pass for private; leave delta out or choose it well below"
            )
        self._find_noise(data, steps)
        assert self.noise_multiplier is not None
        self.plan = PrivacyPlan.make(
            data.num_samples,
            data.expected_batch,
            steps=steps or 0,
            noise_multiplier=self.noise_multiplier,
            delta=self.ledger.delta,
            accountant=self.ledger.accountant,
            steps_per_epoch=data.steps_per_epoch,
            history=self.ledger.history,
        )
        planned = _NO_END if steps is None else steps
        self.steps_left = self.ledger.steps_left(self.noise_multiplier, self.plan.sample_rate, planned)
        self._ends_early = self.steps_left < planned
        self._steps_entered = self.ledger.steps
        if self._ends_early:
            self.plan = replace(self.plan, max_epsilon=self.ledger.max_epsilon, allowed_steps=self.steps_left)
        if self.steps_left < 1 <= planned and not self.ledger.steps:
            raise ValueError(
                f"max_epsilon = {self.ledger.max_epsilon:g} is below the cost of a single step, epsilon "
                f"{self.plan.epsilon_after(1):.4g}: raise it, or take more noise or smaller batches"
            )
        if self.steps_left < min(at_least, planned):
            raise ValueError(
                f"min_epochs or min_steps asks for {at_least} more steps, max_epsilon = {self.ledger.max_epsilon:g} "
                f"allows {self.steps_left}: lower the one or raise the other"
            )
        if self.noise_multiplier == 0:
            rank_zero_warn("noise_multiplier is 0: nothing is private, epsilon is infinite")
            note(self.ledger.caveats, NO_NOISE)
        return self.plan

    def record(self) -> None:
        """Enter one step that is about to be taken.

        Raises:
            PrivacyBudgetExceeded: It would pass ``max_epsilon``. Nothing was recorded.
        """
        assert self.plan is not None
        self._steps_entered += 1
        if self.steps_left < 1:
            self.ledger.record(self.plan.noise_multiplier, self.plan.sample_rate, label="training")
            return
        # the steps left were counted once: to ask the accountant at every step would take longer than the step
        with _without_bound(self.ledger):
            self.ledger.record(self.plan.noise_multiplier, self.plan.sample_rate, label="training")
        self.steps_left -= 1

    @property
    def is_spent(self) -> bool:
        """Whether ``max_epsilon`` allows no further step."""
        return self._ends_early and self.steps_left < 1

    @property
    def plan_is_over(self) -> bool:
        """Whether a further step has to be planned: all that were planned are taken, or others used the ledger."""
        return (not self._ends_early and self.steps_left < 1) or self.ledger.steps != self._steps_entered

    def state_dict(self) -> dict[str, Any]:
        """Return everything a file should tell, as plain Python."""
        return {
            "version": _VERSION,
            "epsilon": self.ledger.epsilon(),
            "delta": self.ledger.delta,
            "noise_multiplier": self.noise_multiplier,
            "target_epsilon": self.target_epsilon,
            "data": None if self.data is None else asdict(self.data),
            "ledger": self.ledger.state_dict(),
        }

    @whole_state
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what a file tells. What this object has spent beside it is kept: never less is told than was spent.

        Raises:
            ValueError: It is not such a state.
        """
        if state.get("version") != _VERSION:
            raise ValueError(f"expected version {_VERSION} of the privacy record, got {state.get('version')!r}")
        theirs = PrivacyLedger()
        theirs.load_state_dict(state["ledger"])
        ours = self.ledger.history
        if not _begins_with(ours, theirs.history):
            merged = self.ledger.state_dict()
            merged["history"] = [dict(vars(event)) for event in [*theirs.history, *ours]]
            self.ledger.load_state_dict(merged)
        for name in ("assumptions", "not_covered", "caveats"):
            for sentence in getattr(theirs, name):
                note(getattr(self.ledger, name), sentence)
        self._resumed_data = state["data"]
        if self.given_noise is None and state["target_epsilon"] == self.target_epsilon:
            self.noise_multiplier = state["noise_multiplier"]

    def _find_noise(self, data: PrivateData, steps: int | None) -> None:
        if self.target_epsilon is None:
            return
        if steps is None:
            raise ValueError(
                "target_epsilon needs to know how many steps there will be: give Trainer(max_epochs=...) or "
                "Trainer(max_steps=...), and a train dataloader with a length"
            )
        make = partial(
            PrivacyPlan.make,
            data.num_samples,
            data.expected_batch,
            steps=steps,
            delta=self.ledger.delta,
            accountant=self.ledger.accountant,
            history=self.ledger.history,
        )
        if self.noise_multiplier is None or math.isinf(self.noise_multiplier):
            self.noise_multiplier = make(target_epsilon=self.target_epsilon).noise_multiplier
            return
        plan = make(noise_multiplier=self.noise_multiplier)
        if plan.epsilon > self.target_epsilon * (1 + 1e-6):
            spent = self.ledger.epsilon()
            if spent > 0.98 * self.target_epsilon:
                raise ValueError(
                    f"{steps} more steps would end at epsilon {plan.epsilon:.4g}, above target_epsilon = "
                    f"{self.target_epsilon:g}: this strategy has already spent {spent:.3g} of {self.target_epsilon:g}; "
                    "make a new one or raise target_epsilon"
                )
            raise ValueError(
                f"{steps} more steps with the noise multiplier {self.noise_multiplier:.4g} found before would end at "
                f"epsilon {plan.epsilon:.4g}, above target_epsilon = {self.target_epsilon:g}: the number of samples, "
                "the batch size or the length of training has changed. Take fewer steps, or another target_epsilon, "
                "for which the noise is found anew"
            )

    def _compare_data(self, data: PrivateData, allow_other_data: bool) -> None:
        before, self._resumed_data = self._resumed_data, None
        if before is None:
            return
        if before["dataset"] != data.dataset:
            if not allow_other_data:
                raise ValueError(
                    f"the checkpoint was trained on a {before['dataset']}, this is a {data.dataset}: epsilon adds up "
                    "over one data set. Train on the same one, or set allow_unaccounted_resume=True, which every "
                    "report tells"
                )
            note(self.ledger.caveats, OTHER_DATA)
        changed = [
            f"{name} {before[name]:g} -> {getattr(data, name):g}"
            for name in ("num_samples", "expected_batch")
            if before[name] != getattr(data, name)
        ]
        if changed:
            rank_zero_info(f"Private training goes on with other data: {', '.join(changed)}; the ledger keeps both.")


def _check_given(ledger: PrivacyLedger, delta: float | None, max_epsilon: float | None) -> None:
    if ledger.adjacency != "add_remove":
        raise ValueError(
            f"the ledger is for adjacency {ledger.adjacency!r}, and sampled steps are accounted for between data sets "
            "of one sample more or less: pass PrivacyLedger(adjacency='add_remove')"
        )
    for name, value in (("delta", delta), ("max_epsilon", max_epsilon)):
        if value is not None and value != getattr(ledger, name):
            raise ValueError(f"{name} = {value:g} beside a ledger with {getattr(ledger, name)}: give it to the ledger")


def note(sentences: list[str], sentence: str) -> None:
    """Add a sentence once."""
    if sentence not in sentences:
        sentences.append(sentence)


@contextmanager
def _without_bound(ledger: PrivacyLedger) -> Iterator[None]:
    bound, ledger.max_epsilon = ledger.max_epsilon, None
    try:
        yield
    finally:
        ledger.max_epsilon = bound


def _begins_with(events: Sequence[PrivacyEvent], start: Sequence[PrivacyEvent]) -> bool:
    """Whether a history is another one with more steps behind it; equal steps in a row are one event in both."""
    if not start:
        return True
    *whole, last = start
    if len(events) < len(start) or list(events[: len(whole)]) != whole:
        return False
    match = events[len(whole)]
    return {**vars(match), "steps": last.steps} == vars(last) and match.steps >= last.steps
