"""LineSelection and LineEvaluation: what is told, and files that give back what was written."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from outcomes import evaluation, selection

from lightning_eff.lidar.evaluation import ALL, RANDOM, LineEvaluation
from lightning_eff.lidar.report import LineSelection, in_order, overlap


def test_a_selection_comes_back_from_its_file_to_the_bit(tmp_path: Path) -> None:
    made = selection(values=torch.rand(6, dtype=torch.float64), se=torch.full((6,), math.inf, dtype=torch.float64))
    loaded = LineSelection.load(made.save(tmp_path / "deep" / "lines.json"))
    assert loaded.to_dict() == made.to_dict()
    assert torch.equal(loaded.values, made.values)
    assert loaded.rounds == made.rounds
    assert list(loaded.per_frame) == ["b", 7]
    assert loaded.selected == {3: [0, 2, 6], 1: [0]}


def test_a_file_of_another_version_is_refused(tmp_path: Path) -> None:
    path = selection().save(tmp_path / "lines.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99}))
    with pytest.raises(ValueError, match="version 1, got 99"):
        LineSelection.load(path)


def test_the_table_tells_lines_by_the_sensors_numbers() -> None:
    table = selection().table("values")
    assert [row[0] for row in table.rows] == [0, 1, 2, 4, 5, 6]
    assert [column.name for column in table.columns][:4] == ["line", "elevation [deg]", "pixels", "value [mm]"]
    assert table.rows[3][1] == -2.0
    assert [row[-2] for row in table.rows] == ["kept", "", "kept", "", "", "kept"]
    assert "from 2000 (no line) to 1434" in table.caption
    assert table.caption.endswith("A note.")


def test_lines_that_no_frame_shows_are_told() -> None:
    assert selection().null_lines == [3, 7]


def test_units_follow_the_metric() -> None:
    assert selection().unit == "mm"
    assert selection(settings={"metric": "imae"}).unit == "1/km"
    assert selection(settings={"metric": "own"}).unit == ""


def test_a_partial_run_says_so() -> None:
    assert "Partial" in str(selection(partial=True))
    assert "Partial" not in str(selection())


def test_a_selection_whose_lines_are_not_told_apart_says_what_it_would_take() -> None:
    told = selection().unresolved(3)  # regions (0, 1), (2, 4), (5, 6): 40 and 41 differ by 1 with an error of 0.14
    assert told is None
    unsure = selection(se=torch.tensor([10.0, 3.0, 4.0, 1.0, 1.0, 1.0], dtype=torch.float64)).unresolved(3)
    assert unsure is not None
    # (2 sqrt(2) / 1)^2 = 8 times the 200 coalitions of each of 2 frames
    assert "lines 6 and 5 differ by 1.0 +- 1.4; about 1,600 coalitions a frame" in unsure
    top = selection(rules={3: "none"}, se=torch.full((6,), 1.0, dtype=torch.float64)).unresolved(3)
    assert top is None  # 90 against 41
    equal = torch.tensor([300.0, 90.0, 90.0, 0, 0, 0], dtype=torch.float64)
    assert "no budget within reach" in str(selection(values=equal, rules={1: "none", 2: "none"}).unresolved(2))
    assert selection().unresolved(6) is None


def test_rules_that_follow_no_ranking_name_no_lines_but_say_so() -> None:
    unsure = {"values": torch.tensor([300.0, 90.0, 90.0, 0, 0, 0], dtype=torch.float64), "selected": {2: [0, 6]}}
    for rule in ("separation", "mmr", "greedy", "region, swapped"):
        made = selection(rules={2: rule}, **unsure)
        assert made.unresolved(2) is None
        assert f"Lines by {rule} follow no ranking" in made.caption()
    assert "no ranking" not in selection(rules={2: "none"}, **unsure).caption()
    exact = selection(rules={2: "mmr"}, se=torch.zeros(6, dtype=torch.float64), **unsure)
    assert "no ranking" not in exact.caption()


def test_the_file_is_strict_json_and_gives_back_what_is_not_finite(tmp_path: Path) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    infinite = torch.full((6,), math.inf, dtype=torch.float64)
    made = selection(se=infinite, error_empty=math.nan)
    path = made.save(tmp_path / "lines.json")
    assert json.loads(path.read_text(), parse_constant=refuse)["se"] == [None] * 6
    loaded = LineSelection.load(path)
    assert torch.equal(loaded.se, infinite)
    assert math.isnan(loaded.error_empty)
    assert [one.max_se for one in loaded.rounds] == [math.inf, 10.0]


def test_a_folder_holds_tables_and_figures(tmp_path: Path) -> None:
    written = selection().write(tmp_path)
    assert {path.name for path in written} == {
        *(f"{stem}.{suffix}" for stem in ("values", "selection") for suffix in ("csv", "json")),
        "selection.md",
        "values.png",
        "elevation.png",
        "frames.png",
        "convergence.png",
    }
    assert all(path.stat().st_size for path in written)
    rows = list(csv.DictReader((tmp_path / "values.csv").read_text().splitlines()))
    assert float(rows[0]["value [mm]"]) == 300.0


def test_overlap_is_the_smallest_over_all_numbers_of_lines() -> None:
    assert overlap({2: [0, 1], 4: [0, 1, 2, 3]}, {2: [0, 1], 4: [0, 1, 2, 9]}) == 3 / 5
    assert overlap({0: []}, {0: []}) == 1.0


def test_frames_have_an_order_of_their_own() -> None:
    assert in_order(["b", 10, "a", 2]) == [2, 10, "a", "b"]
    assert in_order(["f10", "f9", "9", "f1/20", "f1/3", "f01/3", "f"]) == [
        "9",
        "f",
        "f01/3",
        "f1/3",
        "f1/20",
        "f9",
        "f10",
    ]


def test_errors_are_means_over_frames_and_draws() -> None:
    found = evaluation()
    assert found.row("region", 2).errors["rmse"] == 200.0
    assert found.row(RANDOM, 2).errors["mae"] == 800.0
    assert found.row(RANDOM, 2).spread == pytest.approx(400 / math.sqrt(2))
    assert found.row("dynamic oracle", 2).lines is None
    assert found.row("region", 2).lines == [0, 3]
    with pytest.raises(KeyError, match="no row 'region' with k = 3"):
        found.row("region", 3)


def test_the_table_shows_how_far_from_the_optimum_of_the_gap_game_a_rule_is() -> None:
    table = evaluation().table()
    by_rule = {row[1]: row for row in table.rows}
    assert by_rule["region"][-1] == 40.0
    assert by_rule[ALL][-1] is None
    assert [row[1] for row in table.rows[2:]] == ["dynamic oracle", "gap_dp", "region", RANDOM]  # best first
    assert "1 frames without ground truth are left out." in table.caption
    assert table.caption.endswith("So it is.")


def test_logged_names_hold_rule_and_number() -> None:
    names = set(evaluation().logged())
    assert {"rmse/region/k2", "rmse/random/k2", "rmse/dynamic_oracle/k2", "rmse/all_lines", "rmse/no_lidar"} <= names


def test_an_evaluation_comes_back_from_plain_python() -> None:
    found = evaluation()
    assert LineEvaluation.from_dict(json.loads(json.dumps(found.to_dict()))).to_dict() == found.to_dict()


def test_an_evaluation_writes_its_folder(tmp_path: Path) -> None:
    names = {path.name for path in evaluation().write(tmp_path)}
    assert names == {"errors.md", "errors.csv", "errors.json", "errors.png"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lines": [0, 2, 1, 4, 5, 6]}, r"expected ascending lines of 0\.\.7, got \[0, 2, 1"),
        ({"values": [1.0]}, "expected a value and a standard error for each of 6 lines"),
        ({"pixels": [1, 2]}, "expected pixels and elevations of 8 lines"),
        ({"selected": {3: [0, 2, 7]}}, "expected kept lines among"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LineSelection.from_dict({**selection().to_dict(), **changes})
