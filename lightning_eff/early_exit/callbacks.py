"""Early stopping that ends a phase instead of the whole training."""

from __future__ import annotations

import math
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_eff.arguments import check_choice, check_number
from lightning_eff.documents import parsed, whole_state
from lightning_eff.early_exit.training.metrics import output_names
from lightning_eff.early_exit.training.phased_module import PhasedModule


class PhaseEarlyStopping(Callback):
    """Go on with the next phase where no output has improved for a while, and stop in the last one.

    Every output that the phase logs has a counter of its own: a phase ends when all of them have run out (official code
    of arXiv 2407.14320). The next phase begins with the next epoch. All processes decide as the first one does.

    Args:
        patience: validations without improvement an output is given, >= 1; a list has one number a phase.
        monitor: what is watched, ``"val/accuracy"`` for ``val/accuracy_exit0``, ..., ``val/accuracy_final``.
        mode: whether ``"max"`` or ``"min"`` is better.
        min_delta: least change that is an improvement, >= 0.
        restore_best: when a phase has run out, put the weights back with which an output improved last; a copy of them
            is kept on the CPU and in checkpoints.

    Attributes:
        best_of_phase: for every phase begun, the best value of each output, by name.

    Raises:
        ValueError: a value out of range.
    """

    ends_phases = True

    def __init__(
        self,
        patience: int | list[int] = 50,
        monitor: str = "val/accuracy",
        mode: Literal["max", "min"] = "max",
        min_delta: float = 0.0,
        restore_best: bool = True,
    ) -> None:
        each = patience if isinstance(patience, list) else [patience]
        if not each or not all(isinstance(one, int) and not isinstance(one, bool) and one >= 1 for one in each):
            raise ValueError(f"expected a patience of at least one validation, got {patience}")
        check_choice("mode", mode, ("max", "min"))
        check_number("min_delta", min_delta, least=0)
        self.patience, self.monitor, self.mode = patience, monitor, mode
        self.min_delta, self.restore_best = min_delta, restore_best
        self._reset()

    def _reset(self) -> None:
        self.best_of_phase: dict[int, dict[str, float]] = {}
        self._begin(0)

    def _begin(self, phase: int) -> None:
        self._phase, self._ran_out = phase, False
        self._waited: dict[str, int] = {}
        self._best_weights: dict[str, Tensor] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse modules without phases, and numbers of phases that do not match."""
        if stage != "fit":
            return
        phases = _module(pl_module).phases
        if isinstance(self.patience, list) and len(self.patience) != len(phases):
            raise ValueError(f"expected a patience for each of {len(phases)} phases, got {self.patience}")
        if trainer.current_epoch == 0 and trainer.global_step == 0:
            self._reset()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn where nothing will ever be watched; a run that has run out stays so."""
        if self._ran_out and _module(pl_module).is_last_phase:
            trainer.should_stop = True
        if not trainer.enable_validation:
            rank_zero_warn("PhaseEarlyStopping watches validation, of which there is none: phases will not end early")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count, and stop the trainer where the last phase has run out."""
        module = _module(pl_module)
        if trainer.sanity_checking or not module.is_fitting:
            return
        if module.phase_index != self._phase:
            self._begin(module.phase_index)
        if self._ran_out:
            return
        values = trainer.strategy.broadcast(self._values(trainer, module))
        best = self.best_of_phase.setdefault(self._phase, {})
        improved = {name for name, value in values.items() if self._better(value, best.get(name))}
        for name, value in values.items():
            self._waited[name] = 0 if name in improved else self._waited.get(name, 0) + 1
            if name in improved:
                best[name] = value
        if improved and self.restore_best:
            state = module.network.state_dict()
            self._best_weights = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
        patience = self.patience[self._phase] if isinstance(self.patience, list) else self.patience
        if all(waited >= patience for waited in self._waited.values()):
            self._ran_out = True
            told = ", ".join(f"{name} {value:.4g}" for name, value in best.items())
            rank_zero_info(f"Phase {self._phase + 1} has not improved for {patience} validations; best: {told}")
            if module.is_last_phase:
                trainer.should_stop = True

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the best weights back and ask for the next phase; the module begins it right after."""
        module = _module(pl_module)
        if self._ran_out and not module.is_last_phase:
            self._restore(module)
            module.next_phase()
            self._begin(self._phase)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The same where a run goes on from its last batch, which skips the start of the epoch."""
        if batch_idx == 0:
            self.on_train_epoch_start(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the best weights back where the last phase has run out."""
        module = _module(pl_module)
        if self._ran_out and module.is_last_phase:
            self._restore(module)

    def state_dict(self) -> dict[str, Any]:
        """Counters, best values and best weights of the phase."""
        return {
            "best_of_phase": {phase: dict(best) for phase, best in self.best_of_phase.items()},
            "phase": self._phase,
            "waited": dict(self._waited),
            "ran_out": self._ran_out,
            "best_weights": self._best_weights,
        }

    @whole_state
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what :meth:`state_dict` wrote."""
        self.best_of_phase = parsed(dict[int, dict[str, float]], state_dict["best_of_phase"], "best_of_phase")
        self._begin(parsed(int, state_dict["phase"], "phase"))
        self._waited = parsed(dict[str, int], state_dict["waited"], "waited")
        self._ran_out = parsed(bool, state_dict["ran_out"], "ran_out")
        self._best_weights = parsed(dict[str, Any] | None, state_dict["best_weights"], "best_weights")

    def _values(self, trainer: Trainer, module: PhasedModule) -> dict[str, float]:
        names = [f"{self.monitor}_{name}" for name in output_names(module.network.num_exits)]
        logged = trainer.callback_metrics
        values = {name: float(logged[name]) for name in names if name in logged}
        if not values:
            raise RuntimeError(
                f"PhaseEarlyStopping found none of {', '.join(names)} among what is logged: {', '.join(logged)}"
            )
        return values

    def _better(self, value: float, best: float | None) -> bool:
        if best is None:
            return not math.isnan(value)
        return value > best + self.min_delta if self.mode == "max" else value < best - self.min_delta

    def _restore(self, module: PhasedModule) -> None:
        if self._best_weights is not None:
            module.network.load_state_dict(self._best_weights)


def _module(pl_module: LightningModule) -> PhasedModule:
    if not isinstance(pl_module, PhasedModule):
        raise ValueError(f"PhaseEarlyStopping ends phases of an EarlyExitModule, got a {type(pl_module).__name__}")
    return pl_module
