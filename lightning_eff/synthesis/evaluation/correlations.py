"""How strongly columns go together, numbers and categories alike.

Two numeric columns: absolute Pearson correlation. Two categorical ones: Cramer's V. One of each: the correlation ratio
(the share of the number's deviation that the categories explain, square root). All in [0, 1].
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lightning_eff.synthesis.evaluation.marginals import Cells
from lightning_eff.synthesis.tables.columns import CategoricalColumn
from lightning_eff.synthesis.tables.rows import Rows
from lightning_eff.synthesis.tables.schema import TableSchema


def associations(schema: TableSchema, rows: Rows) -> NDArray[np.float64]:
    """Association of every pair of columns, the label last.

    Args:
        schema: Of the table.
        rows: N rows; a missing number counts as the mean of its column.

    Returns:
        Symmetric ``[d, d]`` with ones on the diagonal; 0 where a column does not vary.
    """
    cells, numbers = Cells(schema), schema.read(rows)
    n = len(next(iter(numbers.values())))
    blocks = []  # centred columns of each block span what the column can say
    for column in cells.columns:
        values = numbers[column.name]
        if isinstance(column, CategoricalColumn):
            block = np.eye(column.width)[values]
        else:
            value = np.where(np.isnan(values), np.nanmean(values) if not np.isnan(values).all() else 0.0, values)
            block = (np.log1p(value) if column.transform == "log1p" else value)[:, None]
        used = block[:, block.std(axis=0) > 0]
        blocks.append((used - used.mean(axis=0)) / np.sqrt(n))
    whitened = [_whitened(block) for block in blocks]
    result = np.eye(len(blocks))
    for i in range(len(blocks)):
        for j in range(i):
            # the sum of squared canonical correlations: chi^2 / N of two categories, r^2 of two numbers,
            # and the squared correlation ratio of one of each
            shared = float(np.square(whitened[i].T @ whitened[j]).sum())
            least = min(whitened[i].shape[1], whitened[j].shape[1])
            result[i, j] = result[j, i] = np.sqrt(min(1.0, shared / least)) if least else 0.0
    return result


def _whitened(block: NDArray[np.float64]) -> NDArray[np.float64]:
    # orthonormal basis of the columns; the shares of categories sum to one, so a rank is lost there
    if block.shape[1] == 0:
        return block
    values, vectors = np.linalg.eigh(block.T @ block)
    kept = values > 1e-10 * values.max()
    basis: NDArray[np.float64] = block @ (vectors[:, kept] / np.sqrt(values[kept]))
    return basis
