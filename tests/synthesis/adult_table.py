"""The UCI Adult table, where LIGHTNING_EFF_DATA names a folder that has it."""

import os
from functools import cache
from pathlib import Path

import pytest
from helpers import REPOSITORY

from lightning_eff.synthesis.tables import TableSchema, read_csv

FOLDER = Path(os.environ.get("LIGHTNING_EFF_DATA", "/nowhere")) / "dp_ntk"


@cache
def adult_schema() -> TableSchema:
    return TableSchema.load(REPOSITORY / "examples/adult_schema.yaml")


def adult() -> tuple[TableSchema, dict, dict]:
    """Schema, the 32,561 training rows and the 16,281 test rows."""
    if not (FOLDER / "adult.test").is_file():
        pytest.skip("the Adult table is missing: LIGHTNING_EFF_DATA must name a folder that holds dp_ntk/adult.data")
    return adult_schema(), *_rows()


@cache
def _rows() -> tuple[dict, dict]:
    names = adult_schema().names
    train = read_csv(FOLDER / "adult.data", names=names)
    test = read_csv(FOLDER / "adult.test", names=names, skip_lines=1)  # a comment
    return train, test | {"income": [value.rstrip(".") for value in test["income"]]}
