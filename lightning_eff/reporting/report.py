"""What a piece of work found, as tables and figures that print, become Markdown and are written as files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lightning_eff.documents import write_text
from lightning_eff.reporting.figures import save_figure
from lightning_eff.reporting.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console


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
                write_text(written[-1], "\n".join([*preface, table.to_markdown()]))
            written += [table.save(folder / f"{stem}{suffix}") for suffix in (".csv", ".json")]
        return [*written, *(save_figure(figure, folder / f"{stem}.png") for stem, figure in self.figures().items())]

    def _quoted(self) -> list[str]:
        return [f"> {sentence}\n" for sentence in self.preface()]

    def _read(self) -> list[Table]:
        return [table for stem, table in self.tables().items() if stem not in self.data_tables]


def results_folder(dirpath: str | Path | None, trainer: Any, room: str) -> Path:
    """Return where a callback that is there to write puts its files; to be called in all processes at once.

    Args:
        dirpath: what the user gave; None for the folder ``room`` where the trainer's logger writes, or in its
            ``default_root_dir`` where there is no logger.
        trainer: of the run.
        room: name of the technique.
    """
    return Path(trainer.log_dir or trainer.default_root_dir) / room if dirpath is None else Path(dirpath)
