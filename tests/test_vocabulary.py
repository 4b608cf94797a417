"""The same thing has the same name in every technique: what is logged, and what arguments are called."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from inspect import Parameter, isclass, ismodule, signature
from pathlib import Path
from typing import Any

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


# Arguments


def public_callables() -> dict[str, Any]:
    """Everything that users call, by the name they know it by; rooms' names as ``room.name``."""
    found = {name: getattr(lightning_eff, name) for name in lightning_eff.__all__}
    rooms = {name: room for name, room in found.items() if ismodule(room)}
    found |= {
        f"{name}.{one}": getattr(room, one)
        for name, room in rooms.items()
        for one in getattr(room, "__all__", vars(room))
        if str(getattr(getattr(room, one), "__module__", None)).startswith("lightning_eff.")
    }
    return {name: one for name, one in found.items() if callable(one)}


@cache
def arguments() -> list[tuple[str, Parameter]]:
    """Every argument of every public function, constructor and method, each once."""
    found, seen = [], set()
    for name, one in public_callables().items():
        if id(one) in seen:
            continue
        seen.add(id(one))
        methods = {key: getattr(one, key) for key in vars(one) if not key.startswith("_")} if isclass(one) else {}
        calls = {name: one, **{f"{name}.{key}": method for key, method in methods.items() if callable(method)}}
        for called, call in calls.items():
            try:
                found += [(called, parameter) for parameter in signature(call).parameters.values()]
            except (TypeError, ValueError):  # what is built in tells none
                continue
    return found


# other words for split_batch, progress, amount, seed, dirpath
OTHER_WORDS = {
    "split", "batch_first", "show_progress", "prune_rate", "pruning_rate", "rng", "random_state", "random_seed",
    "output_dir", "save_dir", "out_dir", "folder", "min_gt", "loss_function",
}  # fmt: skip
A_DATA_SET_HAS_SPLITS = {"KittiDepthDataModule", "lidar.KittiDepthDataset"}


def told(word: str) -> dict[str, tuple[str, Any]]:
    """Type and default of the arguments of one name."""
    return {name: (str(p.annotation), p.default) for name, p in arguments() if p.name == word}


def test_no_argument_has_another_word_for_the_same_thing() -> None:
    found = {(name, p.name) for name, p in arguments() if p.name in OTHER_WORDS}
    assert {one for one in found if one[0] not in A_DATA_SET_HAS_SPLITS or one[1] != "split"} == set()


def test_how_a_batch_is_split_is_said_in_the_same_way_everywhere() -> None:
    found = told("split_batch")
    assert len(found) > 20
    assert set(found.values()) == {("SplitBatch | None", None)}


def test_folders_have_the_same_type_and_default_everywhere() -> None:
    found = told("dirpath")
    where = {name for name in found if name.endswith((".write", ".save")) or name == "reporting.results_folder"}
    assert len(found) > len(where) + 12
    assert {one for name, one in found.items() if name not in where} == {("str | Path | None", None)}
    assert {found[name][1] for name in where} == {Parameter.empty}  # whose only purpose is a folder: it is asked for


# None draws one, which the docstring says; gymnasium and stable-baselines3 give resets and buffers their signature
DRAWN = {"DPNTKGenerator.generate", "SyntheticData", "SyntheticDataWriter", "TableSchema.decode"}
GIVEN = {"glimpse.GlimpseEnv.reset", "glimpse.GlimpseVecEnv.seed", "glimpse.GlimpseReplayBuffer"}


def test_seeds_are_numbers_that_begin_at_0() -> None:
    found = {name: one for name, one in told("seed").items() if name not in DRAWN | GIVEN}
    assert len(found) > 25
    assert {default for _, default in found.values()} <= {0, Parameter.empty}
    assert {kind for kind, _ in found.values()} <= {"int", str(int)}


def test_bars_and_prints_are_switches_that_are_on() -> None:
    shown = {**told("progress"), **told("verbose")}
    counted = {name for name, (kind, _) in shown.items() if "Progress" in kind}  # games know no bars, they tell a count
    assert {name.split(".")[0] for name in counted} <= {"shapley", "shapley_values", "ShapleyEstimator"}
    assert {one for name, one in shown.items() if name not in counted} <= {("bool", True), ("bool", Parameter.empty)}
    assert len(shown) > len(counted) + 8


def test_a_loss_is_a_function_of_model_and_batch_everywhere() -> None:
    assert {kind for kind, _ in told("loss_fn").values()} <= {"LossFunction", "LossFunction | None"}
    assert len(told("loss_fn")) > 5
