"""What every pruning callback shares: when to prune, by how much, the cut, resume, and the report.

A new ranking rule subclasses :class:`StructuredPruningCallback` and writes ``score``.

The cut happens before an epoch, so a checkpoint at an epoch's end is of one piece. Lightning restores weights before it
restores callbacks; the shapes of a checkpoint are therefore taken on by the module class (``surgery.prunable``), and
this file only remembers which steps are done.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_eff.arguments import check_whole, plain
from lightning_eff.batch import SplitBatch, take
from lightning_eff.documents import parsed, whole_state
from lightning_eff.pruning.allocation import Dense
from lightning_eff.pruning.decision import Counts, Decision, best_channels
from lightning_eff.pruning.masking import Masks, zero_readers
from lightning_eff.pruning.memory import ScoreMemory, fingerprint, forget, function_bytes
from lightning_eff.pruning.neighbours import (
    refuse_averaging_behind,
    refuse_module,
    refuse_private_data,
    refuse_same_layers,
    tell_strategy,
)
from lightning_eff.pruning.record import Record
from lightning_eff.pruning.repair import Repair, repair
from lightning_eff.pruning.report import PruneReport, Scores, Stage
from lightning_eff.pruning.samples import Samples
from lightning_eff.pruning.scoring import Scoring
from lightning_eff.pruning.settings import Allocation, Calibration, Layers, Schedule, check_amount
from lightning_eff.pruning.trainer_data import NO_VALIDATION, TrainerData, silent_loggers
from lightning_eff.pruning.values import Value, value_function
from lightning_eff.surgery import ChannelGraph, PruningPlan, Trial, measure_latency, prunable
from lightning_eff.surgery.in_trainer import apply_plan_in_trainer, load_in_trainer, refuse_unsupported
from lightning_eff.surgery.state import untouched_generators
from lightning_eff.surgery.structure import averaged_models, is_prunable, structure_of, unprunable


class StructuredPruningCallback(Callback):
    """Base of the pruning callbacks; subclasses write :meth:`score`.

    Args:
        amount: fraction **removed** in [0, 1) of what ``allocation.target`` says; or per layer the channels (int) or
            fraction (float) **kept**.
        allocation: how the amount is shared out between layers.
        schedule: when channels are removed, in how many steps, cut or masked.
        layers: which layers may be pruned.
        calibration: the data that channels are judged on.
        split_batch: ``batch -> (inputs, target)``, for batches of another form, e.g. ``BatchKeys("image", "label")``.
        value: what the network is worth on a sample: ``"accuracy"``, ``"neg_loss"`` or a callable ``(outputs, target)
            -> [B]``, higher is better.
        repair: how the remaining weights are corrected after a cut; None leaves them.
        plan: path of a plan to follow instead of scoring.
        dirpath: where plan, report, figure, the final weights (``pruned.ckpt``) and unfinished scores are written; None
            writes nothing.
        seed: of everything random in the scoring; the global generators are never touched.
        verbose: print progress and the report.

    Logs after every step ``pruning/macs`` (of one sample) and ``pruning/params`` of the network that is left,
    ``pruning/macs_ratio`` and ``pruning/params_ratio`` (parts of the dense network's), ``pruning/value_before`` and
    ``pruning/value_after``.

    After ``fit``: ``report`` (tables and figure) and ``plan`` (kept channels of the original network).
    """

    technique = "prune"  # what plans and files say of where they come from

    def __init__(
        self,
        amount: float | dict[str, int | float] = 0.5,
        *,
        allocation: Allocation = Allocation(),  # noqa: B008 (frozen)
        schedule: Schedule = Schedule(),  # noqa: B008
        layers: Layers = Layers(),  # noqa: B008
        calibration: Calibration = Calibration(),  # noqa: B008
        split_batch: SplitBatch | None = None,
        value: Value = "accuracy",
        repair: Repair | None = None,
        plan: str | Path | None = None,
        dirpath: str | Path | None = None,
        seed: int = 0,
        verbose: bool = True,
    ) -> None:
        amount = plain(amount)
        check_amount(amount)
        check_whole("seed", seed, 0)
        if isinstance(amount, float) and allocation.target == "channels" and amount > allocation.max_ratio:
            raise ValueError(f"amount {amount} (fraction removed) is above allocation.max_ratio {allocation.max_ratio}")
        if plan is not None and schedule.steps != 1:
            raise ValueError(f"a given plan is applied in one step, got schedule.steps={schedule.steps}")
        if repair is not None and schedule.physical != "immediate":
            raise ValueError(
                f'repair corrects what a cut leaves: it needs physical="immediate", got {schedule.physical!r}'
            )
        self._counts = Counts(amount, allocation, schedule, self.scores_per_cost)
        self.amount = amount
        self.allocation = allocation
        self.schedule = schedule
        self.layers = layers
        self.split_batch = split_batch
        self.calibration = replace(calibration, source=calibration.source or self.default_source)
        self.value = value_function(value)
        self.value_name = value if isinstance(value, str) else getattr(value, "__name__", type(value).__name__)
        self.repair = repair
        self.given_plan = None if plan is None else PruningPlan.load(plan)
        self.dirpath = None if dirpath is None else Path(dirpath)
        self.seed = int(seed)
        self.verbose = verbose
        self._made_prunable: type | None = None
        self._reset()

    def _reset(self) -> None:
        self.plan: PruningPlan | None = None
        self.report: PruneReport | None = None
        self._steps_done = 0
        self._finished = False
        self._record = Record()
        self._protected: dict[str, str] | None = None
        self._epoch_begun: int | None = None
        self._masks = Masks()
        self._graph: ChannelGraph | None = None
        self._example: Any = None

    default_source: Literal["val", "train"] = "val"  # of calibration data
    calibration_groups: int | None = 1  # rules that give groups of samples coalitions of their own say so
    whole_batches = False  # rules that take the loader's batches as they are, not calibration.samples samples
    scores_per_cost = True  # False where scores say what part of its layer a channel is, not what the network loses

    def score(self, scoring: Scoring) -> Mapping[str, Scores]:
        """Return scores for every group in ``scoring.graph.prunable`` that may lose channels."""
        raise TypeError(f"{type(self).__name__} must write score, or decide")

    # Lightning hooks

    @property
    def cuts_channels(self) -> bool:
        """Whether tensors will become smaller, which others in the Trainer may have to know."""
        return self.schedule.physical != "never"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, and let checkpoints of this module carry their shapes."""
        refuse_unsupported(trainer)
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if stage == "fit":
            refuse_module(self, pl_module)
            refuse_same_layers(self, [one for one in callbacks if isinstance(one, StructuredPruningCallback)])
        refuse_averaging_behind(self, callbacks)
        if stage == "fit" and structure_of(pl_module) is None:
            self._reset()  # another network than the one this callback pruned before
        if self.layers.submodule:
            pl_module.get_submodule(self.layers.submodule)
        if not is_prunable(type(pl_module)):
            prunable(type(pl_module))
            self._made_prunable = type(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take gates away; a class none of whose instances was cut gets its own hooks back."""
        self._masks.close()
        self._graph = None
        if self._made_prunable is not None and structure_of(pl_module) is None:
            unprunable(self._made_prunable)
        self._made_prunable = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind; Lightning does not call ``teardown`` after an exception."""
        self.teardown(trainer, pl_module, "fit")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mask again what a resumed run had masked."""
        if not self._finished:
            self._masks.open(self._model(pl_module))

    on_validation_start = on_test_start = on_predict_start = on_fit_start

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Trace before training, so that what cannot work is told before hours are spent."""
        if self._steps_done < self.schedule.steps:
            with untouched_generators():
                refuse_private_data(self, trainer, self._loaders(self._data(trainer, pl_module)))
                graph = self._trace(trainer, pl_module)
                graph.refuse_nothing(type(pl_module).__name__)
                self._record.dense = self._record.dense or Dense.of(graph)
                if self.given_plan is None:
                    self._counts.before_scores(graph, self._record.dense, self.schedule.steps - 1)
                self._measured(trainer, pl_module, most=1)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the next step when its epoch has come."""
        self._epoch_begun = trainer.current_epoch
        if self._steps_done < self.schedule.steps and trainer.current_epoch >= self.schedule.epoch(self._steps_done):
            with untouched_generators():
                self._prune(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The same where a run goes on from the last batch of an epoch, which skips the start of the next."""
        if batch_idx == 0 and self._epoch_begun != trainer.current_epoch:
            self.on_train_epoch_start(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Cut what was only masked, measure the fine-tuned network, write and print the report."""
        if self._steps_done < self.schedule.steps:
            rank_zero_warn(
                f"{type(self).__name__}: {self._steps_done} of {self.schedule.steps} steps ran; the next one is due at "
                f"epoch {self.schedule.epoch(self._steps_done)}, training ended at {trainer.current_epoch}"
            )
        if self._steps_done == 0:
            return
        with untouched_generators():
            graph = self._graph or self._trace(trainer, pl_module)
            if self._masks.state is not None and not self._finished:
                self._end_masking(trainer, pl_module, graph)
            if not self._record.stages or self._record.stages[-1].name != "fine-tuned":
                self._record.stages.append(self._measure("fine-tuned", trainer, pl_module))
            self._finish_report(trainer)
        self._finished = True
        if self.dirpath is not None:
            trainer.save_checkpoint(self.dirpath / "pruned.ckpt", weights_only=True)

    def state_dict(self) -> dict[str, Any]:
        """Which steps are done and what they did, plain Python."""
        return {
            "steps_done": self._steps_done,
            "finished": self._finished,
            "plan": None if self.plan is None else self.plan.to_dict(),
            "record": self._record.to_dict(),
            "protected": self._protected,
            "masks": self._masks.state,
        }

    @whole_state
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what :meth:`state_dict` wrote: a step that is done is not done twice."""
        self._steps_done = parsed(int, state_dict["steps_done"], "steps_done")
        self._finished = parsed(bool, state_dict["finished"], "finished")
        self.plan = None if state_dict["plan"] is None else PruningPlan.from_dict(state_dict["plan"])
        self._record = Record.from_dict(state_dict["record"])
        self._protected = parsed(dict[str, str] | None, state_dict["protected"], "protected")
        self._masks = Masks(parsed(dict[str, Any] | None, state_dict["masks"], "masks"))
        self._graph = None

    # One step

    def _prune(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = self._steps_done
        graph = self._graph or self._trace(trainer, pl_module)
        if not self._record.stages:
            self._record.stages.append(self._measure("dense", trainer, pl_module))
        with silent_loggers(trainer):
            decision = Decision(self.given_plan) if self.given_plan else self.decide(trainer, pl_module, graph, step)
        plan = PruningPlan.from_dict(trainer.strategy.broadcast(decision.plan.to_dict()))
        named = PruningPlan(plan.validate(graph), graph.sizes)
        self._record.keep(decision.scores, named)
        if self.schedule.physical == "immediate":
            state = dict(decision.state) or self._repaired(trainer, pl_module, graph, named)
            state = trainer.strategy.broadcast(state)
            cut = apply_plan_in_trainer(
                trainer, pl_module, named, self._example, graph=graph, submodule=self.layers.submodule
            )
            if state:
                load_in_trainer(trainer, pl_module, state, submodule=self.layers.submodule)
            self._graph = cut.graph
            self.plan = named if self.plan is None else self.plan.compose(named)
        else:
            self.plan = named  # masked channels stay in the network, so indices are always of the original
            self._masks.replace(graph, named.keep)
            self._masks.open(self._model(pl_module))
        self._steps_done += 1
        public = self.given_plan is not None or self.calibration.loader is not None
        tell_strategy(self, trainer, self._chosen_by, public=public)
        self._record.stages.append(self._measure(f"pruned, step {self._steps_done}", trainer, pl_module))
        self._log(pl_module)
        if self.dirpath is not None and trainer.is_global_zero:
            self._full_plan().save(self.dirpath / "plan.json")
            forget(self.dirpath, step)

    def decide(self, trainer: Trainer, pl_module: LightningModule, graph: ChannelGraph, step: int) -> Decision:
        """Score channels and keep the best; rules that do not score every channel write this instead of ``score``."""
        assert self._record.dense is not None
        expected = self._counts.before_scores(graph, self._record.dense, step)
        graph, reckoned = self._counts.to_score(graph, expected)
        data = self._data(trainer, pl_module)
        samples = Samples([]) if self.whole_batches else self._samples(data)
        scores = self.score(
            Scoring(
                trainer=trainer,
                pl_module=pl_module,
                model=self._model(pl_module),
                graph=graph,
                samples=samples,
                data=data,
                expected=reckoned,
                curves=self._counts.mode == "budget",
                seed=self.seed + 1_000_003 * step,
                verbose=self.verbose and trainer.is_global_zero,
                remembered=ScoreMemory(
                    self.dirpath if trainer.world_size == 1 and function_bytes(self.value) is not None else None,
                    step,
                    fingerprint(pl_module, samples, (*self.fingerprint_settings(), self.amount, step)),
                ),
            )
        )
        values = self._masks.last({name: one.values for name, one in scores.items()})
        curves = {name: one.curve for name, one in scores.items() if one.curve is not None}
        config = self._masks.cap(self._counts.after_scores(graph, self._record.dense, step, reckoned, values, curves))
        return Decision(best_channels(graph, scores, values, config), scores)

    def _repaired(
        self, trainer: Trainer, pl_module: LightningModule, graph: ChannelGraph, plan: PruningPlan
    ) -> dict[str, Tensor]:
        """Corrected weights of the network that ``plan`` leaves; every process works on the data of the first."""
        if self.repair is None:
            return {}
        data = self._data(trainer, pl_module)
        batches = data.shared(max(self.repair.samples, self.repair.bn_samples))
        trial = Trial(self._model(pl_module), graph, plan)
        repair(trial, batches, self.repair, split_batch=self.split_batch, final=True, seed=self.seed)
        return trial.state()

    def _samples(self, data: TrainerData) -> Samples:
        samples = data.samples(self.calibration_groups)
        found, asked = int(samples.counts.sum()), self.calibration.samples
        if found < asked:
            self._record.note(f"Scores are of {found} samples, all there are of {asked} asked for.")
        return samples

    def _full_plan(self) -> PruningPlan:
        assert self.plan is not None
        settings = {"amount": self.amount, "technique": self.technique, "value": self.value_name, "seed": self.seed}
        return self._record.plan(self.plan, settings)

    def _end_masking(self, trainer: Trainer, pl_module: LightningModule, graph: ChannelGraph) -> None:
        """Turn masks into a cut, or into weights that are zero."""
        assert self.plan is not None
        self._masks.close()
        if self.schedule.physical == "at_end":
            cut = apply_plan_in_trainer(
                trainer, pl_module, self.plan, self._example, graph=graph, submodule=self.layers.submodule
            )
            self._graph = cut.graph
        else:
            for module in (pl_module, *averaged_models(trainer)):
                zero_readers(module.get_submodule(self.layers.submodule), graph, self.plan)
        self._masks = Masks()

    # What was looked at

    def _loaders(self, data: TrainerData) -> list[Any]:
        """Whatever scores, repairs and reports are made on."""
        return [data.loader(), *([data.loader("val")] if self.calibration.loader is None else [])]

    @property
    def _chosen_by(self) -> str:
        if self.given_plan is not None:
            return "by a plan that was made before"
        if self.calibration.loader is not None:
            return "on data that were given to it as public"
        return "on validation data: what it looked at is not covered"

    # Data and measurements

    def _model(self, pl_module: nn.Module) -> nn.Module:
        return pl_module.get_submodule(self.layers.submodule)

    def _trace(self, trainer: Trainer, pl_module: LightningModule) -> ChannelGraph:
        """Find the channel groups; in a resumed run with the protections that the first trace found."""
        self._example = take(self._data(trainer, pl_module).first(), slice(0, 2))
        graph = ChannelGraph.from_model(
            self._model(pl_module),
            self._example,
            include=None if self._protected is not None else self.layers.include,
            exclude=() if self._protected is not None else self.layers.exclude,
            allow_norm_coupled=self.layers.allow_norm_coupled,
            check=self._protected is None,
        )
        if self._protected is None:
            if self.layers.coupled == "inner":
                shared = {name: "several layers produce it" for name, g in graph.groups.items() if len(g.producers) > 1}
                graph = graph.protect(shared)
            self._protected = {name: g.protected for name, g in graph.groups.items() if g.protected}
            if self.verbose and self._protected:
                told = "; ".join(f"{name} ({reason})" for name, reason in self._protected.items())
                rank_zero_info(f"{type(self).__name__} leaves alone: {told}")
        self._graph = graph.protect(self._protected)
        return self._graph

    def _data(self, trainer: Trainer, pl_module: LightningModule) -> TrainerData:
        return TrainerData(trainer, pl_module, self.calibration, self._record.notes, self.split_batch)

    def _measure(self, name: str, trainer: Trainer, pl_module: LightningModule) -> Stage:
        """Evaluate the network as it is on the whole validation set."""
        value = self._measured(trainer, pl_module)
        assert self._graph is not None
        latency = measure_latency({"": self._model(pl_module)}, take(self._example, slice(0, 1)), repeats=10)[""]
        return Stage(
            name,
            trainer.current_epoch,
            value,
            round(self._graph.macs().item()),
            round(self._graph.params().item()),
            latency.median,
        )

    def _measured(self, trainer: Trainer, pl_module: LightningModule, most: int | None = None) -> float:
        """What the report says the network is worth, on the validation set or its first ``most`` batches."""
        return self._data(trainer, pl_module).mean_value(self._model(pl_module), self.value, most)

    @property
    def _measured_on(self) -> str:
        """The data of :meth:`_measured`, in words."""
        if NO_VALIDATION in self._record.notes:
            return "the training set"
        return "the whole validation set" if self.calibration.loader is None else "the calibration loader"

    def fingerprint_settings(self) -> tuple[Any, ...]:
        """Whatever else the scores depend on; subclasses add their own."""
        return (self.value_name, function_bytes(self.value), self.seed, self.allocation, self.schedule)

    # Report

    def _log(self, pl_module: LightningModule) -> None:
        pl_module.log_dict(
            {f"pruning/{name}": value for name, value in self._record.quantities().items()},
            on_step=False,
            on_epoch=True,
            sync_dist=True,
        )

    def _finish_report(self, trainer: Trainer) -> None:
        assert self._graph is not None
        self.report = self._record.report(self.value_name, self._measured_on, self._graph)
        if not trainer.is_global_zero:
            return
        if self.verbose:
            self.report.print()
        if self.dirpath is not None and self.plan is not None:
            self._full_plan().save(self.dirpath / "plan.json")
            self.report.write(self.dirpath)
            rank_zero_info(f"{type(self).__name__}: plan, tables and figure are in {self.dirpath}")
