"""What private training logs: epsilon at every step, the rest where the Trainer logs.

An accountant takes longer than a step of a small network, so between the steps where epsilon is told exactly it is told
for a few more steps than were taken: never too small.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_eff.accounting import PrivacyLedger
from lightning_eff.privacy.planning import PrivacyPlan

# by how much the steps that epsilon is told for may exceed those that were taken
_AHEAD = 0.1


class SpentEpsilon:
    """Epsilon after each step of a plan, told exactly or for at most a tenth more steps."""

    def __init__(self) -> None:
        self._plan: PrivacyPlan | None = None
        self._steps = 0
        self._epsilon = 0.0

    def after_step(self, ledger: PrivacyLedger, plan: PrivacyPlan, exact_in: float) -> float:
        """Return an epsilon that is at least what the ledger tells.

        Args:
            ledger: With the step that was taken.
            plan: The plan it belongs to.
            exact_in: Steps from now to the next one that epsilon is told exactly for; 0: this one.
        """
        taken = ledger.steps - sum(event.steps for event in plan.history)
        if plan is not self._plan or taken < 1:
            self._plan, self._steps = plan, 0
        if exact_in == 0:
            if taken != self._steps:
                self._steps, self._epsilon = taken, ledger.epsilon()
        elif taken > self._steps:
            ahead = int(min(taken * (1 + _AHEAD), taken + exact_in))
            self._steps = min(ahead, plan.steps) if plan.steps >= taken else ahead
            self._epsilon = plan.epsilon_after(self._steps)
        return self._epsilon


def log_step(
    module: LightningModule,
    spent: SpentEpsilon,
    ledger: PrivacyLedger,
    plan: PrivacyPlan,
    every: int | None,
    **others: float,
) -> None:
    """Log what a step did; called before the Trainer counts it.

    Args:
        module: Logs.
        spent: Remembers epsilon from step to step.
        ledger: With the step.
        plan: The plan it belongs to.
        every: Steps between two that the other values are logged at; ``None`` is the Trainer's.
        others: Values by name, without ``privacy/``.
    """
    trainer = module.trainer
    if trainer.barebones:
        return
    exact_in = steps_to_exact(trainer, every or trainer.log_every_n_steps)  # type: ignore[attr-defined]
    epsilon = _rounded_up(spent.after_step(ledger, plan, exact_in))
    # infinity is what it is without noise, and what a logger may take
    module.log("privacy/epsilon", epsilon, prog_bar=True, on_step=True, on_epoch=False, batch_size=1)
    if exact_in == 0 or "privacy/sample_rate" not in trainer.callback_metrics:
        for name, value in {
            **others,
            "noise_multiplier": plan.noise_multiplier,
            "sample_rate": plan.sample_rate,
        }.items():
            module.log(f"privacy/{name}", value, on_step=True, on_epoch=False, batch_size=1)


def _rounded_up(epsilon: float) -> Tensor:
    """Metrics are float32."""
    rounded = torch.tensor(epsilon, dtype=torch.float32)
    return rounded if float(rounded) >= epsilon else torch.nextafter(rounded, torch.tensor(torch.inf))


def steps_to_exact(trainer: Trainer, every: int | None) -> float:
    """Steps from the one that was just taken to the next where epsilon is told exactly; 0: it is this one.

    Exact are logged steps, the last one of an epoch and of training, and those before a validation or a checkpoint.
    """
    step, loop = trainer.global_step + 1, trainer.fit_loop.epoch_loop
    if trainer.should_stop or trainer.is_last_batch or step == trainer.max_steps:
        return 0
    between: list[Any] = [getattr(callback, "_every_n_train_steps", 0) for callback in trainer.checkpoint_callbacks]
    if any(number and step % number == 0 for number in between):
        return 0
    check: Any = trainer.val_check_batch
    if isinstance(check, int) and check > 0 and 0 in ((loop.batch_idx + 1) % check, step % check):
        return 0
    if not every:
        return float("inf")
    return -step % every
