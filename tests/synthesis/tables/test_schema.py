import pickle

import numpy as np
import pytest
import torch
from synthesis.adult_table import adult, adult_schema

from lightning_eff.synthesis.tables import CategoricalColumn, Head, NumericColumn, TableSchema, columns_of, schema_from

ROWS = {"age": ["39", "17", "90"], "job": ["clerk", "", "cook"], "score": [0.5, 0.0, -1.0], "rich": ["no", "no", "yes"]}


@pytest.fixture
def schema():
    return TableSchema(
        [
            NumericColumn("age", 17, 90, bins=4, integer=True),
            CategoricalColumn("job", ["clerk", "cook"], missing=True),
            NumericColumn("score", -1, 1, encoding="minmax"),
        ],
        label="rich",
        label_categories=["no", "yes"],
    )


def test_rows_become_coordinates_and_classes(schema):
    x, y = schema.encode(ROWS)
    assert x.dtype == torch.float32
    assert x.tolist() == [
        [0, 1, 0, 0, 1, 0, 0, 0.5],
        [1, 0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 1, 0, 1, 0, -1],
    ]
    assert y.dtype == torch.int64
    assert y.tolist() == [0, 0, 1]
    assert (schema.width, schema.num_classes) == (8, 2)
    assert schema.heads == [Head("onehot", 0, 4), Head("onehot", 4, 7), Head("tanh", 7, 8)]


def test_rows_come_as_columns_as_mappings_or_as_a_frame(schema):
    pandas = pytest.importorskip("pandas")
    x, y = schema.encode(ROWS)
    records = [dict(zip(ROWS, row, strict=True)) for row in zip(*ROWS.values(), strict=True)]
    frame = pandas.DataFrame(ROWS).assign(age=[39, 17, 90], job=["clerk", None, "cook"])
    for rows in (records, frame, {name: np.array(values) for name, values in ROWS.items()}):
        assert torch.equal(schema.encode(rows)[0], x)
        assert torch.equal(schema.encode(rows)[1], y)


def test_any_coordinates_decode_to_rows_of_the_schema(schema):
    x, y = 30 * torch.randn(500, 8, generator=torch.Generator().manual_seed(0)), torch.arange(500) % 2
    rows = schema.decode(x, y, seed=0)
    assert list(rows) == ["age", "job", "score", "rich"]
    assert set(rows["job"]) == {"clerk", "cook", None}
    assert all(isinstance(age, int) and 17 <= age <= 90 for age in rows["age"])
    assert rows["rich"][:2] == ["no", "yes"]
    again, classes = schema.encode(rows)
    assert torch.equal(classes, y)
    assert torch.equal(again[:, :4].argmax(1), x[:, :4].argmax(1))
    torch.testing.assert_close(again[:, 7], x[:, 7].clamp(-1, 1))


def test_the_seed_decides_what_is_drawn_inside_cells(schema):
    x, y = schema.encode(ROWS)
    assert schema.decode(x, y, seed=3) == schema.decode(x, y, seed=3)
    state = np.random.get_state()[1].copy()
    assert len({tuple(schema.decode(x, y)["age"]) for _ in range(20)}) > 1
    assert np.array_equal(np.random.get_state()[1], state)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.zeros(2, 7), torch.zeros(2, dtype=torch.long), r"expected x of shape \[N, 8\]"),
        (torch.full((2, 8), torch.nan), torch.zeros(2, dtype=torch.long), "finite coordinates"),
        (torch.zeros(2, 8), None, r"expected y of shape \[2\], got None"),
        (torch.zeros(2, 8), torch.tensor([0, 2]), r"expected classes in 0\.\.1, got 0\.\.2"),
    ],
)
def test_what_no_generator_should_give_is_refused(schema, x, y, message):
    with pytest.raises(ValueError, match=message):
        schema.decode(x, y)


def test_a_table_without_a_label_has_one_class():
    schema = TableSchema([NumericColumn("a", 0, 1, bins=2)])
    x, y = schema.encode({"a": [0.2, 0.9]})
    assert (schema.num_classes, y.tolist()) == (1, [0, 0])
    assert list(schema.decode(x)) == ["a"]


