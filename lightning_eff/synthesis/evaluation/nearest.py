"""Whether synthetic rows lie closer to the records that were released than to records nobody used.

A formal guarantee needs no such test; it shows a reader who asks for it that no record was copied. Distance of two
rows: the mean over columns of |difference| / range for numbers and of 0 or 1 for categories (Gower, 1971).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_eff.reporting import Column, Report, Table
from lightning_eff.synthesis.evaluation.coordinates import gower_coordinates
from lightning_eff.synthesis.tables.rows import Rows
from lightning_eff.synthesis.tables.schema import TableSchema

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class NearestRecords(Report):
    """Distances of synthetic rows to the nearest real ones, in [0, 1]: table and figure ``nearest``.

    Attributes:
        to_train: To the nearest of the training records ``[M]``.
        to_holdout: To the nearest of as many records that took no part ``[M]``.
        between: From those other records to the nearest training record ``[M']``: what is normal among real ones.
        compared: Records on either side.
    """

    to_train: NDArray[np.float64]
    to_holdout: NDArray[np.float64]
    between: NDArray[np.float64]
    compared: int

    @property
    def closer_to_train(self) -> float:
        """Share of synthetic rows closer to a training record, ties counted half; 0.5 where nothing was copied."""
        return float((self.to_train < self.to_holdout).mean() + (self.to_train == self.to_holdout).mean() / 2)

    @property
    def standard_error(self) -> float:
        """Of :attr:`closer_to_train` where nothing was copied."""
        return 0.5 / float(np.sqrt(len(self.to_train)))

    def tables(self) -> dict[str, Table]:
        """Quantiles of the three distances, and exact copies."""
        sides = {
            "synthetic to training record": self.to_train,
            "synthetic to other record": self.to_holdout,
            "other record to training record": self.between,
        }
        rows = [
            [name, *np.quantile(d, (0.05, 0.5, 0.95)).tolist(), float((d == 0).mean())] for name, d in sides.items()
        ]
        columns = [Column(name, ".4f") for name in ("from ... to the nearest", "5 %", "median", "95 %")]
        table = Table(
            "Distance to the nearest record",
            [*columns, Column("identical", ".2%")],
            rows,
            f"{self.closer_to_train:.1%} of {len(self.to_train):,} synthetic rows lie closer to one of "
            f"{self.compared:,} training records than to one of as many others; "
            f"50.0% ± {self.standard_error:.1%} if none was copied",
        )
        return {"nearest": table}

    def figures(self) -> dict[str, Figure]:
        """Share of rows whose nearest record lies within a distance."""
        from lightning_eff.synthesis.evaluation.figures import nearest_figure

        return {"nearest": nearest_figure(self)}


def nearest_records(
    schema: TableSchema,
    synthetic: Rows,
    train: Rows,
    holdout: Rows,
    *,
    rows: int = 1000,
    records: int = 8000,
    seed: int = 0,
) -> NearestRecords:
    """Measure distances on samples of equal size.

    Args:
        schema: Of the table.
        synthetic: Synthetic rows.
        train: Records that entered the release.
        holdout: Records that did not.
        rows: Synthetic rows drawn at most.
        records: Records drawn at most on either side.
        seed: Of the draws.
    """
    random = np.random.default_rng(seed)
    points = [torch.from_numpy(gower_coordinates(schema, side)) for side in (synthetic, train, holdout)]
    compared = min(records, len(points[1]), len(points[2]))
    made, seen, unseen = (
        side[random.permutation(len(side))[:size]]
        for side, size in zip(points, (rows, compared, compared), strict=True)
    )
    return NearestRecords(_nearest(made, seen), _nearest(made, unseen), _nearest(unseen[:rows], seen), compared)


def _nearest(points: Tensor, records: Tensor, chunk: int = 250) -> NDArray[np.float64]:
    parts = [torch.cdist(part, records, p=1).amin(dim=1) for part in torch.split(points, chunk)]
    distance: NDArray[np.float64] = torch.cat(parts).double().numpy()
    return distance
