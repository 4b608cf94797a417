"""Sizes of a network's parameters: what was measured or traced holds as long as they stay."""

from __future__ import annotations

from torch import nn


class Sizes:
    """Shapes of all parameters as they were.

    Args:
        network: None takes those that :meth:`changed` sees first, of a network that is still being put together.
    """

    def __init__(self, network: nn.Module | None = None) -> None:
        self._seen = None if network is None else _sizes(network)

    def changed(self, network: nn.Module) -> bool:
        """Whether the network has other shapes now, as after channels were removed from it."""
        now = _sizes(network)
        if self._seen is None:
            self._seen = now
        return now != self._seen


def _sizes(network: nn.Module) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(parameter.shape) for parameter in network.parameters())
