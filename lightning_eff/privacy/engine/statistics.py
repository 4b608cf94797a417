"""Statistics of the batch are refused wherever a step computes them, also in layers that train nothing.

A layer without parameters, a frozen one, one that is put into training mode inside of the step, a call of the function
itself: each mixes the samples of a batch, and running statistics keep them without noise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from lightning_eff.privacy.engine.recording import GUARDS


def _refuse_batch_norm(running_mean: Any, running_var: Any, training: bool) -> None:
    """Raise ValueError where a batch norm uses the statistics of the batch."""
    if training or running_mean is None or running_var is None:
        raise ValueError(
            "a batch norm that uses the statistics of the batch mixes samples, so no sample has a gradient of its "
            "own: call eval() on it to freeze its statistics, or put a GroupNorm in its place"
        )


def _refuse_instance_norm(running_mean: Any, use_input_stats: bool) -> None:
    """Raise ValueError where an instance norm keeps statistics of the batch."""
    if use_input_stats and running_mean is not None:
        raise ValueError(
            "an instance norm with track_running_stats=True in training mode averages the batch into its running "
            "statistics, which no noise protects: set track_running_stats=False, or call eval() on it"
        )


def _batch_norm(
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> None:
    _refuse_batch_norm(running_mean, running_var, training)


def _instance_norm(
    input: Any,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> None:
    _refuse_instance_norm(running_mean, use_input_stats)


def _torch_batch_norm(
    input: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, training: bool, *others: Any
) -> None:
    _refuse_batch_norm(running_mean, running_var, training)


def _torch_instance_norm(
    input: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, use_input_stats: bool, *others: Any
) -> None:
    _refuse_instance_norm(running_mean, use_input_stats)


GUARDS.update(
    {
        functional.batch_norm: _batch_norm,
        functional.instance_norm: _instance_norm,
        torch.batch_norm: _torch_batch_norm,
        torch.native_batch_norm: _torch_batch_norm,
        torch.instance_norm: _torch_instance_norm,
    }
)
