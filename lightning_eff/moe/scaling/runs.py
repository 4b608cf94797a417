"""Training runs as rows of a CSV file: what laws are fitted to, and where a finished run leaves its row.

Rows are written whole or not at all: to a file beside it that takes its place, while a lock keeps other processes out.
"""

from __future__ import annotations

import csv
import math
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from lightning_eff.documents import reading, whole_file

Floats = NDArray[np.float64]

#: Columns a run is told by; a file may have others besides.
RUN_COLUMNS = (
    "run_name",
    "n_total",
    "n_active",
    "n_tokens",
    "granularity",
    "expansion_rate",
    "flops",
    "loss",
    "loss_val",
    "d_model",
    "n_layers",
    "steps",
    "seconds",
    "router",
    "seed",
    "version",
)
_BELOW_ONE = math.nextafter(1.0, 0.0)
# columns of numbers, and what each must exceed
_REQUIRED = {"n_total": 0.0, "n_tokens": 0.0, "loss": 0.0}
_OPTIONAL = {"granularity": _BELOW_ONE, "n_active": 0.0, "expansion_rate": 0.0, "flops": 0.0, "weight": 0.0}
_BLANK = ("", None)


@dataclass(frozen=True, eq=False)
class Runs:
    """Columns of numbers, one entry a run.

    Args:
        n_total: N, [R].
        n_tokens: D, [R].
        loss: nats a token, [R].
        granularity: G, [R]; None if the runs do not tell.
        n_active: N_act, [R], or None.
        expansion_rate: E, [R], or None.
        flops: training FLOPs, [R], or None.
        weight: how much a run counts in a fit, [R], or None for all alike.
        names: names of the runs; empty if they have none.
        diverged: rows left out because their loss is no finite number.
    """

    n_total: Floats
    n_tokens: Floats
    loss: Floats
    granularity: Floats | None = None
    n_active: Floats | None = None
    expansion_rate: Floats | None = None
    flops: Floats | None = None
    weight: Floats | None = None
    names: tuple[str, ...] = ()
    diverged: int = 0

    def __len__(self) -> int:
        return len(self.loss)

    @property
    def duplicates(self) -> int:
        """Runs that have N, D and G of an earlier one."""
        columns = [self.n_total, self.n_tokens] + ([] if self.granularity is None else [self.granularity])
        return len(self) - len(np.unique(np.stack(columns), axis=1).T)

    def take(self, rows: NDArray[Any]) -> Runs:
        """Some of the runs: bool [R] or indices."""
        columns: dict[str, Any] = {
            name: None if getattr(self, name) is None else getattr(self, name)[rows]
            for name in (*_REQUIRED, *_OPTIONAL)
        }
        names = tuple(np.array(self.names, dtype=object)[rows]) if self.names else ()
        return Runs(**columns, names=names, diverged=self.diverged)


def read_runs(
    source: str | Path | Mapping[str, Any] | Any,
    *,
    columns: Mapping[str, str] | None = None,
    where: Mapping[str, Any] | None = None,
) -> Runs:
    """Read runs and check every value that a fit needs.

    Args:
        source: a CSV file with a heading; or columns by name: a dict, a structured array, a data frame. Needed are
            ``n_total``, ``n_tokens`` and ``loss``; ``granularity``, ``n_active``, ``expansion_rate``, ``flops``,
            ``weight`` and ``run_name`` are read where they are.
        columns: where a column has another name: ``{"loss": "loss_c4_val"}``.
        where: keep the rows that have these values: ``{"expansion_rate": 8, "router": "token_choice"}``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column is missing, a value is no number or out of range, or no row is left. The message names
            column and line.

    Warns:
        UserWarning: runs whose loss is NaN or infinite are left out.
    """
    table, lines, what = _table(source)
    renamed = dict(columns or {})
    if unknown := renamed.keys() - {*_REQUIRED, *_OPTIONAL, "run_name"}:
        raise ValueError(f"columns renames what is not read: {sorted(unknown)}")
    for wanted in {*renamed.values(), *(where or {})} - table.keys():
        raise ValueError(f"{what} has no column {wanted!r}; it has {sorted(table)}")
    keep = [row for row in range(len(lines)) if all(_same(table[name][row], v) for name, v in (where or {}).items())]
    if not keep:
        raise ValueError(f"{what} has no run" + (f" with {dict(where)}" if where else ""))

    def cells(name: str) -> list[Any] | None:
        column = table.get(renamed.get(name, name))
        return None if column is None else [column[row] for row in keep]

    at = [lines[row] for row in keep]
    numbers: dict[str, Floats | None] = {}
    for name, least in _REQUIRED.items():
        values = cells(name)
        if values is None:
            raise ValueError(f"{what} has no column {renamed.get(name, name)!r}; it has {sorted(table)}")
        numbers[name] = _numbers(values, renamed.get(name, name), least, at, what, finite=name != "loss")
    for name, least in _OPTIONAL.items():
        values = cells(name)
        # what only the caption of a result needs may be unknown for some runs; what decides the fit may not
        told = values is not None and (name in ("granularity", "weight") or not any(v in _BLANK for v in values))
        numbers[name] = _numbers(values, renamed.get(name, name), least, at, what) if values and told else None
    names = cells("run_name")
    runs = Runs(**numbers, names=tuple(map(str, names)) if names else ())  # type: ignore[arg-type]
    finite = np.isfinite(runs.loss)
    if finite.all():
        return runs
    lost = int((~finite).sum())
    if lost == len(runs):
        raise ValueError(f"{what}: no run has a finite loss")
    warnings.warn(f"{what}: {lost} of {len(runs)} runs diverged (loss NaN or infinite) and are left out", stacklevel=2)
    return replace(runs.take(finite), diverged=lost)


