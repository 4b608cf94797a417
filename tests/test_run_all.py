"""All benchmarks in one table: what is found, kept, and told of those that cannot run."""

import ast
import json
import sys
from pathlib import Path

import pytest
import run_all
from harness import Headline

BENCHMARKS = Path(__file__).resolve().parents[1] / "examples" / "benchmarks"
# A benchmark as run_all sees it: a script that writes tables and headlines to the file behind --json.
SCRIPT = """
import json, sys
TECHNIQUE = {technique!r}
with open({log!r}, "a") as file:
    file.write({name!r} + " " + " ".join(sys.argv[3:]) + chr(10))
{before}
line = dict(work="adding", ours=0.5, peer=3.0, peer_name="by hand 1.0", unit="s", target=5, limit=None,
            more_is_better=False)
further = [dict(line, work="subtracting", ours=2.0, aside=True)] if {further} else []
with open(sys.argv[2], "w") as file:
    json.dump(dict(tables=[dict(title="t", caption="", records=[])], headlines=[line, *further]), file)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder for benchmarks, in an environment that costs nothing to ask for."""
    names = (*run_all.VERSIONS, *run_all.PEERS)
    where = dict.fromkeys(names, "1.0") | {"processor": "abacus", "cores": "2", "system": "desk", "python": "3.11"}
    monkeypatch.setattr(run_all, "environment", lambda: dict(where))
    return tmp_path


def write(folder, name, technique="Adding", before="", further=False):
    log = str(folder / "log.txt")
    (folder / f"{name}.py").write_text(SCRIPT.format(**locals()))


def ran(folder):
    log = folder / "log.txt"
    return log.read_text().split("\n")[:-1] if log.exists() else []


def rows(folder):
    text = (folder / "results.md").read_text().split("**How they ran**")[0]
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in text.splitlines() if line[:1] == "|"]


def test_every_file_of_the_folder_is_a_benchmark_or_excluded_by_name_with_its_reason():
    found = {benchmark.name for benchmark in run_all.discover(BENCHMARKS)}
    assert found | run_all.NO_BENCHMARKS.keys() == {path.stem for path in BENCHMARKS.glob("*.py")}
    assert not found & run_all.NO_BENCHMARKS.keys()
    assert all(run_all.NO_BENCHMARKS.values())
    told = (BENCHMARKS / "README.md").read_text()
    assert all(f"`{name}.py`" in told for name in found)


def test_every_benchmark_hands_headlines_to_the_file_that_run_all_reads():
    for benchmark in run_all.discover(BENCHMARKS):
        tree = ast.parse(benchmark.path.read_text())
        defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert "headlines" in defined, benchmark.name
        calls = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Call)]
        given = [call for call in calls if call.startswith(("main(", "write(")) and "headlines" in call]
        assert given, f"{benchmark.name}: neither main(...) nor write(...) is given headlines"


def test_one_row_a_headline_with_ratio_aim_and_verdict(folder):
    write(folder, "sums")
    assert run_all.main([], folder) == 0
    head, _, row = rows(folder)
    assert head == ["technique", "work", "ours", "peer", "which peer", "better by", "aim", "met", "script"]
    assert row == ["Adding", "adding", "500 ms", "3 s", "by hand 1.0", "6x", "≥ 5x", "yes", "`sums.py`"]
    text = (folder / "results.md").read_text()
    assert text.startswith("abacus, 2 cores, desk, Python 3.11; torch 1.0,")
    assert "Aims met (before rounding): 1 of 1, with all further cases 1 of 1." in text
    assert "Further cases" not in text
    assert "| `sums.py` | ok " in text
    (kept,) = json.loads((folder / "results.json").read_text())["benchmarks"].values()
    assert kept["tables"] == [{"title": "t", "caption": "", "records": []}]
    assert len(kept["load"]) == 2
    assert 0 <= kept["cpu_seconds"] < 60


def test_further_cases_stand_apart_and_their_aims_are_counted(folder):
    write(folder, "sums", further=True)
    run_all.main([], folder)
    text = (folder / "results.md").read_text()
    table, further = text.split("**Further cases**")
    assert "| adding " in table
    assert "subtracting" not in table
    assert "Aims met (before rounding): 1 of 1, with all further cases 1 of 2." in table
    assert "| subtracting |  2 s |  3 s | by hand 1.0 |" in further
    assert "| no  |" in further


