"""The table of what works together: every pair has an answer, and every answer that says so a test."""

import ast
import re
from itertools import combinations_with_replacement
from pathlib import Path

HERE = Path(__file__).parent
PACKAGE = HERE.parents[1] / "lightning_eff"
SECTION = (PACKAGE / "README.md").read_text().split("\n## Together\n")[1].split("\n## ")[0]
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in SECTION.splitlines() if line.startswith("|")]
LIST = {int(row[0]): row for row in ROWS if row[0].isdigit()}
MATRIX = [row for row in ROWS if not row[0].isdigit() and not set("".join(row)) <= set("-") and len(row) > 4]


def answers() -> dict[tuple[str, str], list[tuple[str, int]]]:
    """Marks and numbers of every pair of techniques."""
    head, *rows = MATRIX
    return {
        (row[0], other): [(mark, int(number)) for mark, number in re.findall(r"([✓✗–]) (\d+)", cell)]
        for row in rows
        for other, cell in zip(head[1:], row[1:], strict=True)
        if cell
    }


def test_every_pair_of_techniques_has_an_answer() -> None:
    names = MATRIX[0][1:]
    assert [row[0] for row in MATRIX[1:]] == names
    expected = {(later, earlier) for earlier, later in combinations_with_replacement(names, 2)}
    assert set(answers()) == expected
    assert all(answers().values())


def test_every_answer_is_told_and_everything_told_is_an_answer() -> None:
    numbers = {number for several in answers().values() for _, number in several}
    assert numbers == set(LIST)


def test_whatever_works_or_is_refused_is_held_by_tests_that_exist() -> None:
    there = {
        node.name
        for path in HERE.glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    for several in answers().values():
        for mark, number in several:
            named = re.findall(r"`(test_\w+)`", LIST[number][3])
            assert mark == "–" or named, number
            assert set(named) <= there, number


def test_messages_that_are_quoted_are_those_of_the_package() -> None:
    sources = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    plain = re.sub(r'"\s*\n\s*f?"|\s+', lambda found: "" if '"' in found[0] else " ", sources)
    refused = {number for several in answers().values() for mark, number in several if mark == "✗"}
    for number in refused:
        quotes = re.findall(r'(?<![=\w(])"([^"]{12,})"', LIST[number][2])
        assert quotes, number
        for piece in (part for quote in quotes for part in quote.split(" ... ")):
            words = re.split(r"\(DropInMoE\)|LinearHead|Sequential|RunRecorder's", piece)
            assert all(word.strip() in plain for word in words if len(word.strip()) > 8), (number, piece)
