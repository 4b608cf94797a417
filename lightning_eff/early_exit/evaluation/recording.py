"""One pass of all outputs over a trainer's data, in every process its share, outside of the trainer's own loops."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_eff.batch import batch_size, call_model
from lightning_eff.early_exit.module import EarlyExitModule
from lightning_eff.surgery.state import quiet_model

Data = Literal["val", "test"]
# loaders, and how many batches of each are read; None for all
Loaders = list[tuple[Iterable[Any], int | None]]
# inputs, labels [B], logits of the K outputs [B, C]
Outputs = tuple[Any, Tensor, list[Tensor]]


def loaders_of(trainer: Trainer, data: Data) -> Loaders:
    """Loaders of a running fit's validation data or a running test's data, as far as the trainer's limits go.

    In a test the validation data of its datamodule can be had too.
    """
    if data == "val":
        if not has_validation(trainer):
            return []
        loop: Any = trainer.fit_loop.epoch_loop.val_loop
        with _stage(trainer, data):
            if trainer.state.fn != TrainerFn.FITTING:
                trainer.datamodule.setup("validate")  # type: ignore[attr-defined]
            loop.setup_data()  # keeps what is there; no epoch may have validated yet
    else:
        loop = trainer.test_loop
    limits = [None if limit == float("inf") else int(limit) for limit in loop._max_batches]
    return list(zip(loop._combined_loader.flattened, limits, strict=True))


def has_validation(trainer: Trainer) -> bool:
    """Whether :func:`loaders_of` finds validation data."""
    source = trainer.fit_loop.epoch_loop.val_loop._data_source
    at_hand = trainer.state.fn == TrainerFn.FITTING or isinstance(source.instance, LightningDataModule)
    return bool(at_hand and source.is_defined() and trainer.limit_val_batches > 0)


@contextmanager
def all_outputs(trainer: Trainer, module: EarlyExitModule, loaders: Loaders, data: Data) -> Iterator[Iterator[Outputs]]:
    """Let batches be read, one loader after the other, with the logits of all outputs, as validation computes them.

    Modes, generators and the trainer's stage are put back on leaving.

    Args:
        trainer: that runs.
        module: its module, exits built.
        loaders: of :func:`loaders_of`.
        data: what they hold.
    """
    with (
        _stage(trainer, data),
        quiet_model(module),
        torch.no_grad(),
        trainer.precision_plugin.forward_context(),
    ):
        yield _outputs(trainer, module, loaders)


def gathered(values: Tensor) -> Tensor:
    """Rows of all processes, in the order of the processes; numbers of rows may differ."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    return torch.cat(gather_all_tensors(values.contiguous()))


def exits_of(pl_module: LightningModule, callback: str) -> EarlyExitModule:
    """Return the module if it has exits and their costs are known.

    Raises:
        ValueError: it has not, or they are not.
    """
    if not isinstance(pl_module, EarlyExitModule):
        raise ValueError(f"{callback} works on an EarlyExitModule, got a {type(pl_module).__name__}")
    if pl_module.network.num_exits == 0:
        raise ValueError(f"{callback} has nothing to do: the network has no exits")
    try:
        pl_module.network.costs  # noqa: B018
    except ValueError as error:
        raise ValueError(f"{callback} needs the costs of the exits: give the module cost=[...]") from error
    return pl_module


def _outputs(trainer: Trainer, module: EarlyExitModule, loaders: Loaders) -> Iterator[Outputs]:
    for loader, limit in loaders:
        for batch in islice(loader, limit):
            batch = trainer.precision_plugin.convert_input(batch)
            batch = module._on_before_batch_transfer(batch)
            inputs, target = module.split_batch(trainer.strategy.batch_to_device(batch, module.device))
            if batch_size(inputs):
                yield inputs, target, call_model(module.network, inputs)


@contextmanager
def _stage(trainer: Trainer, data: Data) -> Iterator[None]:
    """Let hooks see the stage the data belongs to, and not, say, augment it."""
    stage = trainer.state.stage
    trainer.state.stage = RunningStage.VALIDATING if data == "val" else RunningStage.TESTING
    try:
        yield
    finally:
        trainer.state.stage = stage
