"""Decide where exits stand on a backbone, what their heads read and how samples can leave it.

The result is plain Python: a checkpoint carries it, and a network is put together from it without any data.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_eff.batch import batch_size, call_model
from lightning_eff.early_exit.attaching.costs import cost_until
from lightning_eff.early_exit.attaching.features import BatchDim
from lightning_eff.early_exit.attaching.heads import channels_of
from lightning_eff.early_exit.attaching.placement import Exits, exit_candidates, exit_name, named_exits, spread_exits
from lightning_eff.early_exit.attaching.probe import Call, Probe, probe, samples
from lightning_eff.early_exit.attaching.self_check import SelfCheck, check_exits, hooks_for
from lightning_eff.early_exit.inference.hooks import ArgumentHook, ExitHook, Tape
from lightning_eff.surgery.state import quiet_model

Engine = Literal["auto", "hooks", "staged", "off"]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Attachment:
    """What was decided.

    Attributes:
        structure: names of the exits, shapes of one sample's feature, hooks, engine; plain Python.
        checked: result of the self-check, None where none was needed.
        stages: the backbone cut into stages, where that was needed to choose the engine.
    """

    structure: dict[str, Any]
    checked: SelfCheck | None
    stages: Any


def attach(
    backbone: nn.Module,
    exits: Exits,
    num_classes: int,
    example: Any,
    *,
    engine: Engine,
    clone_features: bool | Literal["auto"],
    output_of: Callable[[Any], Tensor],
) -> Attachment:
    """Decide all of it by dry runs on a few samples; the backbone is left as it was.

    Raises:
        ValueError: a layer no exit can stand on, an output that is not ``[B, num_classes]``, or an engine that does not
            work here.
    """
    seen = probe(backbone, example)
    _check_output(backbone, num_classes, example, output_of)
    calls = _choose(backbone, exits, engine, seen, example)
    names = [exit_name(call, seen) for call in calls]
    if isinstance(exits, list | tuple) and isinstance(exits[0], str) and list(exits) != names:
        log.info("exits in the order in which they run: %s", ", ".join(names))
    chosen, checked, stages = _choose_engine(backbone, calls, names, engine, seen, example)
    structure = {
        "exits": [
            {
                "name": name,
                "shape": sample_shape(call),
                "channels": _channels(backbone, call),
                "clone": clone_features is True or (clone_features == "auto" and call.overwritten),
            }
            for name, call in zip(names, calls, strict=True)
        ],
        "hooks": _hooks_to_dict(hooks_for(Tape(), calls, seen)),
        "inputs": given_inputs(backbone, *as_arguments(example)),
        "engine": chosen,
    }
    return Attachment(structure, checked, stages)


def sample_shape(call: Call) -> list[int]:
    """Shape of one sample's feature."""
    assert call.shape is not None
    assert call.batch_dim is not None
    shape = list(call.shape)
    del shape[call.batch_dim]
    return shape


def hooks_from_dict(tape: Tape, hooks: dict[str, list[dict[str, Any]]]) -> dict[str, list[ExitHook | ArgumentHook]]:
    """Make the hooks of ``structure["hooks"]``, by layer."""

    def layout(where: Any) -> list[BatchDim | None]:
        return [None if one is None else BatchDim(*one) for one in where]

    return {
        layer: [
            ExitHook(tape, hook["exit"], hook["call"], layout(hook["output"]))
            if "exit" in hook
            else ArgumentHook(tape, layout(hook["inputs"]))
            for hook in placed
        ]
        for layer, placed in hooks.items()
    }


def _hooks_to_dict(hooks: dict[str, list[ExitHook | ArgumentHook]]) -> dict[str, list[dict[str, Any]]]:
    def plain(where: Any) -> list[Any]:
        return [None if one is None else [one.dim, one.factor] for one in where]

    return {
        layer: [
            {"exit": hook.index, "call": hook.call, "output": plain(hook.output)}
            if isinstance(hook, ExitHook)
            else {"inputs": plain(hook.inputs)}
            for hook in placed
        ]
        for layer, placed in hooks.items()
    }


