"""What a training run will cost, before it runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from lightning_eff.accounting import (
    Accountant,
    PrivacyEvent,
    PrivacyLedger,
    subsampled_epsilon,
    subsampled_sigma,
)
from lightning_eff.arguments import check_number, check_whole

if TYPE_CHECKING:
    from lightning_eff.reporting import Table


@dataclass(frozen=True)
class PrivacyPlan:
    """Steps that are to be taken, and their epsilon.

    Args:
        num_samples: N, private training samples.
        expected_batch_size: qN, of all processes together; at most N.
        steps_per_epoch: Optimizer steps in an epoch.
        steps: Optimizer steps in all that are still to come.
        noise_multiplier: sigma, >= 0.
        delta: In (0, 1).
        accountant: ``"prv"`` or ``"rdp"``.
        history: What was done before on the same data.
        max_epsilon: Where training ends before the planned steps are over; ``None`` where it does not.
        allowed_steps: How many of the steps ``max_epsilon`` allows; ``None`` is all.
    """

    num_samples: int
    expected_batch_size: float
    steps_per_epoch: int
    steps: int
    noise_multiplier: float
    delta: float
    accountant: Accountant = "prv"
    history: Sequence[PrivacyEvent] = field(default=(), repr=False)
    max_epsilon: float | None = None
    allowed_steps: int | None = None

    @classmethod
    def make(
        cls,
        num_samples: int,
        batch_size: float,
        *,
        epochs: int | None = None,
        steps: int | None = None,
        noise_multiplier: float | None = None,
        target_epsilon: float | None = None,
        delta: float | None = None,
        accountant: Accountant = "prv",
        steps_per_epoch: int | None = None,
        history: Sequence[PrivacyEvent] = (),
        max_epsilon: float | None = None,
    ) -> PrivacyPlan:
        """Plan a run; with ``target_epsilon`` find the noise multiplier that ends there.

        Args:
            num_samples: N.
            batch_size: Expected samples in a step, all processes together.
            epochs: Passes over the data; give this or ``steps``.
            steps: Optimizer steps in all.
            noise_multiplier: sigma; give this or ``target_epsilon``.
            target_epsilon: Epsilon at the end, history included.
            delta: ``None`` for :func:`default_delta`.
            accountant: See :func:`~lightning_eff.accounting.subsampled_epsilon`.
            steps_per_epoch: ``None`` for ``N / batch_size``, rounded up.
            history: What was done before.
            max_epsilon: Bound at which training stops, or ``None``.

        Raises:
            ValueError: The arguments contradict each other, no noise reaches the target, or the bound is below the
                cost of one step.
        """
        check_one_of(noise_multiplier, target_epsilon)
        if (epochs is None) == (steps is None):
            raise ValueError(f"give epochs or steps, got epochs={epochs} and steps={steps}")
        check_whole("num_samples", num_samples)
        check_number("batch_size", batch_size, above=0)
        for name, number in (("epochs", epochs), ("steps", steps)):
            if number is not None:
                check_whole(name, number, least=0)
        batch_size = min(batch_size, num_samples)
        per_epoch = math.ceil(num_samples / batch_size) if steps_per_epoch is None else steps_per_epoch
        total = steps if steps is not None else (epochs or 0) * per_epoch
        delta = default_delta(num_samples) if delta is None else delta
        if noise_multiplier is None:
            assert target_epsilon is not None
            rate = batch_size / num_samples
            # no further step: the noise does not matter
            noise_multiplier = (
                subsampled_sigma(target_epsilon, delta, rate, total, accountant, history) if total else math.inf
            )
        plan = cls(num_samples, batch_size, per_epoch, total, noise_multiplier, delta, accountant, history)
        if max_epsilon is None or plan.epsilon <= max_epsilon:
            return plan
        ledger = PrivacyLedger(delta, max_epsilon=max_epsilon, accountant=accountant)
        ledger.load_state_dict({**ledger.state_dict(), "history": [dict(vars(event)) for event in history]})
        allowed = ledger.steps_left(noise_multiplier, plan.sample_rate, total)
        if not allowed and not history:
            raise ValueError(
                f"max_epsilon = {max_epsilon:g} is below the cost of a single step, epsilon "
                f"{plan.epsilon_after(1):.4g}: raise it, or take more noise or smaller batches"
            )
        return replace(plan, max_epsilon=max_epsilon, allowed_steps=allowed)

    @property
    def sample_rate(self) -> float:
        """q, the probability with which a sample takes part in a step."""
        return self.expected_batch_size / self.num_samples

    @property
    def epsilon(self) -> float:
        """Epsilon at the end, history included."""
        return self.epsilon_after(self.steps)

    def epsilon_after(self, steps: int) -> float:
        """Epsilon after some more steps, history included."""
        more = [PrivacyEvent(self.noise_multiplier, self.sample_rate, steps)] if steps else []
        return subsampled_epsilon([*self.history, *more], self.delta, self.accountant)

    def epochs(self, rows: int = 10) -> Table:
        """Epsilon after epochs, at most about ``rows`` of them."""
        from lightning_eff.reporting import Column, Table

        ends = [*range(self.steps_per_epoch, self.steps, self.steps_per_epoch), self.steps]
        shown = sorted({*ends[:: max(1, math.ceil(len(ends) / rows))], ends[-1]})
        lines = [[round(end / self.steps_per_epoch, 2), end, self.epsilon_after(end)] for end in shown]
        columns = [Column("epochs", "g"), Column("steps", ","), Column(f"epsilon at delta {self.delta:g}", ".4g")]
        return Table("Privacy over the run", columns, lines, self._caption())

    def noise_for(self, epsilons: Sequence[float] = (1.0, 2.0, 3.0, 8.0)) -> Table:
        """Noise multiplier that ends these steps at given epsilons; empty where none does."""
        from lightning_eff.reporting import Column, Table

        lines: list[list[float | None]] = []
        for epsilon in epsilons:
            try:
                sigma = subsampled_sigma(
                    epsilon, self.delta, self.sample_rate, self.steps, self.accountant, self.history
                )
            except ValueError:
                sigma = None
            lines.append([epsilon, sigma])
        return Table("Noise for a target", [Column("epsilon", "g"), Column("noise multiplier", ".4g")], lines)

    def __str__(self) -> str:
        return self._caption()

    def _caption(self) -> str:
        facts = (
            f"N = {self.num_samples:,}, expected batch {self.expected_batch_size:,g} (q = {self.sample_rate:.4g}), "
            f"{self.steps:,} steps, noise multiplier {self.noise_multiplier:.4g}, delta {self.delta:g}, "
            f"accountant {self.accountant}"
        )
        if self.max_epsilon is None or self.allowed_steps is None:
            return f"{facts}: epsilon {self.epsilon:.4g} at the end"
        of = f" of {self.steps:,}" if self.steps else ""
        return (
            f"{facts}: max_epsilon = {self.max_epsilon:g} ends training after {self.allowed_steps:,}{of} steps, "
            f"epsilon {self.epsilon_after(self.allowed_steps):.4g}"
        )


def default_delta(num_samples: int) -> float:
    """Delta where none was asked for: ``min(1e-5, 1 / (10 N))``; it has to stay well below one over N."""
    return min(1e-5, 1 / (10 * num_samples))


def check_one_of(noise_multiplier: float | None, target_epsilon: float | None) -> None:
    """Refuse both and neither.

    Raises:
        ValueError: Names both.
    """
    if (noise_multiplier is None) == (target_epsilon is None):
        raise ValueError(
            f"give exactly one of noise_multiplier and target_epsilon, got noise_multiplier={noise_multiplier} and "
            f"target_epsilon={target_epsilon}"
        )
    if noise_multiplier is not None:
        check_number("noise_multiplier", noise_multiplier, least=0)
    if target_epsilon is not None and target_epsilon != math.inf:
        check_number("target_epsilon", target_epsilon, above=0)
