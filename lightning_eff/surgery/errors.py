"""What can go wrong when channels are found, masked or cut."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PruningGraphError(RuntimeError):
    """The model's channels could not be traced; the model is as it was."""


class SurgeryError(RuntimeError):
    """A cut could not be made or does not equal the masked network; the model is as it was."""


class BudgetError(ValueError):
    """The asked-for size cannot be reached under the given limits."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> KeyError:
    """Return a KeyError for ``name`` that lists the closest known names."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=5, cutoff=0.3) or known[:5]
    return KeyError(f"no {kind} named {name!r}; close names: {', '.join(close) or 'none'} ({len(known)} in all)")
