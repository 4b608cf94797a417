import lightning as L
import pytest
import torch
from torch import nn

from lightning_eff.synthesis.tables import CategoricalColumn, NumericColumn, TableSchema, TabularDataModule, read_csv

SCHEMA = TableSchema([NumericColumn("a", 0, 10, bins=5)], "y", ["no", "yes"])


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("a,extra,y\n" + "".join(f"{k / 10}, x ,{'yes' if k % 3 == 0 else 'no'}\n" for k in range(101)))
    return file


def all_of(loader):
    return tuple(map(torch.cat, zip(*loader, strict=True)))


def test_every_row_comes_once_and_in_order(path):
    data = TabularDataModule(path, SCHEMA, batch_size=40)
    data.setup()
    assert [len(x) for x, _ in data.train_dataloader()] == [40, 40, 21]
    x, y = all_of(data.train_dataloader())
    assert torch.equal(x, SCHEMA.encode(read_csv(path))[0])
    assert y.tolist() == [int(k % 3 == 0) for k in range(101)]
    assert data.val_dataloader() == []
    with pytest.raises(ValueError, match="no rows to test on"):
        data.test_dataloader()
    assert data.train_rows["a"][:2] == ["0.0", "0.1"]


def test_schema_may_come_as_a_dictionary_or_from_the_module_that_is_fitted(path, tmp_path):
    class Module(L.LightningModule):
        schema = SCHEMA

        def __init__(self):
            super().__init__()
            self.layer, self.seen = nn.Linear(5, 1), 0

        def training_step(self, batch):
            self.seen += len(batch[0])
            return self.layer(batch[0]).mean()

        def validation_step(self, batch):
            raise AssertionError("there are no rows to validate on")

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    module, data = Module(), TabularDataModule(str(path))
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, data)
    assert module.seen == 101
    assert data.schema == SCHEMA
    assert TabularDataModule(path, SCHEMA.to_dict()).schema == SCHEMA
    with pytest.raises(ValueError, match="expected a schema here or in the module that is fitted"):
        TabularDataModule(path).setup()


def test_rows_set_aside_take_no_part_and_depend_on_the_seed_alone(path):
    sets = []
    for seed in (0, 0, 1):
        data = TabularDataModule(path, SCHEMA, test_fraction=0.2, seed=seed)
        data.setup()
        assert (len(data.train_rows["a"]), len(data.test_rows["a"])) == (81, 20)
        assert sorted(data.train_rows["a"] + data.test_rows["a"]) == sorted(read_csv(path)["a"])
        assert len(all_of(data.test_dataloader())[0]) == 20
        sets.append(data.test_rows["a"])
    assert sets[0] == sets[1] != sets[2]


def test_files_and_rows_can_be_mixed(path):
    data = TabularDataModule(
        {"a": [1, 2], "y": ["no", "yes"]}, SCHEMA, val_path=path, test_path={"a": [3], "y": ["no"]}
    )
    data.setup("fit")
    loaders = data.train_dataloader(), data.val_dataloader(), data.test_dataloader()
    assert [len(all_of(loader)[0]) for loader in loaders] == [2, 101, 1]


def test_files_without_heading_with_comments_and_other_separators(tmp_path):
    file = tmp_path / "rows.txt"
    file.write_text("|1x3 Cross validator\n1; no.\n\n2; yes.\n\n")
    assert read_csv(file, separator=";", names=["a", "y"], skip_lines=1) == {"a": ["1", "2"], "y": ["no.", "yes."]}
    schema = TableSchema([CategoricalColumn("a", [1, 2])], "y", ["no.", "yes."])
    data = TabularDataModule(file, schema, separator=";", names=["a", "y"], skip_lines=1)
    data.setup()
    assert all_of(data.train_dataloader())[1].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,y\n1,no\n2\n", "line 3: expected 2 fields, got 1; is ',' the separator?"),
        ("a,y,a\n1,2,3\n", "without a name twice, got 3 fields of which number 3 repeats number 1; .* names= gives"),
        ("a,y\n", "expected rows after the heading, got none"),
        ("", "expected a heading"),
    ],
)
def test_broken_files_are_refused_with_the_line(tmp_path, text, message):
    file = tmp_path / "rows.csv"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_csv(file)


def test_a_record_in_the_place_of_a_heading_is_not_shown(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("Alice,52,52\nBob,31,12\n")
    with pytest.raises(ValueError, match="2") as told:
        read_csv(file)
    assert "Alice" not in str(told.value)
    assert "52" not in str(told.value).replace(str(file), "")


def test_errors_tell_which_rows_they_are_about(path):
    data = TabularDataModule(path, SCHEMA, test_path={"a": [1], "y": ["perhaps"]})
    with pytest.raises(ValueError, match=r"test rows: column 'y': 1 of 1 rows"):
        data.setup()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test_fraction": 1.0}, r"test_fraction must lie in \[0, 1\)"),
        ({"test_fraction": 0.1, "test_path": "x"}, "test_path or test_fraction"),
        ({"batch_size": 0}, "batch_size must be a whole number >= 1"),
        ({"separator": ", "}, "expected separator to be one character"),
        ({"skip_lines": -1}, "skip_lines must be a whole number >= 0, got -1"),
    ],
)
def test_options_outside_their_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TabularDataModule("rows.csv", SCHEMA, **options)


def test_a_split_leaves_rows_on_both_sides(path):
    with pytest.raises(ValueError, match="leaves rows on both sides"):
        TabularDataModule(path, SCHEMA, test_fraction=0.001).setup()
