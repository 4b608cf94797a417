"""A LightningModule that trains its network in phases: what stands still, which optimizer, and when that changes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, islice
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_eff.arguments import check_number, check_whole
from lightning_eff.early_exit.network import MultiExitNetwork
from lightning_eff.early_exit.training.in_trainer import steps_of_epochs
from lightning_eff.early_exit.training.phases import Phase, PhaseClock, timetable
from lightning_eff.early_exit.training.schedules import Schedule, build_schedule, check_schedule
from lightning_eff.surgery.in_trainer import rewrap

UNSET_EPOCHS = 1000
"""What Lightning takes for ``max_epochs`` where nobody has set it."""


class PhasedModule(L.LightningModule):
    """Trains a network with exits phase by phase; a subclass says with what losses.

    Args:
        network: the exits may still have to be built; the subclass does so before calling :meth:`prepare_phases`.
        phases: in order.
        phase_split: share of the first of two phases that have no epochs of their own, in [0, 1].
        start_phase: the first phase that is trained, from 0.
        optimizer: ``parameters -> optimizer``, of phases that have none.
        lr_scheduler: of phases that have none.

    Raises:
        ValueError: an argument out of range, or a schedule that cannot be built.
    """

    network: MultiExitNetwork

    def __init__(
        self,
        network: MultiExitNetwork,
        phases: Sequence[Phase],
        phase_split: float,
        start_phase: int,
        optimizer: OptimizerCallable,
        lr_scheduler: Schedule | None,
    ) -> None:
        super().__init__()
        check_number("phase_split", phase_split, least=0, most=1)
        check_whole("start_phase", start_phase, 0, len(phases) - 1)
        for schedule in (lr_scheduler, *(phase.lr_scheduler for phase in phases)):
            check_schedule(schedule)
        self.network = network
        self.phase_split, self.optimizer, self.lr_scheduler = phase_split, optimizer, lr_scheduler
        self._clock = PhaseClock(phases, start_phase)
        self._trainable: set[str] | None = None  # names of parameters that the user wants trained; None: not fitting
        self._modes: list[tuple[nn.Module, bool]] | None = None  # of a backbone that stands still, as they were

    @property
    def phases(self) -> tuple[Phase, ...]:
        """All phases, in order."""
        return self._clock.phases

    @property
    def phase(self) -> Phase:
        """The current phase."""
        return self._clock.phase

    @property
    def phase_index(self) -> int:
        """Number of the current phase, from 0."""
        return self._clock.index

    @property
    def is_last_phase(self) -> bool:
        """Whether no phase comes after this one."""
        return self._clock.is_last

    @property
    def is_fitting(self) -> bool:
        """Whether a trainer fits this module."""
        trainer = self._trainer
        return trainer is not None and trainer.state.fn == TrainerFn.FITTING

    @property
    def phase_progress(self) -> tuple[int, int]:
        """Number of the epoch in the phase, from 1, and epochs of the phase; steps where phases are counted in steps.

        ``(1, 1)`` while nothing is trained.
        """
        return self._clock.progress(self.current_epoch, self.global_step) if self.is_fitting else (1, 1)

    def next_phase(self) -> None:
        """End the current phase before its time, when the next epoch begins (the next step, where these are counted).

        The fit ends as many epochs earlier. In the last phase this does nothing.
        """
        self._clock.ask_next()

    # Before training

    def prepare_phases(self) -> list[Phase]:
        """Share out the trainer's epochs; in ``setup``, before anything wraps the module.

        Returns:
            The phases that will be trained.
        """
        trainer, clock = self.trainer, self._clock
        given = [phase.epochs for phase in self.phases[clock.start :]]
        limit: int | None = trainer.max_epochs
        if limit == -1 or (limit == UNSET_EPOCHS and None not in given):
            limit = None
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        table = timetable(
            self.phases,
            start=clock.start,
            max_epochs=limit,
            max_steps=None if trainer.max_steps == -1 else trainer.max_steps,
            split=self.phase_split,
            open_ended=any(getattr(callback, "ends_phases", False) for callback in callbacks),
        )
        for note in table.notes:
            rank_zero_warn(note)
        if limit is None and table.unit == "epoch" and table.total is not None:
            trainer.fit_loop.max_epochs = table.total
        clock.table = table
        if trainer.current_epoch == 0 and trainer.global_step == 0:
            clock.restart()
        to_come = range(clock.index, len(self.phases))
        return [self.phases[i] for i in to_come if i == clock.index or table.lengths[i] != 0]

    def begin_phases(self) -> None:
        """Freeze what the first phase does not train; after :meth:`prepare_phases`, when the exits are built."""
        if self._trainable is None:
            self._trainable = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
            self.trainer.callbacks.append(_ThawOnException())  # type: ignore[attr-defined]
        self.freeze_phase()

    def freeze_phase(self) -> None:
        """Let gradients be computed for what the phase trains, as far as the user wants it trained; only in a fit."""
        if self._trainable is None:
            return
        still = {"backbone": self.network.heads, "heads": self.network.backbone}.get(self.phase.train)
        frozen = {id(parameter) for parameter in still.parameters()} if still is not None else set()
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in self._trainable and id(parameter) not in frozen)

    def configure_optimizers(self) -> Any:
        """Build optimizer and schedule of the current phase, over what it trains."""
        phase = self.phase
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if not parameters:
            raise ValueError(f"phase {phase.train!r} has nothing to train: no parameter of it requires a gradient")
        optimizer = (phase.optimizer or self.optimizer)(parameters)
        schedule = phase.lr_scheduler or self.lr_scheduler
        if schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": build_schedule(schedule, optimizer, self._phase_length)}

    def _phase_length(self, unit: str) -> int | None:
        """Length of the current phase in ``"epoch"`` or ``"step"``."""
        length, counted = self._clock.length, self._clock.table.unit
        if length is None or unit == counted:
            return length
        steps = steps_of_epochs(self.trainer, self._clock.began["epoch"])
        if unit == "step":
            return sum(islice(steps, length)) or None
        enough = (epochs for epochs, done in enumerate(accumulate(steps), 1) if done >= length)
        return next(enough, None)

    # Moving on

    def on_train_start(self) -> None:
        """Say which phase it is and hold the backbone still where it is to be."""
        self._tell()
        self._hold_backbone()

    def on_train_epoch_start(self) -> None:
        """Begin the next phase if it is time."""
        self._move_on()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """The same where a run goes on from its last batch, which skips the start of the epoch, or counts steps."""
        if batch_idx == 0 or self._clock.table.unit == "step":
            self._move_on()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop where phases that count steps had theirs."""
        if self._clock.table.unit == "step" and self._clock.finished(self.current_epoch, self.global_step):
            self.trainer.should_stop = True

    def on_train_epoch_end(self) -> None:
        """Stop where earlier phases ended before their time and the last one had its own."""
        if self._clock.table.unit == "epoch" and self._clock.finished(self.current_epoch + 1, self.global_step):
            self.trainer.should_stop = True

    def _move_on(self) -> None:
        if not self._clock.advance(self.current_epoch, self.global_step):
            return
        self._tell()
        for parameter in self.parameters():
            parameter.grad = None
        self.freeze_phase()
        self._hold_backbone()
        rewrap(self.trainer, self)
        self.trainer.strategy.setup_optimizers(self.trainer)

    def _tell(self) -> None:
        length, unit = self._clock.length, self._clock.table.unit
        lasts = "until it is ended" if length is None else f"for {length} {unit}{'' if length == 1 else 's'}"
        rank_zero_info(f"Phase {self.phase_index + 1}/{len(self.phases)} trains {self.phase.train!r} {lasts}")

    # A backbone that stands still

    def _hold_backbone(self) -> None:
        """Keep the backbone in evaluation mode in phases that train heads, and give its modes back in others."""
        if self.phase.train != "heads":
            self._release_backbone()
        elif self._modes is None:
            self._modes = [(module, module.training) for module in self.network.backbone.modules()]
            self.network.backbone.eval()

    def _release_backbone(self) -> None:
        for module, mode in self._modes or ():
            module.training = mode
        self._modes = None

    def train(self, mode: bool = True) -> PhasedModule:
        """Set the mode, except that of a backbone that stands still: its BatchNorm statistics must not move."""
        super().train(mode)
        if mode and self._modes is not None:
            self.network.backbone.eval()
        return self

    def teardown(self, stage: str) -> None:
        """Give back what was frozen."""
        if stage == "fit":
            self._thaw()

    def _thaw(self) -> None:
        if self._trainable is None:
            return
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in self._trainable)
        self._trainable = None
        self._release_backbone()
        trainer: Any = self.trainer
        # another list: the trainer may be going through this one
        trainer.callbacks = [one for one in trainer.callbacks if not isinstance(one, _ThawOnException)]


class _ThawOnException(L.Callback):
    """Gives back what was frozen where Lightning does not call ``teardown``; in the trainer only while it fits."""

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        assert isinstance(pl_module, PhasedModule)
        pl_module._thaw()
