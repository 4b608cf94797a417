"""Which channels go at one step: how many of every layer, and which."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_eff.pruning.allocation import (
    Dense,
    budget_counts,
    counts_per_layer,
    global_counts,
    mass_counts,
    uniform_counts,
)
from lightning_eff.pruning.report import Scores
from lightning_eff.pruning.settings import Allocation, Schedule
from lightning_eff.surgery import ChannelGraph, PruningPlan


@dataclass(frozen=True)
class Decision:
    """What one step removes.

    Attributes:
        plan: channels that stay, in indices of the network as it is.
        scores: what the choice rests on, by group; channels in the same indices.
        state: tensors to load into the smaller network, by state-dict name; empty where weights stay as they are.
    """

    plan: PruningPlan
    scores: Mapping[str, Scores] = field(default_factory=dict)
    state: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Counts:
    """How many channels every group keeps after each step.

    Attributes:
        amount: fraction removed in all, or channels (int) or fraction (float) kept per layer.
        allocation: how the amount is shared out between layers.
        schedule: how it grows from step to step.
        per_cost: compare scores of different layers per cost of a channel.
    """

    amount: float | Mapping[str, int | float]
    allocation: Allocation
    schedule: Schedule
    per_cost: bool = True

    @property
    def mode(self) -> str:
        """The allocation that applies: ``"per_layer"`` where counts are given."""
        return "per_layer" if isinstance(self.amount, Mapping) else self.allocation.mode

    def before_scores(self, graph: ChannelGraph, dense: Dense, step: int) -> dict[str, int]:
        """Channels kept after ``step``: exact for per-layer and uniform amounts, about right for the others."""
        if isinstance(self.amount, Mapping):
            return counts_per_layer(graph, dense, self.amount, self.schedule, step)
        return uniform_counts(graph, dense, self.schedule.amount(step, self.amount), self.allocation)

    def to_score(self, graph: ChannelGraph, expected: Mapping[str, int]) -> tuple[ChannelGraph, dict[str, int]]:
        """The graph with what needs no scores protected, and the counts that rules may reckon with."""
        if self.mode == "per_layer":
            return graph.protect({name: "not named in amount" for name in graph.groups if name not in expected}), {
                **expected
            }
        if self.mode == "uniform":
            return graph, {**expected}
        # channels may go anywhere, so every group needs scores
        return graph, {name: min(kept, graph.groups[name].size - 1) for name, kept in expected.items()}

    def after_scores(
        self,
        graph: ChannelGraph,
        dense: Dense,
        step: int,
        expected: Mapping[str, int],
        values: Mapping[str, Tensor],
        curves: Mapping[str, Tensor],
    ) -> dict[str, int]:
        """Channels kept after ``step``, exact.

        Args:
            graph: of the network as it is.
            dense: the network before the first step.
            step: from 0.
            expected: what :meth:`before_scores` said.
            values: scores by group ``[C]``.
            curves: sensitivity curves by group ``[C]``, for the mode ``"budget"``.
        """
        if isinstance(self.amount, Mapping) or self.mode == "uniform":
            return dict(expected)
        amount = self.schedule.amount(step, self.amount)
        if self.mode == "global":
            return global_counts(graph, dense, amount, self.allocation, values, per_cost=self.per_cost)
        if self.mode == "mass":
            return mass_counts(graph, dense, amount, self.allocation, values)
        return budget_counts(graph, dense, amount, self.allocation, curves)


def best_channels(
    graph: ChannelGraph, scores: Mapping[str, Scores], values: Mapping[str, Tensor], config: Mapping[str, int]
) -> PruningPlan:
    """Keep the channels of highest value; ties go by what the scores say of them."""
    ranked = {}
    for name, value in values.items():
        ties = scores[name].ties
        ranked[name] = value if ties is None else torch.stack([value, ties.to(value)], 1)
    return PruningPlan.from_scores(graph, ranked, config)
