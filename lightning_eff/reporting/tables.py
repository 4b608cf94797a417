"""Tables of results: printed through rich, written as Markdown, CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning_eff.documents import write_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable


@dataclass(frozen=True)
class Column:
    """One column of a :class:`Table`.

    Args:
        name: Heading.
        format: Python format spec for the numbers in it, e.g. ``".3f"``, ``","`` or ``".1%"``, or a function such as
            :func:`human` that makes text of one; CSV and JSON hold the numbers themselves.
        align: ``None`` puts columns of numbers to the right and all others to the left.
    """

    name: str
    format: str | Callable[[float], str] = ""
    align: Literal["left", "right", "center"] | None = None

    def text(self, value: Any) -> str:
        """Return a value of the column as readers see it; ``-`` for ``None``.

        Raises:
            ValueError: A number does not take the format.
        """
        if value is None:
            return "-"
        if not _is_number(value):
            return str(value)
        try:
            return self.format(value) if callable(self.format) else format(value, self.format)
        except ValueError as error:
            raise ValueError(f"expected numbers that take the format of {self}, got {value!r}") from error


class Table:
    """Rows of results.

    Args:
        title: What the rows are.
        columns: Names, or :class:`Column` where numbers want a format.
        rows: One value a column: numbers, zero-dimensional tensors, strings, or ``None``, which prints as ``-``.
        caption: What a reader must know to read it right.

    Raises:
        ValueError: Column names repeat, a row has the wrong length, or a number does not take its column's format.
    """

    def __init__(
        self, title: str, columns: Sequence[str | Column], rows: Iterable[Sequence[Any]], caption: str = ""
    ) -> None:
        self.title, self.caption = title, caption
        self.columns = tuple(Column(column) if isinstance(column, str) else column for column in columns)
        names = [column.name for column in self.columns]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"expected at least one column and no name twice, got {names}")
        self.rows = tuple(tuple(_plain(value) for value in row) for row in rows)
        for row in self.rows:
            if len(row) != len(names):
                raise ValueError(f"expected one value for each of the columns {names}, got the row {row}")
        self._cells = [
            [column.text(value) for value, column in zip(row, self.columns, strict=True)] for row in self.rows
        ]

    def print(self, console: Console | None = None) -> None:
        """Print it on a rich console, by default the global one; what is no terminal gets ``str(table)``."""
        from rich import get_console
        from rich.text import Text

        console = console or get_console()
        if console.is_terminal or console.is_jupyter:
            parts = Text(self.title, style="bold"), self._rich(), Text(self.caption, style="dim")
            console.print(*filter(None, parts), sep="\n")
        else:
            console.print(Text(str(self)), soft_wrap=True)

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        # title and caption apart from the table, or they would be folded to its width
        Console(file=text, color_system=None, width=100_000).print(self._rich())
        return "\n".join(filter(None, (self.title, *map(str.rstrip, text.getvalue().splitlines()), self.caption)))

    def to_markdown(self) -> str:
        """Return a Markdown table with the title above and the caption below."""
        grid = [[column.name for column in self.columns], *self._cells]
        escaped = [[cell.replace("|", r"\|").replace("\n", "<br>") for cell in row] for row in grid]
        widths = [max(3, *map(len, column)) for column in zip(*escaped, strict=True)]
        signs = ["<>^"[["left", "right", "center"].index(self._align(i))] for i in range(len(widths))]
        lines = [[f"{cell:{s}{w}}" for cell, s, w in zip(row, signs, widths, strict=True)] for row in escaped]
        rule = [("-:"[s != ">"] + "-" * (w - 2) + "-:"[s != "<"]) for s, w in zip(signs, widths, strict=True)]
        table = "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))
        return "\n\n".join(filter(None, (self.title and f"**{self.title}**", table, self.caption))) + "\n"

    def to_csv(self, path: str | Path | None = None) -> str:
        """Return, and write if a path is given, CSV with a heading and raw values; ``None`` is an empty field."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([[column.name for column in self.columns], *self.rows])
        return _write(path, text.getvalue())

    def to_json(self, path: str | Path | None = None) -> str:
        """Return, and write if a path is given, a JSON list of records of raw values; NaN and infinity are ``null``."""
        names = [column.name for column in self.columns]
        records = [dict(zip(names, map(_jsonable, row), strict=True)) for row in self.rows]
        return _write(path, json.dumps(records, indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def save(self, path: str | Path) -> Path:
        """Write it in the format the suffix names: ``.md``, ``.csv``, ``.json`` or ``.txt``; folders are made.

        Raises:
            ValueError: Another suffix.
        """
        path = Path(path)
        formats = {".md": Table.to_markdown, ".csv": Table.to_csv, ".json": Table.to_json, ".txt": Table.__str__}
        if path.suffix not in formats:
            raise ValueError(f"expected a file name that ends in {', '.join(formats)}, got {path.name!r}")
        _write(path, formats[path.suffix](self).rstrip("\n") + "\n")
        return path

    def _align(self, index: int) -> Literal["left", "right", "center"]:
        values = [row[index] for row in self.rows if row[index] is not None]
        return self.columns[index].align or ("right" if values and all(map(_is_number, values)) else "left")

    def _rich(self) -> RichTable:
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for i, column in enumerate(self.columns):
            table.add_column(Text(column.name), justify=self._align(i), overflow="fold")
        for row in self._cells:
            table.add_row(*map(Text, row))  # Text: brackets in a cell are no markup
        return table


def human(n: float, unit: str = "") -> str:
    """Write a finite count with three digits and an SI prefix; the unit stands behind the prefix.

    Example:
        >>> human(1_814_073_344), human(1_814_073_344, "MACs"), human(532, "MACs"), human(999_999)
        ('1.81 G', '1.81 GMACs', '532 MACs', '1 M')
    """
    steps = 0
    while abs(float(f"{n:.3g}")) >= 1000 and steps < 6:
        n, steps = n / 1000, steps + 1
    return f"{float(f'{n:.3g}'):g} {('', *'kMGTPE')[steps]}{unit}".rstrip()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _plain(value: Any) -> Any:
    # Python's own number for a zero-dimensional tensor or a NumPy scalar
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value


def _jsonable(value: Any) -> Any:
    finite = value is None or (isinstance(value, int | float) and math.isfinite(value))
    return value if finite else None if isinstance(value, float) else str(value)


def _write(path: str | Path | None, text: str) -> str:
    if path is not None:
        write_text(path, text)
    return text
