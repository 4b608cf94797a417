"""Ask a multi-exit network for all it gives, and leave no trace: what every analysis stands on.

``B`` batch, ``C`` classes, ``E`` exits, ``K = E + 1`` outputs of which the last is the backbone's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn

from lightning_eff.batch import SplitBatch, call_model
from lightning_eff.batch import split_batch as default_split

Criterion = Callable[[Tensor, Tensor], Tensor]
"""``(logits [B, C], target) -> mean loss``, a scalar."""


def outputs_of(network: nn.Module, inputs: Any) -> list[Tensor]:
    """Logits of all K outputs.

    Raises:
        ValueError: the network gives something else than a list of tensors.
    """
    return _tensors(call_model(network, inputs), "forward")


def features_of(network: nn.Module, inputs: Any) -> list[Tensor]:
    """Features of all exits, then the backbone's output; batch first.

    Raises:
        ValueError: the network has no method ``features``, or it gives something else than a list of tensors.
    """
    method = getattr(network, "features", None)
    if not callable(method):
        raise ValueError(
            f"expected a network with a method features(*inputs) -> list of K tensors, got a {type(network).__name__}: "
            "give a MultiExitNetwork"
        )
    if isinstance(inputs, Mapping):
        return _tensors(method(**inputs), "features")
    return _tensors(method(*inputs) if isinstance(inputs, tuple | list) else method(inputs), "features")


def output_names(network: nn.Module, outputs: int) -> tuple[str, ...]:
    """Names of K outputs: the layers of the exits and "final", or numbers where the network does not name them."""
    exits = [str(name) for name in getattr(network, "exits", ())]
    if len(exits) != outputs - 1:
        exits = [f"exit {k}" for k in range(outputs - 1)]
    return (*exits, "final output" if "final" in exits else "final")


def batches_of(
    loader: Iterable[Any], network: nn.Module, split_batch: SplitBatch | None = None
) -> Iterator[tuple[Any, Any]]:
    """Go through ``loader`` and give ``(inputs, target)`` on the network's device.

    Raises:
        ValueError: the loader gave no batch.
    """
    split = split_batch or default_split
    device = next((tensor.device for tensor in (*network.parameters(), *network.buffers())), torch.device("cpu"))
    empty = True
    for batch in loader:
        empty = False
        inputs, target = split(move_data_to_device(batch, device))
        yield inputs, target
    if empty:
        raise ValueError("the loader gave no batch: expected one that gives at least one each time it is gone through")


@contextmanager
def own_buffers(model: nn.Module) -> Iterator[None]:
    """Let ``model`` work on copies of its buffers; on leaving it has its own ones back, never written to."""
    held = [(module, dict(module._buffers)) for module in model.modules()]
    copies: dict[Tensor, Tensor] = {}
    try:
        for module, buffers in held:
            for name, buffer in buffers.items():
                if buffer is not None:
                    if buffer not in copies:
                        copies[buffer] = buffer.detach().clone()
                    module._buffers[name] = copies[buffer]
        yield
    finally:
        for module, buffers in held:
            module._buffers.clear()
            module._buffers.update(buffers)


def _tensors(outputs: Any, what: str) -> list[Tensor]:
    if isinstance(outputs, list | tuple) and outputs and all(isinstance(output, Tensor) for output in outputs):
        return list(outputs)
    raise ValueError(
        f"expected {what} to give a list of K tensors, one an output, got a {type(outputs).__name__}: give a "
        "MultiExitNetwork"
    )
