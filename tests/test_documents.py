"""Files are whole or not there; documents are what they should be, or an error says what is wrong with them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from lightning_eff.documents import parsed, reading, whole_file, write_text


def test_writer_that_fails_half_way_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = write_text(tmp_path / "folder" / "notes.txt", "old")
    with pytest.raises(UnicodeEncodeError), whole_file(path) as beside:
        beside.write_text("new \udcff", encoding="utf-8")
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_line_ends_are_written_as_they_are(tmp_path: Path) -> None:
    assert write_text(tmp_path / "a", "x\r\ny\n").read_bytes() == b"x\r\ny\n"


def test_target_of_a_link_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    (link := tmp_path / "link").symlink_to(tmp_path / "target")
    write_text(link, "one")
    assert link.is_symlink()
    assert (tmp_path / "target").read_text() == "one"


def test_device_is_written_to_and_not_replaced() -> None:
    write_text("/dev/null", "gone")
    assert Path("/dev/null").is_char_device()


def test_pipe_behind_a_link_is_written_to() -> None:
    reader, writer = os.pipe()
    write_text(f"/dev/fd/{writer}", "through")
    os.close(writer)
    with os.fdopen(reader) as end:
        assert end.read() == "through"


def test_file_that_only_its_owner_may_read_stays_so(tmp_path: Path) -> None:
    path = write_text(tmp_path / "ledger.json", "old")
    path.chmod(0o600)
    with whole_file(path) as beside:
        assert beside.stat().st_mode & 0o777 == 0o600
        beside.write_text("new")
    assert path.stat().st_mode & 0o777 == 0o600


def test_writers_of_one_file_do_not_write_over_each_other_and_the_last_one_stays(tmp_path: Path) -> None:
    own = write_text(tmp_path / "a.part", "of somebody else")
    with whole_file(tmp_path / "a") as one:
        one.write_text("one")
        with whole_file(tmp_path / "a") as other:
            other.write_text("other")
        assert one.read_text() == "one"
        assert (tmp_path / "a").read_text() == "other"
    assert (tmp_path / "a").read_text() == "one"
    assert own.read_text() == "of somebody else"
    assert len(list(tmp_path.iterdir())) == 2


@dataclass(frozen=True)
class Point:
    """Something with types to check."""

    x: float
    label: Literal["a", "b"] = "a"
    tags: tuple[str, ...] = ()
    inner: Mapping[str, list[int]] | None = None


def test_document_becomes_a_dataclass_with_tuples_where_json_has_lists() -> None:
    given = {"x": 1, "label": "b", "tags": ["s"], "inner": {"k": [1, 2]}}
    assert parsed(Point, given, "the point") == Point(1, "b", ("s",), {"k": [1, 2]})
    assert parsed(Point | None, None, "the point") is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"x": True}, r"expected the point\.x to be float, got True"),
        ({"x": "1"}, r"the point\.x to be float, got '1'"),
        ({"x": 10**400}, r"expected the point\.x to be float, got 1000"),
        ({"x": None}, r"the point\.x to be float, got None"),
        ({"x": 1.0, "label": "c"}, r"the point\.label to be Literal\['a', 'b'\], got 'c'"),
        ({"x": 1.0, "tags": "abc"}, r"the point\.tags to be tuple\[str, \.\.\.\], got 'abc'"),
        ({"x": 1.0, "inner": {"k": [1, 2.5]}}, r"the point\.inner\['k'\]\[1\] to be int, got 2\.5"),
        ({"x": 1.0, "inner": {1: []}}, r"a key of the point\.inner to be str, got 1"),
        ({"x": 1.0, "y": 2}, "expected the point to have x, label, tags, inner, got y besides"),
        ({"label": "a"}, "expected the point to have x, got label"),
        ([1.0], r"expected the point to be Point, got \[1\.0\]"),
    ],
)
def test_document_that_does_not_fit_is_named_down_to_the_entry(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parsed(Point, given, "the point")


@pytest.mark.parametrize("text", ['{"a": ', "[]", "{}", '{"a": {}}', "[" * 100_000, "\udcff"])
def test_every_malformed_text_is_one_kind_of_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"^x\.json holds nothing: ."), reading("x.json holds nothing"):
        json.loads(text.encode(errors="surrogateescape").decode())["a"].index(1)


def test_missing_file_stays_a_missing_file() -> None:
    with pytest.raises(FileNotFoundError), reading("x.json holds nothing"):
        Path("/nowhere/x.json").read_text()