def test_yaml_and_dictionaries_give_the_same_schema_back(schema, tmp_path):
    path = schema.save(tmp_path / "sub" / "schema.yaml")
    assert "integer: true" in path.read_text()
    for again in (TableSchema.load(path), schema_from(path), schema_from(str(path)), schema_from(schema.to_dict())):
        assert again == schema
    assert pickle.loads(pickle.dumps(schema)) == schema
    odd = TableSchema(
        [
            {"name": "a", "low": 0, "high": 9, "bins": [3, 4.5], "missing": True},
            {"name": "b", "categories": [1, True, "é"]},
        ],
        out_of_range="error",
        unknown="missing",
        missing_values=["", "?"],
    )  # fmt: skip
    assert TableSchema.load(odd.save(tmp_path / "odd.yaml")) == odd
    assert odd != schema


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({"columns": []}, "expected at least one column"),
        ({"label": "y"}, "expected a schema with the key 'columns'"),
        ({"columns": [{"name": "a", "low": 0, "high": 1}], "labels": "y"}, "expected a schema with the key"),
        ({"columns": [{"name": "a", "low": 0, "high": 1}], "label": "y"}, "label and label_categories together"),
        ({"columns": [{"name": "a"}]}, "column 'a': a NumericColumn needs .*public bounds cannot be taken from"),
        ({"columns": [{"name": "a", "categories": [1, 2], "low": 0}]}, "column 'a': a CategoricalColumn needs"),
        ({"columns": ["a"]}, "expected a NumericColumn"),
        ({"columns": [{"name": "a", "low": 0, "high": 1}] * 2}, "expected every name once"),
        ({"columns": [{"name": "a", "low": 0, "high": 1}], "unknown": "drop"}, "unknown must be one of"),
    ],
)  # fmt: skip
def test_a_schema_is_fully_declared(plain, message):
    with pytest.raises(ValueError, match=message):
        TableSchema.from_dict(plain)


def test_numbers_outside_their_bounds_are_clamped_or_refused(schema):
    rows = ROWS | {"age": [39, 12, 200]}
    with pytest.warns(UserWarning, match="taken for the bound: 2 in 'age'.*bounds must not be chosen by it"):
        assert schema.encode(rows)[0][:, :4].argmax(1).tolist() == [1, 0, 3]
    strict = TableSchema(schema.columns, "rich", ["no", "yes"], out_of_range="error")
    with pytest.raises(ValueError, match=r"column 'age': 2 of 3 rows lie outside the declared bounds \[17, 90\]"):
        strict.encode(rows)


def test_unknown_categories_are_refused_without_being_shown_or_taken_for_missing(schema):
    rows = ROWS | {"job": ["clerk", "spy", "cook"]}
    with pytest.raises(
        ValueError, match=r"column 'job': 1 of 3 rows, the first of them row 1, .*unknown='missing'"
    ) as e:
        schema.encode(rows)
    assert "spy" not in str(e.value)
    lenient = TableSchema(schema.columns, "rich", ["no", "yes"], unknown="missing")
    assert lenient.encode(rows)[0][1, 4:7].tolist() == [0, 0, 1]
    with pytest.raises(ValueError, match=r"column 'rich': 1 of 3 rows.*\['no', 'yes'\]"):
        lenient.encode(ROWS | {"rich": ["no", "no", "maybe"]})


@pytest.mark.parametrize("label", [[0.5, "no", "no"], [None, "no", "no"], ["", "no", "no"]])
def test_labels_that_are_no_class_are_refused_with_the_admissible_ones(schema, label):
    with pytest.raises(
        ValueError, match=r"column 'rich': 1 of 3 rows.*hold none of the declared categories \['no', 'yes'\]"
    ):
        schema.encode(ROWS | {"rich": label})


def test_absent_columns_and_unequal_lengths_are_named(schema):
    with pytest.raises(ValueError, match="got none named 'job', 'rich'"):
        schema.encode({"age": [1], "score": [1]})
    with pytest.raises(ValueError, match="expected columns of one length"):
        schema.encode(ROWS | {"age": [1]})
    with pytest.raises(ValueError, match=r"expected the keys \['a'\] in every row"):
        columns_of([{"a": 1}, {"b": 1}])
    with pytest.raises(ValueError, match="got list without any row"):
        columns_of([])
    with pytest.raises(ValueError, match="a list of mappings or a data frame, got int"):
        columns_of(3)


