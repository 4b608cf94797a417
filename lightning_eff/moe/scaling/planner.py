"""Which network to train on how many tokens for a budget of FLOPs; the equations are in `optimum.py`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from scipy.optimize import brentq

from lightning_eff.arguments import check_number
from lightning_eff.moe.scaling.laws import ChinchillaLaw, FineGrainedMoELaw, ScalingLaw
from lightning_eff.moe.scaling.optimum import Optimum
from lightning_eff.moe.scaling.plan import Plan, PlanTable
from lightning_eff.moe.scaling.sizes import FLOPS_PER_PARAMETER, FLOPS_PER_ROUTER_PARAMETER, DecoderShape

#: Granularities that arXiv 2402.07871 chooses from.
GRANULARITIES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
#: Active parameters of the rows of its table of compute-optimal networks.
PAPER_SIZES = (1e8, 1e9, 3e9, 7e9, 7e10, 3e11, 1e12)

_FAR = 100.0  # times outside of the fitted budgets from which a plan is warned about
_LARGEST = 400.0  # logarithm of a budget, 1e173 FLOPs: what needs more never gets there


class ComputePlanner:
    """Compute-optimal networks under a scaling law.

    Args:
        law: the law; of networks without granularity for a :class:`ChinchillaLaw`.
        expansion_rate: E, >= 1; None takes the one the law was fitted at, 1 for a law of dense networks.
        aspect: r, width over number of layers, > 0.
        c_f: FLOPs a token of an ordinary weight, > 0.
        c_r: FLOPs a token of a router weight, >= 0; 0 makes routing free.
        granularities: G to choose from, each >= 1; None is 1, 2, 4 ... 256, and for a law without
            granularity that of its runs.

    Raises:
        ValueError: an argument lies outside its range, or the law has no optimum (an exponent or a coefficient that is
            not positive).

    Warns:
        UserWarning: the law was fitted at another expansion rate.

    Example:
        >>> plan = ComputePlanner(FineGrainedMoELaw.paper()).optimal(1e19)
        >>> plan.granularity, round(plan.d_model), f"{plan.n_tokens:.3g}", f"{plan.loss:.4f}"
        (16, 1025, '6.9e+09', '2.9045')
    """

    def __init__(
        self,
        law: ScalingLaw,
        expansion_rate: float | None = None,
        *,
        aspect: float = 64.0,
        c_f: float = FLOPS_PER_PARAMETER,
        c_r: float = FLOPS_PER_ROUTER_PARAMETER,
        granularities: Sequence[float] | None = None,
    ) -> None:
        dense = not isinstance(law, FineGrainedMoELaw)
        if expansion_rate is None:
            expansion_rate = law.expansion_rate if law.expansion_rate is not None else 1.0 if dense else None
        if expansion_rate is None:
            raise ValueError("the law does not tell the expansion rate it was fitted at: give expansion_rate")
        if granularities is None:
            granularities = (_granularity_of(law, expansion_rate),) if dense else GRANULARITIES
        granularities = tuple(granularities)
        for name, value, least in (("expansion_rate", expansion_rate, 1), ("c_r", c_r, 0)):
            check_number(name, value, least=least)
        for name, value in (("aspect", aspect), ("c_f", c_f)):
            check_number(name, value, above=0)
        for granularity in granularities:
            _check_granularity(granularity)
        if not granularities or (dense and len(granularities) > 1):
            wanted = "one granularity, that of its runs" if dense else "at least one granularity"
            raise ValueError(f"expected {wanted}, got {granularities}")
        if law.expansion_rate is not None and law.expansion_rate != expansion_rate:
            warnings.warn(
                f"the law was fitted at expansion rate {law.expansion_rate:g} and has no term for it: plans for "
                f"{expansion_rate:g} are a guess",
                stacklevel=2,
            )
        self.law, self.expansion_rate, self.aspect = law, expansion_rate, float(aspect)
        self.c_f, self.c_r, self.granularities = float(c_f), float(c_r), tuple(sorted(set(granularities)))
        self._optimum = Optimum(law, expansion_rate, self.aspect, self.c_f, self.c_r)

    def optimal(self, flops: float, granularity: float | Literal["continuous"] | None = None) -> Plan:
        """The network and tokens of least loss.

        Args:
            flops: budget F, > 0.
            granularity: None takes the best of ``granularities``, the smaller of two that are equal; a number holds it;
                ``"continuous"`` takes the best real number >= 1.

        Raises:
            ValueError: an argument lies outside its range.

        Warns:
            UserWarning: the budget is more than 100 times outside of the runs the law was fitted to, or the router is
                larger than the active experts.
        """
        plan = self._optimal(_positive("flops", flops), granularity)
        self._warn(plan, chosen=granularity is not None)
        return plan

    def tokens_for(self, n_active: float, granularity: float | None = None) -> Plan:
        """Tokens for which a network of this size is the optimum of the budget it then costs.

        Args:
            n_active: N_act, > 0.
            granularity: None takes the one that loses least against the best network of the same budget.
        """
        plan = self._tokens_for(_positive("n_active", n_active), granularity)
        self._warn(plan, chosen=granularity is not None)
        return plan

    def frontier(self, f_min: float, f_max: float, points: int = 50) -> PlanTable:
        """Optimal plans for budgets from ``f_min`` to ``f_max``, evenly spaced in the logarithm."""
        _positive("f_min", f_min)
        if not f_max > f_min or points < 2:
            raise ValueError(f"expected f_max > f_min and points >= 2, got {f_min:g}, {f_max:g} and {points}")
        plans = [self._optimal(flops) for flops in np.geomspace(f_min, f_max, points).tolist()]
        self._warn(plans[-1])
        return PlanTable(plans)

    def table(self, n_active: Iterable[float] = PAPER_SIZES, granularity: float | None = None) -> PlanTable:
        """Tokens, granularity and budget for networks of these active parameters."""
        plans = [self._tokens_for(_positive("n_active", size), granularity) for size in n_active]
        if plans:
            self._warn(max(plans, key=lambda plan: plan.flops))
        return PlanTable(plans, "Compute-optimal training by active parameters")

    def compare(self, flops: float) -> PlanTable:
        """The best network of each granularity at one budget."""
        plans = [self._optimal(_positive("flops", flops), granularity) for granularity in self.granularities]
        self._warn(plans[0])
        return PlanTable(plans, f"Granularities at {flops:.3g} FLOPs")

    def at_size(self, flops: float, n_active: float, granularity: float | None = None) -> Plan:
        """A network of this size, trained on what the budget pays for: a point of an isoFLOP curve.

        Args:
            flops: budget F, > 0.
            n_active: N_act, > 0.
            granularity: None takes the best of ``granularities``.
        """
        width = self._width(_positive("n_active", n_active))
        every = self.granularities if granularity is None else (_check_granularity(granularity),)
        log_flops = math.log(_positive("flops", flops))
        return min((self._plan(math.log(width), log_flops, g) for g in every), key=lambda plan: plan.loss)

    def savings(self, flops: float, baseline: ScalingLaw | ComputePlanner | float) -> float:
        """How many times the budget a baseline needs to reach the same loss.

        Args:
            flops: budget F, > 0.
            baseline: a law, of dense networks for instance; a planner; or a granularity, for this law held at it.

        Returns:
            The factor; infinity where no budget gets the baseline there.
        """
        target = self._optimal(_positive("flops", flops)).loss
        held: float | None = None
        if isinstance(baseline, ScalingLaw):
            other = ComputePlanner(baseline, aspect=self.aspect, c_f=self.c_f, c_r=self.c_r)
        elif isinstance(baseline, ComputePlanner):
            other = baseline
        else:
            other, held = self, _check_granularity(baseline)
        if other.law.c >= target:
            return math.inf
        start = math.log(flops)

        def above(log_flops: float) -> float:
            return other._optimal_log(log_flops, held).loss - target

        low, high = start, start
        while above(low) < 0:
            low -= 5
        while above(high) > 0:
            high += 5
            if high > _LARGEST:
                return math.inf
        found = brentq(above, low, high, xtol=1e-12) if high > low else start
        return math.exp(found - start)

    def intervals(self, flops: float, laws: Iterable[ScalingLaw], ci: float = 0.8) -> dict[str, tuple[float, float]]:
        """How far laws fitted to resampled runs disagree about the optimal plan.

        Args:
            flops: budget F, > 0.
            laws: ``FitResult.laws()``; those without an optimum are passed over.
            ci: share of the plans between the two ends, in (0, 1).

        Returns:
            Lower and upper end by column: ``n_tokens``, ``n_active``, ``granularity``, ``loss``.

        Raises:
            ValueError: no law has an optimum, or an argument lies outside its range.
        """
        check_number("ci", ci, above=0, below=1)
        _positive("flops", flops)
        plans = []
        for law in laws:
            with suppress(ValueError):  # no optimum
                plans.append(self._under(law)._optimal(flops))
        if not plans:
            raise ValueError("none of the laws has an optimum: fit with bootstrap > 0, to runs that identify it")
        edges = [50 * (1 - ci), 50 * (1 + ci)]
        columns = {name: PlanTable(plans).column(name) for name in ("n_tokens", "n_active", "granularity", "loss")}
        return {name: tuple(np.percentile(column, edges).tolist()) for name, column in columns.items()}

    def realise(self, plan: Plan, head_dim: int = 64) -> Plan:
        """Round a plan to a network that can be built, at the same budget.

        Layers are rounded; the width becomes the multiple of ``head_dim`` nearest to ``aspect`` times them; the
        granularity a power of two, the plan's own if experts then have a width of 8, 16, 24 ... (rows that grouped
        matrix products take), else the one of least loss.

        Args:
            plan: the plan.
            head_dim: width of an attention head, >= 1 and a multiple of 2.

        Returns:
            A plan of whole numbers; ``penalty`` tells what rounding costs.

        Raises:
            ValueError: ``head_dim`` lies outside its range.
        """
        if head_dim < 2 or head_dim % 2:
            raise ValueError(f"expected head_dim to be a positive multiple of 2, got {head_dim}")
        n_layers = max(1, round(plan.n_layers))
        d_model = head_dim * max(1, round(self.aspect * n_layers / head_dim))
        fitting = [2**power for power in range(20) if (4 * d_model) % (8 * 2**power) == 0]
        choices: Sequence[float] = [plan.granularity] if plan.granularity in fitting else fitting
        if not isinstance(self.law, FineGrainedMoELaw):
            choices = [plan.granularity]
        built = min(
            (self._at(DecoderShape(d_model, n_layers, plan.expansion_rate, g), plan.flops) for g in choices),
            key=lambda built: built.loss,
        )
        return replace(built, penalty=built.loss - plan.loss)

    def _under(self, law: ScalingLaw) -> ComputePlanner:
        settings = {"aspect": self.aspect, "c_f": self.c_f, "c_r": self.c_r}
        law = replace(law, expansion_rate=self.expansion_rate)
        return ComputePlanner(law, **settings, granularities=self.granularities)

    def _optimal(self, flops: float, granularity: float | Literal["continuous"] | None = None) -> Plan:
        return replace(self._optimal_log(math.log(flops), granularity), flops=flops)

    def _optimal_log(self, log_flops: float, granularity: float | Literal["continuous"] | None = None) -> Plan:
        if granularity == "continuous":
            granularity = self._optimum.granularity(log_flops)
        every = self.granularities if granularity is None else (_check_granularity(granularity),)
        plans = (self._plan(self._optimum.log_width(log_flops, g), log_flops, g) for g in every)
        return min(plans, key=lambda plan: plan.loss)  # the first, smallest G of those that are equal

    def _tokens_for(self, n_active: float, granularity: float | None = None) -> Plan:
        log_width = math.log(self._width(n_active))
        every = self.granularities if granularity is None else (_check_granularity(granularity),)
        plans = [self._plan(log_width, self._optimum.log_budget(log_width, g), g) for g in every]
        if len(plans) == 1:
            return plans[0]
        return min(plans, key=lambda plan: plan.loss - self._optimal_log(math.log(plan.flops)).loss)

    def _width(self, n_active: float) -> float:
        return float((n_active * self.aspect / 12) ** (1 / 3))

    def _plan(self, log_width: float, log_flops: float, granularity: float) -> Plan:
        width = math.exp(log_width)
        shape = DecoderShape(width, width / self.aspect, self.expansion_rate, granularity)
        return self._at(shape, math.exp(log_flops))

    def _at(self, shape: DecoderShape, flops: float) -> Plan:
        per_token = shape.flops_per_token(c_f=self.c_f, c_r=self.c_r)
        n_tokens = flops / per_token
        n_total = shape.n_total
        return Plan(
            flops=flops,
            n_tokens=n_tokens,
            n_total=n_total,
            n_active=shape.n_active,
            granularity=shape.granularity,
            expansion_rate=shape.expansion_rate,
            n_experts=shape.n_experts,
            d_model=shape.d_model,
            n_layers=shape.n_layers,
            d_expert=shape.d_expert,
            loss=self.law(n_total, n_tokens, shape.granularity),
            routing_share=self.c_r * shape.n_router / per_token,
            extrapolation=self._extrapolation(flops),
        )

    def _extrapolation(self, flops: float) -> float | None:
        if self.law.fitted_flops is None:
            return None
        least, most = self.law.fitted_flops
        return max(1.0, flops / most, least / flops)

    def _warn(self, plan: Plan, *, chosen: bool = False) -> None:
        if plan.extrapolation is not None and plan.extrapolation > _FAR:
            least, most = self.law.fitted_flops or (math.nan, math.nan)
            warnings.warn(
                f"{plan.flops:.3g} FLOPs are {plan.extrapolation:,.3g} times outside of the runs the law was fitted to "
                f"({least:.3g} to {most:.3g}): take the plan as a guess",
                stacklevel=3,
            )
        if chosen and plan.n_experts > 8 * plan.d_model:
            warnings.warn(
                f"{plan.n_experts:g} experts, width {plan.d_model:.0f}: the router is larger than the active experts; "
                "take a smaller granularity",
                stacklevel=3,
            )


def _granularity_of(law: ScalingLaw, expansion_rate: float) -> float:
    """Granularity of the networks that a law without it was fitted to."""
    granularity = law.granularity if isinstance(law, ChinchillaLaw) else None
    if granularity is None and expansion_rate > 1:
        raise ValueError("the law does not tell the granularity of its mixtures: give granularities=(G,)")
    return granularity or 1


def _check_granularity(granularity: Any) -> float:
    check_number("granularity", granularity, least=1)
    return float(granularity) if granularity != int(granularity) else int(granularity)


def _positive(name: str, value: float) -> float:
    check_number(name, value, above=0)
    return float(value)
