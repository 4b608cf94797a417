"""Rows of a table as coordinates in which classifiers and distances see them, independent of a generator's encoding."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_eff.synthesis.tables.columns import CategoricalColumn, NumericColumn, TableColumn, onehot
from lightning_eff.synthesis.tables.rows import Rows
from lightning_eff.synthesis.tables.schema import TableSchema


def gower_coordinates(schema: TableSchema, rows: Rows) -> NDArray[np.float32]:
    """Coordinates ``[N, W]`` whose L1 distance is Gower's distance of rows, the label included."""
    numbers, columns = schema.read(rows), list[TableColumn](schema.columns)
    if schema.label is not None:
        columns.append(CategoricalColumn(schema.label, schema.label_categories or ()))
    parts = [scaled_coordinates(column, numbers[column.name]) for column in columns]
    # categories that differ do so in two coordinates
    halved = [part / (1 if isinstance(c, NumericColumn) else 2) for part, c in zip(parts, columns, strict=True)]
    return (np.concatenate(halved, axis=1) / len(columns)).astype(np.float32)


def classifier_inputs(schema: TableSchema, rows: Rows) -> tuple[Tensor, Tensor]:
    """Coordinates in [0, 1] for classifiers, ``x [N, W]`` and classes ``y [N]``: scaled numbers, one-hot categories."""
    numbers = schema.read(rows)
    x = np.concatenate([scaled_coordinates(column, numbers[column.name]) for column in schema.columns], axis=1)
    y = np.zeros(len(x), dtype=np.int64) if schema.label is None else numbers[schema.label]
    return torch.from_numpy(x), torch.from_numpy(y)


def scaled_coordinates(column: TableColumn, numbers: NDArray[np.float64]) -> NDArray[np.float32]:
    """A column's numbers in [0, 1] by bounds and transform, with one coordinate more for missing, or one-hot."""
    if isinstance(column, CategoricalColumn):
        return onehot(numbers.astype(np.int64), column.width)
    unit = NumericColumn(column.name, column.low, column.high, "unit", transform=column.transform)
    scaled = unit.encode(numbers)
    return np.column_stack([scaled, np.isnan(numbers)]).astype(np.float32) if column.missing else scaled
