"""Lightning strategies for differentially private training on fewer coordinates.

Sources: "Pre-Pruning and Gradient-Dropping Improve Differentially Private Image Classification", arXiv 2306.11754;
"Differential Privacy Meets Neural Network Pruning", arXiv 2303.04612; DP-SGD is arXiv 1607.00133.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torchmetrics import Metric

from lightning_eff.privacy.accounted import CHECKPOINT_KEY
from lightning_eff.privacy.logged import agree_on_logged, metrics_of_the_process
from lightning_eff.privacy.training import PrivateTraining


class DPGradientDropStrategy(PrivateTraining, SingleDeviceStrategy):
    """Private training on one device, ``Trainer(strategy=DPGradientDropStrategy(...))`` or ``"dp_gradient_drop"``.

    Samples are drawn by Poisson sampling, each sample's gradient is clipped on the coordinates that the step trains,
    and noise is added there alone. Module, optimizer, schedulers, loaders and callbacks stay what they are.

    Args:
        noise_multiplier: sigma >= 0, standard deviation of the noise over C. Exactly one of it and
            ``target_epsilon`` is needed when a fit begins.
        target_epsilon: Epsilon > 0 at the end of the planned steps; the smallest noise that keeps it is found.
        delta: In (0, 1); ``None`` is ``min(1e-5, 1 / (10 N))``.
        max_epsilon: Training stops before it would be passed; ``None`` for no bound.
        max_grad_norm: C > 0, which every sample's gradient is clipped to.
        clipping: ``"flat"`` scales down what is longer than C, ``"automatic"`` brings everything close to C,
            ``"per_layer"`` clips each layer to its share of C.
        drop_rate: Share in [0, 1) of the units that a step does not train, or a :class:`RateSchedule`.
        granularity: What a unit is: ``"element"``, ``"row"``, ``"row_col"`` or ``"tensor"``; all but ``element`` make
            a step cheaper.
        selection: Which units: ``"random"``, ``"magnitude"``, ``"noisy_gradient"``, a :class:`Selector`, or a
            :class:`SelectionPlan`, which has scope, refresh and more, and its own drop rate and granularity.
        max_physical_batch_size: Samples that are worked on at a time, >= 1, for memory; ``None`` takes whole batches.
            The result is the same.
        poisson_sampling: False trains on the loader's own batches; epsilon is approximate then, and reports say so.
        options: What is seldom changed.
        ledger: A :class:`PrivacyLedger` of adjacency ``"add_remove"`` that other runs or releases on the same data were
            entered into, to go on in; its delta, bound and accountant hold. ``None`` begins one.
        kwargs: Of Lightning's strategy.

    Raises:
        ValueError: An argument lies outside its range, or two contradict each other.
    """

    strategy_name = "dp_gradient_drop"

    @property
    def parallel_devices(self) -> None:
        """None: the Trainer hands the devices it chose to whoever has this attribute and has none."""
        return

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device]) -> None:
        if len(devices) > 1:
            raise ValueError(
                f"DPGradientDropStrategy trains on one device, got {len(devices)}: use DPGradientDropDDPStrategy"
            )
        self._root_device = devices[0]

    @property
    def num_nodes(self) -> int:
        """One."""
        return 1

    @num_nodes.setter
    def num_nodes(self, nodes: int) -> None:
        if nodes > 1:
            raise ValueError(f"DPGradientDropStrategy trains on one node, got {nodes}: use DPGradientDropDDPStrategy")


class DPGradientDropDDPStrategy(PrivateTraining, DDPStrategy):
    """Private training on several processes: ``"dp_gradient_drop_ddp"``, ``..._ddp_spawn``, ``..._ddp_fork``.

    Each process draws from its own share of the samples; the clipped sums of the active coordinates are added up, and
    every process adds the same noise, so that parameters stay equal bit for bit. The loader's batch size is that of
    a process. Sums of a step are never shared before the noise but in that one reduction.

    Args:
        noise_multiplier: See :class:`DPGradientDropStrategy`, as for all that follow.
        target_epsilon: See there.
        delta: See there.
        max_epsilon: See there.
        max_grad_norm: See there.
        clipping: See there.
        drop_rate: See there.
        granularity: See there.
        selection: See there.
        max_physical_batch_size: See there.
        poisson_sampling: See there.
        options: See there.
        ledger: See there; the processes agree on it.
        kwargs: Of Lightning's DDPStrategy; what concerns its reducer has no effect.
    """

    strategy_name = "dp_gradient_drop_ddp"

    _in_user_step = False
    _metrics: tuple[Metric, ...] = ()
    _connector: Any = None

    def configure_ddp(self) -> None:
        """Give every process the parameters of the first; no reducer, as autograd makes no weight gradient."""
        _sync_module_states(self._module())

    def setup(self, trainer: Trainer) -> None:
        """Refuse synchronised batch normalisation, then set up."""
        if trainer.state.fn == TrainerFn.FITTING and self._layer_sync is not None:
            raise ValueError("sync_batchnorm=True mixes samples of all processes: leave it out and use GroupNorm")
        super().setup(trainer)

    def on_train_start(self) -> None:
        """See to it that processes agree on what they logged before Lightning reduces it."""
        super().on_train_start()
        module = self._module()
        self._metrics = tuple(layer for layer in module.modules() if isinstance(layer, Metric))
        # of all that happens between the last batch of an epoch and the first reduction, this alone is not a hook
        self._connector = module.trainer._logger_connector
        self._connector.epoch_end_reached = self._epoch_end_reached

    def _epoch_end_reached(self) -> None:
        trainer = self._module().trainer
        if trainer.training:
            with self._without_others():
                agree_on_logged(trainer._results, self._module(), self.reduce)
        type(self._connector).epoch_end_reached(self._connector)

    def teardown(self) -> None:
        """Give the Trainer back as it was."""
        if self._connector is not None:
            vars(self._connector).pop("epoch_end_reached", None)
        self._connector, self._metrics = None, ()
        super().teardown()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the user's step without collective calls: another process may have no sample and not run it."""
        with self._without_others(), metrics_of_the_process(self._metrics):
            return super().training_step(*args, **kwargs)

    @contextmanager
    def _without_others(self) -> Iterator[None]:
        self._in_user_step = True
        try:
            yield
        finally:
            self._in_user_step = False

    def reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any = "mean") -> Any:
        """Reduce over processes; inside of a training step, values that are logged stay those of the process."""
        if self._in_user_step:
            return tensor
        if isinstance(tensor, Tensor) and not tensor.is_floating_point() and reduce_op in ("mean", "avg"):
            # Lightning cuts off the mean of integers, among them the numbers of samples, which differ here
            tensor = tensor.double()
        return super().reduce(tensor, group, reduce_op)

    def all_gather(self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
        """Gather from all processes, which a training step must not do: it would mix samples.

        Raises:
            RuntimeError: Called from a training step.
        """
        if self._in_user_step:
            raise RuntimeError(
                "training_step gathers tensors of other processes: a sample's loss would depend on other samples, "
                "and a process that drew none would not take part"
            )
        gathered: Tensor = super().all_gather(tensor, group, sync_grads)
        return gathered

    def _add_up(self, tensor: Tensor) -> Tensor:
        torch.distributed.all_reduce(tensor)
        return tensor

    def _configure_launcher(self) -> None:
        super()._configure_launcher()
        if isinstance(self._launcher, _MultiProcessingLauncher):
            method: Literal["spawn", "fork", "forkserver"] = self._launcher._start_method
            self._launcher = _LedgerLauncher(self, start_method=method)


class _LedgerLauncher(_MultiProcessingLauncher):
    """Brings the ledger back from processes that were started for a fit and end with it."""

    def get_extra_results(self, trainer: Trainer) -> dict[str, Any]:
        strategy = trainer.strategy
        assert isinstance(strategy, PrivateTraining)
        return {**super().get_extra_results(trainer), CHECKPOINT_KEY: strategy._budget.state_dict()}

    def update_main_process_results(self, trainer: Trainer, extra: dict[str, Any]) -> None:
        super().update_main_process_results(trainer, extra)
        strategy = trainer.strategy
        assert isinstance(strategy, PrivateTraining)
        # it began as a copy of ours
        strategy.ledger.load_state_dict(extra[CHECKPOINT_KEY]["ledger"])
        strategy._budget.load_state_dict(extra[CHECKPOINT_KEY])
