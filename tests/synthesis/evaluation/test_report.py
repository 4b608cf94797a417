import json

import numpy as np
import pytest

from lightning_eff.synthesis.evaluation import evaluate_table
from lightning_eff.synthesis.tables import CategoricalColumn, NumericColumn, TableSchema

SCHEMA = TableSchema(
    [
        NumericColumn("age", 0, 100, bins=10),
        NumericColumn("gain", 0, 1e5, bins=6, transform="log1p", zero_inflated=True),
        CategoricalColumn("job", ["clerk", "cook", "a very long name of a job"], missing=True),
    ],
    "rich",
    ["no", "yes"],
)


def rows(seed, n=600):
    random = np.random.default_rng(seed)
    age = random.uniform(20, 80, n)
    rich = age + random.normal(scale=15, size=n) > 55
    gain = np.where(random.random(n) < 0.8, 0, random.exponential(3000, n).clip(0, 1e5))
    job = random.choice(np.array(["clerk", "cook", "a very long name of a job", None]), n)
    return {"age": age, "gain": gain, "job": job, "rich": np.where(rich, "yes", "no")}


@pytest.fixture(scope="module")
def quality():
    names = ["logistic_regression", "gaussian_nb"]
    return evaluate_table(SCHEMA, rows(0), rows(1), rows(2), classifiers=names, progress=False)


def test_the_report_is_written_with_its_figures_and_says_it_is_not_private(quality, tmp_path):
    folder = tmp_path / "report"
    written, text = quality.write(folder), quality.to_markdown()
    for said in (text, *(path.read_text() for path in written if path.suffix == ".md")):
        assert said.startswith("> Computed on real records without noise. This report carries no privacy")
    order = [text.index(title) for title in ("Trained on synthetic", "**Columns**", "Distance to the nearest")]
    assert order == sorted(order)
    for name in ("marginals", "pairs", "nearest"):
        assert (folder / f"{name}.png").stat().st_size > 10_000
    assert all("not private" in figure.get_supxlabel() for figure in quality.figures().values())
    columns = json.loads((folder / "columns.json").read_text())
    assert [record["column"] for record in columns] == ["age", "gain", "job", "rich", "mean"]
    assert len(json.loads((folder / "classifiers.json").read_text())) == 4
    assert "no privacy guarantee" in str(quality)


def test_figures_show_what_the_tables_say(quality):
    figures = quality.figures()
    panels = figures["marginals"].axes
    assert (
        panels[0].get_title(loc="left")
        == f"age   TV {float(quality.cells.single(quality.real, quality.synthetic)[0]):.3f}"
    )
    heights = [bar.get_height() for bar in panels[0].patches]
    assert heights == pytest.approx(np.histogram(rows(1)["age"], 10, (0, 100))[0] / 600)
    difference = figures["pairs"].axes[1].images[0].get_array()
    np.testing.assert_allclose(difference, quality.synthetic_associations - quality.real_associations)
    assert len(figures["nearest"].axes[0].lines) == 3


def test_samples_of_one_law_are_found_alike(quality):
    assert quality.mean_tv < 0.05
    assert np.abs(quality.synthetic_associations - quality.real_associations).max() < 0.15
    assert abs(quality.nearest.closer_to_train - 0.5) < 4 * quality.nearest.standard_error
    synthetic, real = (quality.downstream.mean("roc_auc", trained_on=source) for source in ("synthetic", "real"))
    assert synthetic == pytest.approx(real, abs=0.03)


def test_shuffled_columns_keep_their_shares_and_lose_their_ties():
    real, random = rows(1), np.random.default_rng(5)
    shuffled = {name: random.permutation(values) for name, values in real.items()}
    quality = evaluate_table(SCHEMA, shuffled, real, rows(2), classifiers=["gaussian_nb"], progress=False)
    assert quality.mean_tv == pytest.approx(0)
    age, rich = 0, 3
    assert quality.real_associations[age, rich] > 0.6
    assert quality.synthetic_associations[age, rich] < 0.15
    assert quality.cells.pairwise(quality.real, quality.synthetic)[age, rich] > 0.2
    assert quality.downstream.mean("roc_auc") < 0.7 < quality.downstream.mean("roc_auc", trained_on="real")


def test_a_table_without_a_label_has_no_classifiers(tmp_path):
    schema = TableSchema([NumericColumn("age", 0, 100, bins=10)])
    quality = evaluate_table(schema, rows(0), rows(1), rows(2), progress=False)
    assert quality.downstream is None
    assert "classifier" not in str(quality)
    assert {path.stem for path in quality.write(tmp_path)} == {"columns", "nearest", "marginals", "pairs"}
