"""Frames of a Trainer's loaders read outside of its own loops, and what its processes tell each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_eff.lidar.frames import Frame, frames_of
from lightning_eff.lidar.journal import fingerprint
from lightning_eff.surgery.state import untouched_generators


def frames_in(inputs: Mapping[str, Any], target: Tensor) -> list[Frame]:
    """The frames of a batch that was split; those without a `sample_id` are named after what they show.

    Loaders shuffle, and samplers repeat frames to give all processes equally many: a frame must have the same name
    wherever it comes up.

    Args:
        inputs: `rgb`, `sparse`, `line_idx`, optionally `sample_id` and `sequence`.
        target: `[B, 1, H, W]` in metres.
    """
    frames = frames_of(inputs, target)
    if "sample_id" in inputs:
        return frames
    return [replace(frame, id=fingerprint(frame.sparse, frame.rgb)) for frame in frames]


class Reader:
    """The frames of a loader, on the module's device, as a step gets them.

    Args:
        trainer: that runs.
        module: its module.
        stage: whose loaders are read: the training loader of `"fit"`, or those of `"validate"` and `"test"`.
        split: a batch's frames.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        stage: Literal["fit", "validate", "test"],
        split: Callable[[Any], list[Frame]],
    ) -> None:
        loops: dict[str, Any] = {
            "fit": trainer.fit_loop,
            "validate": trainer.validate_loop,
            "test": trainer.test_loop,
        }
        loop = loops[stage]
        limits = [loop.max_batches] if stage == "fit" else loop._max_batches
        loaders = loop._combined_loader.flattened
        if stage == "fit":
            limits = limits * len(loaders)
        self._loaders = list(zip(loaders, limits, strict=True))
        self._trainer, self._module, self._split = trainer, module, split

    def frames(self) -> Iterator[Frame]:
        """Read once more; the global random generators do not notice."""
        for loader, limit in self._loaders:
            for batch in _batches(loader, limit):
                yield from self._split(self._on_device(batch))

    def _on_device(self, batch: Any) -> Any:
        return on_device(self._trainer, self._module, batch)


def on_device(trainer: Trainer, module: LightningModule, batch: Any) -> Any:
    """A batch as the module's steps get it."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = module._on_before_batch_transfer(batch)
    return trainer.strategy.batch_to_device(batch, module.device)


def validation_batches(trainer: Trainer, loader: Iterable[Any] | None = None) -> Iterator[Any]:
    """Batches of a running fit's validation data, or this process's share of those of another loader.

    Args:
        trainer: inside of a fit.
        loader: read instead of the validation data; its batches are dealt out to the processes in turn.
    """
    if loader is not None:
        yield from islice(loader, trainer.global_rank, None, trainer.world_size)
        return
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.setup_data()  # keeps what is there; no epoch may have validated yet
    combined = loop._combined_loader
    assert combined is not None
    for loader, limit in zip(combined.flattened, loop._max_batches, strict=True):
        yield from _batches(loader, limit)


def _batches(loader: Any, limit: float) -> Iterator[Any]:
    held = getattr(loader, "_iterator", None)  # persistent workers are in a pass of the trainer's own
    if held is not None:
        loader._iterator = None
    try:
        with untouched_generators():  # a loader's iterator takes its seed from torch when it is made
            batches = islice(iter(loader), None if limit == float("inf") else int(limit))
        yield from batches
    finally:
        if held is not None:
            loader._iterator = held


def gathered(mine: Any) -> list[Any]:
    """An object of every process, in their order."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [mine]
    every: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, mine)
    return every
