"""Run a network's own training step without leaving a trace in it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_eff.surgery.state import parameters_require_grad, quiet_model


@contextmanager
def borrowed(model: nn.Module) -> Iterator[None]:
    """Freeze ``model`` in evaluation mode; on leaving, also by an exception, everything about it is as it was.

    That is parameters, buffers, ``requires_grad``, modes, random generators, and what modules hold in attributes:
    tensors (the state of metrics), lists, dicts and sets, however deep. What objects of other kinds count in themselves
    is not put back.
    """
    with ExitStack() as stack:
        stack.enter_context(_untouched_attributes(model))
        stack.enter_context(quiet_model(model))
        stack.enter_context(parameters_require_grad(model, False))
        stack.enter_context(torch.enable_grad())
        yield


@contextmanager
def _untouched_attributes(model: nn.Module) -> Iterator[None]:
    back: list[Callable[[], None]] = []
    seen: set[int] = set()

    def remember(value: Any) -> None:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, Tensor):
            back.append(_tensor(value))
        elif isinstance(value, list | dict | set | deque):
            back.append(_container(value))
            for item in list(value.values() if isinstance(value, dict) else value):
                remember(item)

    for module in model.modules():
        for value in (*vars(module).values(), *module._parameters.values(), *module._buffers.values()):
            remember(value)
        back.append(_container(vars(module)))
    try:
        yield
    finally:
        for restore in back:
            restore()


def _container(held: Any) -> Callable[[], None]:
    content = list(held.items()) if isinstance(held, dict) else list(held)

    def restore() -> None:
        held.clear()
        held.update(content) if isinstance(held, dict | set) else held.extend(content)

    return restore


def _tensor(held: Tensor) -> Callable[[], None]:
    content = held.detach().clone()

    def restore() -> None:
        with torch.no_grad():
            if not torch.equal(held, content):
                held.copy_(content)

    return restore
