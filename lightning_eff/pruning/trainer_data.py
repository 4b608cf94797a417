"""The Trainer's data for scoring and measuring: loaders, device transfer, sums over processes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain, islice, zip_longest
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from lightning_eff.batch import SplitBatch, batch_size, call_model
from lightning_eff.batch import split_batch as split_pair
from lightning_eff.data.loading import ResumableLoader
from lightning_eff.pruning.samples import Samples, length_of, samples_in
from lightning_eff.pruning.settings import Calibration
from lightning_eff.pruning.values import ValueFunction, per_sample
from lightning_eff.surgery.state import quiet_model

NO_VALIDATION = "There is no validation loader: training data is used instead."


class TrainerData:
    """Batches of a running Trainer, on the module's device.

    Args:
        trainer: inside of ``fit``.
        pl_module: its module.
        calibration: which loader, how many samples.
        notes: what a reader of the report must know is appended here.
        split_batch: ``batch -> (inputs, target)``, for batches of another form.
    """

    def __init__(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        calibration: Calibration,
        notes: list[str],
        split_batch: SplitBatch | None = None,
    ) -> None:
        self._trainer = trainer
        self._pl_module = pl_module
        self._calibration = calibration
        self._source = calibration.source or "val"
        self._split_batch = split_batch or split_pair
        self._notes = notes

    def loader(self, source: Literal["val", "train"] | None = None) -> Any:
        """The loader that is read for calibration, or that of the Trainer for ``source``."""
        own = self._calibration.loader
        return own if own is not None and source is None else self._loader(source or self._source)[0]

    def first(self) -> Any:
        """Inputs of the first calibration batch."""
        for batch in self._batches(self._source):
            return self._split_batch(batch)[0]
        raise ValueError("the calibration loader gave no batch: give Calibration(loader=...) one that does")

    def samples(self, groups: int | None) -> Samples:
        """Calibration samples; every process takes its share."""
        return Samples.collect(
            self._batches(self._source),
            self._calibration.samples,
            self._split_batch,
            groups=groups,
            reduce=self.sum,
            world_size=self._trainer.world_size,
        )

    def batches(self) -> Iterator[Any]:
        """Whole batches of the calibration loader, as ``training_step`` gets them; every process has its own.

        Raises:
            ValueError: the Trainer has several loaders, whose batches come in combinations.
        """
        trainer = self._trainer
        several = trainer.train_dataloader if self._source == "train" else trainer.val_dataloaders
        if self._calibration.loader is None and isinstance(several, list | tuple | dict) and len(several) > 1:
            raise ValueError(
                f"there are {len(several)} loaders: give Calibration(loader=...) one whose batches the loss can take"
            )
        return self._batches(self._source)

    def shared(self, samples: int) -> list[Any]:
        """Whole batches of about ``samples`` samples, the same on every process: those of the first one."""
        taken: list[Any] = []
        count = 0
        for batch in self.batches():
            taken.append(batch)
            count += batch_size(batch)
            if count >= samples:
                break
        if self._trainer.world_size == 1:
            return taken
        strategy, device = self._trainer.strategy, self._pl_module.device
        on_cpu = strategy.broadcast(strategy.batch_to_device(taken, torch.device("cpu")))
        return list(strategy.batch_to_device(on_cpu, device))

    def whole_validation(self, most: int | float | None = None) -> list[Any]:
        """Batches of the validation set, on every process the same ones from its beginning.

        Args:
            most: take at most so many batches (int), or this fraction of them (float); None takes all.
        """
        loader, limit = self._loader("val")
        if self._trainer.world_size > 1 and isinstance(loader, DataLoader) and _has_a_sampler_of_its_own(loader):
            loader, limit = self._joined(loader, limit), None
        elif isinstance(getattr(loader, "sampler", None), DistributedSampler):
            share = length_of(loader)
            loader = DataLoader(loader.dataset, loader.batch_size, collate_fn=loader.collate_fn)
            if limit is not None and share is not None:  # the limit counts batches of one process
                limit = None if limit >= share else limit * self._trainer.world_size
        steps = length_of(loader)
        if steps is not None and limit is not None:
            steps = min(steps, limit)
        if isinstance(most, float):
            most = 1 if steps is None else max(1, math.ceil(most * steps))
        several = self._trainer.val_dataloaders
        if isinstance(several, list | tuple | dict) and len(several) > 1:
            note = f"Candidates are judged on the first of {len(several)} validation loaders."
            if note not in self._notes:
                self._notes.append(note)
        return list(self._on_device(loader, min((n for n in (limit, most) if n is not None), default=None)))

    def _joined(self, loader: DataLoader[Any], limit: int | None) -> DataLoader[Any]:
        """A loader of the batches of all processes, ``limit`` of each, with every sample once."""
        mine = [list(batch) for batch in islice(loader.batch_sampler, limit)]  # type: ignore[arg-type]
        parts: list[Any] = [None] * self._trainer.world_size
        torch.distributed.all_gather_object(parts, mine)
        taken: set[Any] = set()
        batches = []
        for batch in chain.from_iterable(zip_longest(*parts, fillvalue=())):
            new = [index for index in batch if index not in taken]  # samplers repeat some to give all equally many
            taken.update(new)
            if new:
                batches.append(new)
        return DataLoader(loader.dataset, batch_sampler=batches, collate_fn=loader.collate_fn)

    def extent(self) -> tuple[int | None, int | None]:
        """Batches of this process, and samples of the whole data set, of the calibration loader; None for unknown."""
        own = self._calibration.loader
        loader, limit = (own, None) if own is not None else self._loader(self._source)
        steps = length_of(loader)
        if steps is not None and limit is not None:
            steps = min(steps, limit)
        return limit if steps is None else steps, samples_in(loader)

    def mean_value(self, model: nn.Module, value: ValueFunction, most: int | None = None) -> float:
        """Mean value per sample over the validation loader, or its first ``most`` batches, and all processes."""
        total = torch.zeros(2, dtype=torch.float64)
        with quiet_model(self._pl_module), torch.no_grad(), self._trainer.precision_plugin.forward_context():
            for batch in islice(self._batches("val"), most):
                inputs, target = self._split_batch(batch)
                count = batch_size(inputs)
                values = per_sample(value, call_model(model, inputs), target, count)
                total += torch.tensor([float(values.sum()), count], dtype=torch.float64)
        total = self.sum(total)
        return float(total[0] / total[1])

    def sum(self, values: Tensor) -> Tensor:
        """Sum a tensor over all processes; the result is on the CPU where there are several."""
        if self._trainer.world_size == 1:
            return values
        strategy = self._trainer.strategy
        total = strategy.reduce(values.to(strategy.root_device), reduce_op="sum")
        assert isinstance(total, Tensor)
        return total.cpu()

    def _batches(self, source: str) -> Iterator[Any]:
        own = self._calibration.loader
        loader, limit = (own, None) if own is not None else self._loader(source)
        yield from self._on_device(loader, limit)

    def _on_device(self, loader: Any, limit: int | None) -> Iterator[Any]:
        aside = loader.aside() if isinstance(loader, ResumableLoader) else nullcontext()
        with _own_workers(loader), aside:
            for batch in islice(loader, limit):
                batch = self._trainer.precision_plugin.convert_input(batch)
                batch = self._pl_module._on_before_batch_transfer(batch)
                yield self._trainer.strategy.batch_to_device(batch, self._pl_module.device)

    def _loader(self, source: str) -> tuple[Any, int | None]:
        """The first loader for ``source`` and the most batches to take; training data where there is no other."""
        trainer = self._trainer
        val_loop = trainer.fit_loop.epoch_loop.val_loop
        loaders: Any = None
        limit: Any = None
        if source == "val" and val_loop._data_source.is_defined():  # without a loader, setup_data raises
            val_loop.setup_data()
            loaders, limit = trainer.val_dataloaders, trainer.num_val_batches
        if loaders is None or loaders in ([], {}):
            trainer.fit_loop.setup_data()
            loaders, limit = trainer.train_dataloader, trainer.num_training_batches
            if source != "train" and NO_VALIDATION not in self._notes:
                self._notes.append(NO_VALIDATION)
                rank_zero_warn(NO_VALIDATION)
        while isinstance(loaders, list | tuple | dict):
            loaders = next(iter(loaders.values() if isinstance(loaders, dict) else loaders))
        while isinstance(limit, list):
            limit = limit[0]
        return loaders, None if limit == float("inf") else int(limit)


def _has_a_sampler_of_its_own(loader: DataLoader[Any]) -> bool:
    """Whether what a loader reads cannot be told from its data set and batch size."""
    sampler, batches = loader.sampler, loader.batch_sampler
    wrapped = isinstance(sampler, DistributedSampler) and sampler.dataset is not loader.dataset
    return batches is not None and (wrapped or type(batches) is not BatchSampler)


@contextmanager
def _own_workers(loader: Any) -> Iterator[None]:
    """Let a loader with persistent workers be read beside a pass over it that has begun."""
    held = getattr(loader, "_iterator", None)
    if held is None:
        yield
        return
    loader._iterator = None
    try:
        yield
    finally:
        loader._iterator = held


@contextmanager
def silent_loggers(trainer: Trainer) -> Iterator[None]:
    """Keep from the loggers what a module writes to them while its steps are only asked for a score."""
    held = trainer.loggers
    trainer.loggers = [DummyLogger() for _ in held]
    try:
        yield
    finally:
        trainer.loggers = held
