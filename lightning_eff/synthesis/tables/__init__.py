"""Tables of numbers and categories: what they may hold, their encoding, and a data module that reads them."""

from lightning_eff.synthesis.tables.columns import CategoricalColumn, Head, NumericColumn, TableColumn
from lightning_eff.synthesis.tables.data import TabularDataModule, read_csv, split_rows
from lightning_eff.synthesis.tables.rows import Rows, columns_of
from lightning_eff.synthesis.tables.schema import TableSchema, schema_from

__all__ = [
    "CategoricalColumn",
    "Head",
    "NumericColumn",
    "Rows",
    "TableColumn",
    "TableSchema",
    "TabularDataModule",
    "columns_of",
    "read_csv",
    "schema_from",
    "split_rows",
]
