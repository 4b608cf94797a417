import csv
import io
import json
import time
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import pytest
import torch
from rich.console import Console

from lightning_eff.reporting import (
    KEPT,
    REMOVED,
    SERIES,
    Column,
    Report,
    Table,
    human,
    new_figure,
    progress,
    results_folder,
    save_figure,
)


@pytest.fixture
def table():
    columns = ["layer", Column("MACs", ","), Column("share", ".1%")]
    rows = [("conv[1]", 86_400, 0.25), ("fc|out", None, torch.tensor(0.5))]
    return Table("Layers", columns, rows, caption="share: of all MACs.")


def terminal(width=80):
    return Console(file=io.StringIO(), force_terminal=True, force_interactive=True, width=width, color_system=None)


def plain(width=80):
    return Console(file=io.StringIO(), force_terminal=False, width=width)


def test_text_is_aligned_formatted_and_prints_none_as_a_dash(table):
    assert str(table).splitlines() == [
        "Layers",
        "layer       MACs   share",
        "────────────────────────",
        "conv[1]   86,400   25.0%",
        "fc|out         -   50.0%",
        "share: of all MACs.",
    ]


def test_text_is_never_truncated_or_folded():
    long = "x" * 500
    assert long in str(Table("t", ["a", "b"], [(long, 1)]))
    console = plain(width=20)
    Table("t", ["a", "b"], [(long, 1)], caption="word " * 50).print(console)
    assert long in console.file.getvalue()
    assert "word " * 49 in console.file.getvalue()


def test_a_narrow_terminal_folds_cells_and_loses_nothing():
    console = terminal(width=20)
    Table("t", ["a", "b"], [("abcdefghijklmnopqrstuvwxyz0123456789", 1)]).print(console)
    shown = "".join(line.split()[0] for line in console.file.getvalue().splitlines() if line.strip())
    assert "abcdefghijklmnopqrstuvwxyz0123456789" in shown


def test_markdown_aligns_numbers_right_and_escapes_bars(table):
    assert table.to_markdown() == (
        "**Layers**\n\n"
        "| layer   |   MACs | share |\n"
        "| :------ | -----: | ----: |\n"
        "| conv[1] | 86,400 | 25.0% |\n"
        "| fc\\|out |      - | 50.0% |\n\n"
        "share: of all MACs.\n"
    )


def test_alignment_can_be_chosen():
    markdown = Table("", [Column("a", align="center"), Column("b", align="left")], [(1, 2)]).to_markdown()
    assert markdown.splitlines()[1] == "| :-: | :-- |"


def test_csv_and_json_hold_raw_values(table):
    assert list(csv.reader(table.to_csv().splitlines())) == [
        ["layer", "MACs", "share"],
        ["conv[1]", "86400", "0.25"],
        ["fc|out", "", "0.5"],
    ]
    assert json.loads(table.to_json()) == [
        {"layer": "conv[1]", "MACs": 86400, "share": 0.25},
        {"layer": "fc|out", "MACs": None, "share": 0.5},
    ]


def test_json_stays_valid_with_nan_and_infinity():
    text = Table("", ["a", "b", "c"], [(float("nan"), float("inf"), True)]).to_json()
    assert json.loads(text, parse_constant=pytest.fail) == [{"a": None, "b": None, "c": True}]


def test_a_function_makes_text_of_numbers_and_files_keep_the_numbers():
    table = Table("", [Column("MACs", human)], [(1_814_073_344,), (None,)])
    assert [line.strip() for line in str(table).splitlines()] == ["MACs", "──────", "1.81 G", "-"]
    assert json.loads(table.to_json()) == [{"MACs": 1_814_073_344}, {"MACs": None}]


@pytest.mark.parametrize("suffix", [".md", ".csv", ".json", ".txt"])
def test_save_writes_what_the_suffix_names(table, tmp_path, suffix):
    path = table.save(tmp_path / "new" / f"layers{suffix}")
    text = {".md": table.to_markdown(), ".csv": table.to_csv(), ".json": table.to_json(), ".txt": f"{table}\n"}
    assert path.read_text(encoding="utf-8") == text[suffix]


