"""A table's rows, in any form in which they may come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Rows = Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]] | Any
"""A table: values by column name, one mapping a row, or a pandas data frame."""


def columns_of(rows: Rows) -> dict[str, Sequence[Any]]:
    """Values by column name, from any form of rows.

    Raises:
        ValueError: It is no such form, or rows differ in their keys.
    """
    if isinstance(rows, Mapping):
        return dict(rows)
    if hasattr(rows, "columns") and hasattr(rows, "to_numpy"):  # a pandas data frame, without pandas
        return {str(name): rows[name].to_numpy() for name in rows.columns}
    if isinstance(rows, Sequence) and rows and all(isinstance(row, Mapping) for row in rows):
        names = list(rows[0])
        if any(row.keys() != rows[0].keys() for row in rows):
            raise ValueError(f"expected the keys {names} in every row, got rows with others")
        return {name: [row[name] for row in rows] for name in names}
    raise ValueError(
        f"expected values by column name, a list of mappings or a data frame, got {type(rows).__name__}"
        + (" without any row" if isinstance(rows, Sequence) and not rows else "")
    )