def _check_output(backbone: nn.Module, num_classes: int, example: Any, output_of: Callable[[Any], Tensor]) -> None:
    with quiet_model(backbone), torch.no_grad():
        shape = tuple(output_of(call_model(backbone, samples(example, 2))).shape)
    if shape != (2, num_classes):
        raise ValueError(
            f"expected a backbone that returns logits [B, num_classes={num_classes}], for a batch of two it returned "
            f"{shape}: set num_classes to the width of its output, or output_fn where the logits are elsewhere"
        )


def _choose(backbone: nn.Module, exits: Exits, engine: Engine, seen: Probe, example: Any) -> list[Call]:
    if not isinstance(exits, int) and isinstance(next(iter(exits)), str):
        return named_exits(backbone, [str(name) for name in exits], seen)
    fractions = [(k + 1) / (exits + 1) for k in range(exits)] if isinstance(exits, int) else [float(f) for f in exits]
    candidates = exit_candidates(backbone, seen)
    spent = cost_until(backbone, [call.layer for call in candidates], example)

    def works(call: Call) -> bool:
        return engine in ("off", "staged") or check_exits(backbone, [call], [call.layer], seen, example).passed

    return spread_exits(fractions, candidates, dict(enumerate(spent)), works)


def _choose_engine(
    backbone: nn.Module, calls: Sequence[Call], names: Sequence[str], engine: Engine, seen: Probe, example: Any
) -> tuple[Engine, SelfCheck | None, Any]:
    if engine in ("off", "staged"):
        return engine, None, None
    checked = check_exits(backbone, calls, names, seen, example)
    if checked.passed:
        return "hooks", checked, None
    if engine == "hooks":
        raise ValueError(
            f'engine="hooks" does not work on this backbone: {checked.problem}. Use engine="staged" or "auto"'
        )
    from lightning_eff.early_exit.inference.stages import CutError, cut_stages

    inputs = samples(example, max(2, batch_size(example)))
    args, kwargs = as_arguments(inputs)
    try:
        stages = cut_stages(backbone, names, args, kwargs)
    except CutError as error:
        raise ValueError(
            f"samples cannot leave this backbone in the middle. With hooks {checked.problem}; it cannot be cut into "
            f'stages either: {error}. Move the exit, or use engine="off", which saves no work'
        ) from error
    log.info('engine="staged": with hooks, %s', checked.problem)
    return "staged", checked, stages


def as_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``(args, kwargs)`` of a call: a dict by keyword, a tuple or list by position, as :func:`call_model`."""
    if isinstance(inputs, dict):
        return (), inputs
    return (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)), {}


def given_inputs(backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """Names of the arguments of a call that are given and not None; numbers where they have none."""
    given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    with suppress(TypeError, ValueError):  # a forward without a signature, or one that does not take them
        given = inspect.signature(backbone.forward).bind(*args, **kwargs).arguments
    return [str(name) for name, value in given.items() if value is not None]


def check_inputs(backbone: nn.Module, known: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise where there are inputs that the example had not: how they go around exits is not known.

    Args:
        backbone: that is called.
        known: inputs of the example, as in ``structure["inputs"]``.
        args: of the call.
        kwargs: of the call.

    Raises:
        ValueError: names them.
    """
    if len(args) + len(kwargs) == len(known) == 1:
        return
    if new := [name for name in given_inputs(backbone, args, kwargs) if name not in known]:
        raise ValueError(
            f"predict got {', '.join(new)}, which the example had not that the exits were built with "
            f"({', '.join(known)}): build them with an example that has all inputs of the backbone"
        )


def _channels(backbone: nn.Module, call: Call) -> str | None:
    shape = sample_shape(call)
    return channels_of(backbone.get_submodule(call.layer), shape) if len(shape) == 3 else None
