"""A finished run leaves its row in the CSV file that scaling laws are fitted to."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_eff import __version__
from lightning_eff.documents import parsed, whole_state
from lightning_eff.moe.module import MoEScalingModule
from lightning_eff.moe.scaling.laws import load_law
from lightning_eff.moe.scaling.runs import append_run, run_names
from lightning_eff.steps import planned_steps
from lightning_eff.surgery.in_trainer import cutters


class RunRecorder(Callback):
    """Write the row of a :class:`MoEScalingModule`'s run when it has come to its end.

    The row has :data:`RUN_COLUMNS`; ``loss`` is the mean training loss of the module's last ``loss_window`` steps,
    ``loss_val`` the last ``val/loss``. A run that was interrupted or that stopped before its last step leaves no row,
    since its learning rate has not come down; resumed, it leaves the one it would have left. A row of the same name is
    replaced. Seconds are those of training and validation, without those lost when a run was killed.

    With a law it logs, at the end, ``moe/predicted_loss`` and ``moe/loss_gap``: measured loss minus predicted.

    Args:
        path: CSV file; made if there is none, together with its folder.
        run_name: What the row is called; None names width, layers, experts and steps, so that runs that differ in
            something else need names.
        law: A law as :func:`load_law` takes it: ``"moe64"`` and so on, or a JSON file; None predicts nothing.

    Raises:
        ValueError: There is no such law; or, when a fit starts, the file is no table of runs or the module no
            :class:`MoEScalingModule`.
    """

    def __init__(self, path: str | Path, run_name: str | None = None, law: str | None = None) -> None:
        if run_name == "":
            raise ValueError("expected a run_name that is not empty; None makes one")
        self.path, self.run_name = Path(path), run_name
        self.law = None if law is None else load_law(law)
        self._reset()

    def _reset(self) -> None:
        self._loss_val: float | None = None
        self._seconds = 0.0
        self._began: float | None = None
        self._planned = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be recorded; what a checkpoint holds is loaded after this."""
        if stage != "fit":
            return
        if names := cutters(trainer):
            raise ValueError(
                f"{names[0]} changes the size of the network during the run, and RunRecorder's row tells one size that "
                "a law is fitted to: leave one of them out"
            )
        module = _module(pl_module)
        run_names(self.path)
        self._reset()
        rate = module.decoder.shape.expansion_rate
        if self.law is not None and self.law.expansion_rate not in (None, rate):
            rank_zero_warn(
                f"the law was fitted at expansion rate {self.law.expansion_rate:g} and has no term for it, but this "
                f"run has {rate:g}: the predicted loss is that of another network"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take note of time and of the steps to come."""
        self._began, self._planned = time.perf_counter(), planned_steps(trainer)
        before = _module(pl_module).tokens_seen
        if before and trainer.global_step == 0:
            rank_zero_warn(
                f"the module has been trained on {before:,} tokens before this fit, which count in n_tokens and "
                "flops, not in its steps: a law wants runs with one schedule each; make a new module to record this one"
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the last validation loss."""
        if not trainer.sanity_checking and "val/loss" in trainer.callback_metrics:
            self._loss_val = float(trainer.callback_metrics["val/loss"])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._seconds, self._began = self._elapsed(), None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the row, unless the run has stopped too early."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if trainer.global_step < self._planned < math.inf:
            rank_zero_warn(
                f"the run stopped after {trainer.global_step} of {self._planned:.0f} steps: {self.path} gets no row"
            )
            return
        if not _module(pl_module).tokens_seen:
            rank_zero_warn(
                f"{type(pl_module).__name__} has counted no tokens and no loss, which MoEScalingModule.training_step "
                f"does: {self.path} gets no row"
            )
            return
        row = self._row(trainer, _module(pl_module))
        if self.law is not None:
            predicted = self.law(row["n_total"], row["n_tokens"], row["granularity"])
            values = {"moe/predicted_loss": predicted, "moe/loss_gap": row["loss"] - predicted}
            trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
            for logger in trainer.loggers:
                logger.log_metrics(values, step=trainer.global_step)
            rank_zero_info(f"{row['run_name']}: loss {row['loss']:.4f}, predicted {predicted:.4f}")
        if trainer.is_global_zero:
            append_run(self.path, row)

    def state_dict(self) -> dict[str, Any]:
        """Seconds and validation loss so far."""
        return {"seconds": self._elapsed(), "loss_val": self._loss_val}

    @whole_state
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what :meth:`state_dict` wrote."""
        self._seconds = parsed(float, state_dict["seconds"], "seconds")
        self._loss_val = parsed(float | None, state_dict["loss_val"], "loss_val")

    def _elapsed(self) -> float:
        return self._seconds + (0.0 if self._began is None else time.perf_counter() - self._began)

    def _row(self, trainer: Trainer, module: MoEScalingModule) -> dict[str, Any]:
        shape, experts = module.decoder.shape, module.decoder.moe
        size = f"d{shape.d_model:g}-l{shape.n_layers:g}"
        network = "dense" if experts is None else f"e{shape.expansion_rate:g}-g{shape.granularity:g}"
        return {
            "run_name": self.run_name or f"{size}-{network}-{trainer.global_step}steps",
            "n_total": shape.n_total,
            "n_active": shape.n_active,
            "n_tokens": module.tokens_seen,
            "granularity": shape.granularity,
            "expansion_rate": shape.expansion_rate,
            "flops": module.flops_seen,
            "loss": module.smoothed_loss(),
            "loss_val": self._loss_val,
            "d_model": shape.d_model,
            "n_layers": shape.n_layers,
            "steps": trainer.global_step,
            "seconds": round(self._seconds, 3),
            "router": "dense" if experts is None else experts.router,
            "seed": os.environ.get("PL_GLOBAL_SEED"),
            "version": __version__,
        }


def _module(pl_module: LightningModule) -> MoEScalingModule:
    if not isinstance(pl_module, MoEScalingModule):
        raise ValueError(f"RunRecorder records runs of a MoEScalingModule, got a {type(pl_module).__name__}")
    return pl_module
