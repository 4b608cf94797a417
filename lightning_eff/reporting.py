"""How results leave the package: reports of tables and figures of one style, and progress whose cost is known before.

Tables print through rich and are written as Markdown, CSV or JSON. Figures are made without pyplot and change no
setting of matplotlib. Colours: M. Okabe, K. Ito, Color Universal Design, 2008 (told apart by colour-blind readers).
"""

from __future__ import annotations

import csv
import io
import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lightning_eff.documents import whole_file, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.table import Table as RichTable

# Colours by what they say, then those of equal rank in the order in which axes use them.
KEPT = "#0072B2"  # blue: what stays
REMOVED = "#D55E00"  # vermilion: what goes
REFERENCE = "#7F7F7F"  # grey: what the rest is compared with; the dense network, a baseline, chance
HIGHLIGHT = "#CC79A7"  # purple: the one to look at; the point chosen, the best candidate
SERIES = (KEPT, "#E69F00", "#009E73", HIGHLIGHT, "#56B4E9", REMOVED, "#F0E442", "#000000")

# fmt: off
_STYLE: dict[Any, Any] = {
    "font.size": 9, "axes.titlesize": 10, "axes.labelsize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8,
    "figure.titlesize": 10, "legend.fontsize": 8, "legend.frameon": False,
    "axes.axisbelow": True, "axes.grid": True, "grid.alpha": 0.3, "grid.linewidth": 0.6,
    "axes.spines.right": False, "axes.spines.top": False, "figure.facecolor": "white",
    "axes.prop_cycle": f"cycler(color={list(SERIES)})",
}
# fmt: on


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


class Report(ABC):
    """What a piece of work found: tables, and figures where there is something to draw.

    Subclasses give :meth:`tables` and, if need be, :meth:`figures`. What is read back by ``save`` and ``load`` is state
    and apart from this: a report is written for readers.

    Attributes:
        data_tables: Stems of tables that are too long to read, such as those with a row a sample: they are written as
            CSV and JSON, and are no part of text and Markdown.

    Example:
        >>> class Squares(Report):
        ...     def tables(self):
        ...         return {"squares": Table("Squares", ["n", "n^2"], [(n, n * n) for n in (2, 3)])}
        >>> print(Squares())
        Squares
        n   n^2
        ───────
        2     4
        3     9
    """

    data_tables: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def tables(self) -> dict[str, Table]:
        """Return the tables by the stems of their files, the most important one first."""

    def figures(self) -> dict[str, Figure]:
        """Draw the figures and return them by the stems of their files; a report without pictures has none."""
        return {}

    def preface(self) -> list[str]:
        """Return sentences that a reader must see before any table: why a result does not hold, what it is not for."""
        return []

    def table(self, name: str | None = None) -> Table:
        """Return one table, by default the most important one.

        Raises:
            ValueError: There is no such table.
        """
        tables = self.tables()
        if name is not None and name not in tables:
            raise ValueError(f"name must be one of {', '.join(tables)}, got {name!r}")
        return tables[next(iter(tables)) if name is None else name]

    def print(self, console: Console | None = None) -> None:
        """Print the tables on a rich console, by default the global one; what is no terminal gets ``str(report)``."""
        from rich import get_console
        from rich.text import Text

        console = console or get_console()
        parts: list[str | Table] = [*self.preface(), *self._read()]
        for number, part in enumerate(parts):
            if number:
                console.print()
            if isinstance(part, Table):
                part.print(console)
            else:
                console.print(Text(part), soft_wrap=not console.is_terminal)

    def __str__(self) -> str:
        return "\n\n".join(map(str, [*self.preface(), *self._read()]))

    def to_markdown(self) -> str:
        """Return the tables as Markdown, behind a preface if there is one."""
        return "\n".join([*self._quoted(), *(table.to_markdown() for table in self._read())])

    def write(self, dirpath: str | Path) -> list[Path]:
        """Write each table as ``.md``, ``.csv`` and ``.json`` and each figure as ``.png``; folders are made.

        Every Markdown file begins with the preface; of :attr:`data_tables` there is none.

        Returns:
            The files, in the order of tables and figures.
        """
        folder, preface, written = Path(dirpath), self._quoted(), list[Path]()
        for stem, table in self.tables().items():
            if stem not in self.data_tables:
                written.append(folder / f"{stem}.md")
                _write(written[-1], "\n".join([*preface, table.to_markdown()]))
            written += [table.save(folder / f"{stem}{suffix}") for suffix in (".csv", ".json")]
        return [*written, *(save_figure(figure, folder / f"{stem}.png") for stem, figure in self.figures().items())]

    def _quoted(self) -> list[str]:
        return [f"> {sentence}\n" for sentence in self.preface()]

    def _read(self) -> list[Table]:
        return [table for stem, table in self.tables().items() if stem not in self.data_tables]


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


