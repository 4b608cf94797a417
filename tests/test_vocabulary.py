"""The same thing has the same name in every technique: what is logged, and what arguments are called."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import lightning_eff

SOURCES = sorted(Path(lightning_eff.__file__).parent.rglob("*.py"))
STAGES = ("train", "val", "test")
ROOMS = ("early_exit", "glimpse", "lidar", "moe", "privacy", "pruning", "synthesis")
ALLOWED = re.compile(rf"({'|'.join((*STAGES, *ROOMS))})/.+", re.DOTALL)
LOGS = {"log", "log_dict", "log_metrics", "log_hyperparams", "record", "_log_to_all"}


def text_of(node: ast.expr) -> str | None:
    """The text of a name that stands in the source, ``*`` for what is filled in later; None where nothing stands."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "*" for part in node.values)
    return None


def literal_names(source: str) -> Iterator[str]:
    """Names that are handed to a logger, and keys with a slash of dictionaries that may be."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LOGS and node.args:
            first = node.args[0]
            keys = first.keys if isinstance(first, ast.Dict) else [first.key] if isinstance(first, ast.DictComp) else []
            yield from (name for key in (first, *keys) if key is not None and (name := text_of(key)))
        elif isinstance(node, ast.Dict | ast.DictComp):
            keys = node.keys if isinstance(node, ast.Dict) else [node.key]
            yield from (name for key in keys if key is not None and (name := text_of(key)) and "/" in name)
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            yield from (name for name in [text_of(node.slice)] if name and "/" in name)


def unknown_names(source: str) -> list[str]:
    """Names that belong to no stage and no room."""
    resolved = (re.sub(r"^\*/", "val/", name) for name in literal_names(source))  # a stage that is filled in
    return sorted({name for name in resolved if not ALLOWED.fullmatch(name)})


def test_logged_names_begin_with_a_stage_or_a_room() -> None:
    unknown = {path.name: found for path in SOURCES if (found := unknown_names(path.read_text()))}
    assert unknown == {}


def test_a_logged_name_of_no_room_is_found() -> None:
    source = """
self.log("loss", 1)
self.log_dict({"dp/epsilon": 2, "val/accuracy": 3, f"{stage}/loss": 4})
values = {f"sas/{name}": value for name, value in found}
values["law/gap"] = 5
self.log(name, value)
"""
    assert unknown_names(source) == ["dp/epsilon", "law/gap", "loss", "sas/*"]
