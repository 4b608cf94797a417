"""What a strategy knows of the privacy it spends: a budget, its ledger, and checkpoints that carry both."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_eff.accounting import PrivacyLedger
from lightning_eff.privacy import checks
from lightning_eff.privacy.budget import UNACCOUNTED, Budget, note
from lightning_eff.privacy.options import PrivateTrainingOptions
from lightning_eff.privacy.planning import PrivacyPlan

CHECKPOINT_KEY = "lightning_eff.dp"


class AccountedTraining(Strategy):
    """Mixed into a strategy, before it; whoever derives from it sets both attributes.

    Attributes:
        options: What is seldom changed.
    """

    options: PrivateTrainingOptions
    _budget: Budget

    @property
    def ledger(self) -> PrivacyLedger:
        """What was done to private data by all fits of this strategy, and what it rests on."""
        return self._budget.ledger

    @property
    def epsilon(self) -> float:
        """Epsilon spent so far, at the ledger's delta."""
        return self.ledger.epsilon()

    @property
    def noise_multiplier(self) -> float | None:
        """sigma; ``None`` until it is found for ``target_epsilon``."""
        return self._budget.noise_multiplier

    def plan(
        self, num_samples: int | None = None, batch_size: float | None = None, epochs: int | None = None
    ) -> PrivacyPlan:
        """Tell what a run costs.

        Args:
            num_samples: Training samples N. ``None`` takes everything from the fit that runs or ran.
            batch_size: Expected samples in a step, all processes together.
            epochs: Passes over the data.

        Raises:
            ValueError: Something is missing, or the target is out of reach.
        """
        budget = self._budget
        if num_samples is None and budget.plan is not None:
            return budget.plan
        if num_samples is None or batch_size is None or epochs is None:
            raise ValueError("before a fit, plan needs num_samples, batch_size and epochs")
        return PrivacyPlan.make(
            num_samples,
            batch_size,
            epochs=epochs,
            noise_multiplier=budget.given_noise,
            target_epsilon=budget.target_epsilon,
            delta=budget.given_delta,
            accountant=self.ledger.accountant,
            history=self.ledger.history,
            max_epsilon=self.ledger.max_epsilon,
        )

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write what was spent into the file; never the state of a generator."""
        checkpoint[CHECKPOINT_KEY] = {**self._budget.state_dict(), **self._settings_state()}
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Take over what a file tells was spent.

        Raises:
            ValueError: A fit is to go on from a file that does not tell it.
        """
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only=weights_only)
        fitting = self._module().trainer.state.fn == TrainerFn.FITTING
        state = checkpoint.get(CHECKPOINT_KEY)
        if state is not None:
            if fitting or not self.ledger.steps:
                self._budget.load_state_dict(state)
        elif fitting:
            if not self.options.allow_unaccounted_resume:
                raise ValueError(
                    f"{checkpoint_path} does not tell what was spent before (it has no {CHECKPOINT_KEY!r}), so epsilon "
                    "would be too small. To begin with its weights, load them with load_from_checkpoint and fit "
                    "without ckpt_path; to go on all the same, set allow_unaccounted_resume=True, which every report "
                    "tells"
                )
            note(self.ledger.caveats, UNACCOUNTED)
        return checkpoint

    def on_train_end(self) -> None:
        """See what was logged at the end of the last epoch."""
        super().on_train_end()
        self._tell_monitors()

    def _module(self) -> LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    def _settings_state(self) -> dict[str, Any]:
        """What else a file tells, as plain Python and tensors."""
        return {}

    def _tell_monitors(self) -> None:
        trainer = self._module().trainer
        for sentence in checks.monitors_of_training_metrics(trainer, self.lr_scheduler_configs):
            if sentence not in self.ledger.caveats:
                rank_zero_warn(f"{sentence} Let it go by a metric of public data, or by validation.")
                note(self.ledger.caveats, sentence)

    def _stop(self, trainer: Trainer) -> None:
        trainer.should_stop = True
        bound = self.ledger.max_epsilon
        rank_zero_info(f"Private training stops: one more step would pass max_epsilon = {bound:g}.")
