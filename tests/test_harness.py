"""The timing of benchmarks."""

import json

import harness
import pytest
import torch
from harness import Headline, best, compare, entry, one_thread

from lightning_eff.reporting import Table


def spin(n):
    def run():
        sum(i * i for i in range(n))
        return torch.ones(2)

    return run


def records(table):
    return json.loads(table.to_json())


def test_twice_the_work_is_half_as_fast():
    table = compare({"twice": spin(200_000), "once": spin(100_000)}, reference="twice", repeats=5)
    twice, once = records(table)
    assert twice["faster than twice [x]"] == 1
    assert 1.4 < once["faster than twice [x]"] < 2.8  # CPU time of a busy machine still wanders
    assert once["min [s]"] <= once["median [s]"] <= once["max [s]"]


def test_contenders_take_turns():
    order = []
    contenders = {name: lambda name=name: order.append(name) for name in "ab"}
    compare(contenders, reference="a", repeats=2, warmup=1, check=None)
    assert order == ["a", "b"] * 3


def test_different_results_are_refused_before_anything_is_timed():
    calls = []

    def wrong():
        calls.append(1)
        return torch.zeros(2)

    with pytest.raises(AssertionError, match="'wrong' does not give the result of 'right'"):
        compare({"right": spin(1), "wrong": wrong}, reference="right")
    assert calls == [1]


def test_one_thread_is_used_and_the_old_number_restored():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        seen = []
        compare({"a": lambda: seen.append(torch.get_num_threads())}, reference="a", check=None)
        assert set(seen) == {1}
        assert torch.get_num_threads() == 2
        with pytest.raises(RuntimeError), one_thread():
            raise RuntimeError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_caption_names_machine_version_and_threads():
    caption = compare({"a": spin(1)}, reference="a").caption
    assert f"torch {torch.__version__}, 1 thread" in caption


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reference": "b"}, r"expected reference to be one of \['a'\], got 'b'"),
        ({"repeats": 0}, "repeats >= 1 .* got 0"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        compare({"a": spin(1)}, **{"reference": "a", **arguments})


def test_main_prints_tables_and_writes_them_with_headlines_to_one_file(tmp_path, capsys):
    out = tmp_path / "deep" / "out.json"
    harness.main(
        lambda: [Table("First", ["a"], [[1]], "in seconds"), Table("Second", ["b"], [[2]])],
        lambda tables: [Headline("adding", *tables[0].rows[0], peer=3.0, peer_name="by hand", target=2)],
        args=["--json", str(out)],
    )
    printed = capsys.readouterr().out
    assert harness.machine() in printed
    assert "First" in printed
    written = json.loads(out.read_text())
    first, second = written["tables"]
    assert first == {"title": "First", "caption": "in seconds", "records": [{"a": 1}]}
    assert second["records"] == [{"b": 2}]
    (headline,) = written["headlines"]
    assert Headline(**headline) == Headline("adding", 1, 3.0, "by hand", target=2)


def test_short_measures_less_where_there_is_a_shorter_way(capsys):
    long, less = (lambda name=name: [Table(name, ["a"], [[1]])] for name in ("Long", "Less"))
    harness.main(long, short=less, args=["--short"])
    harness.main(long, args=["--short"])
    harness.main(long, short=less, args=[])
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line in ("Long", "Less")] == ["Less", "Long", "Long"]


def test_numbers_are_looked_up_by_title_row_and_column():
    tables = [Table("Time, small", ["batch", "who", "s"], [[1, "a", 5.0], [1, "b", 4.0], [8, "b", 3.0]])]
    assert entry(tables, "Time", (1, "b"), "s") == 4
    assert best(tables, "Time", [(1, "a"), (8, "b")], "s") == (3, "(8, 'b')")
    assert best(tables, "Time", [1, 8], "s", most=True) == (5, "1")
    for title, row, column in (("Space", 1, "s"), ("Time", 2, "s"), ("Time", 1, "ms")):
        with pytest.raises(LookupError, match="expected a"):
            entry(tables, title, row, column)


def test_a_benchmark_that_cannot_run_here_leaves_with_its_own_status_and_the_reason(capsys):
    with pytest.raises(SystemExit) as left:
        harness.unavailable("no GPU here")
    assert left.value.code == harness.UNAVAILABLE
    assert capsys.readouterr().err == "no GPU here\n"
