"""How many channels each group keeps: per layer, uniform, global, by mass of scores, or along sensitivity curves.

Costs are exact for every configuration (closed form of the channel graph), so a target is met by counting, not by
assuming that layers do not interact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lightning_eff.pruning.settings import Allocation, Schedule
from lightning_eff.surgery import BudgetError, ChannelGraph


@dataclass(frozen=True)
class Dense:
    """The network before the first cut: what amounts are fractions of.

    Attributes:
        sizes: channels per group.
        macs: multiply-adds per sample.
        params: parameters.
    """

    sizes: Mapping[str, int]
    macs: int
    params: int

    @classmethod
    def of(cls, graph: ChannelGraph) -> Dense:
        """Measure a graph."""
        return cls(graph.sizes, round(graph.macs().item()), round(graph.params().item()))


def counts_per_layer(
    graph: ChannelGraph, dense: Dense, amount: Mapping[str, int | float], schedule: Schedule, step: int
) -> dict[str, int]:
    """Channels kept per named layer after ``step``: the way from all to the wanted number follows the schedule."""
    config = {}
    for path, wanted in amount.items():
        group = graph.resolve(path)
        size = dense.sizes[group.name]
        keep = wanted if isinstance(wanted, int) else max(1, math.ceil(wanted * size - 1e-9))
        if isinstance(wanted, int) and group.block > 1:
            if wanted % group.block:
                raise ValueError(
                    f"amount[{path!r}] must be a multiple of the layer's {group.block} blocks, got {wanted}"
                )
            keep = wanted // group.block
        if keep > size:
            raise ValueError(
                f"amount[{path!r}] keeps {keep * group.block} channels but the layer has {size * group.block}"
            )
        if keep < size and group.protected:
            raise ValueError(f"{path} cannot be pruned: {group.protected}")
        if group.name in config:
            raise ValueError(f"amount[{path!r}]: the layer goes together with {group.name}, which is named as well")
        removed = math.floor(schedule.amount(step, (size - keep) / size) * size + 1e-9)
        config[group.name] = min(group.size, size - removed)
    return config


def uniform_counts(graph: ChannelGraph, dense: Dense, amount: float, allocation: Allocation) -> dict[str, int]:
    """Remove the same fraction of every prunable group, ``amount`` of the channels or as much as the target needs."""

    def at(fraction: float) -> dict[str, int]:
        config = {}
        for name in graph.prunable:
            size, current = dense.sizes[name], graph.groups[name].size
            keep = allocation.rounded(size - math.floor(fraction * size + 1e-9), current)
            config[name] = min(current, max(keep, allocation.floor(size, current)))
        return config

    if allocation.target == "channels":
        return at(amount)
    limit = (1 - amount) * getattr(dense, allocation.target)
    _check_reachable(graph, at(1.0), limit, allocation)
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if _cost(graph, at(middle), allocation) <= limit else (middle, high)
    return at(high)


def global_counts(
    graph: ChannelGraph,
    dense: Dense,
    amount: float,
    allocation: Allocation,
    scores: Mapping[str, Tensor],
    *,
    per_cost: bool = True,
) -> dict[str, int]:
    """Remove the channels of least score, whichever group they are in, until ``amount`` is gone.

    ``per_cost`` divides scores by what a channel costs: right where a score is the value that the network loses.
    """
    floors = _floors(graph, dense, allocation)
    limit = _limit(graph, dense, amount, allocation)
    _check_reachable(graph, floors, limit, allocation)
    ranked: list[tuple[float, int, str]] = []
    for order, name in enumerate(graph.prunable):
        size = graph.groups[name].size
        cost = _cost(graph, {}, allocation) - _cost(graph, {name: size - 1}, allocation) if per_cost else 1.0
        worst = scores[name].double().sort(stable=True).values[: size - floors[name]]
        ranked += [(float(value) / max(cost, 1e-12), order, name) for value in worst]
    ranked.sort(key=lambda entry: entry[:2])
    columns = {name: column for column, name in enumerate(graph.groups)}
    removed = torch.zeros(len(ranked) + 1, len(graph.groups), dtype=torch.float64)
    for row, (_, _, name) in enumerate(ranked, start=1):
        removed[row, columns[name]] = 1
    configs = torch.tensor([list(graph.sizes.values())], dtype=torch.float64) - removed.cumsum(0)
    if allocation.round_to is not None:
        configs = ((configs / allocation.round_to).ceil() * allocation.round_to).minimum(configs[0])
    costs = {"macs": graph.macs, "params": graph.params, "channels": lambda c: c[:, _unprotected(graph)].sum(1)}
    enough = (costs[allocation.target](configs) <= limit + 1e-9).nonzero()
    row = int(enough[0]) if len(enough) else len(configs) - 1
    return {name: int(configs[row, columns[name]]) for name in graph.prunable}


def mass_counts(
    graph: ChannelGraph, dense: Dense, amount: float, allocation: Allocation, scores: Mapping[str, Tensor]
) -> dict[str, int]:
    """Keep of every group the fewest channels whose scores hold the same part ``rho`` of the group's sum.

    ``rho`` is the largest that meets the target, found by bisection on exact costs. Scores below zero count as zero.
    """
    floors = _floors(graph, dense, allocation)
    limit = _limit(graph, dense, amount, allocation)
    _check_reachable(graph, floors, limit, allocation)
    held = {}
    for name in graph.prunable:
        mass = scores[name].double().clamp(min=0).sort(descending=True, stable=True).values.cumsum(0)
        held[name] = mass / mass[-1].clamp(min=torch.finfo(torch.float64).tiny)

    def at(rho: float) -> dict[str, int]:
        config = {}
        for name, mass in held.items():
            size = graph.groups[name].size
            keep = min(size, int((mass < rho - 1e-12).sum()) + 1)
            config[name] = max(floors[name], allocation.rounded(keep, size))
        return config

    whole = {name: group.size for name, group in graph.groups.items() if name in held}
    if _cost(graph, whole, allocation) <= limit + 1e-9:
        return whole
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _cost(graph, at(middle), allocation) <= limit + 1e-9 else (low, middle)
    return at(low)


def budget_counts(
    graph: ChannelGraph, dense: Dense, amount: float, allocation: Allocation, curves: Mapping[str, Tensor]
) -> dict[str, int]:
    """Choose counts that lose least value by the sensitivity curves, ``curves[g][r]`` = value without the ``r`` worst.

    Greedy on the lower convex hull of (saved cost, lost value) of every group, with the exact cost counted anew after
    every move, because narrowing one layer also makes its neighbours cheaper.
    """
    floors = _floors(graph, dense, allocation)
    limit = _limit(graph, dense, amount, allocation)
    _check_reachable(graph, floors, limit, allocation)
    lost = {name: (curves[name][0] - curves[name])[: graph.groups[name].size - floors[name] + 1] for name in floors}
    moves: list[tuple[float, int, str, int, int]] = []
    for order, name in enumerate(graph.prunable):
        size = graph.groups[name].size
        saving = _cost(graph, {}, allocation) - _cost(graph, {name: size - 1}, allocation)
        for r_from, r_to in _hull(list(range(len(lost[name]))), lost[name].tolist()):
            slope = float(lost[name][r_to] - lost[name][r_from]) / max((r_to - r_from) * saving, 1e-12)
            moves.append((slope, order, name, r_from, r_to))
    config = {name: graph.groups[name].size for name in graph.prunable}
    if _cost(graph, config, allocation) <= limit + 1e-9:
        return config
    for _, _, name, r_from, r_to in sorted(moves):
        # the move that reaches the limit is shortened to the removal in reach of it that loses least
        enough = []
        for r in range(r_to, r_from, -1):
            config[name] = allocation.rounded(graph.groups[name].size - r, graph.groups[name].size)
            if _cost(graph, config, allocation) > limit + 1e-9:
                break
            enough.append((float(lost[name][r]), r, config[name]))
        if enough:
            return {**config, name: min(enough)[2]}
        config[name] = allocation.rounded(graph.groups[name].size - r_to, graph.groups[name].size)
    return config


def _hull(x: list[int], y: list[float]) -> list[tuple[int, int]]:
    """Segments of the lower convex hull of ``(x, y)``, left to right, as index pairs."""
    hull: list[int] = []
    for i in range(len(x)):
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (y[b] - y[a]) * (x[i] - x[a]) < (y[i] - y[a]) * (x[b] - x[a]):
                break
            hull.pop()
        hull.append(i)
    return list(pairwise(hull))


def _unprotected(graph: ChannelGraph) -> list[int]:
    """Columns of the groups that count, those that earlier steps left with one channel too."""
    return [column for column, group in enumerate(graph.groups.values()) if not group.protected]


def _floors(graph: ChannelGraph, dense: Dense, allocation: Allocation) -> dict[str, int]:
    return {name: allocation.floor(dense.sizes[name], graph.groups[name].size) for name in graph.prunable}


def _limit(graph: ChannelGraph, dense: Dense, amount: float, allocation: Allocation) -> float:
    if allocation.target == "channels":
        return (1 - amount) * sum(dense.sizes[name] for name, group in graph.groups.items() if not group.protected)
    return float((1 - amount) * getattr(dense, allocation.target))


def _cost(graph: ChannelGraph, config: Mapping[str, int], allocation: Allocation) -> float:
    if allocation.target == "channels":
        return float(sum(config.get(name, group.size) for name, group in graph.groups.items() if not group.protected))
    return float((graph.macs if allocation.target == "macs" else graph.params)(config).item())


def _check_reachable(graph: ChannelGraph, least: Mapping[str, int], limit: float, allocation: Allocation) -> None:
    reachable = _cost(graph, least, allocation)
    if reachable > limit + 1e-9:
        whole = _cost(graph, {}, allocation)
        raise BudgetError(
            f"{allocation.target} cannot fall to {limit:,.0f}: at least {reachable:,.0f} of {whole:,.0f} remain with "
            f"min_keep={allocation.min_keep}, max_ratio={allocation.max_ratio}, round_to={allocation.round_to} and "
            f"{len(graph.prunable)} of {len(graph.groups)} channel groups prunable; loosen these or lower the amount"
        )
