"""Rows of runs: what is read, what is refused, and that a file is never half written."""

import csv
import math
import os

import numpy as np
import pytest
from helpers import run_python

from lightning_eff.moe.scaling import RUN_COLUMNS, append_run, read_runs, run_names

GOOD = "run_name,n_total,n_tokens,granularity,loss\na,1e8,1e9,1,3.5\nb,2e8,1e9,2,3.4\nc,2e8,4e9,4,3.2\n"


def write(path, text: str):
    path.write_text(text)
    return path


def test_csv_dict_structured_array_and_columns_give_the_same_runs(tmp_path) -> None:
    runs = read_runs(write(tmp_path / "runs.csv", GOOD))
    assert runs.names == ("a", "b", "c")
    table = {"n_total": [1e8, 2e8, 2e8], "n_tokens": [1e9, 1e9, 4e9], "granularity": [1, 2, 4], "loss": [3.5, 3.4, 3.2]}
    array = np.array(list(zip(*table.values(), strict=True)), dtype=[(name, "f8") for name in table])

    class Frame:  # what pandas and polars have in common
        columns = list(table)

        def __getitem__(self, name: str) -> np.ndarray:
            return np.array(table[name])

    for source in (table, array, Frame()):
        other = read_runs(source)
        for name in ("n_total", "n_tokens", "loss", "granularity"):
            np.testing.assert_array_equal(getattr(other, name), getattr(runs, name))
        assert other.flops is None


def test_columns_of_other_names_and_rows_of_one_kind(tmp_path) -> None:
    text = "data,params,n_tokens,loss,weight\nx,1e8,1e9,3.5,1\ny,1e8,1e9,9,1\nx,2e8,1e9,3.4,2\n"
    runs = read_runs(write(tmp_path / "runs.csv", text), columns={"n_total": "params"}, where={"data": "x"})
    assert runs.loss.tolist() == [3.5, 3.4]
    assert runs.weight.tolist() == [1, 2]
    assert read_runs(tmp_path / "runs.csv", columns={"n_total": "params"}, where={"loss": 9}).n_total.tolist() == [1e8]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("granularity,loss", "granularity,los", "no column 'loss'"),
        ("2e8,1e9", "many,1e9", "line 3: column 'n_total' holds no number: 'many'"),
        ("4e9", "", "line 4: column 'n_tokens' holds no number"),
        ("4e9", "0", "line 4: expected n_tokens > 0, got 0"),
        ("4e9", "inf", "line 4: expected n_tokens > 0, got inf"),
        ("1,3.5", "1,-3.5", "line 2: expected loss > 0, got -3.5"),
        ("1,3.5", "1,0", "line 2: expected loss > 0"),
        ("1,3.5", ",3.5", "line 2: column 'granularity' holds no number"),
        ("1,3.5", "0.5,3.5", "line 2: expected granularity >= 1, got 0.5"),
        ("1,3.5", "1,3.5,7", "line 2: expected 5 values, got 6"),
        ("granularity", "loss", "column twice"),
    ],
)
def test_wrong_cells_are_named_by_column_and_line(old: str, new: str, message: str, tmp_path) -> None:
    path = write(tmp_path / "runs.csv", GOOD.replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        read_runs(path)


def test_diverged_runs_are_left_out_and_counted(tmp_path) -> None:
    path = write(tmp_path / "runs.csv", GOOD.replace("3.4", "nan").replace("3.2", "inf"))
    with pytest.warns(UserWarning, match="2 of 3 runs diverged"):
        runs = read_runs(path)
    assert runs.names == ("a",)
    assert runs.diverged == 2
    with pytest.raises(ValueError, match="no run has a finite loss"):
        read_runs(write(path, GOOD.replace("3.5", "nan").replace("3.4", "nan").replace("3.2", "nan")))


def test_unknown_columns_and_empty_choices_are_told(tmp_path) -> None:
    path = write(tmp_path / "runs.csv", GOOD)
    with pytest.raises(ValueError, match="no column 'router'"):
        read_runs(path, where={"router": "token_choice"})
    with pytest.raises(ValueError, match=r"no run with \{'granularity': 3\}"):
        read_runs(path, where={"granularity": 3})
    with pytest.raises(ValueError, match=r"renames what is not read: \['size'\]"):
        read_runs(path, columns={"size": "n_total"})
    with pytest.raises(FileNotFoundError):
        read_runs(tmp_path / "none.csv")
    with pytest.raises(ValueError, match="data frame, got list"):
        read_runs([1, 2])
    with pytest.raises(ValueError, match="columns of one length"):
        read_runs({"n_total": [1e8], "n_tokens": [1e9, 1e9], "loss": [3.0]})


def test_what_only_some_runs_tell_of_cost_is_not_used(tmp_path) -> None:
    text = "n_total,n_tokens,loss,flops\n1e8,1e9,3.5,1e18\n2e8,1e9,3.4,\n"
    assert read_runs(write(tmp_path / "runs.csv", text)).flops is None


def test_runs_of_one_place_are_counted() -> None:
    runs = read_runs(
        {"n_total": [1e8, 1e8, 1e8], "n_tokens": [1e9] * 3, "granularity": [1, 1, 2], "loss": [3, 3.1, 2.9]}
    )
    assert runs.duplicates == 1


def run(name: str, loss: float = 3.0) -> dict[str, object]:
    return {"run_name": name, "n_total": 10**8, "n_tokens": 2.5e9, "granularity": 4, "loss": loss, "seed": None}


def test_appended_runs_are_read_back_to_the_bit(tmp_path) -> None:
    path = tmp_path / "sweep" / "runs.csv"
    assert run_names(path) == set()
    append_run(path, run("a", 1 / 3))
    append_run(path, {**run("b", math.nan), "note": "with, comma\nand line"})
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0])[: len(RUN_COLUMNS)] == RUN_COLUMNS
    assert rows[1]["note"] == "with, comma\nand line"
    assert rows[0]["note"] == rows[0]["seed"] == ""
    assert run_names(path) == {"a", "b"}
    with pytest.warns(UserWarning, match="diverged"):
        assert read_runs(path).loss.tolist() == [1 / 3]


