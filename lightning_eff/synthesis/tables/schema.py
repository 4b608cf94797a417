"""What a table may hold, stated as public knowledge: its columns with bounds and categories, and its label.

A schema turns rows into the tensors a private release reads, and a generator's output back into rows. Bounds taken
from private rows would themselves say something about them, so they are declared, in Python or in a YAML file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from torch import Tensor

from lightning_eff.arguments import check_choice
from lightning_eff.documents import reading, write_text
from lightning_eff.reporting import Table
from lightning_eff.synthesis.tables.columns import (
    CategoricalColumn,
    Encoding,
    Head,
    NumericColumn,
    TableColumn,
    Value,
)
from lightning_eff.synthesis.tables.inference import inferred_categories, inferred_column
from lightning_eff.synthesis.tables.rows import Rows, columns_of

DECLARED, INFERRED = "declared", "inferred from rows that were stated to be public"


class TableSchema:
    """Columns of a table and the label its classes are made of.

    Args:
        columns: The columns besides the label, in the order of the coordinates; dictionaries become a
            :class:`CategoricalColumn` if they have ``categories``, else a :class:`NumericColumn`.
        label: Name of the column whose values are the classes; ``None`` for a table without.
        label_categories: The classes, in the order of their numbers; needed with a label.
        out_of_range: What happens to numbers outside their bounds: ``"clamp"`` to the bound, or ``"error"``.
        unknown: What happens to categories that were not declared: ``"error"``, or ``"missing"`` in the columns that
            allow missing values.
        missing_values: Texts that mean a missing value, besides ``None``, NaN and pandas' ``<NA>``.
        source: Where bounds and categories come from; every privacy report shows it.

    Attributes:
        heads: What the output layer of a generator applies, in the order of the coordinates.
        width: Coordinates D of a row without its label.
        num_classes: C; 1 without a label.

    Raises:
        ValueError: A name occurs twice, or a column or label is not fully declared.

    Example:
        >>> schema = TableSchema(
        ...     [NumericColumn("age", 17, 90, bins=8, integer=True), CategoricalColumn("sex", ["Male", "Female"])],
        ...     label="income",
        ...     label_categories=["<=50K", ">50K"],
        ... )
        >>> x, y = schema.encode({"age": [39, 50], "sex": ["Male", "Female"], "income": ["<=50K", ">50K"]})
        >>> x.shape, y
        (torch.Size([2, 10]), tensor([0, 1]))
    """

    def __init__(
        self,
        columns: Sequence[TableColumn | Mapping[str, Any]],
        label: str | None = None,
        label_categories: Sequence[Value] | None = None,
        *,
        out_of_range: Literal["clamp", "error"] = "clamp",
        unknown: Literal["error", "missing"] = "error",
        missing_values: Sequence[str] = ("",),
        source: str = DECLARED,
    ) -> None:
        self.columns: tuple[TableColumn, ...] = tuple(map(_column, columns))
        self.label, self.source = label, source
        if not self.columns:
            raise ValueError("expected at least one column besides the label, got none")
        if (label is None) != (label_categories is None):
            raise ValueError(
                f"expected label and label_categories together, or neither, got {label!r}, {label_categories!r}"
            )
        self._classes = None if label is None else CategoricalColumn(label, label_categories or ())
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"expected every name once, label included, got {list(self.names)}")
        for name, value, known in (
            ("out_of_range", out_of_range, ("clamp", "error")),
            ("unknown", unknown, ("error", "missing")),
        ):
            check_choice(name, value, known)
        self.out_of_range, self.unknown = out_of_range, unknown
        self.missing_values = tuple(missing_values)
        self.heads: list[Head] = []
        for column in self.columns:
            self.heads += column.heads(self.heads[-1].stop if self.heads else 0)
        self.width = self.heads[-1].stop

    @property
    def label_categories(self) -> tuple[Value, ...] | None:
        """The classes in the order of their numbers, or ``None``."""
        return None if self._classes is None else tuple(self._classes.categories)

    @property
    def num_classes(self) -> int:
        """C; 1 without a label."""
        return 1 if self._classes is None else self._classes.width

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the columns, the label last."""
        return (*(column.name for column in self.columns), *(() if self.label is None else (self.label,)))

    def encode(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Turn N rows into coordinates and classes.

        Args:
            rows: Values by column name, one mapping a row, or a pandas data frame; further columns are ignored.

        Returns:
            ``x [N, D]`` float32 and ``y [N]`` int64, zeros without a label.

        Raises:
            ValueError: A column is absent or holds what was not declared; the message names it, and no value.
        """
        numbers = self.read(rows)
        x = np.concatenate([column.encode(numbers[column.name]) for column in self.columns], axis=1)
        y = np.zeros(len(x), dtype=np.int64) if self.label is None else numbers[self.label]
        return torch.from_numpy(x), torch.from_numpy(y)

    def decode(self, x: Tensor, y: Tensor | None = None, *, seed: int | None = None) -> dict[str, list[Any]]:
        """Turn coordinates, e.g. what a generator gave, into rows that keep to the schema whatever the coordinates are.

        Args:
            x: ``[N, D]``, finite.
            y: Classes ``[N]`` in 0..C-1; not needed without a label.
            seed: Of the values drawn inside the cells of numeric columns; ``None`` draws them anew every time.

        Returns:
            Values by column name, the label last.

        Raises:
            ValueError: Shapes do not fit, ``x`` is not finite, or a class is out of range.
        """
        values = x.detach().cpu().float().numpy()
        if values.ndim != 2 or values.shape[1] != self.width:
            raise ValueError(f"expected x of shape [N, {self.width}], got {list(values.shape)}")
        if not np.isfinite(values).all():
            raise ValueError("expected finite coordinates, got NaN or infinite ones: did the generator diverge?")
        random, start = np.random.default_rng(seed), 0
        rows: dict[str, list[Any]] = {}
        for column in self.columns:
            rows[column.name] = list(column.decode(values[:, start : start + column.width], random))
            start += column.width
        if self._classes is not None:
            if y is None or y.shape != (len(values),):
                raise ValueError(f"expected y of shape [{len(values)}], got {None if y is None else list(y.shape)}")
            classes = y.cpu().tolist()
            if any(not 0 <= number < self.num_classes for number in classes):
                raise ValueError(f"expected classes in 0..{self.num_classes - 1}, got {min(classes)}..{max(classes)}")
            rows[self._classes.name] = [self._classes.categories[number] for number in classes]
        return rows

    def read(self, rows: Rows) -> dict[str, NDArray[Any]]:
        """Turn N rows into numbers by column: float64 with NaN for missing, category numbers, clamped to the schema.

        Raises:
            ValueError: As for :meth:`encode`.
        """
        table = columns_of(rows)
        self._length(table)
        numbers: dict[str, NDArray[Any]] = {}
        clamped: dict[str, int] = {}
        for column in self.columns:
            values = table[column.name]
            if isinstance(column, NumericColumn):
                numbers[column.name], outside = self._bounded(column, values)
                clamped |= {column.name: outside} if outside else {}
            else:
                numbers[column.name] = self._known(column, values)
        if clamped:
            told = ", ".join(f"{outside} in {name!r}" for name, outside in clamped.items())
            rank_zero_warn(
                f"numbers outside the declared bounds were taken for the bound: {told}. This is told to whoever holds "
                "the rows; bounds must not be chosen by it where the rows are private"
            )
        if self._classes is not None:
            numbers[self._classes.name] = self._known(self._classes, table[self._classes.name])
        return numbers

    def check(self, rows: Rows) -> Table:
        """Count, column by column, what does not keep to the schema. What it counts is not private.

        Raises:
            ValueError: A column is absent.
        """
        table, lines = columns_of(rows), []
        length = self._length(table)
        for column in (*self.columns, *(() if self._classes is None else (self._classes,))):
            error, outside, missing, unknown = "", None, None, None
            try:
                if isinstance(column, NumericColumn):
                    numbers = column.read(table[column.name], self.missing_values)
                    outside, missing = int(column.outside(numbers).sum()), int(np.isnan(numbers).sum())
                else:
                    chosen = column.read(table[column.name], self.missing_values)
                    unknown = int((chosen < 0).sum())
                    missing = int((chosen == column.width - 1).sum()) if column.missing else 0
            except ValueError as problem:
                error = str(problem)
            lines.append([column.name, outside, unknown, missing, error])
        heading = ["column", "out of bounds", "unknown category", "missing", "problem"]
        return Table(
            f"{length:,} rows against the schema", heading, lines, "Counts of private rows: not to be released."
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain Python of everything, what is left at its default omitted; :meth:`from_dict` takes it."""
        options = {
            "out_of_range": (self.out_of_range, "clamp"),
            "unknown": (self.unknown, "error"),
            "missing_values": (list(self.missing_values), [""]),
            "source": (self.source, DECLARED),
        }
        plain: dict[str, Any] = {}
        if self.label is not None:
            plain |= {"label": self.label, "label_categories": list(self.label_categories or ())}
        plain |= {name: value for name, (value, default) in options.items() if value != default}
        return plain | {"columns": [_plain(column) for column in self.columns]}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> TableSchema:
        """Build a schema from what :meth:`to_dict` gave or a YAML file holds.

        Raises:
            ValueError: A key is unknown or absent, or what the constructor raises.
        """
        known = {"columns", "label", "label_categories", "out_of_range", "unknown", "missing_values", "source"}
        if not isinstance(plain, Mapping) or "columns" not in plain or plain.keys() - known:
            raise ValueError(
                f"expected a schema with the key 'columns' and perhaps {sorted(known - {'columns'})}, "
                f"got {sorted(plain) if isinstance(plain, Mapping) else plain!r}"
            )
        return cls(**plain)

    def save(self, path: str | Path) -> Path:
        """Write it as YAML; folders are made."""
        import yaml  # type: ignore[import-untyped]

        return write_text(path, yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True))

    @classmethod
    def load(cls, path: str | Path) -> TableSchema:
        """Read it from YAML.

        Raises:
            ValueError: The file holds no schema.
        """
        import yaml

        with reading(f"{path} holds no schema"):
            try:
                plain = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
            except yaml.YAMLError as error:
                raise ValueError(f"it is no YAML, {error}") from error
            return cls.from_dict(plain)

    @classmethod
    def infer(
        cls,
        rows: Rows,
        label: str | None = None,
        *,
        public: bool = False,
        encoding: Encoding = "bins",
        bins: int = 16,
        max_categories: int = 20,
    ) -> TableSchema:
        """Take bounds and categories from rows whose domain is public, e.g. an earlier release; reports will say so.

        Args:
            rows: Never the private ones.
            label: Name of the label, if there is one.
            public: Your statement that the rows say nothing private; without it nothing is read.
            encoding: Of the numeric columns.
            bins: Their cells.
            max_categories: Columns of numbers with at most this many different values count as categories.

        Raises:
            ValueError: ``public`` was not stated; or a column has only one value, holds dates, or text of which nearly
                every row has another one. The message tells no value.
        """
        if not public:
            raise ValueError(
                "bounds and categories taken from private rows break the guarantee: declare them, or pass public=True "
                "if the rows they are taken from are public"
            )
        table = columns_of(rows)
        if label is not None and label not in table:
            raise ValueError(f"expected the label among the columns {list(table)}, got {label!r}")
        columns = [
            inferred_column(name, values, encoding, bins, max_categories)
            for name, values in table.items()
            if name != label
        ]
        classes = None if label is None else inferred_categories(label, table[label])
        return cls(columns, label, classes, source=INFERRED)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TableSchema) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        label = "no label" if self.label is None else f"label {self.label!r} with {self.num_classes} classes"
        return f"TableSchema({len(self.columns)} columns, {self.width} coordinates, {label})"

    def _length(self, table: Mapping[str, Sequence[Any]]) -> int:
        absent = [name for name in self.names if name not in table]
        if absent:
            raise ValueError(
                f"expected the columns {list(self.names)}, got none named {', '.join(map(repr, absent))}; of a file: "
                "is there a heading (else names= gives the names), and is ',' the separator (else separator=)?"
            )
        lengths = {name: len(table[name]) for name in self.names}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"expected columns of one length, got {lengths}")
        return next(iter(lengths.values()))

    def _bounded(self, column: NumericColumn, values: Sequence[Any]) -> tuple[NDArray[np.float64], int]:
        """Numbers inside the bounds, and how many were not."""
        numbers = column.read(values, self.missing_values)
        outside = int(column.outside(numbers).sum())
        if outside and self.out_of_range == "error":
            raise ValueError(
                f"column {column.name!r}: {outside} of {len(numbers)} rows lie outside the declared bounds "
                f"[{column.low:g}, {column.high:g}]; widen them, or let out_of_range='clamp'"
            )
        return np.clip(numbers, column.low, column.high), outside

    def _known(self, column: CategoricalColumn, values: Sequence[Any]) -> NDArray[np.int64]:
        numbers = column.read(values, self.missing_values)
        strange = numbers < 0
        if not strange.any():
            return numbers
        if column.missing and self.unknown == "missing":
            return np.where(strange, column.width - 1, numbers)
        where = np.flatnonzero(strange)
        raise ValueError(
            f"column {column.name!r}: {len(where)} of {len(numbers)} rows, the first of them row {where[0]}, hold "
            f"none of the declared categories {list(column.categories)}"
            + ("; unknown='missing' takes them for missing" if column.missing else "")
            + ("; YAML reads yes, no, on and off as truth values: quote them there" * _truths(column))
        )


