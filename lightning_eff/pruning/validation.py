"""What a network is worth: what its module's own validation logs, or its mean loss, outside of the Trainer's loops.

Both print as what they depend on, data included, so that one score can be told from another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_eff.batch import LossFunction, batch_size
from lightning_eff.pruning.borrowing import borrowed
from lightning_eff.pruning.memory import digest


class ValidationScore:
    """Run ``validation_step`` over batches and return what it logs under one name.

    Values are averaged over samples; metrics are reset before, computed at the end, and left as they were.

    Args:
        pl_module: the module; nothing about it changes.
        monitor: the name it logs.
        batches: batches on its device.
        autocast: context of every step.

    Raises:
        ValueError: the module has no ``validation_step``, or logs no such name; the message lists those it logs.
    """

    def __init__(
        self,
        pl_module: LightningModule,
        monitor: str,
        batches: Sequence[Any],
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        if not is_overridden("validation_step", pl_module):
            raise ValueError(
                f"{type(pl_module).__name__} has no validation_step that could log {monitor!r}: leave monitor=None to "
                "judge by the loss of training_step"
            )
        self._pl_module = pl_module
        self._monitor = monitor.removesuffix("/dataloader_idx_0")  # Lightning's name where there are several loaders
        self._batches = batches
        self._autocast = autocast
        self._name = f"ValidationScore({monitor!r}, {digest(batches)})"

    def __repr__(self) -> str:
        return self._name

    def __call__(self, model: nn.Module | None = None) -> float:
        """Return the value for the module as it is now."""
        logged = _Logged()
        module = self._pl_module
        with borrowed(module), _validating(module), torch.no_grad(), self._autocast():
            vars(module).update(log=logged.log, log_dict=logged.log_dict)  # borrowed takes them back
            for metric in module.modules():
                if isinstance(metric, Metric):
                    metric.reset()
                    metric.sync_on_compute = False  # every process validates by itself
            module.on_validation_start()
            module.on_validation_epoch_start()
            for number, batch in enumerate(self._batches):
                logged.batch = batch
                module.on_validation_batch_start(batch, number, 0)
                output = module.validation_step(*self._arguments(batch, number))
                module.on_validation_batch_end(output, batch, number, 0)
            module.on_validation_epoch_end()
            module.on_validation_end()
            return logged.value(self._monitor)

    def _arguments(self, batch: Any, number: int) -> tuple[Any, ...]:
        step = self._pl_module.validation_step
        if is_param_in_hook_signature(step, "dataloader_idx"):
            return batch, number, 0
        return (batch, number) if is_param_in_hook_signature(step, "batch_idx", min_args=2) else (batch,)


class LossScore:
    """Mean loss per sample over batches.

    Args:
        loss_fn: ``(model, batch) -> loss``, the mean over the batch.
        batches: batches on the model's device.
        known_as: tells the loss from another one.
    """

    def __init__(self, loss_fn: LossFunction, batches: Sequence[Any], known_as: Any = None) -> None:
        self._loss_fn = loss_fn
        self._batches = batches
        self._name = f"LossScore({digest(known_as, batches)})"

    def __repr__(self) -> str:
        return self._name

    def __call__(self, model: nn.Module) -> float:
        """Return the loss of the network as it is now."""
        total = count = 0.0
        for batch in self._batches:
            total += float(self._loss_fn(model, batch).detach()) * _samples(batch)
            count += _samples(batch)
        return total / count


class _Logged:
    """Takes what a module logs."""

    def __init__(self) -> None:
        self.batch: Any = None
        self._sums: dict[str, tuple[float, float]] = {}
        self._metrics: dict[str, Metric] = {}
        self._refused: set[str] = set()

    def log(
        self, name: str, value: Any, *args: Any, reduce_fx: Any = "mean", batch_size: int | None = None, **kwargs: Any
    ) -> None:
        if reduce_fx not in ("mean", torch.mean):
            self._refused.add(name)
        if isinstance(value, Metric):
            self._metrics[name] = value
            return
        weight = float(batch_size if batch_size is not None else _samples(self.batch))
        total, count = self._sums.get(name, (0.0, 0.0))
        number = float(value.detach().float().mean()) if isinstance(value, Tensor) else float(value)
        self._sums[name] = total + weight * number, count + weight

    def log_dict(self, dictionary: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        for name, value in dictionary.items():
            self.log(name, value, **kwargs)

    def value(self, name: str) -> float:
        if name not in {*self._sums, *self._metrics}:
            name = name.removesuffix("_epoch")  # Lightning's name where a value is logged on steps too
        if name in self._refused:
            raise ValueError(f"{name!r} is logged with another reduce_fx than the mean: monitor a mean or a metric")
        if name in self._metrics:
            return float(self._metrics[name].compute())
        if name not in self._sums:
            known = ", ".join(map(repr, (*self._sums, *self._metrics))) or "nothing"
            raise ValueError(f"validation does not log {name!r}; it logs {known}")
        total, count = self._sums[name]
        return total / count


@contextmanager
def _validating(pl_module: LightningModule) -> Iterator[None]:
    """Let ``trainer.validating`` be true where there is a Trainer."""
    trainer = pl_module._trainer
    if trainer is None:
        yield
        return
    stage = trainer.state.stage
    trainer.validating = True
    try:
        yield
    finally:
        trainer.state.stage = stage


def _samples(batch: Any) -> int:
    try:
        return batch_size(batch)
    except ValueError:
        return 1
