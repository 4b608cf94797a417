"""BatchNorm statistics of a changed network: averages over given samples, nothing is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_eff.batch import SplitBatch, batch_size, call_model
from lightning_eff.pruning.repair.calibration import calibration_inputs
from lightning_eff.surgery.state import quiet_model


def recalibrate_norms(
    model: nn.Module, batches: Sequence[Any], *, split_batch: SplitBatch | None = None, samples: int = 512
) -> None:
    """Give every BatchNorm the mean and variance that its inputs have on ``batches``.

    Each batch is normed by its own statistics, as in training, and counts by its number of samples. A network without
    such layers is left alone. The statistics are those of before after an exception.

    Args:
        model: changed in place; modes and momentum are as before afterwards.
        batches: raw batches on the model's device.
        split_batch: ``batch -> (inputs, target)``, for batches of another form.
        samples: samples used at most.

    Raises:
        ValueError: there is not a single sample.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    norms = [norm for norm in norms if norm.running_mean is not None]
    if not norms:
        return
    seen = 0
    with quiet_model(model), torch.no_grad(), _learning(norms):
        for norm in norms:
            norm.reset_running_stats()
        for inputs in calibration_inputs(batches, split_batch, samples):
            size = batch_size(inputs)
            if size == 1 and seen:  # a remainder without a variance
                continue
            seen += size
            for norm in norms:
                norm.momentum = size / seen
            call_model(model, inputs)


@contextmanager
def _learning(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Put norms in training mode, on this process alone; restore momentum, and after an exception the statistics."""
    momentum = [norm.momentum for norm in norms]
    before = [{name: t.clone() for name, t in norm._buffers.items() if t is not None} for norm in norms]
    forwards: list[tuple[nn.Module, Callable[..., Any] | None]] = []
    try:
        for norm in norms:
            norm.training = True
            if isinstance(norm, nn.SyncBatchNorm):  # other processes may hold another network
                forwards.append((norm, norm.__dict__.get("forward")))
                norm.__dict__["forward"] = partial(_BatchNorm.forward, norm)
        yield
    except BaseException:
        for norm, tensors in zip(norms, before, strict=True):
            for name, tensor in tensors.items():
                _restore(norm._buffers[name], tensor)
        raise
    finally:
        for norm, value in zip(norms, momentum, strict=True):
            norm.momentum = value
        for synced, forward in forwards:
            if forward is None:
                del synced.__dict__["forward"]
            else:
                synced.__dict__["forward"] = forward


def _restore(tensor: Tensor | None, value: Tensor) -> None:
    if tensor is not None:
        tensor.copy_(value)