def schema_from(schema: TableSchema | Mapping[str, Any] | str | Path) -> TableSchema:
    """A schema from one, from its dictionary, or from its YAML file."""
    if isinstance(schema, TableSchema):
        return schema
    return TableSchema.load(schema) if isinstance(schema, str | Path) else TableSchema.from_dict(schema)


def _truths(column: CategoricalColumn) -> bool:
    return any(isinstance(category, bool) for category in column.categories)


def _column(column: TableColumn | Mapping[str, Any]) -> TableColumn:
    if isinstance(column, NumericColumn | CategoricalColumn):
        return column
    if not isinstance(column, Mapping):
        raise ValueError(f"expected a NumericColumn, a CategoricalColumn or a dictionary, got {column!r}")
    kind = CategoricalColumn if "categories" in column else NumericColumn
    known = {field.name: field.default for field in fields(kind)}
    needed = {name for name, default in known.items() if default is MISSING}
    if column.keys() - known.keys() or needed - column.keys():
        wanted = "public bounds" if kind is NumericColumn else "categories"
        raise ValueError(
            f"column {column.get('name')!r}: a {kind.__name__} needs {sorted(needed)} ({wanted} cannot be taken from "
            f"private rows) and may have {sorted(known.keys() - needed)}, got {sorted(column)}"
        )
    return kind(**column)


def _plain(column: TableColumn) -> dict[str, Any]:
    plain = {}
    for field in fields(column):
        value = getattr(column, field.name)
        if value != field.default:
            plain[field.name] = list(value) if isinstance(value, tuple) else value
    return plain
