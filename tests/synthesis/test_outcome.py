"""What comes out: samples in every form, the report, the figures."""

import csv
import json
import math
import sys

import numpy as np
import pytest
import torch
from synthesis.private_records import records, small, trainer
from torch.utils.data import DataLoader, TensorDataset

from lightning_eff.synthesis import (
    DPNTKGenerator,
    SynthesisFigures,
    SyntheticData,
    SyntheticDataWriter,
    TableSchema,
    TabularDataModule,
    images_figure,
    loss_figure,
    signal_figure,
)
from lightning_eff.synthesis.sampling import apportioned

SCHEMA = TableSchema.from_dict(
    {
        "label": "income",
        "label_categories": ["<=50K", ">50K"],
        "columns": [
            {"name": "age", "low": 17, "high": 90, "bins": 8, "integer": True},
            {"name": "sex", "categories": ["m", "f"]},
        ],
    }
)
ROWS = {"age": [20, 60, 89], "sex": ["m", "f", "m"], "income": ["<=50K", ">50K", ">50K"]}


def table():
    return SyntheticData(*SCHEMA.encode(ROWS), schema=SCHEMA, seed=3)


def images(n=30, channels=1):
    return SyntheticData(torch.rand(n, channels, 8, 8), torch.arange(n) % 3)


def test_rows_keep_names_and_types_and_are_the_same_every_time():
    made = table()
    assert list(made.rows) == ["age", "sex", "income"]
    assert made.rows["income"] == ROWS["income"]
    assert all(type(value) is int for value in made.rows["age"])
    assert made.rows == table().rows
    assert len(made) == 3


def test_a_csv_file_holds_the_rows(tmp_path):
    path = table().to_csv(tmp_path / "made/rows.csv")
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["sex"] for line in lines] == ROWS["sex"]
    assert [int(line["age"]) for line in lines] == table().rows["age"]


def test_an_npz_file_has_the_keys_data_and_labels(tmp_path):
    made = images()
    with np.load(made.to_npz(tmp_path / "made.npz")) as file:
        assert set(file) == {"data", "labels"}
        assert np.array_equal(file["data"], made.x.numpy())
        assert np.array_equal(file["labels"], made.y.numpy())
    with pytest.raises(ValueError, match=r"ends in .npz"):
        made.to_npz(tmp_path / "made.csv")


def test_samples_are_a_data_set():
    x, y = images().as_dataset()[4]
    assert x.shape == (1, 8, 8)
    assert y == 1


def test_images_have_no_rows_and_tables_no_pictures(tmp_path):
    with pytest.raises(ValueError, match="these have no schema"):
        _ = images().rows
    with pytest.raises(ValueError, match="expected images"):
        table().grid()


def test_pandas_is_asked_for_only_when_a_frame_is(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match="pip install pandas"):
        table().to_pandas()


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_has_a_row_for_each_class(tmp_path, channels):
    made = images(channels=channels)
    (axis,) = made.grid(per_class=4, class_names=["a", "b", "c"]).axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a", "b", "c"]
    (sheet,) = axis.get_images()
    sheet = np.asarray(sheet.get_array())
    assert sheet.shape[:2] == (3 * 9 - 1, 4 * 9 - 1)
    # second image of the third class
    expected = made.x[5].permute(1, 2, 0).squeeze(2) if channels == 1 else made.x[5].permute(1, 2, 0)
    assert np.allclose(sheet[18:26, 9:17], expected.numpy())
    assert made.save_grid(tmp_path / "grid.png").stat().st_size > 1_000


def test_images_in_minus_one_to_one_are_shown_from_black_to_white():
    x = torch.full((1, 1, 4, 4), -1.0)
    x[0, 0, 0, 0] = 1.0
    (sheet,) = images_figure(x, torch.zeros(1), per_class=1).axes[0].get_images()
    assert float(sheet.get_array().min()) == 0
    assert float(sheet.get_array().max()) == 1


