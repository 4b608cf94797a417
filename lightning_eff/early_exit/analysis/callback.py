"""Gradient dominance over a training, recorded by a callback; the measure itself is in ``dominance.py``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast, get_args

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor

from lightning_eff.arguments import check_choice, check_whole
from lightning_eff.early_exit.analysis.dominance import (
    Dominance,
    DominanceHistory,
    Measure,
    check_weights,
    gradient_dominance,
)
from lightning_eff.early_exit.module import EarlyExitModule
from lightning_eff.reporting import results_folder


class GradientDominance(Callback):
    """Record which outputs pull the backbone, on the first batch of every n-th epoch and of every phase.

    Nothing is logged and training is not changed: the same weights come out of it. The cost is one forward and one
    backward pass an output each time. Values are those of the first process, on its batch.

    Args:
        every_n_epochs: n, >= 1.
        dirpath: where ``gradient_dominance`` is written, as CSV while it goes and with a figure at the end; None takes
            the folder ``early_exit`` beside what the trainer logs.
        measure: ``"share"``, ``"cosine"`` or ``"norm"``, see :func:`gradient_dominance`.
        groups: names of submodules of the backbone; by default its stages and all of it.
        weights: of the ``K`` losses; None takes those of the phase where it trains everything, and elsewhere all the
            same, for what the outputs would do to the backbone if they were let.

    Attributes:
        history: a dict each time, of plain Python: epoch, step, phase (its number, from 0), train (what it trains),
            groups, outputs and values ``[G][K]``. In checkpoints.

    Raises:
        ValueError: an argument outside its range.
    """

    def __init__(
        self,
        every_n_epochs: int = 1,
        dirpath: str | Path | None = None,
        *,
        measure: Measure = "share",
        groups: list[str] | None = None,
        weights: list[float] | None = None,
    ) -> None:
        check_whole("every_n_epochs", every_n_epochs)
        check_choice("measure", measure, get_args(Measure))
        self.every_n_epochs = every_n_epochs
        self.dirpath = None if dirpath is None else Path(dirpath)
        self.measure, self.groups, self.weights = measure, groups, weights
        self.history: list[dict[str, Any]] = []

    @property
    def state_key(self) -> str:
        """Apart for every measure, so that several can be in one Trainer."""
        return self._generate_state_key(measure=self.measure)

    @property
    def report(self) -> DominanceHistory:
        """What was measured so far, as table and figure."""
        return DominanceHistory(self.history, self.measure)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be measured, before any work.

        Raises:
            MisconfigurationException: another module, or a strategy that shards parameters.
            ValueError: weights that are not one an output, or cannot be meant.
        """
        if stage != "fit":
            return
        if not isinstance(pl_module, EarlyExitModule):
            raise MisconfigurationException(
                f"GradientDominance measures the outputs of an EarlyExitModule, got a {type(pl_module).__name__}"
            )
        if trainer.strategy.restore_checkpoint_after_setup:
            raise MisconfigurationException(
                f"{type(trainer.strategy).__name__} shards the parameters, whose gradients GradientDominance needs "
                'whole: use strategy="ddp" or one process'
            )
        if self.weights is not None:
            check_weights(self.weights, pl_module.network.num_outputs)
        if trainer.current_epoch == 0 and trainer.global_step == 0:
            self.history = []
        self._folder = results_folder(self.dirpath, trainer, "early_exit")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Measure if it is time."""
        module = cast(EarlyExitModule, pl_module)
        # the module begins a phase in this hook too where a run goes on from its last batch, but after callbacks
        EarlyExitModule.on_train_batch_start(module, batch, batch_idx)
        if not self._due(module):
            return
        # on every process, though one is kept: layers of a network may wait for each other
        inputs, target = module.split_batch(batch)
        precision = trainer.precision_plugin
        # float32 under autocast, where small gradients would vanish; what is half precision all through stays it
        if isinstance(precision, MixedPrecision):
            result = self._measure(module, inputs, target)
        else:
            with precision.forward_context():
                result = self._measure(module, inputs, target)
        self.history.append(
            {
                "epoch": module.current_epoch,
                "step": module.global_step,
                "phase": module.phase_index,
                "train": module.phase.train,
                "groups": list(result.groups),
                "outputs": list(result.outputs),
                "values": result.values.tolist(),
            }
        )
        if trainer.is_global_zero:
            self.report.table().save(self._folder / "gradient_dominance.csv")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw what was measured."""
        if trainer.is_global_zero and self.history:
            self.report.write(self._folder)

    def state_dict(self) -> dict[str, Any]:
        """What was measured so far."""
        return {"history": [dict(one) for one in self.history]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what :meth:`state_dict` wrote."""
        self.history = [dict(one) for one in state_dict["history"]]

    def _due(self, module: EarlyExitModule) -> bool:
        epoch, phase = module.current_epoch, module.phase_index
        new_epoch = epoch % self.every_n_epochs == 0 and all(one["epoch"] != epoch for one in self.history)
        return new_epoch or all(one["phase"] != phase for one in self.history)

    def _measure(self, module: EarlyExitModule, inputs: Any, target: Any) -> Dominance:
        def loss(logits: Tensor, target: Any) -> Tensor:
            return module.losses.each([logits], target)[0]

        return gradient_dominance(
            module.network,
            inputs,
            target,
            weights=self._weights(module),
            groups=self.groups,
            measure=self.measure,
            criterion=loss,
        )

    def _weights(self, module: EarlyExitModule) -> Sequence[float] | None:
        if self.weights is not None or module.phase.train != "all":
            return self.weights
        return module._weights(module.phase, module.phase_progress)
