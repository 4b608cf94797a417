"""Whether samples can leave a backbone in the middle: survivors must get what they get in a full batch.

A tensor that goes around an exit inside of some ``forward`` (a skip connection) keeps its rows when the feature loses
some: the shapes no longer fit, or, where one row is left, broadcasting hides it. Both are found by letting some rows
of a small batch leave and comparing what every later layer makes of the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_eff.batch import call_model
from lightning_eff.early_exit.attaching.features import feature_of
from lightning_eff.early_exit.attaching.probe import Call, Probe, observed, samples
from lightning_eff.early_exit.inference.hooks import ArgumentHook, Compact, ExitHook, Tape, place, running
from lightning_eff.early_exit.inference.leaving import Leaving, Rule
from lightning_eff.early_exit.inference.policies import Policy, State
from lightning_eff.surgery.state import quiet_model


@dataclass(frozen=True)
class SelfCheck:
    """Result of a self-check.

    Attributes:
        exits: names of the exits that were checked.
        error: largest difference of a survivor to the full batch, relative to the largest value of the layer; infinite
            where the pass failed.
        problem: what is wrong, None where nothing is.
    """

    exits: tuple[str, ...]
    error: float
    problem: str | None = None

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return self.problem is None


def hooks_for(tape: Tape, calls: Sequence[Call], seen: Probe) -> dict[str, list[ExitHook | ArgumentHook]]:
    """Hooks of exits at ``calls``, and of the later layers that get more than one tensor of the batch."""
    hooks: dict[str, list[ExitHook | ArgumentHook]] = {}
    if not calls:
        return hooks
    later = {call.layer for call in seen.calls[min(map(seen.calls.index, calls)) :]}
    for layer, layer_calls in seen.by_layer.items():
        inputs = layer_calls[0].inputs
        alike = all(call.inputs == inputs for call in layer_calls)
        if layer in later and alike and sum(where is not None for where in inputs) > 1:
            hooks.setdefault(layer, []).append(ArgumentHook(tape, inputs))
    for index, call in enumerate(calls):
        number = call.number if len(seen.by_layer[call.layer]) > 1 else 0
        hooks.setdefault(call.layer, []).append(ExitHook(tape, index, number, call.output))
    return hooks


def check_exits(
    backbone: nn.Module, calls: Sequence[Call], names: Sequence[str], seen: Probe, example: Any
) -> SelfCheck:
    """Let one row leave at every exit, two or one survive, and compare the survivors with a full batch."""
    found = _check(backbone, calls, seen, example)
    if isinstance(found, float):
        return SelfCheck(tuple(names), found)
    for call, name in zip(calls, names, strict=True):
        alone = _check(backbone, [call], seen, example)
        if isinstance(alone, tuple):
            return SelfCheck(tuple(names), alone[0], f"exit {name!r}: {alone[1]}")
    return SelfCheck(tuple(names), found[0], f"exits {', '.join(names)} together: {found[1]}")


def _check(backbone: nn.Module, calls: Sequence[Call], seen: Probe, example: Any) -> float | tuple[float, str]:
    """Largest relative difference; with what is wrong where something is."""
    tape, exits, worst = Tape(), len(calls), 0.0
    behind = seen.calls.index(calls[-1]) + 1
    compared = {
        position: (call.batch_dim, f"the output of {call.layer!r}")
        for position, call in enumerate(seen.calls)
        if position >= behind and call.batch_dim is not None
    }
    compared[len(seen.calls)] = (0, "the backbone's output")
    handles = place(backbone, hooks_for(tape, calls, seen))
    try:
        for survivors in (2, 1):
            inputs = samples(example, exits + survivors, distinct=True)
            rule = Rule(_Forced(), [0.5] * exits, [1.0] * (exits + 1))
            leaving = Leaving(rule, nn.ModuleList(_Nothing() for _ in calls), exits + survivors)
            with quiet_model(backbone), torch.no_grad():
                expected = _features(backbone, inputs)
                try:
                    with running(Compact(tape, leaving)):
                        got = _features(backbone, inputs)
                except Exception as failure:  # whatever a network does with rows that do not fit
                    return math.inf, f"when {exits} of {exits + survivors} samples leave, the backbone fails: {failure}"
            for position, (dim, layer) in compared.items():
                one, full = got[position], expected[position].narrow(dim or 0, exits, survivors)
                if one.shape != full.shape:
                    return math.inf, f"{layer} has shape {tuple(one.shape)} instead of {tuple(full.shape)}"
                error = _difference(one, full)
                if not error <= (5e-2 if one.element_size() < 4 else 1e-4):
                    return error, f"{layer} differs from that of a full batch by {error:.2g} of its largest value"
                worst = max(worst, error)
    finally:
        for handle in handles:
            handle.remove()
    return worst


def _difference(one: Tensor, full: Tensor) -> float:
    if not one.is_floating_point():
        return 0.0
    return float((one - full).abs().max() / full.abs().max().clamp(min=1e-12))


def _features(backbone: nn.Module, inputs: Any) -> list[Tensor]:
    out: list[Tensor] = []
    nothing = torch.zeros(0)

    def note(layer: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        try:
            out.append(feature_of(output).clone())
        except ValueError:
            out.append(nothing)

    with observed(backbone, note):
        output = call_model(backbone, inputs)
    return [*out, feature_of(output)]


class _Forced(Policy):
    """Row k leaves at exit k, the rows behind survive."""

    name = "forced"

    def __call__(self, logits: Tensor, exit_index: int, state: State) -> tuple[Tensor, State]:
        rows = torch.arange(len(logits), device=logits.device) if state is None else state
        return (rows == exit_index).float(), rows

    def grid(self, points: int, num_exits: int, num_classes: int) -> list[float]:
        return [0.5]


class _Nothing(nn.Module):
    """Stands for a head: the check decides by row."""

    def forward(self, feature: Tensor) -> Tensor:
        return torch.zeros(len(feature), 1, device=feature.device)
