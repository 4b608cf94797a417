"""What makes a Lightning strategy train privately, whatever it runs on.

One Lightning batch is one Poisson-sampled logical batch and one optimizer step; physical batches never leave the
strategy. The optimizer is the user's own: it only ever sees gradients that are clipped, summed and noised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_eff.accounting import PrivacyLedger
from lightning_eff.arguments import check_choice, check_number, check_whole, plain
from lightning_eff.privacy import checks
from lightning_eff.privacy.accounted import CHECKPOINT_KEY, AccountedTraining
from lightning_eff.privacy.announcement import banner, hyperparameters, tell_loggers, write_reports
from lightning_eff.privacy.batches import number_of_samples, some_samples
from lightning_eff.privacy.budget import Budget, note
from lightning_eff.privacy.engine.engine import Clipping
from lightning_eff.privacy.engine.uses import slices
from lightning_eff.privacy.inspection import Inspection
from lightning_eff.privacy.metrics import SpentEpsilon, log_step
from lightning_eff.privacy.noise import SecretStreams
from lightning_eff.privacy.options import PrivateTrainingOptions, check_options
from lightning_eff.privacy.outputs import join_outputs, loss_of
from lightning_eff.privacy.planning import check_one_of
from lightning_eff.privacy.replacement import KnownParameters, replaced
from lightning_eff.privacy.selection.granularity import Granularity
from lightning_eff.privacy.selection.plan import SelectionPlan
from lightning_eff.privacy.selection.schedule import RateSchedule
from lightning_eff.privacy.selection.selected import Selection
from lightning_eff.privacy.selection.selectors import Selector, SelectorName
from lightning_eff.privacy.statement import write_statement
from lightning_eff.privacy.stepping import MaskMode, PrivateStep, StaticMasks
from lightning_eff.privacy.training_data import TrainingData


class PrivateTraining(AccountedTraining):
    """Mixed into a strategy, before it; :class:`DPGradientDropStrategy` tells the arguments."""

    global_rank: int
    world_size: int

    def __init__(
        self,
        noise_multiplier: float | None = None,
        target_epsilon: float | None = None,
        delta: float | None = None,
        max_epsilon: float | None = None,
        max_grad_norm: float = 1.0,
        clipping: Clipping = "flat",
        drop_rate: float | RateSchedule = 0.0,
        granularity: Granularity = "element",
        selection: SelectorName | Selector | SelectionPlan = "random",
        max_physical_batch_size: int | None = None,
        poisson_sampling: bool = True,
        options: PrivateTrainingOptions | None = None,
        ledger: PrivacyLedger | None = None,
        **kwargs: Any,
    ) -> None:
        if noise_multiplier is not None or target_epsilon is not None:
            check_one_of(noise_multiplier, target_epsilon)
        check_number("max_grad_norm", max_grad_norm, above=0)
        check_choice("clipping", clipping, ("flat", "automatic", "per_layer"))
        if max_physical_batch_size is not None:
            check_whole("max_physical_batch_size", max_physical_batch_size)
        if isinstance(selection, SelectionPlan):
            if drop_rate != 0 or granularity != "element":
                raise ValueError(
                    "a SelectionPlan has its own drop rate and granularity: set them there, got drop_rate="
                    f"{drop_rate} and granularity={granularity!r} beside it"
                )
            plan = selection
        else:
            plan = SelectionPlan(drop_rate, selection, granularity)
        self.options = PrivateTrainingOptions() if options is None else options
        check_options(self.options)
        self._budget = Budget(
            plain(noise_multiplier), plain(target_epsilon), plain(delta), max_epsilon, self.options.accountant, ledger
        )
        self._idle_accelerator: Accelerator | None = None
        super().__init__(**kwargs)
        self.max_grad_norm, self.clipping = float(max_grad_norm), clipping
        self.max_physical_batch_size = plain(max_physical_batch_size)
        self.poisson_sampling = poisson_sampling
        self._plan = plan
        self._streams: SecretStreams | None = None
        self._step: PrivateStep | None = None
        self._known: KnownParameters | None = None
        self._spent = SpentEpsilon()
        self._static: StaticMasks | None = None
        self._data = TrainingData()
        self._plan_is_restored = False
        self._norm_layers: list[tuple[str, torch.nn.Module]] = []
        self._inspection: Inspection | None = None
        if self.options.noise_seed is not None:
            rank_zero_warn("noise_seed makes noise and sampling repeatable: it is for tests, nothing is private")

    @property
    def accelerator(self) -> Accelerator | None:
        """What the Trainer runs on; a Trainer that is over leaves the next one the choice."""
        return self._accelerator or self._idle_accelerator

    @accelerator.setter
    def accelerator(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    @property
    def active_coordinates(self) -> int:
        """Coordinates that the present step trains; 0 outside of a fit."""
        return 0 if self._step is None else self._step.active_coordinates

    @property
    def selection_state(self) -> dict[str, Selection]:
        """Active coordinates of every parameter in the present step; empty outside of a fit."""
        return {} if self._step is None else dict(self._step.selections)

    def set_static_masks(self, masks: Mapping[str, Tensor], mode: MaskMode) -> None:
        """Train only what the masks leave, for the fit that is beginning or runs.

        Args:
            masks: By parameter name, bool of its shape, True where it is trained; parameters without one are trained.
            mode: ``"prune"`` makes the other coordinates zero, ``"freeze"`` leaves them at their value.

        Raises:
            ValueError: Names or shapes do not fit; lists all differences, and nothing was applied.
        """
        module = self._module()
        self._static = StaticMasks(masks, mode, checks.trained_parameters(module, self.optimizers))
        self._step = None

    def refuse_private_data(self, data: Any, who: str) -> None:
        """Refuse that a callback looks at what is trained on, for choices that no noise covers.

        Args:
            data: Loader or data set that it is about to read, in a fit whose training data are there.
            who: Name of the callback.

        Raises:
            ValueError: Samples of the training data are in it; tells the ways out.
        """
        trainer = self._module().trainer
        self._data.refuse(data, trainer.train_dataloader, who, type(self).__name__)

    def note_resizing(self, sentence: str, *, public: bool) -> None:
        """Take up parameters that a callback has made smaller or masks, and write down what it went by.

        Args:
            sentence: For the ledger.
            public: Whether it went by nothing that needs protection; otherwise the sentence is a caveat.
        """
        note(self.ledger.assumptions if public else self.ledger.caveats, sentence)
        if not public:
            rank_zero_warn(sentence)
        if self._known is not None and self._known.look(self._module()):
            self._plan.start_anew()
            self._step = None

    def setup(self, trainer: Trainer) -> None:
        """Check, set up as ever, check the optimizer."""
        if trainer.state.fn == TrainerFn.FITTING:
            if self._budget.given_noise is None and self._budget.target_epsilon is None:
                raise ValueError(
                    "private training needs exactly one of noise_multiplier and target_epsilon, and a name carries no "
                    f"budget: strategy={type(self).__name__}(target_epsilon=3.0)"
                )
            checks.check_trainer(trainer, self._module())
            checks.check_precision(self.precision_plugin)
            self._static = self._step = None
            self._inspection = Inspection(self.options.isolation_check, self.options.public_buffers)
            if not self._plan_is_restored:
                self._plan.start_anew()
            self._plan_is_restored = False
        super().setup(trainer)

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Set up the user's optimizer and see what it trains."""
        try:
            super().setup_optimizers(trainer)
        except RuntimeError as error:
            if "multiple optimizers" not in str(error):
                raise
            raise ValueError(
                "private training writes one gradient in a step, for one optimizer: give it the parameters of the "
                "others as parameter groups, as in SGD([{'params': a, 'lr': 0.1}, {'params': b, 'lr': 0.01}])"
            ) from error
        checks.trained_parameters(self._module(), self.optimizers)
        self._known = KnownParameters(self._module())

    def process_dataloader(self, dataloader: object) -> object:
        """Sample the private training loader by Poisson sampling; other loaders stay."""
        dataloader = super().process_dataloader(dataloader)
        trainer = self._module().trainer
        if trainer.state.fn != TrainerFn.FITTING or trainer.state.stage != RunningStage.TRAINING:
            return dataloader
        if self._streams is None:
            self._streams = self._make_streams()
        return self._data.draw_from(
            dataloader,
            poisson=self.poisson_sampling,
            streams=self._streams,
            first_step=None if self.options.noise_seed is None else lambda: self.ledger.steps,
            rank=self.global_rank,
            world_size=self.world_size,
            anew=trainer.fit_loop._combined_loader is not None,
        )

    def on_train_start(self) -> None:
        """Find the noise, count the steps, and say what is about to happen."""
        super().on_train_start()
        self._begin_data()
        self._build_step()
        assert self._step is not None
        trainer = self._module().trainer
        self._step.begin(trainer.global_step, trainer.current_epoch)
        settings = hyperparameters(self.plan(), self.max_grad_norm, self.clipping)
        text = banner(
            self.plan(),
            settings,
            trainable=sum(parameter.numel() for parameter in self._step.parameters.values()),
            kept=self._step.kept_coordinates,
            active=self.active_coordinates,
            poisson=self.poisson_sampling,
            seeded=self.options.noise_seed is not None,
        )
        rank_zero_info(text)
        tell_loggers(trainer.loggers, settings)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Choose what this step trains."""
        super().on_train_batch_start(batch, batch_idx)
        self._data.next_batch()
        module = self._module()
        trainer = module.trainer
        if self._data.known != self._budget.data or self._budget.plan_is_over:
            self._begin_data()
        checks.refuse_batch_statistics(
            [(name, layer) for name, layer in self._norm_layers if checks.uses_batch_statistics(layer)]
        )
        trained = checks.trained_parameters(module, self.optimizers)
        assert self._known is not None
        changed = self._known.look(module)
        if changed:
            note(self.ledger.caveats, replaced(changed))
            rank_zero_warn(replaced(changed))
        if changed or self._step is None or not self._step.trains(trained):
            if self._step is not None:
                self._plan.start_anew()
            self._build_step()
        assert self._step is not None
        self._step.begin(trainer.global_step, trainer.current_epoch)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the user's step on physical batches and collect their clipped sums.

        An empty batch gives a loss of zero; the user's step is not called for it.
        """
        assert self._step is not None
        assert self._inspection is not None
        batch, *others = args
        samples = number_of_samples(batch)
        self._data.check_rows(samples, self._as_steps_get_it)
        if not samples:
            return torch.zeros((), device=self.root_device)
        trainer = self._module().trainer
        size = min(samples, self.max_physical_batch_size or samples)
        self._inspection.check_isolation(self._module(), self._user_step(others, kwargs), batch, self.ledger)
        parts = list(slices(samples, size))
        outputs, sizes = [], []
        with self._inspection.watch_buffers(self._module(), self.ledger):
            for part in parts:
                physical = batch if len(parts) == 1 else some_samples(batch, part)
                count = part.stop - part.start
                # what the user logs is weighted by the size of the batch that Lightning knows of
                if len(parts) > 1:
                    trainer._logger_connector.on_batch_start(physical)
                assert trainer._results is not None
                trainer._results.batch_size = count
                with self._step.record(count):
                    output = super().training_step(physical, *others, **kwargs)
                outputs.append(self._collect(output, count))
                sizes.append(count)
        return join_outputs(outputs, sizes)

    def backward(self, closure_loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Do nothing: backward has run for each physical batch."""
        return closure_loss

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Let the optimizer step with the private gradient."""
        step = self._step
        assert step is not None

        def private() -> Any:
            result = closure()
            self._release(step)
            return result

        output = super().optimizer_step(optimizer, private, model, **kwargs)
        step.restore()
        self._after_step()
        return output

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Take over what a file tells was spent, and how far the choice of coordinates was.

        Raises:
            ValueError: A fit is to go on from a file that does not tell what was spent.
        """
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only=weights_only)
        state = checkpoint.get(CHECKPOINT_KEY)
        fitting = self._module().trainer.state.fn == TrainerFn.FITTING
        # another rule starts from nothing
        if fitting and state is not None and state["selector"] == type(self._plan.selector).__name__:
            self._plan.start_anew()
            self._plan.load_state_dict(state["selection"])
            self._plan_is_restored = True
        return checkpoint

    def teardown(self) -> None:
        """Let go of the step, the key of the noise and the loaders, and write the reports of a fit."""
        if self._streams is not None and self.options.dirpath is not None and self.global_rank == 0:
            write_reports(self.ledger, self.options.dirpath)
        self._step = self._streams = self._static = self._inspection = None
        self._data, self._norm_layers = TrainingData(), []
        self._plan_is_restored = False
        super().teardown()
        # a Trainer refuses a strategy that has one already, unless it is told nothing about it
        self._idle_accelerator, self._accelerator = self.accelerator, None

    def _settings_state(self) -> dict[str, Any]:
        return {
            "max_grad_norm": self.max_grad_norm,
            "clipping": self.clipping,
            "selector": type(self._plan.selector).__name__,
            "selection": self._plan.state_dict(),
        }

    def _make_streams(self) -> SecretStreams:
        seed = self.options.noise_seed
        return SecretStreams(self.broadcast(SecretStreams().key)) if seed is None else SecretStreams.from_seed(seed)

    def _begin_data(self) -> None:
        """Get the budget ready for the training data as they are now."""
        trainer = self._module().trainer
        self._plan.check_public(self._data.loader())
        fit = trainer.fit_loop
        data, planned = self._data.known, trainer.estimated_stepping_batches
        assert data is not None
        remaining = None if planned in (float("inf"), -1) else max(0, int(planned) - trainer.global_step)
        asked = max((fit.min_epochs or 0) * data.steps_per_epoch, fit.min_steps or 0) - trainer.global_step
        self._budget.begin(data, remaining, max(0, asked), self.options.allow_unaccounted_resume)
        if self._budget.is_spent:
            self._stop(trainer)
        write_statement(self.ledger, poisson=self.poisson_sampling, seeded=self.options.noise_seed is not None)
        if self._inspection is not None:
            self._inspection.tell(self.ledger)

    def _build_step(self) -> None:
        module = self._module()
        trainer = module.trainer
        assert self._streams is not None
        planned = trainer.estimated_stepping_batches
        epochs = trainer.max_epochs
        options = self.options
        self._step = PrivateStep(
            module,
            checks.trained_parameters(module, self.optimizers),
            self._plan,
            self._streams,
            max_grad_norm=self.max_grad_norm,
            clipping=self.clipping,
            dropped=options.dropped,
            static=self._static,
            memory_budget_mb=options.memory_budget_mb,
            tune=options.noise_seed is None,
            add_up=self._add_up,
            total_steps=None if planned in (float("inf"), -1) else int(planned),
            epochs=None if epochs in (None, -1) else epochs,
        )
        self._norm_layers = [
            (name, layer) for name, layer in module.named_modules() if isinstance(layer, checks.NORM_LAYERS)
        ]

    def _as_steps_get_it(self, batch: Any) -> Any:
        """A batch of the loader after all that Lightning does to it before a step."""
        batch = self._module()._on_before_batch_transfer(self.precision_plugin.convert_input(batch), dataloader_idx=0)
        return self.batch_to_device(batch, dataloader_idx=0)

    def _user_step(self, others: list[Any], kwargs: Mapping[str, Any]) -> Callable[[Any, Any], Tensor]:
        """The user's step on a module (a copy, perhaps) and a batch, as a function that returns the loss."""

        def step(module: Any, batch: Any) -> Tensor:
            with self.precision_plugin.train_step_context():
                return loss_of(module.training_step(batch, *others, **kwargs))

        return step

    def _collect(self, output: Any, samples: int) -> Any:
        """Run backward for one physical batch, take its clipped sum, and return the output without graph."""
        assert self._step is not None
        loss = loss_of(output)
        if loss.requires_grad:
            # the loss is a mean over the batch: a sample's own gradient is n times its share
            loss.register_hook(lambda gradient: gradient * samples)  # type: ignore[no-untyped-call]
            super().backward(loss, None)
        self._step.collect()
        return {**output, "loss": loss.detach()} if isinstance(output, Mapping) else loss.detach()

    def _release(self, step: PrivateStep) -> None:
        """Write the private gradient; the ledger knows of it before anybody can see it."""
        budget = self._budget
        assert budget.plan is not None
        assert budget.data is not None
        number = self.ledger.steps
        flat = step.add_up()
        budget.record()
        step.release(flat, budget.plan.noise_multiplier, budget.data.expected_batch, number)
        private = {id(parameter) for parameter in step.parameters.values()}
        for parameter in checks.optimized_parameters(self.optimizers):
            if id(parameter) not in private:
                parameter.grad = None  # neither clipped nor noised

    def _add_up(self, tensor: Tensor) -> Tensor:
        return tensor

    def _after_step(self) -> None:
        module = self._module()
        trainer = module.trainer
        self._tell_monitors()
        if self._budget.is_spent:
            self._stop(trainer)
        assert self._budget.plan is not None
        log_step(
            module,
            self._spent,
            self.ledger,
            self._budget.plan,
            self.options.log_every_n_steps,
            active_coordinates=float(self.active_coordinates),
            drop_rate=self._plan.dropped,
        )
