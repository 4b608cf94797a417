"""Imports point downward: command line, techniques, shared rooms, torch."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "lightning_eff"
TECHNIQUES = {"pruning", "early_exit", "privacy", "synthesis", "moe", "glimpse", "lidar"}
SHARED = {"shapley", "surgery", "accounting", "data", "models", "reporting", "batch", "documents", "arguments", "steps"}
# What a shared room may import of the others; the package's techniques may import every shared room.
ALLOWED = {
    "shapley": {"reporting", "documents", "arguments"},
    "accounting": {"reporting", "documents", "arguments"},
    "reporting": {"documents"},
    "arguments": set(),
    "batch": set(),
    "documents": set(),
    "steps": set(),
    "models": {"arguments"},
    "surgery": {"batch", "documents", "arguments", "reporting"},
    "data": {"batch", "arguments"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    """Return the folder, or the file's stem at the top of the package."""
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else path.stem


def imported(path: Path) -> set[str]:
    """Rooms that a file imports anywhere, also inside of functions and under TYPE_CHECKING."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        found |= {name.split(".")[1] for name in names if name.startswith("lightning_eff.")}
    return found & (TECHNIQUES | SHARED | {"cli"})


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_file_imports_only_downward(path: Path) -> None:
    here = room(path)
    others = imported(path) - {here}
    if here in TECHNIQUES:
        assert not others & (TECHNIQUES | {"cli"})
    elif here in ALLOWED:
        assert others <= ALLOWED[here]


def test_every_room_is_named_here() -> None:
    doors = {"__init__", "__main__", "cli", "strategy_names"}
    assert {room(path) for path in FILES} - doors == TECHNIQUES | SHARED
    assert ALLOWED.keys() == SHARED
    assert not imported(PACKAGE / "strategy_names.py")


def test_no_file_takes_what_another_keeps_to_itself() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_eff"):
                assert not [a.name for a in node.names if a.name.startswith("_") and not a.name.startswith("__")], path


def test_shapley_knows_no_lightning_and_only_one_surgery_file_touches_its_strategies() -> None:
    for path in FILES:
        text = path.read_text()
        if room(path) in ("shapley", "accounting"):
            assert "import lightning" not in text.replace("import lightning_eff", "")
            assert "from lightning." not in text
        if room(path) == "surgery" and path.name != "in_trainer.py":
            assert "lightning.pytorch" not in text


@pytest.mark.parametrize("folder", sorted(TECHNIQUES | {"accounting", "shapley", "surgery"}))
def test_every_room_has_a_readme(folder: str) -> None:
    if not (PACKAGE / folder).is_dir():
        pytest.skip(f"{folder} is not built yet")
    assert (PACKAGE / folder / "README.md").stat().st_size > 500


@pytest.mark.parametrize("folder", sorted(TECHNIQUES | {"accounting", "shapley", "surgery"}))
def test_the_readme_of_a_room_says_what_each_of_its_files_is_for(folder: str) -> None:
    told = (PACKAGE / folder / "README.md").read_text()
    files = {path.name for path in (PACKAGE / folder).glob("*.py")} - {"__init__.py"}
    assert {name for name in files if f"{name}`" not in told} == set()
    assert [
        name
        for name in re.findall(r"`([a-z_]+(?:/[a-z_]+)*\.py)`(?!\])", told)
        if not (PACKAGE / folder / name).exists()
    ] == []
