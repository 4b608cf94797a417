"""Prune the channels whose importance switches are smallest (Dirichlet pruning, arXiv 2011.05985).

The module's own training step is the likelihood. Scores are ``C * E[s_j]`` of a layer of ``C`` channels, so that 1 is
an average channel of any layer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_eff.batch import LossFunction, SplitBatch, call_model, take
from lightning_eff.documents import whole_state, write_text
from lightning_eff.pruning.borrowing import borrowed
from lightning_eff.pruning.callback import StructuredPruningCallback
from lightning_eff.pruning.dirichlet.data import Data, Likelihood
from lightning_eff.pruning.dirichlet.figures import feature_figure
from lightning_eff.pruning.dirichlet.memory import SwitchMemory
from lightning_eff.pruning.dirichlet.options import DirichletOptions
from lightning_eff.pruning.dirichlet.posterior import DirichletPosterior
from lightning_eff.pruning.dirichlet.report import SwitchReport
from lightning_eff.pruning.dirichlet.scoring import SwitchTraining
from lightning_eff.pruning.memory import fingerprint, function_bytes
from lightning_eff.pruning.repair import Repair
from lightning_eff.pruning.report import Scores
from lightning_eff.pruning.scoring import Scoring
from lightning_eff.pruning.settings import Allocation, Calibration, Layers, Schedule
from lightning_eff.pruning.trainer_data import silent_loggers
from lightning_eff.pruning.training_loss import check_training_step, scoring_autocast, training_loss
from lightning_eff.pruning.values import Value
from lightning_eff.reporting import Table, progress, save_figure
from lightning_eff.surgery.state import untouched_generators


class DirichletPruneCallback(StructuredPruningCallback):
    """Learn how much channels matter in one pass over the training data, remove those that matter least.

    Args:
        amount: fraction **removed** in [0, 1) of what ``allocation.target`` says; or per layer the channels (int) or
            fraction (float) **kept**.
        allocation: how the amount is shared out between layers. ``"global"`` compares shares, 1 being an average
            channel of its layer; ``"mass"`` keeps the same sum of expected switches everywhere.
        schedule: when channels are removed, in how many steps (each scores anew), cut or masked.
        layers: which layers may be pruned.
        calibration: whose batches train the switches, the training loader by default; ``samples`` does not count here,
            ``switches.max_batches`` does.
        split_batch: ``batch -> (inputs, target)``, for batches of another form, e.g. ``BatchKeys("image", "label")``.
        switches: how importance switches are trained.
        loss_fn: ``(model, batch) -> loss``, the mean over the batch, where ``training_step`` cannot serve.
        value: what the network is worth on a sample, for the report: ``"accuracy"``, ``"neg_loss"`` or a callable
            ``(outputs, target) -> [B]``, higher is better.
        repair: how the remaining weights are corrected after a cut; None leaves them.
        plan: path of a plan to follow instead of scoring.
        dirpath: where plan, report, figures, scores (``scores.json``, ``scores.csv``) and the final weights
            (``pruned.ckpt``) are written; None writes nothing. A scoring that was finished but not used, because the
            run broke off, is taken up from there.
        seed: of draws and shuffling; the global generators are never touched.
        verbose: print progress and the report.

    After scoring, ``posterior`` holds the :class:`DirichletPosterior` of every group that was scored.

    Raises:
        ValueError: a setting lies outside its range.
    """

    technique = "dirichlet"
    default_source = "train"
    whole_batches = True
    scores_per_cost = False

    def __init__(
        self,
        amount: float | dict[str, int | float] = 0.5,
        *,
        allocation: Allocation = Allocation(),  # noqa: B008 (frozen)
        schedule: Schedule = Schedule(),  # noqa: B008
        layers: Layers = Layers(),  # noqa: B008
        calibration: Calibration = Calibration(),  # noqa: B008
        split_batch: SplitBatch | None = None,
        switches: DirichletOptions = DirichletOptions(),  # noqa: B008
        loss_fn: LossFunction | None = None,
        value: Value = "accuracy",
        repair: Repair | None = None,
        plan: str | Path | None = None,
        dirpath: str | Path | None = None,
        seed: int = 0,
        verbose: bool = True,
    ) -> None:
        if allocation.mode == "budget":
            raise ValueError(
                'allocation.mode "budget" needs measured curves, which importance switches do not give: use "uniform", '
                '"global" or "mass"'
            )
        super().__init__(
            amount,
            allocation=allocation,
            schedule=schedule,
            layers=layers,
            calibration=calibration,
            split_batch=split_batch,
            value=value,
            repair=repair,
            plan=plan,
            dirpath=dirpath,
            seed=seed,
            verbose=verbose,
        )
        self.switches = switches
        self.loss_fn = loss_fn

    def _reset(self) -> None:
        super()._reset()
        self.posterior: dict[str, DirichletPosterior] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse training steps that do not say what the loss is, before any work."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self.loss_fn is None and self.given_plan is None:
            check_training_step(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As the base, and ask for the loss of one batch: what cannot work is told before training."""
        super().on_train_start(trainer, pl_module)
        if self._graph is None or self.given_plan is not None or self._steps_done >= self.schedule.steps:
            return
        data, model = self._data(trainer, pl_module), self._model(pl_module)
        likelihood = self._likelihood(trainer, pl_module, model)
        SwitchTraining(likelihood, self._graph, Data(data.batches, *data.extent()), self.switches)
        with untouched_generators(), silent_loggers(trainer), borrowed(pl_module), torch.no_grad():
            for batch in data.batches():
                likelihood.loss(batch, 0)
                break

    def score(self, scoring: Scoring) -> Mapping[str, Scores]:
        """Train the switches of every prunable group, from where an interrupted run left them."""
        trainer = scoring.trainer
        steps, size = scoring.data.extent()
        memory = self._memory(scoring)
        training = SwitchTraining(
            self._likelihood(trainer, scoring.pl_module, scoring.model),
            scoring.graph,
            Data(
                scoring.data.batches, steps, size, lambda values: scoring.data.sum(values).to(scoring.pl_module.device)
            ),
            self.switches,
            seed=scoring.seed + trainer.global_rank,
            warn=rank_zero_warn,
            keep=memory.keep,
        )
        stored = memory.stored()
        if stored is not None:
            training.load_state_dict(stored)
        try:
            with progress("importance switches", training.steps or 0, enabled=scoring.verbose, unit="batches") as bar:
                self.posterior = training.run(bar)
        finally:
            if self.dirpath is not None and trainer.is_global_zero:
                self._write(self.dirpath, training)
        if self.dirpath is not None and trainer.is_global_zero:
            self._draw_features(self.dirpath, scoring)
        return {name: Scores(posterior.relative.double()) for name, posterior in self.posterior.items()}

    def _memory(self, scoring: Scoring) -> SwitchMemory:
        """Switches on disk until the step is done; of one process whose loss can be told from another."""
        step = scoring.pl_module.training_step
        settings = (
            *self.fingerprint_settings(),
            self.layers,
            scoring.graph.sizes,
            scoring.graph.prunable,
            scoring.data.extent(),
            scoring.seed,
            getattr(getattr(step, "__code__", None), "co_code", b""),
        )
        keeps = self.dirpath is not None and scoring.trainer.world_size == 1
        folder = self.dirpath if keeps and function_bytes(self.loss_fn) is not None else None
        return SwitchMemory(folder, self._steps_done, fingerprint(scoring.pl_module, scoring.samples, settings))

    def _likelihood(self, trainer: Trainer, pl_module: LightningModule, model: nn.Module) -> Likelihood:
        loss_fn = self.loss_fn
        return Likelihood(
            model=model,
            loss=training_loss(pl_module) if loss_fn is None else lambda batch, number: loss_fn(model, batch),
            root=pl_module,
            forward=lambda: call_model(model, self._example),
            other=lambda: call_model(model, take(self._example, [-1, 0])),
            autocast=scoring_autocast(trainer),
        )

    def _write(self, dirpath: Path, training: SwitchTraining) -> None:
        """Switches as they are, for readers."""
        groups = {
            name: {"phi": one.concentration.tolist(), "mean": one.mean.tolist(), "rank": one.rank()}
            for name, one in training.posterior().items()
        }
        write_text(dirpath / "scores.json", json.dumps(groups))
        columns = ["batches", "layer", "loss", "kl", "phi_min", "phi_max", "phi_sum"]
        Table("Importance switches", columns, training.history).save(dirpath / "scores.csv")

    def _draw_features(self, dirpath: Path, scoring: Scoring) -> None:
        """What the first prunable layer makes of one image, while all of its channels are there."""
        name = scoring.graph.prunable[0]
        layer = scoring.model.get_submodule(name)
        if isinstance(layer, nn.Conv2d) and layer.out_channels == scoring.graph.groups[name].size:
            figure = feature_figure(scoring.model, name, self._example, self.posterior[name])
            save_figure(figure, dirpath / "features.png")

    def _finish_report(self, trainer: Trainer) -> None:
        super()._finish_report(trainer)
        if self.dirpath is None or not trainer.is_global_zero or not self.posterior:
            return
        kept = {name: self._record.scores[name][1] for name in self.posterior if name in self._record.scores}
        SwitchReport(self.posterior, kept).write(self.dirpath)

    def state_dict(self) -> dict[str, Any]:
        """Add the posteriors."""
        return {
            **super().state_dict(),
            "posterior": {name: one.concentration.tolist() for name, one in self.posterior.items()},
        }

    @whole_state
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what :meth:`state_dict` wrote."""
        super().load_state_dict(state_dict)
        self.posterior = {name: DirichletPosterior(torch.tensor(phi)) for name, phi in state_dict["posterior"].items()}

    def fingerprint_settings(self) -> tuple[Any, ...]:
        """Add how switches are trained and on what."""
        source = (self.calibration.source, type(self.calibration.loader).__name__)
        return (*super().fingerprint_settings(), self.amount, self.switches, function_bytes(self.loss_fn), source)
