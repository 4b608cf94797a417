"""One column of a table as coordinates a generator can produce, and back.

Bounds, categories and cells are stated by the user as public knowledge; nothing here looks them up in private rows.
Messages name columns and numbers of rows, never a value.

Shapes: N rows, W coordinates of the column.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

_DATES = "dates must become numbers first, such as days since a day of your choice"
Floats = NDArray[np.float64]
Value = str | int | float | bool
Encoding = Literal["bins", "minmax", "unit"]


@dataclass(frozen=True)
class Head:
    """What a generator's output layer applies to the coordinates ``start`` to ``stop`` (not included).

    Args:
        kind: ``"onehot"`` chooses one of them; ``"tanh"`` gives values in [-1, 1], ``"sigmoid"`` in [0, 1].
        start: First coordinate.
        stop: The one after the last.
    """

    kind: Literal["onehot", "sigmoid", "tanh"]
    start: int
    stop: int


@dataclass(frozen=True)
class NumericColumn:
    """Numbers between public bounds.

    Args:
        name: Heading of the column.
        low: Least value, of public knowledge.
        high: Greatest value, > ``low``.
        encoding: ``"bins"`` tells in which cell a value lies (one of W coordinates is 1) and decodes to a value drawn
            uniformly inside the cell; ``"minmax"`` scales to [-1, 1], ``"unit"`` to [0, 1]. Cells let a generator show
            several peaks and serve most tables best; ``"minmax"`` keeps smooth columns of small tables in one number.
        bins: Number of cells, equally wide after the transform, >= 2; or the inner edges between cells, in the
            column's own unit, ascending.
        transform: ``"log1p"`` for values >= 0 that span several orders of magnitude.
        zero_inflated: Whether the exact value 0 gets a coordinate of its own.
        integer: Whether values are whole numbers; decoded ones are ``int``.
        missing: Whether values may be missing, which gets a coordinate of its own and decodes to ``None``.

    Raises:
        ValueError: An argument lies outside its range.
    """

    name: str
    low: float
    high: float
    encoding: Encoding = "bins"
    bins: int | Sequence[float] = 16
    transform: Literal["none", "log1p"] = "none"
    zero_inflated: bool = False
    integer: bool = False
    missing: bool = False

    def __post_init__(self) -> None:
        where = f"column {self.name!r}: "
        _check_name(self.name)
        if not (_is_number(self.low) and _is_number(self.high) and self.low < self.high):
            raise ValueError(
                f"{where}expected public bounds low < high, both finite, got {self.low!r} and {self.high!r}"
            )
        for argument, known in {"encoding": get_args(Encoding), "transform": ("none", "log1p")}.items():
            if getattr(self, argument) not in known:
                raise ValueError(
                    f"{where}{argument} must be one of {', '.join(known)}, got {getattr(self, argument)!r}"
                )
        if self.transform == "log1p" and self.low < 0:
            raise ValueError(f"{where}expected low >= 0 for the transform log1p, got {self.low!r}")
        if self.zero_inflated and not self.low <= 0 <= self.high:
            raise ValueError(f"{where}zero_inflated needs bounds that hold 0, got low={self.low!r}, high={self.high!r}")
        if isinstance(self.bins, int):
            if self.bins < 2:
                raise ValueError(f"{where}expected at least 2 bins, got {self.bins}")
            return
        if not isinstance(self.bins, list | tuple) or not all(map(_is_number, self.bins)):
            raise ValueError(f"{where}expected bins to be a number of cells or a list of edges, got {self.bins!r}")
        edges = (self.low, *self.bins, self.high)
        if len(edges) < 3 or any(left >= right for left, right in pairwise(edges)):
            raise ValueError(
                f"{where}expected at least one inner edge, ascending and between {self.low!r} and {self.high!r}, "
                f"got {list(self.bins)}"
            )
        object.__setattr__(self, "bins", tuple(self.bins))  # hashable, and equal whatever sequence was given

    @cached_property
    def edges(self) -> Floats:
        """Edges of the cells in the column's unit, ascending, ``[cells + 1]``."""
        if not isinstance(self.bins, int):
            return np.array([self.low, *self.bins, self.high], dtype=np.float64)
        inner = self._inverse(np.linspace(*self._transformed_bounds, self.bins + 1))
        inner[0], inner[-1] = self.low, self.high  # free of rounding
        return inner

    @property
    def flags(self) -> tuple[str, ...]:
        """What besides a value a row may hold, each with a coordinate: ``"zero"``, ``"missing"``."""
        return ("zero",) * self.zero_inflated + ("missing",) * self.missing

    @property
    def width(self) -> int:
        """Coordinates W."""
        if self.encoding == "bins":
            return len(self.edges) - 1 + len(self.flags)
        return 1 + (1 + len(self.flags) if self.flags else 0)

    def heads(self, start: int) -> list[Head]:
        """The output layers of the coordinates, the first of which is ``start``."""
        stop = start + self.width
        if self.encoding == "bins":
            return [Head("onehot", start, stop)]
        scaled = Head("tanh" if self.encoding == "minmax" else "sigmoid", stop - 1, stop)
        return [Head("onehot", start, stop - 1), scaled] if self.flags else [scaled]

    def read(self, values: Sequence[Any], missing_values: Sequence[str] = ("",)) -> Floats:
        """Turn what a file or frame holds into numbers ``[N]``, NaN where missing.

        Raises:
            ValueError: Something is no number, infinite, not whole in a column of integers, or missing where nothing
                may be.
        """
        numbers = _numbers(self.name, values, missing_values)
        absent = np.isnan(numbers)
        if absent.any() and not self.missing:
            raise ValueError(
                f"column {self.name!r}: {_rows(absent)} no number; declare missing=True if values may be missing"
            )
        if np.isinf(numbers).any():
            raise ValueError(f"column {self.name!r}: {_rows(np.isinf(numbers))} an infinite number")
        if self.integer and (broken := ~absent & (numbers != np.rint(numbers))).any():
            raise ValueError(f"column {self.name!r}: {_rows(broken)} a number that is not whole; declare integer=False")
        return numbers

    def outside(self, numbers: Floats) -> NDArray[np.bool_]:
        """Which numbers ``[N]`` lie outside the bounds."""
        return (numbers < self.low) | (numbers > self.high)

    def encode(self, numbers: Floats) -> NDArray[np.float32]:
        """Coordinates ``[N, W]`` of numbers ``[N]``; those outside the bounds count as the bound."""
        absent = np.isnan(numbers)
        inside = np.clip(np.where(absent, self.low, numbers), self.low, self.high)
        zero = (inside == 0) & ~absent if self.zero_inflated else np.zeros(len(numbers), dtype=bool)
        flags = {"zero": zero, "missing": absent}
        states = np.stack([flags[flag] for flag in self.flags] or [zero], axis=1)[:, : len(self.flags)]
        if self.encoding == "bins":
            cells = onehot(self.cell(inside), len(self.edges) - 1)
            return np.column_stack([cells * ~(zero | absent)[:, None], states]).astype(np.float32)
        least, most = self._transformed_bounds
        share = (self._forward(inside) - least) / (most - least)
        scaled = share if self.encoding == "unit" else 2 * share - 1
        if not self.flags:
            return scaled[:, None].astype(np.float32)
        other = zero | absent
        centre = 0.5 if self.encoding == "unit" else 0.0
        return np.column_stack([~other, states, np.where(other, centre, scaled)]).astype(np.float32)

    def cell(self, numbers: Floats) -> NDArray[np.int64]:
        """Index of the cell that holds each number ``[N]``; a cell holds its lower edge, the last one both."""
        return np.searchsorted(self.edges[1:-1], numbers, side="right").astype(np.int64)

    def decode(self, x: NDArray[Any], random: np.random.Generator) -> list[float | int | None]:
        """Values of coordinates ``[N, W]``: of one-hot coordinates the largest counts, whatever they are."""
        if self.encoding == "bins":
            cells = len(self.edges) - 1
            choice = x.argmax(axis=1)
            numbers = self._draw(np.minimum(choice, cells - 1), random)
            flag = choice - cells
        else:
            least, most = self._transformed_bounds
            share = x[:, -1] if self.encoding == "unit" else (x[:, -1] + 1) / 2
            numbers = self._inverse(least + (most - least) * np.clip(share.astype(np.float64), 0, 1))
            if self.integer:
                numbers = np.clip(np.rint(numbers), math.ceil(self.low), math.floor(self.high))
            flag = x[:, :-1].argmax(axis=1) - 1 if self.flags else np.full(len(x), -1)
        numbers = np.clip(numbers, self.low, self.high)
        if self.zero_inflated:
            numbers[flag == self.flags.index("zero")] = 0
        values: list[float | int | None] = numbers.astype(np.int64).tolist() if self.integer else numbers.tolist()
        if self.missing:
            for row in np.flatnonzero(flag == self.flags.index("missing")):
                values[row] = None
        return values

    def _draw(self, cells: NDArray[np.int64], random: np.random.Generator) -> Floats:
        # uniform inside the cell, after the transform
        first, last = self.edges[:-1].copy(), self.edges[1:].copy()
        if self.integer:  # the whole numbers of a cell, each as the stretch up to the next one
            first, last = np.ceil(first), np.ceil(last)
            last[-1] = math.floor(self.high) + 1
            if self.zero_inflated:  # 0 has a coordinate of its own
                first[first == 0] = 1
            # a cell without whole numbers holds no real row; a generator may still choose it
            empty = first >= last
            first[empty] = np.clip(np.floor(first[empty]), math.ceil(self.low), math.floor(self.high))
            last[empty] = first[empty] + 1
        u = random.random(len(cells))
        lower, upper = self._forward(first)[cells], self._forward(last)[cells]
        numbers = self._inverse(lower + u * (upper - lower))
        if self.integer:
            return np.clip(np.floor(numbers), first[cells], last[cells] - 1)
        return np.clip(numbers, first[cells], np.nextafter(last[cells], -np.inf))  # rounding must not leave the cell

    @cached_property
    def _transformed_bounds(self) -> tuple[float, float]:
        least, most = self._forward(np.array([self.low, self.high], dtype=np.float64))
        return float(least), float(most)

    def _forward(self, numbers: Floats) -> Floats:
        return np.log1p(numbers) if self.transform == "log1p" else numbers

    def _inverse(self, numbers: Floats) -> Floats:
        return np.expm1(numbers) if self.transform == "log1p" else numbers