def append_run(path: str | Path, run: Mapping[str, Any]) -> None:
    """Add a run to a CSV file, in place of the one that has its name.

    The file is made with :data:`RUN_COLUMNS` as its heading; columns it lacks are added, columns the run lacks are left
    empty. A process that dies leaves the file as it was; several may write at a time.

    Args:
        path: the file; ``path.lock`` beside it is the lock, and stays.
        run: values by column; ``run_name`` must be among them.

    Raises:
        ValueError: the run has no name, or the file is no table of runs.
    """
    path = Path(path).resolve()  # the target of a link, not the link, is replaced
    name = str(run.get("run_name") or "")
    if not name:
        raise ValueError(f"expected a run with a run_name, got {dict(run)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        heading, rows = _read_rows(path) if path.exists() else (list(RUN_COLUMNS), [])
        heading += [column for column in run if column not in heading]
        rows = [row for row in rows if row["run_name"] != name]
        rows.append({column: _text(value) for column, value in run.items()})
        with whole_file(path) as beside, beside.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, heading, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            file.flush()
            os.fsync(file.fileno())


def run_names(path: str | Path) -> set[str]:
    """Names of the runs a file holds; none if there is no file yet.

    Raises:
        ValueError: the file is no table of runs.
    """
    path = Path(path)
    return {row["run_name"] for row in _read_rows(path)[1]} if path.exists() else set()


def _read_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    with reading(f"{path} is no table of runs"), path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    heading = list(reader.fieldnames or [])
    if "run_name" not in heading:
        raise ValueError(f"{path} is no table of runs: it has no column 'run_name' among {heading}")
    for number, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise ValueError(f"{path}, line {number}: expected {len(heading)} values")
    return heading, rows


def _text(value: Any) -> str:
    return "" if value is None else repr(float(value)) if isinstance(value, float) else str(value)


def _table(source: Any) -> tuple[dict[str, list[Any]], list[str], str]:
    """Columns by name, where each row stands, and what to call the source."""
    if isinstance(source, str | Path):
        path = Path(source)
        with reading(f"{path} is no table of runs"), path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            heading = next(reader, [])
            rows, lines = [], []
            for row in reader:
                if row:
                    rows.append(row)
                    lines.append(f"line {reader.line_num}")
        if len(set(heading)) < len(heading):
            raise ValueError(f"{path} has a column twice: {heading}")
        for row, line in zip(rows, lines, strict=True):
            if len(row) != len(heading):
                raise ValueError(f"{path}, {line}: expected {len(heading)} values, got {len(row)}")
        return {name: [row[i] for row in rows] for i, name in enumerate(heading)}, lines, str(path)
    if isinstance(source, Mapping):
        names: Iterable[str] = source.keys()
    elif isinstance(source, np.ndarray) and source.dtype.names:
        names = source.dtype.names
    elif hasattr(source, "columns"):
        names = source.columns
    else:
        raise ValueError(
            f"expected a CSV file, a dict, a structured array or a data frame, got {type(source).__name__}"
        )
    table = {str(name): list(source[name]) for name in names}
    lengths = {name: len(column) for name, column in table.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"expected columns of one length, got {lengths}")
    count = next(iter(lengths.values()), 0)
    return table, [f"row {row}" for row in range(count)], "the runs"


def _numbers(values: list[Any], name: str, least: float, at: list[str], what: str, *, finite: bool = True) -> Floats:
    numbers = np.empty(len(values))
    for i, (value, where) in enumerate(zip(values, at, strict=True)):
        try:
            numbers[i] = float(value)
        except (TypeError, ValueError):
            raise ValueError(f"{what}, {where}: column {name!r} holds no number: {value!r}") from None
        wrong = not math.isfinite(numbers[i]) if finite else numbers[i] == -math.inf
        if wrong or numbers[i] <= least:
            bound = ">= 1" if least == _BELOW_ONE else f"> {least:g}"
            raise ValueError(f"{what}, {where}: expected {name} {bound}, got {value}")
    return numbers


def _same(cell: Any, wanted: Any) -> bool:
    if isinstance(wanted, str):
        return str(cell) == wanted
    try:
        return bool(float(cell) == float(wanted))
    except (TypeError, ValueError):
        return str(cell) == str(wanted)
