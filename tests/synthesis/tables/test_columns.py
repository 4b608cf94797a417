import math

import numpy as np
import pytest

from lightning_eff.synthesis.tables import CategoricalColumn, Head, NumericColumn

RANDOM = np.random.default_rng(0)


def encoded(column, values):
    return column.encode(column.read(values))


def round_trip(column, values):
    return column.decode(encoded(column, values), np.random.default_rng(0))


def test_cells_hold_their_lower_edge_and_the_last_one_both():
    column = NumericColumn("age", 0, 40, bins=4)
    assert column.edges.tolist() == [0, 10, 20, 30, 40]
    assert encoded(column, [0, 9.99, 10, 29.9, 30, 40]).argmax(1).tolist() == [0, 0, 1, 2, 3, 3]


def test_equal_cells_lie_after_the_transform():
    column = NumericColumn("gain", 0, math.e**4 - 1, bins=4, transform="log1p")
    np.testing.assert_allclose(column.edges, np.expm1([0, 1, 2, 3, 4]), rtol=1e-12)


def test_stated_edges_are_the_edges():
    column = NumericColumn("hours", 1, 99, bins=[35, 40, 41])
    assert column.edges.tolist() == [1, 35, 40, 41, 99]
    assert encoded(column, [34, 35, 40, 41]).argmax(1).tolist() == [0, 1, 2, 3]
    assert column == NumericColumn("hours", 1, 99, bins=(35, 40, 41))


@pytest.mark.parametrize(
    "column",
    [
        NumericColumn("a", -2, 3, bins=5),
        NumericColumn("a", 17, 90, bins=8, integer=True),
        NumericColumn("a", 0, 99_999, bins=8, transform="log1p", zero_inflated=True, integer=True),
        NumericColumn("a", 0, 3, bins=16, integer=True),
        NumericColumn("a", 0, 1e-3, bins=7, zero_inflated=True, missing=True),
        NumericColumn("a", 0, 99, bins=[1, 2, 50.5], missing=True, integer=True),
        CategoricalColumn("a", ["x", 3, 2.5], missing=True),
    ],
)
def test_what_any_coordinates_decode_to_is_valid_and_encodes_to_where_it_came_from(column):
    x = np.random.default_rng(1).normal(size=(4000, column.width)).astype(np.float32)
    values = column.decode(x, np.random.default_rng(2))
    if isinstance(column, NumericColumn):
        assert not column.outside(column.read(values)).any()
        assert all(value is None or isinstance(value, int if column.integer else float) for value in values)
    again = encoded(column, values)
    assert (again.sum(1) == 1).all()
    # cells that hold no whole number decode to the nearest one
    reachable = np.isin(x.argmax(1), again.argmax(1))
    assert (again.argmax(1) == x.argmax(1))[reachable].all()
    assert reachable.mean() > 0.2
    assert np.array_equal(encoded(column, column.decode(again, np.random.default_rng(3))), again)


def test_a_decoded_number_is_uniform_inside_its_cell():
    column = NumericColumn("a", 0, 4, bins=2)
    x = np.tile(np.float32([0, 1]), (20_000, 1))
    values = np.array(column.decode(x, np.random.default_rng(0)))
    assert values.min() >= 2
    counts = np.histogram(values, bins=8, range=(2, 4))[0]
    assert ((counts - 2500) ** 2 / 2500).sum() < 24.3  # chi squared with 7 degrees of freedom, 1 in 1000


def test_whole_numbers_of_a_cell_are_equally_likely():
    column = NumericColumn("a", 1, 10, bins=[4], integer=True)  # 4 to 10
    values = column.decode(np.tile(np.float32([0, 1]), (14_000, 1)), np.random.default_rng(0))
    counts = np.bincount(values, minlength=11)
    assert counts[:4].sum() == 0
    assert ((counts[4:] - 2000) ** 2 / 2000).sum() < 22.5  # 6 degrees of freedom, 1 in 1000


def test_zero_decodes_to_exactly_zero():
    column = NumericColumn("loss", 0, 4356, bins=8, transform="log1p", zero_inflated=True, integer=True)
    assert column.width == 9
    assert round_trip(column, [0, 0]) == [0, 0]
    assert 0 not in column.decode(np.tile(np.eye(9, dtype=np.float32)[0], (100, 1)), RANDOM)


