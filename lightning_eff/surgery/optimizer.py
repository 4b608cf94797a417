"""Carry the state of an optimizer across a cut: momenta lose the channels that their parameters lose."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer


def slice_state(optimizer: Optimizer, parameter: Tensor, old_shape: torch.Size, kept: Mapping[int, Tensor]) -> None:
    """Slice every state tensor of ``parameter`` as the parameter was sliced.

    A state tensor follows when each of its sizes is the parameter's old one or 1 (factored and row-wise states);
    scalars such as ``step`` stay. State of another layout is dropped with a warning. LBFGS keeps one flat history
    over all parameters, which is cleared.

    Args:
        optimizer: any optimizer; nothing happens when it does not hold the parameter.
        parameter: the parameter, already smaller.
        old_shape: its shape before.
        kept: dimension -> kept positions, int64.
    """
    if isinstance(optimizer, LBFGS):
        optimizer.state.clear()
        optimizer._numel_cache = None
        return
    state = optimizer.state.get(parameter) if isinstance(parameter, nn.Parameter) else None
    if not state:
        return
    for name, value in list(state.items()):
        if not isinstance(value, Tensor) or value.numel() == 1:
            continue
        if value.ndim != len(old_shape) or any(s not in (1, o) for s, o in zip(value.shape, old_shape, strict=True)):
            warnings.warn(
                f"{type(optimizer).__name__} state {name!r} of shape {list(value.shape)} does not follow its parameter "
                f"of shape {list(old_shape)}: the state of this parameter starts afresh after the cut",
                stacklevel=2,
            )
            del optimizer.state[parameter]
            return
        for d, positions in kept.items():
            if value.shape[d] == old_shape[d]:
                value = value.index_select(d, positions.to(value.device))
        if parameter.is_contiguous(memory_format=torch.channels_last) and not parameter.is_contiguous():
            value = value.contiguous(memory_format=torch.channels_last)
        state[name] = value
