"""Values of a finished selection taken up by one that asks for other numbers of lines or another rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightning_eff.lidar.report import LineSelection
from lightning_eff.lidar.settings import Settings
from lightning_eff.lidar.study import LineStudy


def choice_of(asked: Settings) -> dict[str, Any]:
    """What the selected lines depend on besides values, plain Python fit for checkpoints."""
    spread = asked.spread
    return {
        "k": sorted(asked.k),
        "spread": {
            "rule": spread.rule,
            "options": dict(spread.options),
            "angles": spread.angles if spread.distance == "angle" else None,
            "refine": spread.refine,
            "max_swaps": spread.max_swaps if spread.refine == "swap" else None,
        },
    }


def choose_again(study: LineStudy, made: Mapping[str, Any], *, fitting: bool) -> bool:
    """Select anew from the values that a study took up, where its selection was made for other `k` or `spread`.

    Args:
        study: which has taken up the values.
        made: `choice_of` the settings that its selection was made with.
        fitting: whether a fit follows, which has the calibration frames: until its end, what needs them is left out.

    Returns:
        Whether `k` or `spread` are others.

    Raises:
        ValueError: the rule asks the network on calibration frames, and no fit follows.
    """
    asked, old, own = study.settings, study.selection, choice_of(study.settings)
    changed = [name for name in own if own[name] != made[name]]
    if not changed or old is None:
        return bool(changed)
    if changed == ["k"] and {*asked.k} <= {*made["k"]} and not fitting:
        study.selection = _only(old, asked.k)
        return True
    if not fitting and (asked.spread.rule == "auto" or asked.spread.refine != "none"):
        told = "; ".join(f"{name}: {made[name]} there, {own[name]} here" for name in changed)
        raise ValueError(
            f"the lines of this checkpoint were selected otherwise ({told}), and the rule asked for tries lines out on "
            "the calibration frames: call trainer.fit(selector, calibration_data, ckpt_path=...), which has them and "
            f"evaluates nothing twice, or take the {' and '.join(changed)} of the checkpoint"
        )
    now = study.select()
    kept = {  # baselines that asked the network
        name: {k: sets[k] for k in asked.k}
        for name, sets in old.baselines.items()
        if name in asked.baselines and name not in now.baselines and {*asked.k} <= {*sets}
    }
    spent = {name: old.baseline_forwards[name] for name in kept if name in old.baseline_forwards}
    study.selection = replace(
        now, baselines={**now.baselines, **kept}, baseline_forwards={**now.baseline_forwards, **spent}
    )
    return True


def _only(selection: LineSelection, sizes: Sequence[int]) -> LineSelection:
    """The part of a selection that is about some of its numbers of lines."""
    others = {selection.unresolved(k) for k in selection.selected if k not in sizes}
    return replace(
        selection,
        selected={k: selection.selected[k] for k in sizes},
        rules={k: rule for k, rule in selection.rules.items() if k in sizes},
        scores={k: scores for k, scores in selection.scores.items() if k in sizes},
        baselines={
            name: {k: lines for k, lines in sets.items() if k in sizes} for name, sets in selection.baselines.items()
        },
        notes=[note for note in selection.notes if note not in others],
    )
