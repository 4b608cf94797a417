"""Rows of a CSV file, a data frame or plain lists as the batches that a release reads."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_eff.arguments import check_number, check_whole
from lightning_eff.synthesis.tables.rows import Rows, columns_of
from lightning_eff.synthesis.tables.schema import TableSchema, schema_from


class TabularDataModule(LightningDataModule):
    """A table in the coordinates of its schema: batches ``(x [N, D] float32, y [N] int64)``, every row once, in order.

    Args:
        path: CSV file, or the rows themselves: values by column name, one mapping a row, or a data frame.
        schema: The schema, its dictionary, or its YAML file; ``None`` takes that of the module the trainer fits.
        val_path: Rows to validate on, in the same forms.
        test_path: Rows to test on, in the same forms.
        test_fraction: Share of the rows of ``path`` set aside for tests instead, in [0, 1); they enter no release.
        batch_size: Rows a batch, >= 1.
        separator: Character between the fields of a file.
        names: Names of the columns where files have no heading.
        skip_lines: Lines to leave out at the beginning of every file, >= 0.
        seed: Of the rows set aside.

    Attributes:
        train_rows: Rows of the training set by column, as read; after ``setup``.
        test_rows: Those of the test set, or ``None``.

    Raises:
        ValueError: An argument lies outside its range; from ``setup``: a file or its rows do not keep to the schema.
    """

    train_rows: dict[str, Sequence[Any]]
    test_rows: dict[str, Sequence[Any]] | None

    def __init__(
        self,
        path: str | Path | Rows,
        schema: TableSchema | dict[str, Any] | str | Path | None = None,
        *,
        val_path: str | Path | Rows | None = None,
        test_path: str | Path | Rows | None = None,
        test_fraction: float = 0.0,
        batch_size: int = 4096,
        separator: str = ",",
        names: list[str] | None = None,
        skip_lines: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_number("test_fraction", test_fraction, least=0, below=1)
        if test_fraction and test_path is not None:
            raise ValueError("expected test_path or test_fraction, got both")
        for argument, value, least in (("batch_size", batch_size, 1), ("skip_lines", skip_lines, 0)):
            check_whole(argument, value, least)
        if len(separator) != 1:
            raise ValueError(f"expected separator to be one character, got {separator!r}")
        self.path, self.val_path, self.test_path = path, val_path, test_path
        self.schema = None if schema is None else schema_from(schema)
        self.test_fraction, self.batch_size, self.seed = test_fraction, batch_size, seed
        self.separator, self.names, self.skip_lines = separator, names, skip_lines
        self._sets: dict[str, TensorDataset] = {}

    def setup(self, stage: str | None = None) -> None:
        """Read and encode the rows unless that has been done. It is the same for every stage."""
        if self._sets:
            return
        schema = self.schema or getattr(getattr(self.trainer, "lightning_module", None), "schema", None)
        if schema is None:
            raise ValueError("expected a schema here or in the module that is fitted, got none: pass schema=")
        self.schema = schema_from(schema)
        train, val = self._read(self.path), None if self.val_path is None else self._read(self.val_path)
        test = None if self.test_path is None else self._read(self.test_path)
        unread = [name for name in train if name not in self.schema.names]
        if unread and not [name for name in self.schema.names if name not in train]:
            rank_zero_info(f"not read, as the schema has no such column: {', '.join(unread)}")
        if self.test_fraction:
            train, test = split_rows(train, self.test_fraction, self.seed)
        given = {"train": train, "val": val, "test": test}
        encoded = {name: TensorDataset(*self._encode(name, rows)) for name, rows in given.items() if rows is not None}
        self._sets, self.train_rows, self.test_rows = encoded, train, test

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Batches of the training rows, each row once, in order."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]] | list[Any]:
        """Batches of the validation rows; no loader where there are none."""
        return self._loader("val") if "val" in self._sets else []

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Batches of the test rows.

        Raises:
            ValueError: There are none.
        """
        if "test" not in self._sets:
            raise ValueError("there are no rows to test on: pass test_path= or test_fraction=")
        return self._loader("test")

    def _loader(self, name: str) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self._sets[name], batch_size=self.batch_size)

    def _read(self, source: str | Path | Rows) -> dict[str, Sequence[Any]]:
        if isinstance(source, str | Path):
            return dict(read_csv(source, separator=self.separator, names=self.names, skip_lines=self.skip_lines))
        return columns_of(source)

    def _encode(self, name: str, rows: Rows) -> tuple[Tensor, Tensor]:
        assert self.schema is not None
        try:
            return self.schema.encode(rows)
        except ValueError as error:
            raise ValueError(f"{name} rows: {error}") from error


def read_csv(
    path: str | Path, *, separator: str = ",", names: Sequence[str] | None = None, skip_lines: int = 0
) -> dict[str, list[str]]:
    """Read a file of rows as text by column; blanks around fields and empty lines are left out.

    Args:
        path: The file, UTF-8.
        separator: Character between fields.
        names: Names of the columns of a file without a heading.
        skip_lines: Lines to leave out at the beginning.

    Raises:
        ValueError: A line has another number of fields, a name occurs twice, or there is no row.
    """
    with Path(path).open(encoding="utf-8-sig", newline="") as file:
        for _ in range(skip_lines):
            file.readline()
        lines = csv.reader(file, delimiter=separator, skipinitialspace=True)
        heading = list(names) if names is not None else [name.strip() for name in next(lines, [])]
        if not heading:
            raise ValueError(f"{path}: expected a heading, got none")
        if len(set(heading)) < len(heading):  # what stands there may be a record: its fields are not told
            second = next(k for k, name in enumerate(heading) if name in heading[:k])
            raise ValueError(
                f"{path}: expected a heading without a name twice, got {len(heading)} fields of which number "
                f"{second + 1} repeats number {heading.index(heading[second]) + 1}; where there is no heading, names= "
                "gives the names"
            )
        rows = []
        for fields in lines:
            if not fields:
                continue
            if len(fields) != len(heading):
                raise ValueError(
                    f"{path}, line {skip_lines + lines.line_num}: expected {len(heading)} fields, got {len(fields)}; "
                    f"is {separator!r} the separator?"
                )
            rows.append([field.strip() for field in fields])
    if not rows:
        raise ValueError(f"{path}: expected rows after the heading, got none")
    return {name: list(values) for name, values in zip(heading, zip(*rows, strict=True), strict=True)}


def split_rows(
    rows: Mapping[str, Sequence[Any]], fraction: float, seed: int = 0
) -> tuple[dict[str, Sequence[Any]], dict[str, Sequence[Any]]]:
    """Set aside a share of the rows, drawn by the seed; both parts keep the order.

    Args:
        rows: Values by column name.
        fraction: Share set aside, in (0, 1).
        seed: Of the draw.

    Returns:
        The rest, and the rows set aside.

    Raises:
        ValueError: One of the parts would be empty.
    """
    length = len(next(iter(rows.values())))
    aside = round(fraction * length)
    if not 0 < aside < length:
        raise ValueError(f"expected a fraction that leaves rows on both sides, got {fraction!r} of {length} rows")
    chosen = np.zeros(length, dtype=bool)
    chosen[np.random.default_rng(seed).permutation(length)[:aside]] = True
    return _where(rows, ~chosen), _where(rows, chosen)


def _where(rows: Mapping[str, Sequence[Any]], mask: Any) -> dict[str, Sequence[Any]]:
    return {name: [values[index] for index in np.flatnonzero(mask).tolist()] for name, values in rows.items()}
