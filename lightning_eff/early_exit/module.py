"""Train a network with early exits in one, two or more phases, with any Lightning Trainer (arXiv 2407.14320).

Shapes: ``B`` batch, ``C`` classes, ``E`` exits, ``K = E + 1`` outputs, the last being the backbone's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Self, cast

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_eff.batch import SplitBatch, batch_size, call_model
from lightning_eff.batch import split_batch as split_pair
from lightning_eff.documents import whole_state
from lightning_eff.early_exit.attaching.costs import ExitCosts
from lightning_eff.early_exit.attaching.heads import Head
from lightning_eff.early_exit.evaluation.curve import CurveResult, check_budgets
from lightning_eff.early_exit.inference.leaving import ExitOutput, select_from_all
from lightning_eff.early_exit.inference.policies import Policy, ScoreFunction
from lightning_eff.early_exit.network import MultiExitNetwork
from lightning_eff.early_exit.options import NetworkOptions
from lightning_eff.early_exit.training.checkpoint import (
    KEY,
    load_phases,
    names_not_held,
    plain_hyperparameters,
    save_phases,
    without_foreign_heads,
)
from lightning_eff.early_exit.training.in_trainer import check_trainer, first_batch
from lightning_eff.early_exit.training.losses import ExitLosses, loss_weights
from lightning_eff.early_exit.training.metrics import ExitMetrics, only_with_heads, output_names
from lightning_eff.early_exit.training.phased_module import PhasedModule
from lightning_eff.early_exit.training.phases import Phase, phases_from
from lightning_eff.early_exit.training.schedules import Schedule
from lightning_eff.surgery.structure import prunable


@prunable
class EarlyExitModule(PhasedModule):
    """A backbone with early exits, trained on batches ``(inputs, labels)``.

    Logs ``train/loss``, ``train/loss_exit{k}``, ``train/loss_final`` and ``early_exit/phase``. Validation and test log
    ``loss``, every output alone (``accuracy_exit{k}``, ``accuracy_final``), early exit at the current thresholds
    (``accuracy``, ``cost``, ``exit_rate{k}``, ``exit_rate_final``), and the best of all thresholds: ``accuracy@25``
    within 25 % of the plain backbone's cost, ``accuracy@max``, and ``auc``, behind ``val/`` or ``test/``. While a phase
    trains the backbone alone, validation logs only ``loss`` and ``accuracy_final``.

    A subclass may override ``configure_optimizers``, which is called again when a phase begins; ``phase`` tells which.

    A backbone handed over as an object is not written into checkpoints' hyperparameters, so a new one is handed over
    again: ``EarlyExitModule.load_from_checkpoint(path, backbone=resnet18())``. So is all else that is not plain data
    (optimizers, a criterion, a policy of one's own). One described in a YAML for the command line is plain data, is
    written, and ``load_from_checkpoint(path)`` is enough.

    Args:
        backbone: maps inputs to logits ``[B, C]``; it is not rewritten.
        exits: names of layers, a dict name -> head, fractions of the cost, or a number of exits to spread over the
            cost; see :class:`MultiExitNetwork`.
        num_classes: ``C``.
        regime: ``"mixed"`` trains the backbone, then everything; ``"joint"`` everything; ``"disjoint"`` the backbone,
            then the heads on a backbone that stands still; or a list of :class:`Phase`. Where all of these have epochs
            and nobody has set ``max_epochs`` (Lightning then takes 1000), the fit lasts as long as they do.
        phase_split: share of the first of two phases that have no epochs of their own, in [0, 1].
        start_phase: the first phase that is trained, from 0; 1 with a backbone that is trained already.
        head: kind of the heads, a :class:`Head`, or a callable ``(shape of one sample's feature, C) -> module``.
        policy: how sure a sample is, see :class:`MultiExitNetwork`.
        thresholds: from where samples leave, in the policy's unit; None disables exits.
        optimizer: ``parameters -> optimizer``, of phases that have none. The command line's own ``--optimizer`` would
            take the place of all of them.
        lr_scheduler: of phases that have none; see :data:`~lightning_eff.early_exit.training.schedules.Schedule`.
        losses: how outputs are judged in training.
        split_batch: ``batch -> (inputs, target)``, for batches that are not ``(inputs, target)``.
        budgets: costs, as fractions of the plain backbone, at which the best accuracy is logged, > 0.
        cost: ``"flops"``, ``"latency"``, or a list of the costs of the ``K`` outputs, each > 0, the last being the
            backbone's.
        engine: how ``predict`` stops, see :class:`MultiExitNetwork`.
        network_options: rarely needed, what of the backbone's output is the logits for example.
        example_input: a batch of inputs; None takes the first batch of the trainer's data.

    Attributes:
        network: the :class:`MultiExitNetwork`.
        curves: accuracy over cost of the last pass over ``"val"`` and over ``"test"`` data.

    Raises:
        ValueError: what cannot be meant, before any work.
    """

    def __init__(
        self,
        backbone: nn.Module,
        exits: list[str] | list[float] | dict[str, str | Head | Callable[[Any, int], Any]] | int,
        num_classes: int,
        regime: Literal["mixed", "joint", "disjoint"] | list[Phase] = "mixed",
        *,
        phase_split: float = 0.5,
        start_phase: int = 0,
        head: str | Head | Callable[[Any, int], Any] = "auto",
        policy: str | Policy | ScoreFunction = "max_prob",
        thresholds: float | list[float | None] | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: Schedule | None = None,
        losses: ExitLosses = ExitLosses(),  # noqa: B008 (frozen)
        split_batch: SplitBatch | None = None,
        budgets: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
        cost: Literal["flops", "latency"] | list[float] = "flops",
        engine: Literal["auto", "hooks", "staged", "off"] = "auto",
        network_options: NetworkOptions = NetworkOptions(),  # noqa: B008 (frozen)
        example_input: Any = None,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        # hyperparameters of a checkpoint come as a dict
        options = NetworkOptions(**network_options) if isinstance(network_options, Mapping) else network_options
        network = MultiExitNetwork(
            backbone,
            exits,
            num_classes,
            head=head,
            policy=policy,
            thresholds=thresholds,
            engine=engine,
            clone_features=options.clone_features,
            compact_min_fraction=options.compact_min_fraction,
            output_fn=options.output_fn,
        )
        super().__init__(network, phases_from(regime), phase_split, start_phase, optimizer, lr_scheduler)
        self.save_hyperparameters(ignore=list(given))
        self._not_plain: list[str] = []  # arguments that checkpoints cannot hold
        if "_instantiator" in self.hparams:  # built by LightningCLI, which gives everything as plain data
            self.save_hyperparameters()
        else:
            plain, rest = plain_hyperparameters(given)
            self.save_hyperparameters(plain)
            self._not_plain = [name for name in rest if name not in ("backbone", "example_input")]
            if optimizer is torch.optim.AdamW:
                self._not_plain.remove("optimizer")  # the default
        check_budgets(budgets)
        self.losses = ExitLosses(**losses) if isinstance(losses, Mapping) else losses
        network.gradient_scaling = self.losses.gradient_scaling
        self.criterion = self.losses.criterion  # a submodule, so that it moves between devices
        self.budgets, self.cost = tuple(budgets), cost
        self.curves: dict[str, CurveResult] = {}
        self._split = split_batch
        self._metrics: ExitMetrics | None = None
        self._finite: Tensor | None = None  # whether the losses of this epoch were, until one was not
        self._not_held: list[str] = []  # arguments that were not in the checkpoint that was loaded
        self._foreign_heads: str | None = None  # why the heads of a checkpoint are not ours
        if isinstance(cost, list):
            if len(cost) != network.num_outputs or not all(0 < one < math.inf for one in cost):
                raise ValueError(
                    f"expected {network.num_outputs} costs that are finite and > 0, one an output, got {cost}"
                )
            network.costs = ExitCosts(tuple(cost), (0.0,) * network.num_exits, "given")
        elif cost not in ("flops", "latency"):
            raise ValueError(f"expected cost to be 'flops', 'latency' or a list, got {cost!r}")
        if example_input is not None:
            self._build(example_input)

    # Before training

    def configure_model(self) -> None:
        """Build the exits from the trainer's first batch, if there was no example."""
        trainer = self._trainer
        if trainer is not None and not self.network.built:
            self._build(self.split_batch(first_batch(trainer, self))[0])

    def _build(self, example: Any) -> None:
        network, given = self.network, self.network.costs if isinstance(self.cost, list) else None
        network.build(example)
        rank_zero_info(network.summary())
        if given is not None:
            network.costs = given
        elif self.cost == "latency":
            network.measure_costs(example, "latency")

    def setup(self, stage: str) -> None:
        """Build the exits and prepare the first phase, before anything wraps the module."""
        network, trainer, built = self.network, self.trainer, self.network.built
        self.configure_model()
        if self.cost == "latency":  # clocks of processes differ, and so would the curves
            network.costs = ExitCosts.from_dict(trainer.strategy.broadcast(network.costs.to_dict()))
        if stage != "fit":
            return
        phases = self.prepare_phases()
        late = only_with_heads(network.num_exits, self.budgets)
        check_trainer(trainer, self, phases, {f"{stage}/{name}" for stage in ("val", "test") for name in late}, built)
        for phase in phases:
            if phase.train != "backbone":
                self._weights(phase, (1, 1))
        self.begin_phases()

    def split_batch(self, batch: Any) -> tuple[Any, Any]:
        """Return ``(inputs, target)`` of a batch."""
        return (self._split or split_pair)(batch)

    # Training

    def forward(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """Return the logits of all ``K`` outputs, ``[B, C]`` each."""
        logits: list[Tensor] = self.network(*args, **kwargs)
        return logits

    def on_train_epoch_start(self) -> None:
        """Begin the next phase if it is time."""
        super().on_train_epoch_start()
        self._finite = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of one batch in the current phase."""
        inputs, target = self.split_batch(batch)
        self.network.keep_shapes(inputs)
        loss, each = self._train_on(inputs, target)
        self._watch(each)
        size = batch_size(inputs)
        self.log_dict({f"train/loss_{name}": value.detach() for name, value in each.items()}, batch_size=size)
        shown: dict[str, Any] = {"train/loss": loss.detach(), "early_exit/phase": float(self.phase_index)}
        self.log_dict(shown, batch_size=size, prog_bar=True)
        return loss

    def _train_on(self, inputs: Any, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What is minimised, and the loss of every output that the phase trains."""
        if self.phase.train == "backbone":
            loss = self.losses.each([self._backbone_logits(inputs)], target)[0]
            return loss, {"final": loss}
        if self.phase.train == "heads" and self.losses.distill is None:
            logits = call_model(cast(nn.Module, self.network.forward_heads), inputs)
        else:
            logits = call_model(self.network, inputs)
        return self._loss(self.phase, logits, target)

    def _loss(self, phase: Phase, logits: list[Tensor], target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        trained = logits[: self.network.num_exits] if phase.train == "heads" else logits
        each = self.losses.each(trained, target)
        total = self.losses.total(each, self._weights(phase, self.phase_progress), logits)
        return total, dict(zip(output_names(self.network.num_exits), each, strict=False))

    def _weights(self, phase: Phase, progress: tuple[int, int]) -> list[float]:
        network, (epoch, epochs) = self.network, progress
        try:
            costs = network.costs.fractions()
        except ValueError:  # nothing could be counted
            costs = None
        weights = self.losses.weights if phase.loss_weights is None else phase.loss_weights
        final = phase.train != "heads"
        return loss_weights(weights, network.num_exits, final=final, epoch=epoch, epochs=epochs, costs=costs)

    def _backbone_logits(self, inputs: Any) -> Tensor:
        return self.network.output_of(call_model(self.network.backbone, inputs))

    def _watch(self, each: Mapping[str, Tensor]) -> None:
        """Note losses that are no numbers; raise at once where the trainer looks for anomalies."""
        finite = torch.isfinite(torch.stack([loss.detach() for loss in each.values()]))
        if self.trainer._detect_anomaly and not finite.all():
            raise ValueError(self._not_finite(each, finite))
        before = self._finite
        if before is not None and len(before) == len(finite):  # otherwise another phase has begun
            finite = torch.where(before.all(), finite, before)  # those that were the first
        self._finite = finite

    def _not_finite(self, names: Iterable[str], finite: Tensor) -> str:
        bad = [name for name, good in zip(names, finite.tolist(), strict=True) if not good]
        return f"the loss of {', '.join(bad)} is not finite in phase {self.phase_index} ({self.phase.train})"

    def on_train_epoch_end(self) -> None:
        """Tell of losses that are no numbers."""
        super().on_train_epoch_end()
        if self._finite is not None and not self._finite.all():
            names = output_names(self.network.num_exits)
            names = names[-1:] if self.phase.train == "backbone" else names[: len(self._finite)]
            rank_zero_warn(f"{self._not_finite(names, self._finite)}, epoch {self.current_epoch}")

    # Validation, test, prediction

    def on_test_start(self) -> None:
        """Tell what would surprise."""
        self._tell_of_idle_exits()

    def on_predict_start(self) -> None:
        """Tell what would surprise."""
        self._tell_of_idle_exits()

    def _tell_of_idle_exits(self) -> None:
        network = self.network
        if not any(map(network.rule.enabled, range(network.num_exits))):
            rank_zero_info(
                "All exits are disabled, no sample leaves early: set thresholds, or let ThresholdCalibration find "
                "them. Checkpoints of before the end of a fit hold none, ThresholdCalibration(dirpath=...) writes one"
            )

    def on_validation_epoch_start(self) -> None:
        """Begin to collect."""
        self._begin_pass()

    def on_test_epoch_start(self) -> None:
        """Begin to collect."""
        self._begin_pass()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Take in what one batch tells."""
        self._evaluate(batch)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Take in what one batch tells."""
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        """Log what the pass tells."""
        self._end_pass("val")

    def on_test_epoch_end(self) -> None:
        """Log what the pass tells."""
        self._end_pass("test")

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> ExitOutput:
        """Answer one batch ``(inputs, target)``, or inputs alone; samples that are sure enough leave early."""
        pair = isinstance(batch, tuple | list) and len(batch) == 2
        inputs = self.split_batch(batch)[0] if pair or self._split is not None else batch
        network = self.network
        if self.trainer.strategy.restore_checkpoint_after_setup:
            # shards: processes gather parameters together, one that stops early would leave the others waiting
            return select_from_all(network.rule, call_model(network, inputs))
        answer: ExitOutput = call_model(cast(nn.Module, network.predict), inputs)
        return answer

    def _begin_pass(self) -> None:
        alone = self.is_fitting and self.phase.train == "backbone"
        self._metrics = ExitMetrics(self.network, self.budgets, alone)

    def _evaluate(self, batch: Any) -> None:
        inputs, target = self.split_batch(batch)
        metrics = self._metrics
        if metrics is None or batch_size(inputs) == 0:
            return
        if metrics.alone:
            logits = [self._backbone_logits(inputs)]
            loss = self.losses.each(logits, target)[0]
        else:
            logits = call_model(self.network, inputs)
            loss, _ = self._loss(Phase("all") if self.phase.train == "backbone" else self.phase, logits, target)
        metrics.update(logits, target, loss)

    def _end_pass(self, stage: str) -> None:
        metrics, self._metrics = self._metrics, None
        if metrics is None:
            return
        curve, values = metrics.compute()
        if curve is not None:
            self.curves[stage] = curve
        shown = [name for name in ("accuracy_final", "accuracy@50") if name in values]
        self.log_dict({f"{stage}/{name}": values.pop(name) for name in shown}, prog_bar=True)
        self.log_dict({f"{stage}/{name}": value for name, value in values.items()})

    # Checkpoints

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Build a module from a checkpoint; see Lightning's method of this name.

        Args:
            checkpoint_path: of the checkpoint.
            *args: of Lightning's method.
            **kwargs: of Lightning's method and of the module. What is not plain data is not in the checkpoint and is
                handed over again; a warning lists what is not, which becomes what it is by default.

        Raises:
            ValueError: thresholds of another policy, other exits or heads.
        """
        loaded = super().load_from_checkpoint(checkpoint_path, *args, **kwargs)
        if forgotten := [name for name in loaded._not_held if name.split(".")[0] not in kwargs]:
            rank_zero_warn(
                f"{', '.join(forgotten)}: not plain data, so not in the checkpoint, and not handed over to "
                "load_from_checkpoint; this module has the default"
            )
        return loaded

    def build_for_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the exits where they were: a checkpoint of a network that lost channels has shapes for their heads."""
        structure = checkpoint.get(KEY, {}).get("structure")
        if structure is not None:
            self.network.build_from(structure)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the phase and where the exits are."""
        save_phases(checkpoint, self.network, self._clock, self.phase_split, self._not_plain)

    @whole_state
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the exits where they were, before their weights are loaded, and take up the phase."""
        self._foreign_heads = load_phases(
            checkpoint, self.network, self._clock, self.phase_split, fitting=self.is_fitting
        )
        self._not_held = names_not_held(checkpoint)
        if self.phase.train == "backbone" and not (self.is_last_phase or self.is_fitting):
            rank_zero_warn(
                f"the checkpoint is of phase {self.phase_index + 1} of {len(self.phases)}, which trains the backbone "
                "alone: its heads are not trained"
            )
        self.freeze_phase()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights; with ``strict=False`` those of the backbone also where the exits are others."""
        kept = without_foreign_heads(state_dict, self.state_dict(), self._foreign_heads, strict)
        self._foreign_heads = None
        return super().load_state_dict(kept, strict, assign)