def new_figure(rows: int = 1, cols: int = 1, *, width: float = 6.4, height: float = 4.0) -> tuple[Figure, Any]:
    """Make a figure with axes in the package's style.

    Args:
        rows: Rows of axes, >= 1.
        cols: Columns of axes, >= 1.
        width: Of the whole figure, in inches, > 0.
        height: Of the whole figure, in inches, > 0.

    Returns:
        The figure, and its axes as an array ``[rows, cols]``.

    Raises:
        ValueError: An argument lies outside its range.
    """
    if rows < 1 or cols < 1 or width <= 0 or height <= 0:
        raise ValueError(f"expected rows, cols >= 1 and width, height > 0, got {rows}, {cols}, {width}, {height}")
    from matplotlib import rc_context
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    class StyledFigure(Figure):
        """What is added to the axes later has the style, too."""

        def colorbar(self, *args: Any, **kwargs: Any) -> Any:
            with rc_context(_STYLE):
                return super().colorbar(*args, **kwargs)

        def legend(self, *args: Any, **kwargs: Any) -> Any:
            with rc_context(_STYLE):
                return super().legend(*args, **kwargs)

        def suptitle(self, *args: Any, **kwargs: Any) -> Any:
            with rc_context(_STYLE):
                return super().suptitle(*args, **kwargs)

    class StyledAxes(Axes):
        """Its legend has the style, too."""

        def legend(self, *args: Any, **kwargs: Any) -> Any:
            with rc_context(_STYLE):
                return super().legend(*args, **kwargs)

    with rc_context(_STYLE):
        figure = StyledFigure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        return figure, figure.subplots(rows, cols, squeeze=False, subplot_kw={"axes_class": StyledAxes})


def save_figure(figure: Figure, path: str | Path, *, dpi: int = 150) -> Path:
    """Write a figure in the format the suffix names, e.g. ``.png``, ``.pdf`` or ``.svg``; folders are made.

    Raises:
        ValueError: matplotlib knows no such format.
    """
    from matplotlib import rc_context

    path, known = Path(path), figure.canvas.get_supported_filetypes()
    if path.suffix[1:] not in known:
        raise ValueError(f"expected a file name that ends in one of {', '.join(sorted(known))}, got {path.name!r}")
    with rc_context(_STYLE), whole_file(path) as beside:
        figure.savefig(beside, dpi=dpi, format=path.suffix[1:])
    return path


def results_folder(dirpath: str | Path | None, trainer: Any, room: str) -> Path:
    """Return where a callback that is there to write puts its files; to be called in all processes at once.

    Args:
        dirpath: what the user gave; None for the folder ``room`` where the trainer's logger writes, or in its
            ``default_root_dir`` where there is no logger.
        trainer: of the run.
        room: name of the technique.
    """
    return Path(trainer.log_dir or trainer.default_root_dir) / room if dirpath is None else Path(dirpath)


class Progress:
    """How far work has come; :func:`progress` makes it, ``done`` counts the units."""

    def __init__(self, show: Callable[[int, str], None] = lambda done, note: None) -> None:
        self.done = 0
        self._show = show

    def advance(self, k: int = 1, note: str = "") -> None:
        """Count ``k`` more units as done; a note, e.g. the error so far, is shown beside the bar."""
        self.done += k
        self._show(self.done, note)


@contextmanager
def progress(
    description: str, total: int, *, enabled: bool = True, unit: str = "evaluations", console: Console | None = None
) -> Generator[Progress, None, None]:
    """Show a bar with elapsed and remaining time while the block runs and calls ``advance``; then the bar is gone.

    On a console that is no terminal it prints a line with the cost when it begins and one when it ends.

    Args:
        description: What is being done.
        total: How many units it takes, >= 0.
        enabled: Whether to show anything.
        unit: Word for what is counted, in the plural.
        console: Where; by default rich's global console, the one Lightning's progress bar uses too.

    Raises:
        ValueError: ``total`` is negative.
    """
    if total < 0:
        raise ValueError(f"expected total >= 0, got {total}")
    if not enabled:
        yield Progress()
        return
    from rich import get_console, progress
    from rich.markup import escape

    console = console or get_console()
    if console.is_interactive or console.is_jupyter:
        words = ("{task.description}", progress.BarColumn(), progress.MofNCompleteColumn(), escape(unit))
        times = (progress.TimeElapsedColumn(), "<", progress.TimeRemainingColumn(), "{task.fields[note]}")
        with progress.Progress(*words, *times, console=console, transient=True) as display:
            task = display.add_task(escape(description), total=total, note="")
            yield Progress(lambda done, note: display.update(task, completed=done, note=escape(note)))
        return
    counter, start, how = Progress(), time.monotonic(), "stopped after"
    console.print(f"{description}: {total:,} {unit}", markup=False, highlight=False, soft_wrap=True)
    try:
        yield counter
        how = "done,"
    finally:
        end = f"{description}: {how} {counter.done:,} {unit} in {time.monotonic() - start:.1f} s"
        console.print(end, markup=False, highlight=False, soft_wrap=True)


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
