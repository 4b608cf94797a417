"""How far the distributions of synthetic columns, and of pairs of them, lie from the real ones.

Total variation TV(p, q) = 1/2 sum |p - q| lies in [0, 1]: the largest difference in the probability of any event.
Every numeric column is counted in cells. Shapes: d columns with the label, W cells of all columns together.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

from lightning_eff.reporting import human
from lightning_eff.synthesis.tables.columns import CategoricalColumn, NumericColumn, TableColumn, onehot
from lightning_eff.synthesis.tables.rows import Rows
from lightning_eff.synthesis.tables.schema import TableSchema


class Cells:
    """The cells that the columns of a schema are counted in: categories, and intervals of numbers.

    Args:
        schema: Of the table.
        bins: Intervals of every numeric column, equally wide after its transform; ``None`` takes the column's own.
            Own cells say what a generator could have learned, finer ones what a reader of the table will see.

    Attributes:
        names: Names of the d columns, the label last.
        slices: Where the cells of each column lie among all W.
    """

    def __init__(self, schema: TableSchema, bins: int | None = None) -> None:
        self.schema = schema
        columns = [_counted(column, bins) for column in schema.columns]
        if schema.label is not None:
            columns.append(CategoricalColumn(schema.label, schema.label_categories or ()))
        self.columns: list[TableColumn] = columns
        self.names = tuple(column.name for column in columns)
        stops = np.cumsum([column.width for column in columns]).tolist()
        self.slices = tuple(slice(stop - column.width, stop) for stop, column in zip(stops, columns, strict=True))
        self.width = int(stops[-1])

    def count(self, rows: Rows) -> Tensor:
        """How many rows lie in each pair of cells, float64 ``[W, W]``; the diagonal counts single cells."""
        counted = torch.zeros(self.width, self.width, dtype=torch.float64)
        for part in torch.split(
            torch.from_numpy(self.members(rows)), 2**20
        ):  # up to 2^24 single precision counts exactly
            counted += part.T @ part
        return counted

    def members(self, rows: Rows) -> NDArray[np.float32]:
        """Which cells each of N rows lies in, zeros and d ones, ``[N, W]``."""
        numbers = self.schema.read(rows)
        return np.concatenate([_encode(column, numbers[column.name]) for column in self.columns], axis=1)

    def labels(self, column: int) -> list[str]:
        """What the cells of a column are called."""
        kind = self.columns[column]
        if isinstance(kind, CategoricalColumn):
            return [*map(str, kind.categories), *(["missing"] if kind.missing else [])]
        edges = np.ceil(kind.edges) if kind.integer else kind.edges  # the first number of each cell
        return [human(edge) if abs(edge) >= 1000 else f"{edge:.3g}" for edge in edges[:-1].tolist()] + list(kind.flags)

    def single(self, real: Tensor, synthetic: Tensor) -> Tensor:
        """Total variation of each column ``[d]`` from the counts of both sides."""
        return torch.stack(
            [_tv(real.diagonal()[where], synthetic.diagonal()[where]) for where in self.slices],
        )

    def pairwise(self, real: Tensor, synthetic: Tensor) -> Tensor:
        """Total variation of each pair of columns ``[d, d]``; the diagonal holds that of single columns."""
        tv = self.single(real, synthetic).diag()
        for i, first in enumerate(self.slices):
            for j, second in enumerate(self.slices[:i]):
                tv[i, j] = tv[j, i] = _tv(real[first, second], synthetic[first, second])
        return tv


class MarginalTV(Metric):
    """Mean total variation between real and synthetic rows, over columns or over pairs of columns.

    Counts are summed over batches and processes. Range [0, 1], less is better.

    Args:
        schema: Of the table.
        order: 1 for single columns, 2 for pairs.
        bins: Intervals of every numeric column; ``None`` takes the schema's own.
        **kwargs: Of ``torchmetrics.Metric``.

    Raises:
        ValueError: ``order`` is neither, or is 2 with one column only.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    real: Tensor
    synthetic: Tensor

    def __init__(
        self, schema: TableSchema, order: Literal[1, 2] = 1, *, bins: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if order not in (1, 2):
            raise ValueError(f"expected order to be 1 or 2, got {order!r}")
        self.cells, self.order = Cells(schema, bins), order
        if order == 2 and len(self.cells.names) < 2:
            raise ValueError(f"expected at least two columns for order=2, got {list(self.cells.names)}")
        empty = torch.zeros(self.cells.width, self.cells.width, dtype=torch.float64)
        self.add_state("real", default=empty, dist_reduce_fx="sum")
        self.add_state("synthetic", default=empty.clone(), dist_reduce_fx="sum")

    def update(self, rows: Rows, real: bool) -> None:
        """Count rows, real or synthetic ones."""
        counted = self.cells.count(rows).to(self.real.device)
        if real:
            self.real += counted
        else:
            self.synthetic += counted

    def compute(self) -> Tensor:
        """The mean, a float32 number.

        Raises:
            ValueError: There are no synthetic or no real rows.
        """
        if not self.real.any() or not self.synthetic.any():
            raise ValueError("expected synthetic rows and real rows, got only one of the two: call update with both")
        if self.order == 1:
            return self.cells.single(self.real, self.synthetic).mean().float()
        tv = self.cells.pairwise(self.real, self.synthetic)
        return tv[torch.ones_like(tv, dtype=torch.bool).tril(-1)].mean().float()


def _counted(column: TableColumn, bins: int | None) -> TableColumn:
    if isinstance(column, CategoricalColumn) or (bins is None and column.encoding == "bins"):
        return column
    return NumericColumn(
        column.name,
        column.low,
        column.high,
        bins=bins or 16,
        transform=column.transform,
        zero_inflated=column.zero_inflated,
        integer=column.integer,
        missing=column.missing,
    )


def _encode(column: TableColumn, numbers: NDArray[Any]) -> NDArray[np.float32]:
    return onehot(numbers, column.width) if isinstance(column, CategoricalColumn) else column.encode(numbers)


def _tv(real: Tensor, synthetic: Tensor) -> Tensor:
    return (real / real.sum() - synthetic / synthetic.sum()).abs().sum() / 2