@dataclass(frozen=True)
class CategoricalColumn:
    """One of a few values.

    Args:
        name: Heading of the column.
        categories: All values that may occur, of public knowledge: strings, numbers or truth values, none twice.
            What a file holds is compared as text, so ``"1"`` is the category ``1``.
        missing: Whether values may be missing, which is one more category and decodes to ``None``.

    Raises:
        ValueError: There are fewer than two categories, missing included, or one occurs twice.
    """

    name: str
    categories: Sequence[Value]
    missing: bool = False

    def __post_init__(self) -> None:
        _check_name(self.name)
        if not isinstance(self.categories, list | tuple):
            raise ValueError(f"column {self.name!r}: expected a list of categories, got {self.categories!r}")
        texts = [str(category) for category in self.categories]
        if len(set(texts)) < len(texts) or not all(isinstance(c, str | int | float) for c in self.categories):
            raise ValueError(
                f"column {self.name!r}: expected strings or numbers, none twice, as categories, got {texts}"
            )
        if len(texts) + self.missing < 2:
            raise ValueError(f"column {self.name!r}: expected at least two categories, got {texts}")
        object.__setattr__(self, "categories", tuple(self.categories))

    @property
    def width(self) -> int:
        """Coordinates W."""
        return len(self.categories) + self.missing

    def heads(self, start: int) -> list[Head]:
        """The output layer of the coordinates, the first of which is ``start``."""
        return [Head("onehot", start, start + self.width)]

    def read(self, values: Sequence[Any], missing_values: Sequence[str] = ("",)) -> NDArray[np.int64]:
        """Turn what a file or frame holds into category numbers ``[N]``: W - 1 where missing is allowed, -1 unknown."""
        absent = self.width - 1 if self.missing else -1
        number = {str(category): index for index, category in enumerate(self.categories)}
        number.update({f"{c}.0": number[str(c)] for c in self.categories if isinstance(c, int)})  # a float of a frame
        for text in ("None", "nan", "<NA>", *missing_values):
            number.setdefault(text, absent)
        if hasattr(values, "tolist"):
            values = values.tolist()  # NumPy's strings and numbers to Python's
        return np.fromiter((number.get(str(value), -1) for value in values), np.int64, len(values))

    def encode(self, numbers: NDArray[np.int64]) -> NDArray[np.float32]:
        """Coordinates ``[N, W]``, one of which is 1, of category numbers ``[N]``."""
        return onehot(numbers, self.width)

    def decode(self, x: NDArray[Any], random: np.random.Generator | None = None) -> list[Value | None]:
        """Values of coordinates ``[N, W]``: the largest counts, whatever they are."""
        values = [*self.categories, None]
        return [values[index] for index in x.argmax(axis=1)]


