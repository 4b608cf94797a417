"""What comes at the end of training and test: thresholds for a budget, and a folder that tells how exits are used."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_eff.documents import parsed, whole_state
from lightning_eff.early_exit.calibration import Calibration, Method, calibrate, fit_temperatures
from lightning_eff.early_exit.calibration.calibrate import check_goal, check_method
from lightning_eff.early_exit.callbacks import PhaseEarlyStopping
from lightning_eff.early_exit.evaluation.answers import ExitUse, record_answers
from lightning_eff.early_exit.evaluation.curve import BUDGETS, EarlyExitCurve, Record, check_budgets
from lightning_eff.early_exit.evaluation.recording import (
    Data,
    Loaders,
    all_outputs,
    exits_of,
    gathered,
    has_validation,
    loaders_of,
)
from lightning_eff.early_exit.module import EarlyExitModule
from lightning_eff.reporting import results_folder

# at the end of training
CHANGE_WEIGHTS = (PhaseEarlyStopping, StochasticWeightAveraging, WeightAveraging)


class ThresholdCalibration(Callback):
    """Set the thresholds of an :class:`EarlyExitModule` at the end of a fit, on its validation data.

    All processes end with the same thresholds. Checkpoints that are written during the fit, by ``ModelCheckpoint`` too,
    hold the thresholds from before it: give ``dirpath`` for one that holds what was found. Where a test or prediction
    begins with all exits disabled or with the thresholds from before the fit, thresholds are looked for once more, on
    the validation data of the fit before or of the datamodule; others are left as somebody has set them. Samples that a
    sampler repeats, to give all processes equally many, count as often. Put it behind callbacks that change weights at
    the end of training.

    Args:
        budget: mean cost of a sample, as a fraction of the plain backbone's, > 0.
        target_accuracy: share of right answers to keep, in [0, 1].
        max_drop: share of right answers that may be lost against the backbone's own output, in [0, 1].
        method: see :func:`~lightning_eff.early_exit.calibrate`.
        temperature: whether a temperature is fitted for each output first, on the same data.
        min_exit_samples: an exit takes none or at least that many samples, >= 0.
        dirpath: where ``calibrated.ckpt`` is written at the end of a fit, final weights and thresholds without the
            state of the training, for ``load_from_checkpoint``; None writes nothing.

    Attributes:
        calibration: what was found, None before.

    Raises:
        ValueError: not exactly one goal, or a value out of its range; at the start of a fit, a module without exits, no
            validation data, or a callback that would change weights later; at its end, fewer than two samples or
            samples of one class alone, and nothing has changed then.
    """

    def __init__(
        self,
        budget: float | None = None,
        target_accuracy: float | None = None,
        max_drop: float | None = None,
        method: Method = "lagrangian",
        temperature: bool = False,
        min_exit_samples: int = 0,
        dirpath: str | Path | None = None,
    ) -> None:
        check_goal(budget, target_accuracy, max_drop)
        check_budgets([] if budget is None else [budget])
        check_method(method, min_exit_samples)
        self.goal = {"budget": budget, "target_accuracy": target_accuracy, "max_drop": max_drop}
        self.method, self.temperature, self.min_exit_samples = method, temperature, min_exit_samples
        self.dirpath = None if dirpath is None else Path(dirpath)
        self.calibration: Calibration | None = None
        self._before: list[float] | None = None  # thresholds, as scores, from before the fit
        self._loaders: Loaders = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what could not be calibrated, before training."""
        module = exits_of(pl_module, type(self).__name__)
        if not has_validation(trainer):
            raise ValueError(
                f"{type(self).__name__} needs validation data: give the trainer a validation loader, and no "
                "limit_val_batches=0"
            )
        _must_be_last(trainer, self, CHANGE_WEIGHTS)
        self.calibration, self._before = None, module.network.score_thresholds.tolist()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find and set thresholds."""
        self._loaders = loaders_of(trainer, "val")
        self._calibrate(trainer, exits_of(pl_module, type(self).__name__))
        if self.dirpath is not None:
            trainer.save_checkpoint(self.dirpath / "calibrated.ckpt", weights_only=True)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find thresholds where the weights came without any, or with those from before the fit."""
        module = exits_of(pl_module, type(self).__name__)
        now = module.network.score_thresholds.tolist()
        found = self.calibration is not None and now == torch.tensor(self.calibration.thresholds).tolist()
        if found:
            return
        if min(now, default=math.inf) < math.inf and now != self._before:
            rank_zero_info(f"{type(self).__name__} keeps the thresholds that are set; without any it looks anew")
            return
        self._loaders = self._loaders or loaders_of(trainer, "val")
        if self._loaders:
            self._calibrate(trainer, module)
        else:
            rank_zero_warn(
                f"all exits are disabled, or as they were before the fit, and {type(self).__name__} has no validation "
                "data to calibrate them on: fit before, give a datamodule, or test a checkpoint that was saved after "
                "the fit"
            )

    on_predict_start = on_test_start

    def state_dict(self) -> dict[str, Any]:
        """What was found, plain Python."""
        found = None if self.calibration is None else self.calibration.to_dict()
        return {"calibration": found, "before": self._before}

    @whole_state
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what :meth:`state_dict` wrote."""
        found = state_dict["calibration"]
        self.calibration = None if found is None else Calibration.from_dict(found)
        self._before = state_dict.get("before")

    def _calibrate(self, trainer: Trainer, module: EarlyExitModule) -> None:
        network = module.network
        temperatures, record = self._record(trainer, module)
        target = record.target
        if len(target) < 2 or bool((target == target[0]).all()):
            raise ValueError(
                f"{type(self).__name__} needs validation samples of two classes or more, got {len(target)} of class "
                f"{target[0].item()}; thresholds are left as they were"
            )
        with warnings.catch_warnings():
            if not trainer.is_global_zero:
                warnings.simplefilter("ignore")
            found = calibrate(
                record.scores,
                record.correct,
                network.costs.fractions(),
                **self.goal,
                method=self.method,
                min_exit_samples=self.min_exit_samples,
            )
        thresholds = list(found.thresholds)
        if network.policy.remembers:
            # a disabled exit would change what later ones say: it stays on, out of reach
            beyond = math.ceil(record.scores[record.scores.isfinite()].max().item()) + 1.0
            thresholds = [min(limit, beyond) for limit in thresholds]
        fractions = network.costs.fractions([limit < math.inf for limit in thresholds])
        cost = math.fsum(rate * spent for rate, spent in zip(found.exit_rate, fractions, strict=True))
        found = replace(found, thresholds=tuple(thresholds), cost=cost)
        found = Calibration.from_dict(trainer.strategy.broadcast(found.to_dict()))
        temperatures = trainer.strategy.broadcast(temperatures)
        # outside of inference mode, which does not count changes, and the network looks at their number
        with torch.inference_mode(False), torch.no_grad():
            network.score_thresholds.copy_(torch.tensor(found.thresholds))
            network.temperatures.copy_(torch.tensor(temperatures))
        self.calibration = found
        self._tell(module)

    def _record(self, trainer: Trainer, module: EarlyExitModule) -> tuple[list[float], Record]:
        """Temperatures, and scores and predictions of all processes."""
        network = module.network
        curve = EarlyExitCurve(network.costs.fractions(), policy=network.policy).to(module.device)
        temperatures = network.temperatures
        kept: list[tuple[list[Tensor], Tensor]] = []
        with all_outputs(trainer, module, self._loaders, "val") as batches:
            for _, target, logits in batches:
                if self.temperature:
                    kept.append(([output.float() for output in logits], target))
                else:
                    curve.update(logits, target, temperatures)
        if self.temperature:
            none = torch.empty(0, network.num_classes, device=module.device)
            logits = [gathered(torch.cat([none, *(batch[k] for batch, _ in kept)])) for k in range(network.num_outputs)]
            labels = torch.empty(0, dtype=torch.int64, device=module.device)
            target = gathered(torch.cat([labels, *(target for _, target in kept)]))
            if len(target):
                temperatures = fit_temperatures(logits, target).to(module.device)
                curve.update(logits, target, temperatures)
            curve.sync_on_compute = False  # all processes have all samples
            return temperatures.tolist(), curve.recorded()
        with curve.sync_context():
            return temperatures.tolist(), curve.recorded()

    def _tell(self, module: EarlyExitModule) -> None:
        assert self.calibration is not None
        limits = ["off" if limit is None else f"{limit:.4g}" for limit in module.network.thresholds]
        rank_zero_info(
            f"{type(self).__name__}: thresholds {', '.join(limits)} ({module.network.policy.name}) keep "
            f"{self.calibration.accuracy:.2%} of the validation samples right at {self.calibration.cost:.1%} of the "
            "backbone's cost"
        )


class ExitReport(Callback):
    """Write how exits are used into a folder: ``val`` in it at the end of a fit, ``test`` at the end of a test.

    Each holds ``curve.json``, ``thresholds.json``, the tables ``outputs`` and ``budgets``, ``exits`` (sample, exit,
    confidence, prediction) as CSV and JSON, and figures: ``curve.png``, ``exits.png``, ``reliability.png``,
    ``samples.png`` where inputs are images, and ``history.png`` after a fit. The data are read once more for it. Put it
    behind :class:`ThresholdCalibration`.

    Args:
        dirpath: where; None takes the folder ``early_exit`` beside what the trainer logs.
        budgets: fractions of the plain backbone's cost that are told, > 0.
        verbose: print the tables too.

    Raises:
        ValueError: a budget out of range; at the start, a module without exits, or a place before callbacks that would
            change what was reported.
    """

    def __init__(
        self, dirpath: str | Path | None = None, budgets: Sequence[float] = BUDGETS, verbose: bool = True
    ) -> None:
        check_budgets(budgets)
        self.dirpath = None if dirpath is None else Path(dirpath)
        self.budgets, self.verbose = tuple(budgets), verbose
        self._history: list[dict[str, float]] = []
        self._phases: list[str] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what could not be reported, before training."""
        exits_of(pl_module, type(self).__name__)
        if not has_validation(trainer):
            rank_zero_warn(f"{type(self).__name__} reports on validation data, of which there is none")
        _must_be_last(trainer, self, (ThresholdCalibration, *CHANGE_WEIGHTS))
        if trainer.current_epoch == 0 and trainer.global_step == 0:
            self._history, self._phases = [], []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the accuracy of every output."""
        module = exits_of(pl_module, type(self).__name__)
        if trainer.sanity_checking or not module.is_fitting:
            return
        exits = range(0 if module.phase.train == "backbone" else module.network.num_exits)
        names = {**{f"exit{k}": f"exit {k}" for k in exits}, "final": "final"}
        logged = trainer.callback_metrics
        values = {label: f"val/accuracy_{name}" for name, label in names.items()}
        self._history.append({label: float(logged[name]) for label, name in values.items() if name in logged})
        self._phases.append(module.phase.train)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report on the validation data."""
        if has_validation(trainer):
            self._report(trainer, pl_module, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report on the test data."""
        self._report(trainer, pl_module, "test")

    def state_dict(self) -> dict[str, Any]:
        """The course of training so far."""
        return {"history": [dict(epoch) for epoch in self._history], "phases": list(self._phases)}

    @whole_state
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what :meth:`state_dict` wrote."""
        self._history = parsed(list[dict[str, Any]], state_dict["history"], "history")
        self._phases = list(state_dict["phases"])

    def _report(self, trainer: Trainer, pl_module: LightningModule, data: Data) -> None:
        module = exits_of(pl_module, type(self).__name__)
        answers = record_answers(trainer, module, data)
        folder = results_folder(self.dirpath, trainer, "early_exit") / data
        if trainer.is_global_zero:
            history, phases = (self._history, self._phases) if data == "val" else ((), ())
            use = ExitUse(answers, module.network, self.budgets, history, phases)
            use.save(folder)
            use.write(folder)
            if self.verbose:
                use.print()
            rank_zero_info(f"{type(self).__name__}: curve, thresholds, tables and figures are in {folder}")


def _must_be_last(trainer: Trainer, callback: Callback, others: tuple[type[Callback], ...]) -> None:
    """Raise ValueError if a callback that acts at the end of training stands behind."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for later in callbacks[callbacks.index(callback) + 1 :]:
        if isinstance(later, others):
            one, other = type(callback).__name__, type(later).__name__
            raise ValueError(
                f"{other} acts at the end of training, after {one} has looked at the network: put {one} behind {other} "
                "in the list of callbacks"
            )
