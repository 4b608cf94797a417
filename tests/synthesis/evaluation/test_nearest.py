import numpy as np
import pytest
from synthesis.adult_table import adult

from lightning_eff.synthesis.evaluation import nearest_records
from lightning_eff.synthesis.evaluation.coordinates import classifier_inputs, gower_coordinates
from lightning_eff.synthesis.tables import CategoricalColumn, NumericColumn, TableSchema

SCHEMA = TableSchema(
    [NumericColumn("a", 0, 10, missing=True), CategoricalColumn("b", ["x", "y", "z"])], "c", ["no", "yes"]
)


def part(rows, where):
    return {name: [values[k] for k in where] for name, values in rows.items()}


def test_distance_is_the_mean_over_columns():
    rows = {"a": [1, 6, None], "b": ["x", "y", "x"], "c": ["no", "no", "yes"]}
    x = gower_coordinates(SCHEMA, rows)
    distance = np.abs(x[:, None] - x[None]).sum(2)
    assert distance[0, 1] == pytest.approx((0.5 + 1 + 0) / 3)
    assert distance[0, 2] > (0 + 0 + 1) / 3  # a missing number is far from any number


def test_classifiers_see_numbers_and_not_the_cells_a_generator_makes():
    x, y = classifier_inputs(SCHEMA, {"a": [2.5, None], "b": ["x", "z"], "c": ["yes", "no"]})
    assert x.tolist() == [[0.25, 0, 1, 0, 0], [0, 1, 0, 0, 1]]
    assert y.tolist() == [1, 0]
    tall = TableSchema([NumericColumn("a", 0, 99, transform="log1p")])
    assert classifier_inputs(tall, {"a": [9]})[0].item() == pytest.approx(0.5)


def test_copies_are_seen_and_new_records_are_not_taken_for_copies():
    schema, train, test = adult()
    used, unused, new = part(train, range(4000)), part(test, range(4000)), part(test, range(4000, 5000))
    copied = nearest_records(schema, part(train, range(1000)), used, unused)
    assert (copied.to_train == 0).all()
    assert copied.closer_to_train > 0.95
    fresh = nearest_records(schema, new, used, unused)
    assert abs(fresh.closer_to_train - 0.5) < 4 * fresh.standard_error
    assert fresh.compared == 4000
    assert np.median(fresh.to_train) == pytest.approx(np.median(fresh.between), rel=0.2)


def test_samples_are_of_equal_size_and_of_the_seed():
    random = np.random.default_rng(0)
    rows = {"a": random.uniform(0, 10, 300), "b": ["x"] * 300, "c": ["no"] * 300}
    made, train, holdout = part(rows, range(50)), part(rows, range(50, 250)), part(rows, range(250, 300))
    first, again = (nearest_records(SCHEMA, made, train, holdout, rows=20, seed=1) for _ in range(2))
    assert first.compared == 50
    assert len(first.to_train) == len(first.to_holdout) == len(first.between) == 20
    assert np.array_equal(first.to_train, again.to_train)
    assert "20 synthetic rows" in first.table().caption