def test_whole_numbers_in_proportion_have_the_right_sum():
    assert apportioned(torch.tensor([1.0, 1.0, 1.0]).double(), 10).tolist() == [4, 3, 3]
    assert apportioned(torch.tensor([0.01, 0.99]).double(), 1_000).tolist() == [10, 990]
    assert apportioned(torch.tensor([0.5, 0.0, 0.5]).double(), 3).tolist() == [2, 0, 1]


@pytest.fixture
def released():
    module = small(1.0, release_options={"max_epsilon": 3.0})
    module.release(records(1_000))
    return module


def test_the_report_tells_everything_that_the_guarantee_needs(released):
    facts = released.privacy_report().facts
    assert facts["private"] is True
    assert facts["epsilon"] == pytest.approx(1.0)
    assert facts["delta"] == 1e-5
    assert facts["sigma"] == pytest.approx(3.7306316348)
    assert facts["sensitivity"] == 2.0
    assert facts["adjacency"].startswith("replace_one: one record replaced")
    assert facts["unit_of_privacy"] == "one record"
    assert facts["releases"] == 1
    assert facts["records"] == 1_000
    assert facts["class_counts"] == "released with noise"
    assert facts["noise_source"] == "operating system"
    assert facts["nonprivate_validation"] is False
    assert facts["versions"]["torch"] == torch.__version__.split("+")[0]
    assert any("without looking at the private records" in line for line in released.privacy_report().assumptions)


def test_the_report_is_written_as_text_markdown_and_json(released, tmp_path):
    report = released.privacy_report()
    text, markdown = str(report), report.to_markdown()
    for part in ("epsilon = 1 at delta = 1e-05", "rests on", "does not cover", "signal to noise", "1,000"):
        assert part in text
        assert part in markdown
    assert {path.stem for path in report.write(tmp_path)} == {"privacy", "classes", "terms"}
    assert (tmp_path / "privacy.md").read_text().startswith("> epsilon = 1 at delta = 1e-05\n")
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert plain["epsilon"] == pytest.approx(1.0)
    assert [line["class"] for line in plain["classes"]] == [0, 1, 2]
    assert plain["history"][0]["sensitivity"] == 2.0


def test_a_second_release_and_people_with_several_records_are_in_the_report():
    module = small(
        1.0,
        release_options={
            "max_contributions": 4,
            "adjacency": "add_remove",
            "label_prior": [0.2, 0.3, 0.5],
            "num_records": 1_000,
        },
    )
    for _ in range(2):
        module.release(records(1_000))
    facts = module.privacy_report().facts
    assert facts["epsilon"] == pytest.approx(1.465170, abs=1e-6)
    assert facts["releases"] == 2
    assert facts["unit_of_privacy"] == "one person with up to 4 records"
    assert facts["records"] == "not public"
    assert facts["class_counts"] == "public shares"


def test_what_makes_a_release_not_private_comes_first():
    module = small(math.inf)
    with pytest.warns(UserWarning, match="NOT PRIVATE"):
        module.release(records())
    assert str(module.privacy_report()).splitlines()[0].startswith("NOT PRIVATE")
    assert json.loads(json.dumps(module.privacy_report().to_dict()))["epsilon"] == "inf"
    seeded = small(release_options={"noise_seed": 1})
    seeded.release(records())
    assert not seeded.privacy_report().private
    assert "noise_seed" in seeded.privacy_report().to_markdown().splitlines()[0]


def test_before_a_release_nothing_was_spent():
    report = small().privacy_report()
    assert str(report).startswith("nothing released yet")
    assert small(release_options={"max_epsilon": 7.0}).privacy_report().facts["max_epsilon"] == 7.0
    assert not report.private
    assert report.facts["epsilon"] == 0
    assert report.classes == []


