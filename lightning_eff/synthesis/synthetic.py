"""Generated records, as tensors, rows of a table, files or a picture."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_eff.documents import whole_file
from lightning_eff.synthesis.tables import TableSchema

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class SyntheticData:
    """What a generator made.

    Args:
        x: Records ``[n, ...]`` float32 on the CPU; of a table, their coordinates ``[n, D]``.
        y: Classes ``[n]`` int64.
        schema: Of a table; ``None`` for images and vectors.
        seed: What the latent codes were drawn from; numeric cells of a table are decoded by it too.
    """

    x: Tensor
    y: Tensor
    schema: TableSchema | None = None
    seed: int | None = None

    def __len__(self) -> int:
        return len(self.x)

    def __repr__(self) -> str:
        return f"SyntheticData(n={len(self)}, shape={list(self.x.shape[1:])}, schema={self.schema!r}, seed={self.seed})"

    @cached_property
    def rows(self) -> dict[str, list[Any]]:
        """Values by column name in their original types, the label last.

        Raises:
            ValueError: There is no schema.
        """
        if self.schema is None:
            raise ValueError("expected the records of a table, these have no schema: use x and y, or to_npz()")
        return self.schema.decode(self.x, self.y, seed=self.seed)

    def to_pandas(self) -> Any:
        """Return a data frame of :attr:`rows`.

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        try:
            pandas = import_module("pandas")
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("to_pandas needs pandas: pip install pandas, or take rows or to_csv()") from error
        return pandas.DataFrame(self.rows)

    def to_csv(self, path: str | Path) -> Path:
        """Write :attr:`rows` with a heading; what is missing is an empty field. Folders are made."""
        with whole_file(path) as beside, beside.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(self.rows)
            writer.writerows(zip(*self.rows.values(), strict=True))
        return Path(path)

    def to_npz(self, path: str | Path) -> Path:
        """Write ``data`` (records) and ``labels`` (classes), the keys that other tools read. Folders are made."""
        path = Path(path)
        if path.suffix != ".npz":
            raise ValueError(f"expected a file name that ends in .npz, got {path.name!r}")
        with whole_file(path) as beside, beside.open("wb") as file:
            np.savez_compressed(file, data=self.x.numpy(), labels=self.y.numpy())
        return path

    def as_dataset(self) -> TensorDataset:
        """Return a data set of ``(x, y)``."""
        return TensorDataset(self.x, self.y)

    def grid(self, per_class: int = 10, class_names: Sequence[str] | None = None) -> Figure:
        """Draw images, a row a class.

        Args:
            per_class: Images of each class, >= 1; fewer where there are not so many.
            class_names: In the order of the classes.

        Raises:
            ValueError: The records are no images ``[channels, height, width]`` with 1 or 3 channels.
        """
        from lightning_eff.synthesis.figures import images_figure

        return images_figure(self.x, self.y, per_class=per_class, class_names=class_names)

    def save_grid(self, path: str | Path, per_class: int = 10, class_names: Sequence[str] | None = None) -> Path:
        """Write :meth:`grid` as a picture; folders are made."""
        from lightning_eff.reporting import save_figure

        return save_figure(self.grid(per_class, class_names), path)