def test_a_run_takes_the_place_of_the_one_of_its_name(tmp_path) -> None:
    path = tmp_path / "runs.csv"
    for name, loss in (("a", 3.0), ("b", 2.9), ("a", 2.8)):
        append_run(path, run(name, loss))
    assert sorted(zip(read_runs(path).names, read_runs(path).loss, strict=True)) == [("a", 2.8), ("b", 2.9)]


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch) -> None:
    path = tmp_path / "runs.csv"
    append_run(path, run("a"))
    before = path.read_bytes()

    def full(source: object, target: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="disk full"):
            append_run(path, run("b"))
    assert path.read_bytes() == before
    append_run(path, run("b"))  # what was left beside it is in nobody's way
    assert run_names(path) == {"a", "b"}


def test_processes_that_write_at_a_time_lose_no_run(tmp_path) -> None:
    code = """
import subprocess, sys
one = '''
import sys
from lightning_eff.moe.scaling import append_run
for i in range(10):
    append_run(sys.argv[1], {"run_name": f"{sys.argv[2]}-{i}", "n_total": 1e8, "n_tokens": 1e9, "loss": 3.0})
'''
several = [subprocess.Popen([sys.executable, "-c", one, sys.argv[1], str(i)]) for i in range(3)]
sys.exit(max(process.wait() for process in several))
"""
    run_python(code, str(tmp_path / "runs.csv"))
    assert len(run_names(tmp_path / "runs.csv")) == 30


def test_what_is_no_table_of_runs_is_not_overwritten(tmp_path) -> None:
    path = write(tmp_path / "notes.csv", "a,b\n1,2\n")
    with pytest.raises(ValueError, match="no table of runs"):
        append_run(path, run("a"))
    assert path.read_text() == "a,b\n1,2\n"
    with pytest.raises(ValueError, match="run_name"):
        append_run(tmp_path / "runs.csv", {"loss": 3.0})
    write(path, "run_name,loss\na,3.0\nb\n")
    with pytest.raises(ValueError, match="line 3: expected 2 values"):
        run_names(path)
