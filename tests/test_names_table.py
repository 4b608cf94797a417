"""The table of public names in lightning_eff/README.md says what the docstrings say."""

import inspect
import re
from pathlib import Path

import pytest

import lightning_eff

README = Path(lightning_eff.__file__).with_name("README.md")
STUB = Path(lightning_eff.__file__).with_suffix(".pyi")


def meaning(name: str) -> str:
    """First sentence of the docstring, Sphinx's roles taken off, one backtick for code."""
    summary = (inspect.getdoc(getattr(lightning_eff, name)) or "").split("\n\n")[0].replace("\n", " ")
    summary = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"``\1``", summary)
    return summary.replace("``", "`").replace("|", r"\|")


def rooms() -> dict[str, list[str]]:
    """Public names by the room that the stub imports them from; rooms themselves under an empty name."""
    found: dict[str, list[str]] = {}
    for room, names in re.findall(r"^from \.(\w*) import \((.*?)\)", STUB.read_text(), re.M | re.S):
        found[room] = re.findall(r"(\w+) as", names)
    return found


def rows() -> list[str]:
    """Every line that the table must have, in order."""
    by_room = rooms()
    lines = [f"| `{name}` | room | {meaning(name)} |" for name in by_room[""]]
    return lines + [f"| `{name}` | {room} | {meaning(name)} |" for room in by_room if room for name in by_room[room]]


def test_table_of_names_is_what_the_docstrings_say():
    section = README.read_text().split("## Names", 1)[1].split("\n## ", 1)[0]
    table = [line for line in section.splitlines() if line.startswith("| `")]
    assert table == rows(), "the table must be:\n" + "\n".join(rows())


def test_every_public_name_stands_in_the_stub_once():
    listed = [name for names in rooms().values() for name in names]
    assert sorted(listed) == sorted(lightning_eff.__all__)
    assert len(set(listed)) == len(listed)


@pytest.mark.parametrize("name", lightning_eff.__all__)
def test_meaning_is_one_sentence_that_fits_a_line_of_the_table(name):
    assert 10 < len(meaning(name)) <= 120
    assert meaning(name).endswith((".", "`"))
