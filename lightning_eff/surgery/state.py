"""Borrow a model: run it in evaluation mode and give it back as it was, also after an exception."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from torch import nn


class Generators:
    """The global random generators of Python, NumPy and torch, as they are when this is made."""

    def __init__(self) -> None:
        self._states = _collect_rng_states()

    def restore(self) -> None:
        """Set them back, as often as wanted."""
        _set_rng_states(self._states)


@contextmanager
def untouched_generators() -> Iterator[None]:
    """Give the global random generators back as they were."""
    generators = Generators()
    try:
        yield
    finally:
        generators.restore()


@contextmanager
def quiet_model(model: nn.Module) -> Iterator[None]:
    """Run ``model`` in evaluation mode, compiled parts eagerly; restore modes and random generators on leaving."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with untouched_generators(), torch.compiler.set_stance("force_eager"), torch.inference_mode(False):
            model.eval()
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def parameters_require_grad(model: nn.Module, value: bool) -> Iterator[None]:
    """Set ``requires_grad`` of every parameter, and put each one back on leaving."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(value)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def channels_last_weights(model: nn.Module) -> Iterator[None]:
    """Lay the weights of convolutions on the CPU out channels-last, where they run faster; values do not change."""
    weights = [
        (parameter, parameter.data)
        for module in model.modules()
        if isinstance(module, nn.Conv2d)
        for parameter in module.parameters(recurse=False)
        if parameter.ndim == 4 and parameter.device.type == "cpu"
    ]
    try:
        for parameter, data in weights:
            parameter.data = data.contiguous(memory_format=torch.channels_last)
        yield
    finally:
        for parameter, data in weights:
            parameter.data = data
