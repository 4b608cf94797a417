"""The backbone's optimizer, and what checkpoints hold of a module's arguments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, is_dataclass
from numbers import Real
from typing import Any, TypeVar

from torch.optim import AdamW, Optimizer

from lightning_eff.arguments import plain as plain_numbers
from lightning_eff.glimpse.config import AgentConfig, ReplayOptions

Options = TypeVar("Options")


def paper_optimizer(params: Iterable[Any]) -> Optimizer:
    """Return AdamW with a learning rate of 1e-5 and a weight decay of 1e-4, for backbones that are trained already."""
    return AdamW(params, lr=1e-5, weight_decay=1e-4)


def options_from(kind: type[Options], given: Options | Mapping[str, Any]) -> Options:
    """Return options as they are, or made from a dict of them, as checkpoints hold them."""
    if not isinstance(given, Mapping):
        return given
    arguments = dict(given)
    if kind is AgentConfig and "replay" in arguments:
        arguments["replay"] = options_from(ReplayOptions, arguments["replay"])
    return kind(**arguments)


def plain_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return those arguments that can be written as plain Python: options as dicts, names and numbers."""
    plain: dict[str, Any] = {}
    for name, value in given.items():
        if is_dataclass(value) and not isinstance(value, type):
            plain[name] = plain_numbers(asdict(value))
        elif _is_plain(value):
            plain[name] = plain_numbers(value)
    return plain


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):  # options that came back from a checkpoint
        return all(isinstance(name, str) and _is_plain(one) for name, one in value.items())
    if isinstance(value, tuple | list):
        return all(_is_plain(one) for one in value)
    return value is None or isinstance(value, str | Real | bool)
