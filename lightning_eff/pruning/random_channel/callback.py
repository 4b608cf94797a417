"""Prune to the best of many random channel configurations (random channel pruning, arXiv 2205.05676).

Every candidate is cut on trial, its remaining weights are corrected by least squares, and the module's own validation
judges it; nothing is trained until the best one is cut for good. Candidate 0 is the uniform configuration.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_eff.arguments import check_number, check_whole
from lightning_eff.batch import LossFunction, SplitBatch
from lightning_eff.documents import whole_state
from lightning_eff.pruning.borrowing import borrowed
from lightning_eff.pruning.callback import StructuredPruningCallback
from lightning_eff.pruning.criteria import Criterion, importance, needs
from lightning_eff.pruning.decision import Decision
from lightning_eff.pruning.memory import function_bytes
from lightning_eff.pruning.random_channel.candidates import Candidates
from lightning_eff.pruning.random_channel.sampling import sample_configs
from lightning_eff.pruning.random_channel.search import Processes, SearchResult, random_search
from lightning_eff.pruning.repair import Repair
from lightning_eff.pruning.report import Scores
from lightning_eff.pruning.settings import Allocation, Calibration, Layers, Schedule, check_choices, is_count_or_share
from lightning_eff.pruning.trainer_data import NO_VALIDATION, TrainerData, silent_loggers
from lightning_eff.pruning.training_loss import check_training_step, scoring_autocast, training_loss
from lightning_eff.pruning.validation import LossScore, ValidationScore
from lightning_eff.pruning.values import Value
from lightning_eff.surgery import ChannelGraph
from lightning_eff.surgery.state import untouched_generators


@dataclass(frozen=True)
class Search:
    """Which configurations are tried and how they are judged.

    Attributes:
        candidates: number of configurations, >= 1, the uniform one among them.
        sampler: ``"power"``, ``"rejection"``, ``"uniform"``, or a list of configurations (channels kept by layer),
            which are tried whatever they cost; see :func:`sample_configs`.
        min_ratio: smallest keep ratio drawn, in (0, 1).
        tolerance: largest distance from the budget as a fraction of the dense cost, > 0.
        top_k: candidates that are repaired and judged once more, on the whole validation set; 0 for none.
        score_batches: validation batches that all candidates are judged on: a number, or a fraction of them. Of
            several validation loaders the first counts.
        monitor: name that ``validation_step`` logs; None judges by the loss of ``training_step``.
        mode: whether the ``"min"`` or the ``"max"`` of it is best.
        on_error: ``"skip"`` goes on where a candidate's repair or evaluation fails, and tells so in the report.
    """

    candidates: int = 100
    sampler: Literal["power", "rejection", "uniform"] | list[dict[str, int]] = "power"
    min_ratio: float = 0.1
    tolerance: float = 0.01
    top_k: int = 5
    score_batches: int | float = 10
    monitor: str | None = None
    mode: Literal["min", "max"] = "min"
    on_error: Literal["raise", "skip"] = "raise"

    def __post_init__(self) -> None:
        """Check choices and ranges."""
        check_choices(self)
        if isinstance(self.sampler, str) and self.sampler not in ("power", "rejection", "uniform"):
            raise ValueError(
                f"sampler must be one of power, rejection, uniform, or a list of configurations, got {self.sampler!r}"
            )
        for name, least in (("candidates", 1), ("top_k", 0)):
            check_whole(name, getattr(self, name), least)
        check_number("min_ratio", self.min_ratio, above=0, below=1)
        check_number("tolerance", self.tolerance, above=0)
        if not is_count_or_share(self.score_batches):
            raise ValueError(f"score_batches must be an int >= 1 or a fraction in (0, 1], got {self.score_batches!r}")
        if self.monitor is None and self.mode == "max":
            raise ValueError(
                'mode="max" needs monitor, the name of what is best when large: the loss is best when small'
            )


class RandomChannelPruningCallback(StructuredPruningCallback):
    """Try many random channel configurations without training, keep the best, and train on.

    Args:
        amount: fraction **removed** in [0, 1) of the multiply-adds (or of what ``allocation.target`` says).
        allocation: ``target`` is ``"macs"`` or ``"params"``; ``min_keep``, ``max_ratio``, ``round_to`` bound every
            candidate. How much each layer keeps is what the search finds, so ``mode`` plays no part.
        search: which configurations are tried and how they are judged.
        criterion: which channels of a layer stay: ``"l1"``, ``"random"``, ``"taylor"``, ``"kl_fisher"``, ``"shapley"``,
            ``"dirichlet"`` ... (see :mod:`lightning_eff.pruning.criteria`) or a callable.
        schedule: when; with several steps each searches anew, from the network that the last one left.
        layers: which layers may be pruned.
        calibration: data for the criterion and for the repair; the training loader by default.
        split_batch: ``batch -> (inputs, target)``, for batches of another form, e.g. ``BatchKeys("image", "label")``.
        loss_fn: ``(model, batch) -> loss``, the mean over the batch, where ``training_step`` cannot serve.
        value: what the network is worth on a sample, for the report; None takes ``search.monitor``, and the accuracy
            where there is none.
        repair: how the remaining weights are corrected, of candidates and of what is kept.
        plan: path of a plan to follow instead of searching.
        dirpath: where candidates (``candidates.csv``), figures, plan, report and the final weights are written. A
            search that was interrupted goes on from what lies in ``scores/`` until the step is done.
        seed: of everything random; the global generators are never touched.
        verbose: print progress and the report.

    Also logs ``pruning/best_score``, ``pruning/median_score`` and ``pruning/dense_score`` (of ``search.monitor``, or
    the loss), ``pruning/reconstruction_error`` and ``pruning/candidates_per_second`` of a search.

    After the search, ``search`` holds the candidates of the last step, and the plan and weights of the best one; in a
    resumed run that does not search again the candidates only.

    Raises:
        ValueError: a setting lies outside its range, or does not go with a search.
    """

    technique = "random"
    default_source = "train"

    def __init__(
        self,
        amount: float = 0.5,
        *,
        allocation: Allocation = Allocation(target="macs"),  # noqa: B008 (frozen)
        search: Search = Search(),
        criterion: str | Criterion = "l1",
        schedule: Schedule = Schedule(),  # noqa: B008
        layers: Layers = Layers(),  # noqa: B008
        calibration: Calibration = Calibration(samples=512),  # noqa: B008
        split_batch: SplitBatch | None = None,
        loss_fn: LossFunction | None = None,
        value: Value | None = None,
        repair: Repair = Repair(),  # noqa: B008
        plan: str | Path | None = None,
        dirpath: str | Path | None = None,
        seed: int = 0,
        verbose: bool = True,
    ) -> None:
        _check(amount, allocation, schedule, search)
        needs(criterion)  # an unknown name is told now
        super().__init__(
            amount,
            allocation=allocation,
            schedule=schedule,
            layers=layers,
            calibration=calibration,
            split_batch=split_batch,
            value="accuracy" if value is None else value,
            repair=repair,
            plan=plan,
            dirpath=dirpath,
            seed=seed,
            verbose=verbose,
        )
        self.settings = search
        self.criterion = criterion
        self.loss_fn = loss_fn
        self._reports_monitor = value is None and search.monitor is not None
        if self._reports_monitor:
            self.value_name = str(search.monitor)

    def _reset(self) -> None:
        super()._reset()
        self.search: SearchResult | Candidates | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse training steps that do not say what the loss is where it is needed, before any work."""
        super().setup(trainer, pl_module, stage)
        asks_loss = self.settings.monitor is None or needs(self.criterion).loss
        if stage == "fit" and asks_loss and self.loss_fn is None and self.given_plan is None:
            searched = "; or search by what validation logs, Search(monitor=...)"
            check_training_step(pl_module, "" if needs(self.criterion).loss else searched)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As the base; also draw the configurations of the last step, and ask validation for the monitored name."""
        super().on_train_start(trainer, pl_module)
        if self._graph is None or self.given_plan is not None or self._steps_done >= self.schedule.steps:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of too few configurations: the search itself will say so
            self._draw(self._graph, self.schedule.steps - 1, 2)
        if isinstance(self.criterion, str) and not any(needs(self.criterion)):
            importance(self._model(pl_module), self._graph, self.criterion)
        if self.settings.monitor is not None and not self._reports_monitor:  # else the base has asked
            with untouched_generators(), silent_loggers(trainer):
                self._validation(trainer, pl_module, self._data(trainer, pl_module).whole_validation(1))()

    def decide(self, trainer: Trainer, pl_module: LightningModule, graph: ChannelGraph, step: int) -> Decision:
        """Search; the best candidate's plan and its corrected weights."""
        data = self._data(trainer, pl_module)
        repair = self.repair or Repair(update="none", bn_samples=0)
        samples = max(self.calibration.samples, repair.samples, repair.bn_samples)
        with borrowed(pl_module):
            _take_buffers_of_the_first(trainer, pl_module)
            found = random_search(
                self._model(pl_module),
                graph,
                batches=data.shared(samples),
                score_fn=self._score(trainer, pl_module, data, self.settings.score_batches),
                final_score_fn=self._score(trainer, pl_module, data, None),
                mode=self.settings.mode,
                configs=self._draw(graph, step, self.settings.candidates),
                criterion=self.criterion,
                loss_fn=self._loss(trainer, pl_module),
                repair=repair,
                top_k=self.settings.top_k,
                on_error=self.settings.on_error,
                split_batch=self.split_batch,
                seed=self.seed + step,
                progress=self.verbose and trainer.is_global_zero,
                journal=Path(self.dirpath or "") / "scores" / f"step{step}-search.csv" if self._can_go_on else None,
                processes=_processes(trainer),
            )
        found.score_name = self.settings.monitor or "loss"
        self.search = found
        if self.dirpath is not None and trainer.is_global_zero:
            found.table("candidates").save(self.dirpath / "candidates.csv")
        for note in found.notes:
            self._record.note(note)
        scores = {name: Scores(values.double()) for name, values in found.scores.items() if name in found.plan.keep}
        return Decision(found.plan, scores, found.state)

    @property
    def _can_go_on(self) -> bool:
        """Whether a search that breaks off could be told from another one by its files."""
        known = all(function_bytes(part) is not None for part in (self.loss_fn, self.criterion))
        return self.dirpath is not None and known

    def _draw(self, graph: ChannelGraph, step: int, number: int) -> Tensor:
        """Configurations ``[n, G]`` of a step, the same on every process."""
        assert isinstance(self.amount, int | float)
        return sample_configs(
            graph,
            number,
            self.schedule.amount(step, self.amount),
            target=self.allocation.target,  # type: ignore[arg-type]
            sampler=self.settings.sampler,
            min_ratio=self.settings.min_ratio,
            tolerance=self.settings.tolerance,
            allocation=self.allocation,
            dense=self._record.dense,
            seed=self.seed + step,
        )

    def _score(
        self, trainer: Trainer, pl_module: LightningModule, data: TrainerData, most: int | float | None
    ) -> Callable[[nn.Module], float]:
        batches = data.whole_validation(most)
        if self.settings.monitor is not None:
            return self._validation(trainer, pl_module, batches)
        return LossScore(self._loss(trainer, pl_module), batches, function_bytes(self.loss_fn))

    def _validation(self, trainer: Trainer, pl_module: LightningModule, batches: Sequence[Any]) -> ValidationScore:
        if NO_VALIDATION in self._record.notes:
            raise ValueError(f"monitor={self.settings.monitor!r} needs a validation loader: leave it None, or give one")
        monitor = self.settings.monitor
        assert monitor is not None
        return ValidationScore(pl_module, monitor, batches, trainer.precision_plugin.forward_context)

    def _measured(self, trainer: Trainer, pl_module: LightningModule, most: int | None = None) -> float:
        if not self._reports_monitor:
            return super()._measured(trainer, pl_module, most)
        batches = self._data(trainer, pl_module).whole_validation(most)
        with silent_loggers(trainer), borrowed(pl_module):
            _take_buffers_of_the_first(trainer, pl_module)
            return self._validation(trainer, pl_module, batches)()

    def _loaders(self, data: TrainerData) -> list[Any]:
        return [data.loader(), *([] if self.given_plan is not None else [data.loader("val")])]

    @property
    def _measured_on(self) -> str:
        return "the whole validation set" if self._reports_monitor else super()._measured_on

    def _loss(self, trainer: Trainer, pl_module: LightningModule) -> LossFunction:
        """The loss of a batch under the Trainer's precision, with the same random numbers for every network."""
        autocast = scoring_autocast(trainer)
        own = self.loss_fn
        step = None if own is not None else training_loss(pl_module)

        def loss(model: nn.Module, batch: Any) -> Any:
            with autocast():
                return own(model, batch) if own is not None else step(batch, 0)  # type: ignore[misc]

        return loss

    def _finish_report(self, trainer: Trainer) -> None:
        super()._finish_report(trainer)
        if self.search is None or not trainer.is_global_zero:
            return
        if self.verbose:
            self.search.print()
        if self.dirpath is not None:
            self.search.write(self.dirpath)

    def _log(self, pl_module: LightningModule) -> None:
        super()._log(pl_module)
        if self.search is not None:
            values = {f"pruning/{name}": value for name, value in self.search.quantities().items()}
            pl_module.log_dict(values, on_step=False, on_epoch=True, sync_dist=True)

    def state_dict(self) -> dict[str, Any]:
        """Add the candidates of the last step."""
        return {**super().state_dict(), "search": None if self.search is None else self.search.to_dict()}

    @whole_state
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what :meth:`state_dict` wrote."""
        super().load_state_dict(state_dict)
        self.search = None if state_dict["search"] is None else Candidates.from_dict(state_dict["search"])


def _check(amount: Any, allocation: Allocation, schedule: Schedule, search: Search) -> None:
    if isinstance(amount, dict):
        raise ValueError("the search finds the counts of every layer: give a fraction, or Search(sampler=[counts])")
    if allocation.target == "channels":
        raise ValueError('allocation.target must be "macs" or "params", what configurations are drawn for')
    if allocation.mode != "uniform":
        raise ValueError(f"the search shares the amount out, so allocation.mode={allocation.mode!r} has no use")
    if schedule.physical != "immediate":
        raise ValueError(f'a search needs schedule.physical="immediate", got {schedule.physical!r}')
    if schedule.steps > 1 and not isinstance(search.sampler, str):
        raise ValueError("a list of configurations is of the whole network: it goes with schedule.steps=1 only")


def _take_buffers_of_the_first(trainer: Trainer, pl_module: LightningModule) -> None:
    """Norm statistics are each process's own in training; all must judge the same network."""
    if trainer.world_size > 1:
        for buffer in pl_module.buffers():
            torch.distributed.broadcast(buffer.data, 0)


def _processes(trainer: Trainer) -> Processes:
    def gather(value: Any) -> list[Any]:
        parts: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(parts, value)
        return parts

    if trainer.world_size == 1:
        return Processes()
    return Processes(trainer.global_rank, trainer.world_size, gather)