def test_classes_of_a_table_have_their_names_and_an_inferred_schema_is_told():
    rows = {"age": [20, 60] * 200, "sex": ["m", "f"] * 200, "income": ["<=50K", ">50K"] * 200}
    module = DPNTKGenerator(5.0, schema=TableSchema.infer(rows, "income", public=True), feature_widths=(5,))
    module.release(rows)
    report = module.privacy_report()
    assert [line["class"] for line in report.classes] == ["<=50K", ">50K"]
    assert any("schema" in line and "public" in line for line in report.assumptions)


def test_records_are_written_by_predict_without_data(tmp_path):
    rows = {"age": [20, 60] * 200, "sex": ["m", "f"] * 200, "income": ["<=50K", ">50K"] * 200}
    module = DPNTKGenerator(5.0, schema=SCHEMA, feature_widths=(5,), steps_per_epoch=2, samples_per_class=4)
    writer = SyntheticDataWriter(20, tmp_path / "made", seed=1)
    run = trainer(max_epochs=1, callbacks=[writer])
    run.fit(module, datamodule=TabularDataModule(rows))
    assert not writer.written
    run.predict(module, datamodule=(data := TabularDataModule(rows)))
    assert [path.name for path in writer.written] == ["synthetic.csv", "privacy_report.md"]
    assert writer.written[0].read_text() == module.generate(20, seed=1).to_csv(tmp_path / "same.csv").read_text()
    assert "predict_dataloader" not in vars(data)
    with pytest.raises(RuntimeError, match="prediction makes records and takes none"):
        run.predict(module, DataLoader(TensorDataset(*records()), batch_size=101))
    with pytest.raises(ValueError, match="n must be a whole number >= 1"):
        SyntheticDataWriter(0)


def test_loss_and_noise_floor_are_drawn():
    steps, losses = list(range(1, 101)), [1 / k for k in range(1, 101)]
    (axis,) = loss_figure(steps, losses, 0.02).axes
    each, mean, floor = axis.get_lines()
    assert list(each.get_ydata()) == losses
    assert mean.get_ydata()[-1] == pytest.approx(sum(losses[-4:]) / 4)
    assert floor.get_ydata()[0] == 0.02
    assert axis.get_yscale() == "log"
    (axis,) = loss_figure([1, 2], [0.1, -0.1]).axes
    assert axis.get_yscale() == "linear"


def test_signal_to_noise_is_drawn_by_class(released):
    (axis,) = signal_figure(released.embedding, ["a", "b", "c"]).axes
    ratios = [line["signal_to_noise"] for line in released.privacy_report().classes]
    assert [bar.get_width() for bar in axis.patches] == pytest.approx(ratios)
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a", "b", "c"]


def test_without_noise_the_figure_says_not_private():
    module = small(math.inf)
    with pytest.warns(UserWarning, match="NOT PRIVATE"):
        module.release(records())
    assert "NOT PRIVATE" in signal_figure(module.embedding).axes[0].get_xlabel()


def test_pictures_are_written_while_training(tmp_path):
    module = DPNTKGenerator(
        5.0, num_classes=3, input_shape=(1, 8, 8), feature_widths=(5,), samples_per_class=3, steps_per_epoch=7
    )
    module.release(records(shape=(1, 8, 8)))
    figures = SynthesisFigures(tmp_path, every_n_steps=5, per_class=2)
    trainer(max_epochs=1, callbacks=[figures]).fit(module)
    assert sorted(path.name for path in figures.written) == [
        "loss.png", "samples-00005.png", "samples-00007.png", "signal_to_noise.png",
    ]  # fmt: skip
    assert all(path.exists() for path in figures.written)
    with pytest.raises(ValueError, match="every_n_steps must be a whole number >= 1"):
        SynthesisFigures(every_n_steps=0)


def test_what_are_no_images_is_not_drawn():
    with pytest.raises(ValueError, match=r"expected images \[n, 1 or 3, height, width\], got a tensor \[4, 2, 8, 8\]"):
        images_figure(torch.zeros(4, 2, 8, 8), torch.zeros(4, dtype=torch.int64))