def test_save_refuses_another_suffix(table, tmp_path):
    with pytest.raises(ValueError, match=r"ends in \.md, \.csv, \.json, \.txt, got 'layers\.xls'"):
        table.save(tmp_path / "layers.xls")


@pytest.mark.parametrize(
    ("columns", "rows", "message"),
    [
        ([], [], "at least one column"),
        (["a", "a"], [], "no name twice"),
        (["a", "b"], [(1,)], "one value for each"),
        ([Column("a", "d")], [(1.5,)], "take the format"),
    ],
)
def test_tables_are_validated_when_made(columns, rows, message):
    with pytest.raises(ValueError, match=message):
        Table("t", columns, rows)


class Layers(Report):
    """Two tables to read, one of data, and a figure."""

    data_tables = frozenset({"samples"})
    drawn = 0

    def tables(self):
        return {
            "layers": Table("Layers", ["layer"], [("conv",)]),
            "samples": Table("Samples", ["n"], [(n,) for n in range(1000)]),
            "course": Table("Course", ["epoch"], [(1,), (2,)]),
        }

    def figures(self):
        self.drawn += 1
        return {"scores": new_figure()[0]}


def test_a_report_writes_every_table_three_ways_and_every_figure_by_its_key(tmp_path):
    report = Layers()
    written = report.write(tmp_path / "new" / "folder")
    names = ["layers.md", "layers.csv", "layers.json", "samples.csv", "samples.json"]  # nobody reads a thousand rows
    names += ["course.md", "course.csv", "course.json", "scores.png"]
    assert written == [tmp_path / "new" / "folder" / name for name in names]
    assert sorted((tmp_path / "new" / "folder").iterdir()) == sorted(written)
    assert written[1].read_text() == "layer\nconv\n"
    assert written[0].read_text() == report.table().to_markdown()


def test_a_report_is_read_as_its_tables_but_those_of_data_and_draws_nothing_for_it():
    report, console = Layers(), plain()
    report.print(console)
    assert str(report) == f"{report.table('layers')}\n\n{report.table('course')}"
    assert console.file.getvalue() == f"{report}\n"
    assert report.to_markdown().index("**Layers**") < report.to_markdown().index("**Course**")
    assert report.drawn == 0


def test_tables_of_a_report_are_found_by_name_and_the_first_is_the_most_important(tmp_path):
    assert Layers().table().title == "Layers"
    assert Layers().table("course").title == "Course"
    with pytest.raises(ValueError, match="name must be one of layers, samples, course, got 'coarse'"):
        Layers().table("coarse")


def test_what_a_reader_must_know_first_comes_first_also_in_files(tmp_path):
    class Doubtful(Layers):
        def preface(self):
            return ["Do not [b]trust[/b] this.", "Really."]

    console, told = plain(), terminal(width=200)
    Doubtful().print(console)
    Doubtful().print(told)
    assert str(Doubtful()) == f"Do not [b]trust[/b] this.\n\nReally.\n\n{Layers()}"
    assert console.file.getvalue() == f"{Doubtful()}\n"
    assert told.file.getvalue().startswith("Do not [b]trust[/b] this.\n\nReally.\n\n")
    markdown, comma, _, *_ = Doubtful().write(tmp_path)
    assert markdown.read_text() == ("> Do not [b]trust[/b] this.\n\n> Really.\n\n" + Layers().table().to_markdown())
    assert Doubtful().to_markdown() == "> Do not [b]trust[/b] this.\n\n> Really.\n\n" + Layers().to_markdown()
    assert comma.read_text() == "layer\nconv\n"


def test_a_report_without_pictures_writes_tables_alone(tmp_path):
    class Numbers(Report):
        def tables(self):
            return {"numbers": Table("Numbers", ["n"], [(1,)])}

    assert {path.suffix for path in Numbers().write(tmp_path)} == {".md", ".csv", ".json"}


