"""What a checkpoint of :class:`EarlyExitModule` holds besides the weights: plain Python, loaded with weights_only."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from typing import Any

from torch import Tensor

from lightning_eff.early_exit.attaching.heads import Head
from lightning_eff.early_exit.inference.policies import Policy, policy_from
from lightning_eff.early_exit.network import MultiExitNetwork
from lightning_eff.early_exit.training.losses import ExitLosses
from lightning_eff.early_exit.training.phases import Phase, PhaseClock

KEY = "lightning_eff.early_exit"
VERSION = 1
_OF_EXITS = ("network.heads.", "network.score_thresholds", "network.temperatures")


def save_phases(checkpoint: dict[str, Any], network: MultiExitNetwork, clock: PhaseClock) -> None:
    """Write the phase and where the exits are into a checkpoint."""
    checkpoint[KEY] = {
        "version": VERSION,
        "regime": [phase.to_dict() for phase in clock.phases],
        "clock": clock.state_dict(),
        "structure": network.structure() if network.built else None,
    }


def load_phases(
    checkpoint: Mapping[str, Any], network: MultiExitNetwork, clock: PhaseClock, *, fitting: bool
) -> str | None:
    """Put exits where they were and take up the phase; a checkpoint of other origin changes nothing.

    Args:
        checkpoint: as Lightning hands it over.
        network: built or not.
        clock: of the phases.
        fitting: whether training goes on, for which the regime must be the same.

    Returns:
        Why the exits are not those of the checkpoint, None if they are.

    Raises:
        ValueError: another version, or training would go on in another regime; nothing has changed then.
    """
    saved = checkpoint.get(KEY)
    if saved is None:
        return None
    if saved["version"] != VERSION:
        raise ValueError(f"expected a checkpoint of early exits in version {VERSION}, got {saved['version']!r}")
    regime = [phase.to_dict() for phase in clock.phases]
    if fitting and regime != saved["regime"]:
        raise ValueError(
            f"the checkpoint was trained in the phases {_told(saved['regime'])}, this module has {_told(regime)}: give "
            "it the same regime, or load the weights alone and begin anew, with start_phase where you want to"
        )
    if regime == saved["regime"]:
        clock.load_state_dict(saved["clock"])
    if saved["structure"] is None:
        return None
    try:
        network.build_from(saved["structure"])
    except ValueError as error:
        return str(error)
    return None


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


def plain_hyperparameters(given: Mapping[str, Any]) -> dict[str, Any]:
    """What can be written as plain Python of the arguments of a module; the rest is left out.

    Objects that are made of plain parts (losses, phases, kinds of heads, policies) become dicts and names, which the
    module takes as well.
    """
    plain = {}
    for name, value in given.items():
        try:
            plain[name] = _plain(value)
        except TypeError:
            continue
    return plain


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Phase | ExitLosses):
        return plain_hyperparameters({field.name: getattr(value, field.name) for field in fields(value)})
    if isinstance(value, Head) and Head(value.kind) == value:
        return value.kind
    if isinstance(value, Policy):
        with suppress(ValueError):  # no policy of ours has this name
            if policy_from(value.name) == value:
                return value.name
    raise TypeError(f"{type(value).__name__} is not plain")


def _told(regime: list[dict[str, Any]]) -> str:
    return "[" + ", ".join(f"{phase['train']}: {phase['epochs'] or 'a share'}" for phase in regime) + "]"
