"""Sizes of a network's parameters: what was measured or traced holds as long as they stay."""

from __future__ import annotations

from typing import TypeAlias

from torch import nn

_Shapes: TypeAlias = dict[str, tuple[int, ...]]


class Sizes:
    """Shapes of all parameters as they were.

    Args:
        network: None takes those that :meth:`changed` or :meth:`resized` sees first, of a network that is still being
            put together.
    """

    def __init__(self, network: nn.Module | None = None) -> None:
        self._seen = None if network is None else _sizes(network)

    def changed(self, network: nn.Module) -> bool:
        """Whether the network has other parameters now, in name or in shape."""
        now, before = self._both(network)
        return now != before

    def resized(self, network: nn.Module) -> bool:
        """Whether parameters have other shapes now, as after channels were removed.

        Parameters that came or went tell nothing: layers were quantised, parametrized or given adapters.
        """
        now, before = self._both(network)
        return any(before.get(name, shape) != shape for name, shape in now.items())

    def replaced(self, network: nn.Module) -> bool:
        """Whether some parameters went and others came: layers stand in the place of others, experts for instance."""
        now, before = self._both(network)
        return bool(now.keys() - before.keys() and before.keys() - now.keys())

    def _both(self, network: nn.Module) -> tuple[_Shapes, _Shapes]:
        now = _sizes(network)
        if self._seen is None:
            self._seen = now
        return now, self._seen


def _sizes(network: nn.Module) -> _Shapes:
    return {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
