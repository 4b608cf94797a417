"""What importance switches are trained on: the loss of a batch, and batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_eff.batch import batch_size
from lightning_eff.pruning.samples import alone, samples_in


@dataclass(frozen=True)
class Likelihood:
    """The loss that switches are trained on.

    Attributes:
        model: the network whose channels are gated.
        loss: ``(batch, number of the batch) -> scalar``, the mean over the batch.
        root: a module that holds everything ``loss`` runs; the model itself, or the LightningModule around it.
        forward: one forward pass on a few samples, to find what gates reach; None takes ``loss`` on two samples.
        other: the same on other samples.
        autocast: context of every forward pass.
    """

    model: nn.Module
    loss: Callable[[Any, int], Tensor]
    root: nn.Module
    forward: Callable[[], Any] | None = None
    other: Callable[[], Any] | None = None
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True)
class Data:
    """Batches on the network's device.

    Attributes:
        batches: starts a new pass.
        steps: batches in a pass; None where that is unknown.
        size: samples in the data set over all processes; None where that is unknown.
        reduce: sums a tensor over all processes.
    """

    batches: Callable[[], Iterable[Any]]
    steps: int | None = None
    size: int | None = None
    reduce: Callable[[Tensor], Tensor] = alone

    def limit(self, most: int | float | None) -> int | None:
        """Batches to take in a pass: ``most`` of them, or this fraction."""
        if isinstance(most, float):
            if self.steps is None:
                raise ValueError(f"max_batches={most} is a fraction, but the loader has no length: give a number")
            return max(1, math.ceil(most * self.steps))
        return self.steps if most is None else most if self.steps is None else min(most, self.steps)


def size_of(loader: Any) -> int | None:
    """Samples in the data set of a loader, or in a list of batches; None where that is unknown."""
    if isinstance(loader, list | tuple):
        return sum(batch_size(batch) for batch in loader)
    return samples_in(loader)
