"""What a checkpoint of :class:`EarlyExitModule` holds besides the weights: plain Python, loaded with weights_only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from numbers import Real
from typing import Any

from torch import Tensor

from lightning_eff.arguments import plain as plain_numbers
from lightning_eff.documents import parsed
from lightning_eff.early_exit.attaching.heads import Head
from lightning_eff.early_exit.inference.policies import Policy, policy_from
from lightning_eff.early_exit.network import MultiExitNetwork
from lightning_eff.early_exit.options import NetworkOptions
from lightning_eff.early_exit.training.losses import ExitLosses
from lightning_eff.early_exit.training.phases import Phase, PhaseClock

KEY = "lightning_eff.early_exit"
VERSION = 1
_OF_EXITS = ("network.heads.", "network.score_thresholds", "network.temperatures")


def save_phases(
    checkpoint: dict[str, Any],
    network: MultiExitNetwork,
    clock: PhaseClock,
    phase_split: float,
    not_plain: Sequence[str],
) -> None:
    """Write the phase, where the exits are, and what cannot be written into a checkpoint."""
    checkpoint[KEY] = {
        "version": VERSION,
        "regime": [phase.to_dict() for phase in clock.phases],
        "start_phase": clock.start,
        "phase_split": phase_split,
        "clock": clock.state_dict(),
        "structure": network.structure() if network.built else None,
        "policy": network.policy.name,
        "not_plain": list(not_plain),
    }


def load_phases(
    checkpoint: Mapping[str, Any], network: MultiExitNetwork, clock: PhaseClock, phase_split: float, *, fitting: bool
) -> str | None:
    """Put exits where they were and take up the phase; a checkpoint of other origin changes nothing.

    Args:
        checkpoint: as Lightning hands it over.
        network: built or not.
        clock: of the phases.
        phase_split: share of the first of two phases.
        fitting: whether training goes on, for which the regime, its start and its split must be the same.

    Returns:
        Why the exits are not those of the checkpoint, None if they are.

    Raises:
        ValueError: another version, thresholds of another policy, or training would go on in another regime; nothing
            has changed then.
    """
    saved = checkpoint.get(KEY)
    if saved is None:
        return None
    if saved["version"] != VERSION:
        raise ValueError(f"expected a checkpoint of early exits in version {VERSION}, got {saved['version']!r}")
    _check_policy(parsed(str | None, saved.get("policy"), "policy"), checkpoint, network)
    parsed(list[str] | tuple[str, ...], saved.get("not_plain", ()), "not_plain")
    regime = [phase.to_dict() for phase in clock.phases]
    if fitting and regime != saved["regime"]:
        raise ValueError(
            f"the checkpoint was trained in the phases {_told(saved['regime'])}, this module has {_told(regime)}: give "
            "it the same regime, or load the weights alone and begin anew, with start_phase where you want to"
        )
    for name, own in (("start_phase", clock.start), ("phase_split", phase_split)):
        if fitting and saved.get(name, own) != own:
            raise ValueError(
                f"the checkpoint was trained with {name}={saved[name]}, this module has {own}: give it the same, or "
                "load the weights alone and begin anew"
            )
    structure, why = parsed(dict[str, Any] | None, saved["structure"], "structure"), None
    if regime == saved["regime"]:
        clock.load_state_dict(saved["clock"])
    if structure is not None:
        try:
            network.build_from(structure)
        except ValueError as error:
            why = str(error)
    return why


def _check_policy(saved: str | None, checkpoint: Mapping[str, Any], network: MultiExitNetwork) -> None:
    """Raise where thresholds of one policy would be compared with scores of another; disabled exits compare nothing."""
    thresholds = checkpoint.get("state_dict", {}).get("network.score_thresholds")
    enabled = thresholds is not None and bool((thresholds < math.inf).any())
    if saved is not None and saved != network.policy.name and enabled:
        raise ValueError(
            f"the checkpoint has thresholds of the policy {saved!r}, this module has the policy "
            f"{network.policy.name!r}: give it the same policy; once loaded, network.policy and its thresholds can be "
            "changed"
        )


def names_not_held(checkpoint: Mapping[str, Any]) -> list[str]:
    """Names of the arguments that were no plain data when the checkpoint was written."""
    return list(checkpoint.get(KEY, {}).get("not_plain", ()))


def without_foreign_heads(
    state: Mapping[str, Any], own: Mapping[str, Tensor], reason: str | None, strict: bool
) -> Mapping[str, Any]:
    """Drop the heads of a checkpoint where they do not fit.

    Args:
        state: of the checkpoint.
        own: of the module.
        reason: why the exits are others, None if they are not.
        strict: whether that is an error.

    Raises:
        ValueError: it is.
    """
    theirs = {name: tuple(value.shape) for name, value in state.items() if name.startswith(_OF_EXITS)}
    mine = {name: tuple(value.shape) for name, value in own.items() if name.startswith(_OF_EXITS)}
    if reason is None and theirs != mine:
        other = sorted(name for name in {*theirs, *mine} if theirs.get(name) != mine.get(name))
        reason = "the heads differ: " + ", ".join(
            f"{name} {theirs.get(name, 'is missing')} in the checkpoint, {mine.get(name, 'is missing')} here"
            for name in other
        )
    if reason is None:
        return state
    if strict:
        raise ValueError(f"{reason}. Give the module the same exits and heads; strict=False loads the backbone alone")
    return {name: value for name, value in state.items() if not name.startswith(_OF_EXITS)}


def plain_hyperparameters(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What can be written as plain Python of the arguments of a module, and the names of the rest.

    Objects that are made of plain parts (losses, phases, options, kinds of heads, policies) become dicts and names,
    which the module takes as well. Parts that are left out of them have names with dots, ``losses.criterion``.
    """
    plain: dict[str, Any] = {}
    rest: list[str] = []
    for name, value in given.items():
        try:
            plain[name] = _plain(value, name, rest)
        except TypeError:
            rest.append(name)
    return plain, rest


def _plain(value: Any, name: str, rest: list[str]) -> Any:
    if value is None or isinstance(value, bool | Real | str):
        return plain_numbers(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{name}.{key}", rest) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{name}.{i}", rest) for i, item in enumerate(value)]
    if isinstance(value, Phase | ExitLosses | NetworkOptions):
        plain, parts = plain_hyperparameters({field.name: getattr(value, field.name) for field in fields(value)})
        rest += [f"{name}.{part}" for part in parts]
        return plain
    if isinstance(value, Head) and Head(value.kind) == value:
        return value.kind
    if isinstance(value, Policy):
        with suppress(ValueError):  # no policy of ours has this name
            if policy_from(value.name) == value:
                return value.name
    raise TypeError(f"{type(value).__name__} is not plain")


def _told(regime: list[dict[str, Any]]) -> str:
    return "[" + ", ".join(f"{phase['train']}: {phase['epochs'] or 'a share'}" for phase in regime) + "]"
