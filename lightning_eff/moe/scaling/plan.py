"""What a planner answers with: one plan, or plans side by side."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from lightning_eff.moe.scaling.sizes import DecoderShape
from lightning_eff.reporting import Column, Report, Table

#: How numbers of a plan are written for a reader, by column.
_TEXT = {
    "flops": lambda value: f"{value:.2e}",
    "loss": lambda value: f"{value:.3f}",
    "routing_share": lambda value: f"{value:.1%}",
    "granularity": lambda value: f"{value:.4g}",
    "n_experts": lambda value: f"{value:,.0f}",
    "d_model": lambda value: f"{value:,.0f}",
    "n_layers": lambda value: f"{value:.3g}",
    "d_expert": lambda value: f"{value:,.0f}",
    "penalty": lambda value: f"{value:+.2g}",
}


@dataclass(frozen=True)
class Plan:
    """A network and the tokens to train it on.

    Args:
        flops: training FLOPs, the paper's convention.
        n_tokens: D.
        n_total: N, parameters without embeddings and routers.
        n_active: N_act, those one token uses.
        granularity: G.
        expansion_rate: E.
        n_experts: experts in a layer, E G.
        d_model: width; real-valued unless realised.
        n_layers: blocks; real-valued unless realised.
        d_expert: hidden width of an expert.
        loss: predicted, nats a token.
        routing_share: share of routing in the FLOPs.
        penalty: loss above that of the plan it was rounded from; 0 for one that was not.
        extrapolation: how many times the budget lies outside of the runs the law was fitted to; 1 inside, None if not
            known.
    """

    flops: float
    n_tokens: float
    n_total: float
    n_active: float
    granularity: float
    expansion_rate: float
    n_experts: float
    d_model: float
    n_layers: float
    d_expert: float
    loss: float
    routing_share: float
    penalty: float = 0.0
    extrapolation: float | None = None

    @property
    def shape(self) -> DecoderShape:
        """The network."""
        return DecoderShape(self.d_model, self.n_layers, self.expansion_rate, self.granularity)

    def to_dict(self) -> dict[str, Any]:
        """Return everything by name."""
        return asdict(self)

    def __str__(self) -> str:
        text = {name: readable(name, value) for name, value in self.to_dict().items() if value is not None}
        experts = f", {text['n_experts']} experts of width {text['d_expert']}" if self.n_experts > 1 else ""
        lines = [
            f"{text['flops']} FLOPs: {text['n_tokens']} tokens, loss {text['loss']} nats a token",
            f"G = {text['granularity']}{experts}",
            f"d_model {text['d_model']}, {text['n_layers']} layers: {text['n_total']} parameters, "
            f"{text['n_active']} active, {text['routing_share']} of the FLOPs in routing",
        ]
        if self.penalty:
            lines.append(f"{text['penalty']} nats against the plan it was rounded from")
        if self.extrapolation is not None and self.extrapolation > 1:
            lines.append(f"{self.extrapolation:,.3g} times outside of the runs the law was fitted to")
        return "\n".join(lines)


class PlanTable(Sequence[Plan], Report):
    """Plans side by side: table ``plans``.

    Args:
        plans: the rows.
        title: what they are.
    """

    COLUMNS = (
        *("flops", "n_active", "n_total", "n_tokens", "granularity", "n_experts", "d_model", "n_layers", "d_expert"),
        *("routing_share", "loss"),
    )

    def __init__(self, plans: Sequence[Plan], title: str = "Compute-optimal plans") -> None:
        self.plans, self.title = tuple(plans), title

    @overload
    def __getitem__(self, index: int) -> Plan: ...
    @overload
    def __getitem__(self, index: slice) -> PlanTable: ...
    def __getitem__(self, index: int | slice) -> Plan | PlanTable:
        return PlanTable(self.plans[index], self.title) if isinstance(index, slice) else self.plans[index]

    def __len__(self) -> int:
        return len(self.plans)

    def __iter__(self) -> Iterator[Plan]:
        return iter(self.plans)

    def column(self, name: str) -> NDArray[np.float64]:
        """One column of numbers, [rows]."""
        return np.array([getattr(plan, name) for plan in self.plans], dtype=np.float64)

    def tables(self) -> dict[str, Table]:
        """The plans, a row each."""
        names = self.COLUMNS + (("penalty",) if any(plan.penalty for plan in self.plans) else ())
        columns = [Column(name, partial(readable, name)) for name in names]
        rows = [[getattr(plan, name) for name in names] for plan in self.plans]
        worst = max((plan.extrapolation or 1 for plan in self.plans), default=1)
        caption = "" if worst <= 1 else f"Budgets up to {worst:,.3g} times outside of the runs the law was fitted to."
        return {"plans": Table(self.title, columns, rows, caption)}


def readable(name: str, value: float) -> str:
    """Write a number of a plan for a reader.

    Example:
        >>> readable("n_tokens", 4.3712e9), readable("flops", 2.95e18), readable("granularity", 8)
        ('4.37B', '2.95e+18', '8')
    """
    if name in _TEXT:
        return _TEXT[name](value)
    value, steps = float(f"{value:.3g}"), 0
    while abs(value) >= 1000 and steps < 4:
        value, steps = value / 1000, steps + 1
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}{('', 'K', 'M', 'B', 'T')[steps]}"