@pytest.mark.parametrize(("encoding", "least", "kind"), [("minmax", -1, "tanh"), ("unit", 0, "sigmoid")])
def test_scaled_columns_keep_the_number(encoding, least, kind):
    column = NumericColumn("a", 10, 30, encoding=encoding)
    assert column.heads(5) == [Head(kind, 5, 6)]
    np.testing.assert_allclose(encoded(column, [10, 20, 30])[:, 0], [least, (least + 1) / 2, 1])
    assert round_trip(column, [10, 20, 30]) == [10, 20, 30]
    assert column.decode(np.float32([[-9], [9]]), RANDOM) == [10, 30]  # outside the range of the head


def test_scaled_columns_with_zeros_and_missing_values_choose_first():
    column = NumericColumn("a", -4, 4, encoding="minmax", zero_inflated=True, missing=True)
    assert column.heads(0) == [Head("onehot", 0, 3), Head("tanh", 3, 4)]
    x = encoded(column, [2.0, 0.0, None])
    assert x.tolist() == [[1, 0, 0, 0.5], [0, 1, 0, 0], [0, 0, 1, 0]]
    assert column.decode(x, RANDOM) == [2.0, 0.0, None]


def test_numbers_come_as_text_or_numbers_with_missing_values_of_all_kinds():
    column = NumericColumn("a", 0, 9, missing=True)
    read = column.read(["1", " 2.5 ", "", None, float("nan"), "n/a"], missing_values=("", "n/a"))
    np.testing.assert_array_equal(read, [1, 2.5, *[math.nan] * 4])


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        (NumericColumn("a", 0, 9), [1, None], "column 'a': row 1 holds no number; declare missing=True"),
        (NumericColumn("a", 0, 9), ["1", "secret", "secret"], "column 'a': 2 rows, the first of them row 1, hold"),
        (NumericColumn("a", 0, 9, missing=True), [1.0, math.inf], "column 'a': row 1 holds an infinite number"),
        (NumericColumn("a", 0, 9, integer=True), [1, 2.5], "column 'a': row 1 holds a number that is not whole"),
    ],
)
def test_what_is_no_number_is_named_by_column_and_row_but_not_shown(column, values, message):
    with pytest.raises(ValueError, match=message) as error:
        column.read(values)
    assert "secret" not in str(error.value)
    assert error.value.__cause__ is None  # float() would have shown it
    assert error.value.__context__ is None  # as loggers of whole tracebacks do


def test_categories_compare_as_text():
    column = CategoricalColumn("a", [1, 2.5, "x", True])
    assert column.read(["1", 2.5, "x", True, "True", 1, 1.0, "y", None]).tolist() == [0, 1, 2, 3, 3, 0, 0, -1, -1]
    assert column.read(np.array([1, 1, 2])).tolist() == [0, 0, -1]


def test_a_missing_category_is_one_more():
    column = CategoricalColumn("a", ["x"], missing=True)
    assert column.width == 2
    assert round_trip(column, ["x", None, ""]) == ["x", None, None]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"low": 3, "high": 3}, "expected public bounds low < high"),
        ({"low": 0, "high": math.inf}, "expected public bounds low < high, both finite"),
        ({"low": None, "high": 1}, "expected public bounds"),
        ({"low": 0, "high": 1, "encoding": "cells"}, "encoding must be one of"),
        ({"low": 0, "high": 1, "transform": "log"}, "transform must be one of"),
        ({"low": -1, "high": 1, "transform": "log1p"}, "expected low >= 0 for the transform log1p"),
        ({"low": 1, "high": 2, "zero_inflated": True}, "zero_inflated needs bounds that hold 0"),
        ({"low": 0, "high": 1, "bins": 1}, "expected at least 2 bins"),
        ({"low": 0, "high": 1, "bins": []}, "expected at least one inner edge"),
        ({"low": 0, "high": 1, "bins": [0.5, 0.2]}, "ascending and between 0 and 1"),
        ({"low": 0, "high": 1, "bins": "8"}, "expected bins to be a number of cells or a list of edges"),
    ],
)
def test_numeric_columns_are_fully_declared(arguments, message):
    with pytest.raises(ValueError, match=f"column 'a': .*{message}"):
        NumericColumn("a", **arguments)


@pytest.mark.parametrize(
    ("categories", "message"),
    [
        (["x", "x"], "none twice"),
        ([1, "1"], "none twice"),
        (["x"], "at least two categories"),
        ("xy", "expected a list of categories"),
        ([None, "x"], "strings or numbers"),
    ],
)
def test_categorical_columns_are_fully_declared(categories, message):
    with pytest.raises(ValueError, match=f"column 'a': .*{message}"):
        CategoricalColumn("a", categories)
