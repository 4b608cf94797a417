from itertools import product

import numpy as np
import pytest
import torch
from synthesis.adult_table import adult

from lightning_eff.synthesis.evaluation import Cells, MarginalTV
from lightning_eff.synthesis.tables import CategoricalColumn, NumericColumn, TableSchema

SCHEMA = TableSchema(
    [NumericColumn("a", 0, 4, bins=4, missing=True), CategoricalColumn("b", ["x", "y"])], "c", ["no", "yes"]
)
REAL = {"a": [0.5, 1.5, 1.5, None], "b": ["x", "x", "y", "y"], "c": ["no", "no", "yes", "yes"]}
MADE = {"a": [0.5, 0.5, 1.5, 3.5], "b": ["x", "y", "x", "y"], "c": ["no", "no", "no", "yes"]}


def tv_by_hand(schema, real, made, names):
    """From dictionaries of shares, cell by cell."""
    shares = []
    for rows in (real, made):
        numbers = schema.read(rows)
        columns = []
        for name in names:
            kind = next((column for column in schema.columns if column.name == name), None)
            values = numbers[name]
            if isinstance(kind, NumericColumn):
                cells = kind.encode(values).argmax(1)
                columns.append(cells)
            else:
                columns.append(values)
        found = list(zip(*columns, strict=True))
        shares.append({cell: found.count(cell) / len(found) for cell in set(found)})
    cells = shares[0].keys() | shares[1].keys()
    return sum(abs(shares[0].get(cell, 0) - shares[1].get(cell, 0)) for cell in cells) / 2


def test_total_variation_by_hand():
    cells = Cells(SCHEMA)
    real, made = cells.count(REAL), cells.count(MADE)
    # a: shares (1, 2, 0, 0, missing 1)/4 against (2, 1, 0, 1, 0)/4
    assert cells.single(real, made).tolist() == [0.5, 0.0, 0.25]
    tv = cells.pairwise(real, made)
    assert torch.equal(tv, tv.T)
    for i, j in product(range(3), range(3)):
        names = [cells.names[i]] if i == j else [cells.names[i], cells.names[j]]
        assert float(tv[i, j]) == pytest.approx(tv_by_hand(SCHEMA, REAL, MADE, names))


def test_the_same_rows_have_none_and_disjoint_rows_all():
    cells = Cells(SCHEMA)
    real = cells.count(REAL)
    assert cells.pairwise(real, real).eq(0).all()
    far = cells.count({"a": [2.5], "b": ["x"], "c": ["yes"]})
    assert cells.pairwise(real, far)[0, 1:].tolist() == [1.0, 1.0]


def test_finer_intervals_see_what_the_columns_own_cells_hide():
    real = {"a": np.linspace(0, 0.49, 100), "b": ["x"] * 100, "c": ["no"] * 100}
    made = real | {"a": np.linspace(0.51, 0.99, 100)}
    for bins, expected in ((None, 0.0), (8, 1.0)):
        cells = Cells(SCHEMA, bins)
        assert float(cells.single(cells.count(real), cells.count(made))[0]) == expected
    smooth = TableSchema([NumericColumn("a", 0, 4, encoding="minmax")])
    assert Cells(smooth).width == 16


@pytest.mark.parametrize(("order", "expected"), [(1, 0.25), (2, None)])
def test_the_metric_sums_batches(order, expected):
    metric = MarginalTV(SCHEMA, order)
    metric.update(REAL, real=True)
    with pytest.raises(ValueError, match="got only one of the two"):
        metric.compute()
    metric.reset()
    for part in (slice(0, 1), slice(1, 4)):
        metric.update({name: values[part] for name, values in REAL.items()}, real=True)
        metric.update({name: values[part] for name, values in MADE.items()}, real=False)
    if expected is None:
        pairs = [("a", "b"), ("a", "c"), ("b", "c")]
        expected = np.mean([tv_by_hand(SCHEMA, REAL, MADE, pair) for pair in pairs])
    assert float(metric.compute()) == pytest.approx(expected)
    metric.reset()
    assert not metric.real.any()


def test_orders_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="expected order to be 1 or 2, got 3"):
        MarginalTV(SCHEMA, 3)
    with pytest.raises(ValueError, match="at least two columns for order=2"):
        MarginalTV(TableSchema([NumericColumn("a", 0, 1)]), 2)


def test_cells_are_named_by_categories_and_lower_edges():
    cells = Cells(SCHEMA)
    assert cells.labels(0) == ["0", "1", "2", "3", "missing"]
    assert cells.labels(1) == ["x", "y"]
    assert Cells(TableSchema([NumericColumn("a", 0, 4e5, bins=2)])).labels(0) == ["0", "200 k"]


def test_samples_of_one_table_differ_as_little_as_their_size_lets_them():
    schema, train, test = adult()
    metric = MarginalTV(schema)
    metric.update(train, real=True)
    metric.update(test, real=False)
    # sampling alone: E|p - q| of a cell is sqrt(2 p (1 - p) / pi * (1/n + 1/m))
    shares = metric.cells.count(train).diagonal() / 32_561
    deviation = (2 * shares * (1 - shares) / torch.pi * (1 / 32_561 + 1 / 16_281)).sqrt()
    expected = float(torch.stack([deviation[where].sum() / 2 for where in metric.cells.slices]).mean())
    assert float(metric.compute()) == pytest.approx(expected, rel=0.35)
