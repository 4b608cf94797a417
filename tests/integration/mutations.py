"""Valid files and documents, made wrong at a place that hypothesis chooses."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

FAST = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)

ODD = [
    None,
    True,
    -1,
    0,
    3,
    2**40,
    10**400,
    0.5,
    -2.5,
    math.nan,
    math.inf,
    "",
    "x",
    "1",
    "é/../..",
    [],
    [[]],
    [None, 1],
    {},
    {"x": 1},
]


def places(document: Any) -> list[tuple[Any, ...]]:
    """Paths to every entry of a nested document, its root first."""
    found: list[tuple[Any, ...]] = [()]
    if isinstance(document, dict):
        for key, value in document.items():
            found += [(key, *rest) for rest in places(value)]
    elif isinstance(document, list | tuple):
        for i, value in enumerate(document[:3]):  # the others are like the first
            found += [(i, *rest) for rest in places(value)]
    return found


@st.composite
def mutated(draw: st.DrawFn, document: Any, *, root: bool = True) -> Any:
    """The document with one entry replaced, deleted, doubled or cut; ``root`` says if all of it may be replaced."""
    path = draw(st.sampled_from(places(document)[0 if root else 1 :]))
    how = draw(st.sampled_from(["replace", "replace", "delete", "add", "cut"]))
    odd = draw(st.sampled_from(ODD))
    return _changed(copy.deepcopy(document), path, how, odd)


def _changed(document: Any, path: tuple[Any, ...], how: str, odd: Any) -> Any:
    if not path:
        if isinstance(document, Tensor):
            return {"cut": document[:-1] if document.ndim else odd, "add": document.unsqueeze(0)}.get(how, odd)
        return document[:-1] if how == "cut" and isinstance(document, str | list | tuple) else odd
    key, *rest = path
    entries: Any = dict(document) if isinstance(document, dict) else list(document)
    if rest or how in ("replace", "cut"):
        entries[key] = _changed(entries[key], tuple(rest), how, odd)
    elif how == "delete":
        del entries[key]
    elif isinstance(entries, dict):
        entries["strange"] = 1
    else:
        entries.append(entries[key])
    return tuple(entries) if isinstance(document, tuple) else entries


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes cut off, with some taken out, overwritten or put in."""
    at = draw(st.integers(0, len(content) - 1))
    how = draw(st.sampled_from(["cut", "out", "over", "in"]))
    junk = draw(st.sampled_from([b"\x00", b"\xff\xfe", b"{", b'"', b"}", b",", b"\n", b"9" * 30, b"-", b"NaN", b"e"]))
    if how == "cut":
        return content[:at]
    if how == "out":
        return content[:at] + content[at + draw(st.integers(1, 40)) :]
    return content[:at] + junk + content[at + (len(junk) if how == "over" else 0) :]


def refused(action: Callable[[], Any]) -> str | None:
    """Do something: why it was refused, by a ``ValueError``, if it was; any other error is one of the test."""
    try:
        action()
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return None


def only_value_errors(load: Callable[[], Any], use: Callable[[Any], Any] = lambda loaded: None) -> None:
    """Load, and use what was loaded: nothing but ``ValueError`` with a reason may come out of either."""
    why = refused(lambda: use(load()))
    assert why is None or (why.startswith("ValueError: ") and len(why) > 30), why


def rewritten(path: Path, content: bytes) -> Path:
    """The path, with other content."""
    path.write_bytes(content)
    return path


def same(one: Any, other: Any) -> bool:
    """Whether two nested documents are equal, NaN to NaN."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
    return bool(one == other) or (one != one and other != other)
