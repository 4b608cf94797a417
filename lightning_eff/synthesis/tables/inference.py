"""Bounds and categories of columns, taken from values that are public."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import date
from typing import Any

from lightning_eff.synthesis.tables.columns import CategoricalColumn, Encoding, NumericColumn, TableColumn, Value


def inferred_column(
    name: str, values: Sequence[Any], encoding: Encoding, bins: int, max_categories: int
) -> TableColumn:
    """A column that holds these values, and none wider.

    Args:
        name: Of the column.
        values: Of all rows; missing ones are ``None``, NaN or empty.
        encoding: If it is numeric.
        bins: Its cells, then.
        max_categories: At most this many different numbers count as categories.

    Raises:
        ValueError: There is one value only, or there are dates, or text of which nearly every row has another one.
    """
    if getattr(getattr(values, "dtype", None), "kind", "") in ("M", "m") or any(
        isinstance(value, date) for value in values
    ):
        raise ValueError(f"column {name!r}: dates are no numbers yet: make them days since a day of your choice first")
    plain = _plain_values(values)
    missing, distinct = any(map(_is_missing, plain)), _distinct(plain)
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in distinct)
    if not numeric or len(distinct) <= max_categories:
        if missing and len(distinct) == 1:
            return CategoricalColumn(name, _distinct(values), missing=True)
        return CategoricalColumn(name, inferred_categories(name, values), missing=missing)
    numbers = [float(value) for value in distinct]
    whole = all(number.is_integer() for number in numbers)
    return NumericColumn(name, min(numbers), max(numbers), encoding, bins, integer=whole, missing=missing)


def inferred_categories(name: str, values: Iterable[Any]) -> list[Value]:
    """Different values, where they are so few that they can be categories."""
    plain = _plain_values(values)
    numbers, distinct = _distinct(plain), _distinct(values)
    if {str(number) for number in numbers} == {str(value) for value in distinct}:  # not "007", which is no number 7
        distinct = numbers
    if len(distinct) < 2:
        raise ValueError(f"column {name!r}: expected at least two different values, got {len(distinct)}: leave it out")
    if len(distinct) > max(20, sum(not _is_missing(value) for value in plain) // 2):
        raise ValueError(
            f"column {name!r}: {len(distinct)} different values in {len(plain)} rows are no categories (names, notes "
            "and identifiers are none): leave the column out"
        )
    return distinct


def _distinct(values: Iterable[Any]) -> list[Value]:
    plain = values.tolist() if hasattr(values, "tolist") else list(values)
    return sorted({value for value in plain if not _is_missing(value)}, key=lambda value: (str(type(value)), value))


def _plain_values(values: Iterable[Any]) -> list[Any]:
    """Plain Python, texts as numbers where all of them are, as a file holds them."""
    plain = values.tolist() if hasattr(values, "tolist") else list(values)
    told = [value for value in plain if not _is_missing(value)]
    if told and all(isinstance(value, str) for value in told):
        for kind in (int, float):
            with suppress(ValueError):
                return [None if _is_missing(value) else kind(value) for value in plain]
    return plain


def _is_missing(value: Any) -> bool:
    return value is None or value != value or str(value) in ("", "<NA>")  # NaN differs from itself
