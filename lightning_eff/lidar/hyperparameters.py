"""Arguments of a selector as they are written into checkpoints, and weights of its network from a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from numbers import Real
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from lightning_eff.arguments import plain as plain_numbers
from lightning_eff.documents import parsed, reading
from lightning_eff.surgery.structure import HINT, KEY, apply_structure, part_of

Options = TypeVar("Options")


def built(kind: type[Options], value: Options | Mapping[str, Any]) -> Options:
    """Options as they are; those of a checkpoint come as dicts."""
    return kind(**value) if isinstance(value, Mapping) else value


def plain_hyperparameters(given: Mapping[str, Any]) -> dict[str, Any]:
    """What can be written as plain Python of the arguments; the rest is left out."""
    plain: dict[str, Any] = {}
    for name, value in given.items():
        if name in ("model", "checkpoint_path"):
            continue
        if is_dataclass(value) and not isinstance(value, type):
            entries = plain_hyperparameters(vars(value))
            if len(entries) == len(vars(value)):
                plain[name] = entries
        elif value is None or isinstance(value, bool | Real | str):
            plain[name] = plain_numbers(value)
        elif isinstance(value, Path):
            plain[name] = str(value)
        elif isinstance(value, Mapping):
            plain[name] = plain_numbers(dict(value))
        elif isinstance(value, Sequence):
            plain[name] = plain_numbers(list(value))
    return plain


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state dict, or the one of a checkpoint, whole; RuntimeError names weights that are missing.

    Of a network that lost channels, the model takes on the shapes first.
    """
    with reading(f"{path} holds no weights"):
        loaded = parsed(dict[str, Any], torch.load(path, map_location="cpu", weights_only=True), "what it holds")
    structure = loaded.get(KEY) if isinstance(loaded, Mapping) else None
    for name in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(name), Mapping):
            loaded = loaded[name]
    loaded = {name: entry for name, entry in loaded.items() if name != HINT}
    own = set(model.state_dict())
    for prefix in ("model.", "net.", "module."):  # of a module that holds the network
        if not own & set(loaded) and any(name.startswith(prefix) for name in loaded):
            loaded = {name.removeprefix(prefix): entry for name, entry in loaded.items() if name.startswith(prefix)}
            structure = part_of(structure, prefix)
    if structure is not None:
        apply_structure(model, structure)
    model.load_state_dict(loaded)