def test_a_missing_peer_a_missing_machine_and_a_crash_are_rows_that_say_why(folder, capsys):
    write(folder, "a_peer", before="import no_such_peer")
    write(folder, "b_gpu", before="print('no GPU here', file=sys.stderr); sys.exit(77)")
    write(folder, "c_crash", before="assert 1 == 2, 'one is not two'")
    write(folder, "d_fine")
    assert run_all.main([], folder) == 1  # for the crash
    assert [row[1] for row in rows(folder)[2:]] == [
        "no_such_peer is not installed", "no GPU here", "AssertionError: one is not two", "adding",
    ]  # fmt: skip
    assert "Traceback" in capsys.readouterr().err
    (folder / "c_crash.py").unlink()
    assert run_all.main([], folder) == 0


def test_a_run_goes_on_where_it_was_broken_off(folder, monkeypatch):
    measure = run_all.measure

    def broken_off(benchmark, full):
        if benchmark.name == "b_second":
            raise KeyboardInterrupt
        return measure(benchmark, full)

    write(folder, "a_first")
    write(folder, "b_second")
    monkeypatch.setattr(run_all, "measure", broken_off)
    with pytest.raises(KeyboardInterrupt):
        run_all.main([], folder)
    monkeypatch.setattr(run_all, "measure", measure)
    run_all.main([], folder)
    assert [line.split()[0] for line in ran(folder)] == ["a_first", "b_second"]
    assert len(rows(folder)) == 2 + 2


def test_what_would_come_out_differently_is_measured_again(folder, monkeypatch):
    def count(*args):
        before = len(ran(folder))
        run_all.main([*args], folder)
        return len(ran(folder)) - before

    write(folder, "sums")
    assert [count(), count(), count("--full"), count("--full"), count("--again")] == [1, 0, 1, 0, 1]
    write(folder, "sums", before="more = 1")
    assert [count(), count()] == [1, 0]
    elsewhere = run_all.environment() | {"torch": "2.0"}
    monkeypatch.setattr(run_all, "environment", lambda: elsewhere)
    assert [count(), count()] == [1, 0]


def test_short_is_the_usual_way_and_only_and_skip_choose(folder):
    for name in ("a", "b", "c"):
        write(folder, name, technique=f"Adding {name}")
    run_all.main(["--only", "a", "b", "--skip", "b"], folder)
    run_all.main(["--only", "c", "--full"], folder)
    assert ran(folder) == ["a --short", "c "]
    assert [row[0] for row in rows(folder)[2:]] == ["Adding a", "Adding c"]  # what is there already stays
    assert "Not measured: `b.py`." in (folder / "results.md").read_text()
    with pytest.raises(SystemExit):
        run_all.main(["--only", "d"], folder)
    with pytest.raises(SystemExit):
        run_all.main(["--out", str(folder / "results.csv")], folder)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (2.0, None)),
        ({"target": 2}, (2.0, True)),
        ({"target": 2.1}, (2.0, False)),
        ({"limit": 1.5}, (2.0, True)),
        ({"limit": 0.5}, (2.0, False)),
        ({"target": 2, "limit": 0.5}, (2.0, False)),
        ({"more_is_better": True, "limit": 0.9}, (0.5, True)),
        ({"more_is_better": True, "target": 1}, (0.5, False)),
        ({"peer": None, "target": 2}, (None, None)),
        ({"peer": None, "limit": 1}, (None, True)),
        ({"ours": 0.0, "limit": 1}, (None, True)),
    ],
)
def test_ratio_and_verdict(fields, expected):
    line = Headline(**{"work": "w", "ours": 1.0, "peer": 2.0, "peer_name": "p", **fields})
    assert (run_all.ratio(line), run_all.met(line)) == expected


def test_environment_names_machine_and_peers():
    found = run_all.environment()
    assert found["torch"] == sys.modules["torch"].__version__.split("+")[0]
    assert found["python"].startswith(f"{sys.version_info.major}.")
    assert set(run_all.PEERS) < found.keys()