TableColumn = NumericColumn | CategoricalColumn


def onehot(index: NDArray[np.int64], width: int) -> NDArray[np.float32]:
    """Rows ``[N, width]`` with a single 1 at ``index`` ``[N]``."""
    rows = np.zeros((len(index), width), dtype=np.float32)
    rows[np.arange(len(index)), index] = 1
    return rows


def _numbers(name: str, values: Sequence[Any], missing_values: Sequence[str]) -> Floats:
    array = np.asarray(values)
    if array.dtype.kind in "Mm":
        raise ValueError(f"column {name!r}: {_DATES}")
    if array.dtype.kind in "fiub":
        return array.astype(np.float64)
    absent = {*missing_values, "None", "nan", "<NA>"}
    texts = [str(value).strip() for value in array.tolist()]
    with suppress(ValueError):
        return np.array([math.nan if text in absent else float(text) for text in texts], dtype=np.float64)
    # not raised while float()'s error is handled: that one shows the value, and would stay with this one as its context
    broken = np.array([text not in absent and not _reads_as_number(text) for text in texts])
    dates = any(_reads_as_date(text) for text in texts)
    raise ValueError(f"column {name!r}: {_rows(broken)} something that is no number" + (f"; {_DATES}" * dates))


def _reads_as_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _reads_as_date(text: str) -> bool:
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return not text.isdigit()


def _rows(broken: NDArray[np.bool_]) -> str:
    where = np.flatnonzero(broken)
    return f"row {where[0]} holds" if len(where) == 1 else f"{len(where)} rows, the first of them row {where[0]}, hold"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not name:
        raise ValueError(f"expected the name of a column to be a non-empty string, got {name!r}")
