"""Whether the parameters of a module are still those that training began with.

A callback that cuts channels, or a module that takes another head, exchanges parameters for new ones. What it looked
at in order to do so, no accountant knows.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lightning_eff.privacy.checks import first_few


class KnownParameters:
    """The parameters of a module as they were when they were last looked at: objects, and their shapes.

    Args:
        module: The module that is trained.
    """

    def __init__(self, module: nn.Module) -> None:
        self._seen = _parameters(module)

    def look(self, module: nn.Module) -> list[str]:
        """Return the names of parameters that were replaced, resized, added or removed since the last look."""
        before, self._seen = self._seen, _parameters(module)
        return sorted(
            name
            for name in {**before, **self._seen}
            if name not in before or name not in self._seen or not _same(before[name], self._seen[name])
        )


def replaced(names: Sequence[str]) -> str:
    """The caveat of a ledger about parameters with these names."""
    return (
        f"A callback or the module replaced or resized parameters during training ({first_few(names)}): what it looked "
        "at is not covered."
    )


def _parameters(module: nn.Module) -> dict[str, tuple[Tensor, tuple[int, ...]]]:
    return {name: (parameter, tuple(parameter.shape)) for name, parameter in module.named_parameters()}


def _same(one: tuple[Tensor, tuple[int, ...]], other: tuple[Tensor, tuple[int, ...]]) -> bool:
    return one[0] is other[0] and one[1] == other[1]