def test_check_counts_all_that_does_not_fit_without_raising(schema):
    rows = {"age": [39, 12, "old"], "job": ["spy", None, "cook"], "score": [2, 0, 0], "rich": ["no", "no", "x"]}
    table = schema.check(rows)
    found = {row[0]: row[1:] for row in table.rows}
    assert found["age"][3].startswith("column 'age': row 2 holds something that is no number")
    assert found["job"] == (None, 1, 1, "")
    assert found["score"] == (1, None, 0, "")
    assert found["rich"] == (None, 1, 0, "")


def test_bounds_are_taken_from_rows_only_if_these_are_stated_to_be_public():
    rows = {"a": list(range(40)), "b": ["x", "y"] * 20, "c": [0, 1] * 20, "y": ["no", "yes"] * 20}
    with pytest.raises(ValueError, match="taken from private rows break the guarantee"):
        TableSchema.infer(rows, "y")
    schema = TableSchema.infer(rows, "y", public=True)
    assert schema.columns == (
        NumericColumn("a", 0, 39, integer=True),
        CategoricalColumn("b", ["x", "y"]),
        CategoricalColumn("c", [0, 1]),
    )
    assert schema.label_categories == ("no", "yes")
    assert schema.source == "inferred from rows that were stated to be public"
    assert TableSchema.from_dict(schema.to_dict()).source == schema.source
    with pytest.raises(ValueError, match="expected the label among the columns"):
        TableSchema.infer(rows, "z", public=True)


def test_inferring_reads_numbers_of_texts_and_refuses_what_is_no_category_without_showing_it():
    rows = {"a": [str(k / 2) for k in range(40)], "b": ["0", "1", ""] * 13 + ["1"], "c": ["007", "8"] * 20}
    assert TableSchema.infer(rows, public=True).columns == (
        NumericColumn("a", 0.0, 19.5),
        CategoricalColumn("b", [0, 1], missing=True),
        CategoricalColumn("c", ["007", "8"]),
    )
    days = np.arange("2020-01-01", "2020-02-10", dtype="datetime64[D]")
    for values, message in (
        ([f"secret {k}" for k in range(40)], "40 different values in 40 rows are no categories"),
        (["secret"] * 40, "at least two different values, got 1"),
        (days, "dates are no numbers"),
        (list(map(str, days)), "40 different values"),
    ):
        with pytest.raises(ValueError, match=message) as told:
            TableSchema.infer({"a": rows["a"], "note": values}, public=True)
        assert "secret" not in str(told.value)
        assert "2020" not in str(told.value)


def test_dates_are_told_to_become_numbers_and_truth_values_to_be_quoted():
    schema = TableSchema([NumericColumn("visit", 0, 1e5), CategoricalColumn("smoker", [True, False])])
    for visit in (["2020-01-01", "2020-01-02"], np.array(["2020-01-01", "2020-01-02"], dtype="datetime64[D]")):
        with pytest.raises(ValueError, match="days since a day of your choice") as told:
            schema.encode({"visit": visit, "smoker": [True, False]})
        assert "2020" not in str(told.value)
    with pytest.raises(ValueError, match="YAML reads yes, no, on and off as truth values: quote them"):
        schema.encode({"visit": [1, 2], "smoker": ["yes", "no"]})
    with pytest.raises(ValueError, match=r"is there a heading .* is ',' the separator"):
        schema.encode({"1": [1, 2], "yes": ["yes", "no"]})


def test_adult_fits_its_schema_row_by_row():
    schema, train, test = adult()
    assert adult_schema().width == schema.width
    x, y = schema.encode(train)
    assert x.shape[0] == 32_561
    assert int(y.sum()) == 7_841  # above 50K, as adult.names says: 24.08 %
    assert len(schema.encode(test)[0]) == 16_281
    assert torch.equal(x.sum(1), torch.full((32_561,), float(len(schema.columns))))
    again, classes = schema.encode(schema.decode(x, y, seed=0))
    assert torch.equal(again, x)
    assert torch.equal(classes, y)
    assert not any(any(row[1:4]) or row[4] for row in schema.check(train).rows)
