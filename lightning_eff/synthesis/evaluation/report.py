"""One report on a synthetic table: what it is good for, how it differs, and whether records were copied.

It is computed on real records and carries no guarantee: it is for those who hold the records, not for release.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_eff.reporting import Column, Report, Table
from lightning_eff.synthesis.evaluation.classifiers import TABLE_CLASSIFIERS
from lightning_eff.synthesis.evaluation.coordinates import classifier_inputs
from lightning_eff.synthesis.evaluation.correlations import associations
from lightning_eff.synthesis.evaluation.downstream import Downstream, train_synthetic_test_real
from lightning_eff.synthesis.evaluation.figures import marginals_figure, nearest_figure, pairs_figure
from lightning_eff.synthesis.evaluation.marginals import Cells
from lightning_eff.synthesis.evaluation.nearest import NearestRecords, nearest_records
from lightning_eff.synthesis.tables.rows import Rows
from lightning_eff.synthesis.tables.schema import TableSchema

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NOT_PRIVATE = (
    "Computed on real records without noise. This report carries no privacy guarantee: do not release it, and do not "
    "choose what is released by it."
)

NOT_TO_RELEASE = "computed on real records, not private"
"""What every figure of the report says."""

_FINE = 32  # intervals of a numeric column in the second count


@dataclass(frozen=True)
class TableQuality(Report):
    """What :func:`evaluate_table` measured: tables ``classifiers``, ``columns``, ``nearest``, and figures.

    Attributes:
        cells: What columns were counted in: the schema's own cells.
        real: Counts of the training rows ``[W, W]``.
        synthetic: Counts of the synthetic rows ``[W, W]``.
        fine_tv: Total variation of each column in 32 intervals ``[d]``.
        real_associations: Of the training rows ``[d, d]``.
        synthetic_associations: Of the synthetic rows ``[d, d]``.
        nearest: Distances to the nearest records.
        downstream: Scores of classifiers; ``None`` for a table without a label or where none were asked for.
    """

    cells: Cells
    real: Tensor
    synthetic: Tensor
    fine_tv: Tensor
    real_associations: NDArray[np.float64]
    synthetic_associations: NDArray[np.float64]
    nearest: NearestRecords
    downstream: Downstream | None

    @property
    def mean_tv(self) -> float:
        """Mean total variation of single columns."""
        return float(self.cells.single(self.real, self.synthetic).mean())

    def preface(self) -> list[str]:
        """Say that none of it is private."""
        return [NOT_PRIVATE]

    def tables(self) -> dict[str, Table]:
        """Classifiers, columns, and nearest records."""
        parts = {} if self.downstream is None else {"classifiers": self.downstream.table()}
        return {**parts, "columns": self._columns(), "nearest": self.nearest.table()}

    def _columns(self) -> Table:
        tv, names = self.cells.single(self.real, self.synthetic), self.cells.names
        widths = [column.width for column in self.cells.columns]
        figures = [tv.numpy(), self.fine_tv.numpy()]
        if len(names) > 1:
            others = ~np.eye(len(names), dtype=bool)
            pairs = self.cells.pairwise(self.real, self.synthetic).numpy()
            changes = np.abs(self.synthetic_associations - self.real_associations)
            figures += [np.mean(pairs, axis=1, where=others), np.max(changes, axis=1, where=others, initial=0.0)]
        means = [float(values.mean()) for values in figures]
        if len(names) > 1:
            means[-1] = float(changes[others].mean())
        absent = [None] * (4 - len(figures))
        rows: list[list[Any]] = [
            [name, width, *(float(values[i]) for values in figures), *absent]
            for i, (name, width) in enumerate(zip(names, widths, strict=True))
        ]
        rows.append(["mean", None, *means, *absent])
        columns = [
            Column("column"),
            Column("cells", "d"),
            Column("TV", ".3f"),
            Column(f"TV in {_FINE} intervals", ".3f"),
            Column("TV with another column", ".3f"),
            Column("largest change of association", ".3f"),
        ]
        caption = (
            "TV: total variation between real and synthetic shares, 0 to 1; in the last line the change of association "
            "is the mean over pairs."
        )
        return Table("Columns", columns, rows, caption)

    def figures(self) -> dict[str, Figure]:
        """Histograms, pairs of columns and nearest records, by the name of their file."""
        pairs = self.cells.pairwise(self.real, self.synthetic)
        figures = {
            "marginals": marginals_figure(self.cells, self.real, self.synthetic),
            "pairs": pairs_figure(self.cells.names, pairs, self.real_associations, self.synthetic_associations),
            "nearest": nearest_figure(self.nearest),
        }
        for figure in figures.values():
            figure.supxlabel(NOT_TO_RELEASE, fontsize=8, color="firebrick")
        return figures


def evaluate_table(
    schema: TableSchema,
    synthetic: Rows,
    train: Rows,
    test: Rows,
    *,
    classifiers: Sequence[str] = TABLE_CLASSIFIERS,
    seeds: int = 1,
    compare_real: bool = True,
    progress: bool = True,
) -> TableQuality:
    """Compare a synthetic table with real records.

    Args:
        schema: Of the table.
        synthetic: Its rows.
        train: Records that entered the release.
        test: Records that did not: classifiers are scored on them.
        classifiers: Names out of :data:`TABLE_CLASSIFIERS`; none skips them.
        seeds: Times each classifier is trained, >= 1.
        compare_real: Whether classifiers are trained on ``train`` as well.
        progress: Whether a bar is shown.

    Returns:
        All of it, to print, draw or save.

    Raises:
        ValueError: Rows do not keep to the schema, or a classifier is not known.
    """
    downstream = None
    if schema.label is not None and classifiers:
        downstream = train_synthetic_test_real(
            classifier_inputs(schema, synthetic),
            classifier_inputs(schema, test),
            real=classifier_inputs(schema, train) if compare_real else None,
            classifiers=classifiers,
            seeds=seeds,
            num_classes=schema.num_classes,
            progress=progress,
        )
    own, fine = Cells(schema), Cells(schema, _FINE)
    return TableQuality(
        cells=own,
        real=own.count(train),
        synthetic=own.count(synthetic),
        fine_tv=fine.single(fine.count(train), fine.count(synthetic)),
        real_associations=associations(schema, train),
        synthetic_associations=associations(schema, synthetic),
        nearest=nearest_records(schema, synthetic, train, test),
        downstream=downstream,
    )
