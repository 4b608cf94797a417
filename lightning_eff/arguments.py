"""What is said of an argument that cannot be meant: the same words in every room, before any work is done.

``<name> must <what it must be>, got <what came>``. A truth value is neither a whole number nor a number here, and NaN
lies in no range.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any, TypeVar

T = TypeVar("T")


def check_whole(name: str, value: Any, least: int = 1, most: int | None = None) -> None:
    """Raise a ValueError unless ``value`` is a whole number of at least ``least``, and at most ``most``."""
    whole = not isinstance(value, bool) and isinstance(value, Integral)
    if not whole or value < least or (most is not None and value > most):
        wanted = f">= {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be a whole number {wanted}, got {value!r}")


def check_number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
) -> None:
    """Raise a ValueError unless ``value`` is a finite number within the bounds.

    Args:
        name: what the user calls it.
        value: what came.
        above: bound from below that is outside of the range.
        least: bound from below that belongs to it.
        below: bound from above that is outside of the range.
        most: bound from above that belongs to it.
    """
    number = not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)
    low_holds = number and (above is None or value > above) and (least is None or value >= least)
    if not low_holds or (below is not None and value >= below) or (most is not None and value > most):
        low = None if above is None and least is None else f"({above}" if least is None else f"[{least}"
        high = None if below is None and most is None else f"{below})" if most is None else f"{most}]"
        if low is not None and high is not None:
            wanted = f"lie in {low}, {high}"
        elif low is not None:
            wanted = f"be {'>' if least is None else '>='} {low[1:]}"
        elif high is not None:
            wanted = f"be {'<' if most is None else '<='} {high[:-1]}"
        else:
            wanted = "be a number"
        infinite = isinstance(value, float) and math.isinf(value)
        raise ValueError(f"{name} must {wanted}{' and finite' if infinite else ''}, got {value!r}")


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Raise a ValueError that lists the choices unless ``value`` is one of them, also in type."""
    choices = list(choices)
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")


def plain(value: T) -> T:
    """The same with Python's numbers in the place of NumPy's, also within dicts, lists and tuples.

    Checkpoints that are read with ``weights_only=True`` hold no others, and seeds must be Python's.
    """
    if isinstance(value, dict):
        return {plain(key): plain(one) for key, one in value.items()}  # type: ignore[return-value]
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))  # type: ignore[call-arg, call-overload]
    if isinstance(value, Real) and not isinstance(value, bool) and type(value).__module__ == "numpy":
        return int(value) if isinstance(value, Integral) else float(value)  # type: ignore[return-value]
    return value
