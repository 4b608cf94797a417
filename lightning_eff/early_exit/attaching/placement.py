"""Where exits stand: layers by name, as many as wanted, or at fractions of the cost."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from lightning_eff.early_exit.attaching.features import BatchDim
from lightning_eff.early_exit.attaching.probe import BATCHES, Call, Probe

Exits = Sequence[str] | Sequence[float] | Mapping[str, Any] | int


def number_of_exits(exits: Exits) -> int:
    """Count the exits asked for.

    Raises:
        ValueError: none, names twice, fractions outside (0, 1), names and fractions mixed.
    """
    if isinstance(exits, int):
        if isinstance(exits, bool) or exits < 1:
            raise ValueError(f"expected a number of exits >= 1, got {exits!r}")
        return exits
    if isinstance(exits, str) or not exits:
        raise ValueError(
            f"expected names of layers, fractions of the cost, a dict name -> head, or a number of exits, got {exits!r}"
        )
    listed: list[Any] = list(exits)
    if isinstance(exits, Mapping) and not all(isinstance(one, str) for one in listed):
        raise ValueError(f"expected a dict of exits to map names of layers to heads, got the keys {listed}")
    if all(isinstance(one, str) for one in listed):
        if len(set(listed)) < len(listed):
            twice = sorted({str(one) for one in listed if listed.count(one) > 1})
            raise ValueError(f"expected every exit once, got {', '.join(twice)} more than once")
    elif all(isinstance(one, float) for one in listed):
        if not all(0 < float(one) < 1 for one in listed) or len(set(listed)) < len(listed):
            raise ValueError(f"expected different fractions of the cost in (0, 1), got {listed}")
    else:
        raise ValueError(f"expected names of layers or fractions of the cost, not both, got {listed}")
    return len(listed)


def named_exits(backbone: nn.Module, names: Sequence[str], seen: Probe) -> list[Call]:
    """Find the calls that ``names`` mean, in the order in which they run; ``name@2`` is the second call of a layer.

    Raises:
        ValueError: an unknown layer, one that does not run or runs more than once, or whose output no head can read.
    """
    calls = [_named(backbone, name, seen) for name in names]
    if len({id(call) for call in calls}) < len(calls):
        raise ValueError(f"expected every exit once, got two names of one call in {', '.join(names)}")
    return sorted(calls, key=lambda call: _position(call, seen))


def _position(call: Call, seen: Probe) -> int:
    return next(i for i, one in enumerate(seen.calls) if one is call)


def exit_name(call: Call, seen: Probe) -> str:
    """Name of a call, as in :func:`named_exits`."""
    return call.layer if len(seen.by_layer[call.layer]) == 1 else f"{call.layer}@{call.number}"


def exit_candidates(backbone: nn.Module, seen: Probe) -> list[Call]:
    """Calls at the ends of blocks: of containers, and of the members of sequences, whose output a head can read."""
    members = set()
    for path, module in backbone.named_modules():
        if isinstance(module, nn.Sequential | nn.ModuleList):
            members |= {f"{path}.{name}".lstrip(".") for name, _ in module.named_children()}
    out = []
    for call in seen.calls[:-1]:
        layer = backbone.get_submodule(call.layer)
        block = call.layer in members or next(layer.children(), None) is not None
        if block and len(seen.by_layer[call.layer]) == 1 and not _unreadable(call):
            out.append(call)
    return out


def spread_exits(
    fractions: Sequence[float], candidates: Sequence[Call], cost: Mapping[int, float], works: Callable[[Call], bool]
) -> list[Call]:
    """Choose the candidate nearest to each fraction of the cost, outer layers before inner ones that end with them.

    Args:
        fractions: of the cost of the backbone, in (0, 1).
        candidates: calls that may be exits.
        cost: fraction of the cost until the end of each candidate, by position in ``candidates``.
        works: whether samples can leave there.

    Raises:
        ValueError: there are not enough that work.
    """
    chosen: dict[int, Call] = {}
    known: dict[int, bool] = {}
    for fraction in fractions:
        order = sorted(
            (i for i in range(len(candidates)) if 0 < cost[i] < 1 and cost[i] not in {cost[j] for j in chosen}),
            # of places at equal cost the outermost, then the last: behind the activation rather than before it
            key=lambda i: (round(abs(cost[i] - fraction), 9), candidates[i].layer.count("."), -i),
        )
        for i in order:
            if i not in known:
                known[i] = works(candidates[i])
            if known[i]:
                chosen[i] = candidates[i]
                break
        else:
            raise ValueError(
                f"found {len(chosen)} places for {len(fractions)} exits: ask for fewer, or name layers yourself"
            )
    return [chosen[i] for i in sorted(chosen)]


def _named(backbone: nn.Module, name: str, seen: Probe) -> Call:
    layer, _, number = name.partition("@")
    known = {path for path, _ in backbone.named_modules() if path}
    if layer not in known:
        close = difflib.get_close_matches(layer, sorted(known), n=3, cutoff=0.0)
        raise ValueError(
            f"the backbone has no layer {layer!r}; close names: {', '.join(close)}. "
            "All of them: [name for name, _ in backbone.named_modules()]"
        )
    calls = seen.by_layer.get(layer, [])
    if not calls:
        raise ValueError(f"layer {layer!r} is not executed by the backbone's forward: no exit can stand there")
    if number:
        if not number.isdecimal() or not 1 <= int(number) <= len(calls):
            raise ValueError(f"layer {layer!r} is executed {len(calls)} times, got the exit {name!r}")
        call = calls[int(number) - 1]
    elif len(calls) > 1:
        raise ValueError(
            f"layer {layer!r} is executed {len(calls)} times in one forward: say which, for example {layer + '@2'!r}"
        )
    else:
        call = calls[0]
    if problem := _unreadable(call):
        raise ValueError(f"no exit can stand on layer {name!r}: {problem}")
    return call


def _unreadable(call: Call) -> str | None:
    if call.feature is None:
        return "it returns no tensor"
    where = call.output[call.feature]
    at = " and ".join(f"{shape} for a batch of {size}" for shape, size in zip(call.seen, BATCHES, strict=True))
    if where is None:
        return f"its output has no batch dimension, its shape is {at}"
    if where != BatchDim(where.dim, 1):
        return f"its output holds {where.factor} rows a sample, its shape is {at}"
    if call.shape is None or len(call.shape) < 2:
        return f"its output has no features, its shape is {at}"
    return None