def test_figures_leave_the_settings_of_matplotlib_alone(tmp_path):
    before = dict(matplotlib.rcParams)
    figure, axes = new_figure(2, 3, width=9)
    axes[1, 2].plot([0, 1])
    path = save_figure(figure, tmp_path / "new" / "scores.png")
    assert axes.shape == (2, 3)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert figure.get_size_inches().tolist() == [9.0, 4.0]
    assert dict(matplotlib.rcParams) == before


def test_figures_of_one_axes_are_indexed_like_all_others():
    _, axes = new_figure()
    assert axes.shape == (1, 1)
    assert axes[0, 0].plot([0, 1])[0].get_color() == SERIES[0]


def test_unknown_figure_formats_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"png.*got 'a\.xyz'"):
        save_figure(new_figure()[0], tmp_path / "a.xyz")
    with pytest.raises(ValueError, match="rows, cols >= 1"):
        new_figure(0)


def luminance(colour):
    """Relative luminance of WCAG 2, in [0, 1]."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_kept_and_removed_differ_in_brightness_too():
    assert luminance(REMOVED) - luminance(KEPT) > 0.05


def test_progress_prints_cost_and_end_where_there_is_no_terminal():
    console = plain()
    with progress("conv1 [1/2]", 2048, console=console) as bar:
        bar.advance(1000)
        bar.advance(24, note="error 0.1")
    start, end = console.file.getvalue().splitlines()
    assert start == "conv1 [1/2]: 2,048 evaluations"
    assert end.startswith("conv1 [1/2]: done, 1,024 evaluations in 0.")


def test_progress_says_where_an_exception_stopped_it():
    console = plain()
    with pytest.raises(KeyError), progress("walks", 10, unit="walks", console=console) as bar:  # noqa: PT012
        bar.advance(3)
        raise KeyError
    assert "walks: stopped after 3 walks" in console.file.getvalue()


def test_progress_on_a_terminal_shows_counts_and_note_and_is_gone_afterwards():
    console = terminal(width=200)
    with pytest.raises(KeyError), progress("walks [a]", 10, console=console) as bar:  # noqa: PT012
        bar.advance(4, note="[±] 0.1")
        time.sleep(0.15)  # rich draws ten times a second
        raise KeyError
    shown = console.file.getvalue()
    assert "walks [a]" in shown
    assert "4/10 evaluations" in shown
    assert "[±] 0.1" in shown
    assert shown.endswith("\x1b[?25h\r\x1b[1A\x1b[2K")  # cursor shown again, one line up, line erased
    with progress("again", 1, console=console):
        pass


def test_progress_is_silent_when_not_enabled(capsys):
    with progress("walks", 10, enabled=False) as bar:
        bar.advance(2)
    assert bar.done == 2
    assert capsys.readouterr() == ("", "")


def test_progress_refuses_a_negative_cost():
    with pytest.raises(ValueError, match="total >= 0, got -1"), progress("walks", -1):
        pass


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0"),
        (999, "999"),
        (999.6, "1 k"),
        (12_340, "12.3 k"),
        (999_999, "1 M"),
        (1_814_073_344, "1.81 G"),
        (-86_400, "-86.4 k"),
        (0.0123, "0.0123"),
        (2.95e18, "2.95 E"),
    ],
)
def test_human_numbers_have_three_digits_and_a_prefix(n, text):
    assert human(n) == text


def test_human_numbers_take_a_unit():
    assert human(1_814_073_344, "MACs") == "1.81 GMACs"
    assert human(532, "MACs") == "532 MACs"


@pytest.mark.parametrize(
    ("dirpath", "log_dir", "folder"),
    [("mine", "logs/version_3", "mine"), (None, "logs/version_3", "logs/version_3/moe"), (None, None, "root/moe")],
)
def test_results_go_where_the_user_says_or_beside_what_the_trainer_logs(dirpath, log_dir, folder):
    trainer = SimpleNamespace(log_dir=log_dir, default_root_dir="root")
    assert results_folder(dirpath, trainer, "moe") == Path(folder)
