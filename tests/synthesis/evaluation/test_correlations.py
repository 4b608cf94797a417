import numpy as np
import pytest
from scipy.stats import chi2_contingency

from lightning_eff.synthesis.evaluation import associations
from lightning_eff.synthesis.tables import CategoricalColumn, NumericColumn, TableSchema

RANDOM = np.random.default_rng(0)
N = 500
JOB = RANDOM.integers(0, 3, N)
TOWN = np.where(RANDOM.random(N) < 0.4, JOB, RANDOM.integers(0, 4, N))
AGE = 40 + 5 * JOB + RANDOM.normal(scale=6, size=N)
PAY = 3 * AGE + RANDOM.normal(scale=40, size=N)
SCHEMA = TableSchema(
    [
        NumericColumn("age", 0, 100),
        NumericColumn("pay", -1000, 1000, encoding="minmax"),
        CategoricalColumn("town", [0, 1, 2, 3]),
        CategoricalColumn("never", ["x", "y"]),
    ],
    "job",
    [0, 1, 2],
)
ROWS = {"age": AGE, "pay": PAY, "town": TOWN, "never": ["x"] * N, "job": JOB}


@pytest.fixture(scope="module")
def found():
    return associations(SCHEMA, ROWS)


def test_numbers_have_the_absolute_correlation_of_pearson(found):
    assert found[0, 1] == pytest.approx(abs(np.corrcoef(AGE, PAY)[0, 1]))
    flipped = associations(SCHEMA, ROWS | {"pay": -PAY})
    assert flipped[0, 1] == pytest.approx(found[0, 1])


def test_categories_have_cramers_v(found):
    table = np.zeros((4, 3))
    np.add.at(table, (TOWN, JOB), 1)
    chi2 = chi2_contingency(table, correction=False).statistic
    assert found[2, 4] == pytest.approx(np.sqrt(chi2 / N / 2))


def test_a_number_and_a_category_have_the_correlation_ratio(found):
    groups = [AGE[job == JOB] for job in range(3)]
    between = sum(len(group) * (group.mean() - AGE.mean()) ** 2 for group in groups)
    assert found[0, 4] == pytest.approx(np.sqrt(between / ((AGE - AGE.mean()) ** 2).sum()))


def test_what_does_not_vary_goes_with_nothing(found):
    assert found[3].tolist() == [0, 0, 0, 1, 0]
    assert np.array_equal(found, found.T)
    assert found.diagonal().tolist() == [1] * 5


def test_missing_numbers_count_as_the_mean():
    schema = TableSchema([NumericColumn("a", 0, 9, missing=True), NumericColumn("b", 0, 9)])
    full = associations(schema, {"a": [1, 3, 2], "b": [1, 3, 2]})
    assert full[0, 1] == pytest.approx(1)
    assert associations(schema, {"a": [1, 3, None], "b": [1, 3, 2]})[0, 1] == pytest.approx(1)
    assert associations(schema, {"a": [None] * 3, "b": [1, 3, 2]})[0, 1] == 0
