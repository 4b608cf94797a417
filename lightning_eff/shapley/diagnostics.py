"""How far to trust an estimate, and which estimator to take: convergence, stability of ranks, cost and benefit."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_eff.reporting import Column, Report, Table
from lightning_eff.shapley.estimator import Progress, ShapleyEstimator, ShapleyWarning, StopRule, kendall_tau
from lightning_eff.shapley.exact import ExactShapley
from lightning_eff.shapley.games import Game
from lightning_eff.shapley.result import ShapleyResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class ConvergenceCurve(Report):
    """Values of `n` players after each of `B` budgets: table and figure `convergence`.

    Attributes:
        evaluations: int64 `[B]`, evaluations really spent.
        values: float64 `[B, n]`, NaN for a player that was not reached yet.
        stderr: float64 `[B, n]`, inf below two samples.
        names: a name for each player.
    """

    evaluations: Tensor
    values: Tensor
    stderr: Tensor
    names: list[str] | None = None

    def tables(self) -> dict[str, Table]:
        """One row a budget: evaluations, largest and mean standard error, agreement with the last ranking."""
        rows = [
            (int(spent), stderr.max(), stderr.mean(), None if values.isnan().any() else kendall_tau(values, last))
            for spent, values, stderr, last in zip(
                self.evaluations, self.values, self.stderr, self.values[-1:].expand_as(self.values), strict=True
            )
        ]
        columns = [Column("evaluations", ","), Column("largest stderr", ".3g"), Column("mean stderr", ".3g")]
        last = Column("Kendall's tau", ".3f")
        caption = "Kendall's tau: with the ranking of the last row."
        return {"convergence": Table("Convergence", [*columns, last], rows, caption)}

    def figures(self) -> dict[str, Figure]:
        """Value with standard error against evaluations, of the eight players that rank highest at the end."""
        from lightning_eff.shapley.figures import convergence_figure

        return {"convergence": convergence_figure(self)}


def convergence_curve(
    game: Game, estimator: ShapleyEstimator, budgets: Sequence[int], *, generator: torch.Generator | int = 0
) -> ConvergenceCurve:
    """How values and their errors settle as one estimate goes on from budget to budget.

    Args:
        game: a game with scalar values.
        estimator: what estimates; how much work it asks for by itself does not matter.
        budgets: most evaluations, in all. A budget too small for the estimator is left out, and so is one that adds
            nothing. An estimator that cannot resume starts again for every budget.
        generator: see `ShapleyEstimator.estimate`.

    Raises:
        ValueError: vector values, or no budget that suffices.
    """
    n = game.n_players
    seed = generator if isinstance(generator, int) else int(torch.randint(2**62, (), generator=generator))
    results: list[ShapleyResult] = []
    for budget in sorted(set(budgets)):
        sized = _sized(estimator, budget, n)
        if sized is None:
            continue
        if sized is estimator and results:  # its cost follows from n alone: there is nothing more to do
            break
        resume = results[-1] if results and results[-1].state is not None else None
        result = _quietly(sized, game, seed, budget, resume)
        if not results or result.n_evals > results[-1].n_evals:
            results.append(result)
    if not results:
        raise ValueError(f"none of the budgets {list(budgets)} suffices: {_why_not(estimator, budgets, n)}")
    return ConvergenceCurve(
        evaluations=torch.tensor([result.n_evals for result in results]),
        values=torch.stack([result.values for result in results]),
        stderr=torch.stack([result.stderr for result in results]),
        names=getattr(game, "names", None),
    )


@dataclass(frozen=True, eq=False)
class RankStability(Report):
    """How much of a ranking would come out the same another time: table `stability`.

    Attributes:
        kendall: mean Kendall's tau between the compared rankings, in [-1, 1].
        top: float64 `[n - 1]`, entry k - 1: share of the comparisons in which the k best players are the same set.
    """

    kendall: float
    top: Tensor

    def tables(self) -> dict[str, Table]:
        """One row a number of players kept: how often they are the same set."""
        columns = [Column("best players", "d"), Column("the same set", ".1%")]
        caption = f"Mean Kendall's tau between rankings: {self.kendall:.3f}."
        return {"stability": Table("Stability of ranks", columns, enumerate(self.top.tolist(), 1), caption)}


def rank_stability(
    results: ShapleyResult | Sequence[ShapleyResult], *, draws: int = 1000, generator: int = 0
) -> RankStability:
    """Compare the rankings of several results with each other, or that of one result with what its errors allow.

    One result is compared with `draws` normal redraws of its values by its standard errors. Players are drawn by
    themselves, though efficiency ties them a little; and the values of the result are taken for the true ones.

    Args:
        results: two or more results of one game (other seeds, other budgets), or a single one.
        draws: redraws of a single result.
        generator: seed of the redraws.

    Raises:
        ValueError: an empty sequence or one of a single result, fewer than two players, vector values, players
            without value, results of different length, or a single result with players that have no error bar.
    """
    if isinstance(results, ShapleyResult):
        results.rank()  # raises where there is none
        if bool(results.stderr.isinf().any()):
            raise ValueError("some players have no error bar: use estimate(resume=result) or a larger budget")
        noise = torch.randn(
            draws, len(results.values), generator=torch.Generator().manual_seed(generator), dtype=torch.float64
        )
        pairs = [(results.values, results.values + results.stderr * row) for row in noise]
    else:
        if len(results) < 2:
            raise ValueError(f"expected one ShapleyResult or a sequence of at least two, got {len(results)}")
        for result in results:
            result.rank()
        pairs = [(a.values, b.values) for a, b in combinations(results, 2)]
    if len({len(values) for pair in pairs for values in pair}) != 1 or len(pairs[0][0]) < 2:
        raise ValueError("expected results of one game with at least two players")
    agreed = torch.stack([_same_top(*pair) for pair in pairs])
    return RankStability(sum(kendall_tau(*pair) for pair in pairs) / len(pairs), agreed.double().mean(0))


def _same_top(a: Tensor, b: Tensor) -> Tensor:
    """Whether the k highest of both are the same players, bool `[n - 1]` for k = 1..n-1."""
    place_in_b = b.argsort(descending=True, stable=True).argsort()
    worst = place_in_b[a.argsort(descending=True, stable=True)].cummax(0).values
    return (worst == torch.arange(len(a)))[:-1]


@dataclass(frozen=True, eq=False)
class CostBenefitCell:
    """One estimator at one budget, `R` seeds.

    Attributes:
        estimator: its name.
        budget: most evaluations it was allowed; for a method whose cost is fixed, that cost.
        evaluations: int64 `[R]`, evaluations it spent.
        error: float64 `[R]`, |estimate - phi|^2 / |phi|^2; NaN where a player was left without value.
        spearman: float64 `[R]`, rank correlation with phi; NaN also where all estimates are equal.
        seconds: float64 `[R]`, wall-clock time.
    """

    estimator: str
    budget: int
    evaluations: Tensor
    error: Tensor
    spearman: Tensor
    seconds: Tensor


@dataclass(frozen=True, eq=False)
class CostBenefit(Report):
    """What each estimator makes of each budget: table and figure `cost_benefit`.

    Attributes:
        exact: float64 `[n]`, the Shapley values.
        cells: one for each estimator and budget that suffices for it, estimators in the order given.
    """

    exact: Tensor
    cells: tuple[CostBenefitCell, ...]

    def tables(self) -> dict[str, Table]:
        """One row an estimator and budget: medians over the seeds, and quartiles of the error."""
        rows = [
            (
                cell.estimator,
                cell.budget,
                int(cell.evaluations.double().median()),
                *torch.quantile(cell.error, torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64)).tolist(),
                torch.quantile(cell.spearman, 0.5),
                1000 * torch.quantile(cell.seconds, 0.5),
            )
            for cell in self.cells
        ]
        columns: list[str | Column] = [
            "estimator",
            *(Column(name, ",") for name in ("budget", "evaluations")),
            *(Column(name, ".2g") for name in ("error", "lower quartile", "upper quartile")),
            Column("Spearman", ".3f"),
            Column("ms", ".1f"),
        ]
        seeds = max((len(cell.error) for cell in self.cells), default=0)
        caption = f"Medians over {seeds} seeds; error: |estimate - exact|^2 / |exact|^2 of {len(self.exact)} players."
        return {"cost_benefit": Table("Cost and benefit", columns, rows, caption)}

    def figures(self) -> dict[str, Figure]:
        """Error and Spearman against evaluations: a line for the median, a band between the quartiles."""
        from lightning_eff.shapley.figures import cost_benefit_figure

        return {"cost_benefit": cost_benefit_figure(self)}


def cost_benefit(
    game: Game,
    estimators: Mapping[str, ShapleyEstimator],
    budgets: Sequence[int],
    seeds: int | Sequence[int] = 20,
    *,
    exact: Tensor | None = None,
    progress: Progress | None = None,
) -> CostBenefit:
    """Compare estimators at equal numbers of evaluations, none of which is ever exceeded.

    Wrap a slow game in `CachedGame`: estimators meet the same coalitions again and again.

    Args:
        game: a game with scalar values.
        estimators: what to compare, by name; each gets its work by `with_budget`.
        budgets: evaluations. One too small for an estimator is left out; a method whose cost follows from the number
            of players appears once, where the largest budget covers it.
        seeds: how many seeds (0, 1, ...), or which.
        exact: Shapley values `[n]`; None enumerates them, up to 20 players.
        progress: called with the number of evaluations just done.

    Raises:
        ValueError: vector values, values that are all 0 (an error has no scale), no seeds or budgets, or too many
            players to enumerate.

    Warns:
        ShapleyWarning: none of the budgets suffices for an estimator.
    """
    n = game.n_players
    seeds = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not seeds or not budgets:
        raise ValueError("cost_benefit needs at least one seed and one budget")
    if exact is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ShapleyWarning)
            exact = ExactShapley().estimate(game, progress=progress).values
    if exact.shape != (n,):
        raise ValueError(f"exact values must be [{n}], one number a player, got {list(exact.shape)}")
    if not bool((exact != 0).any()):
        raise ValueError("all exact values are 0: the game carries no signal that an error could be compared with")
    cells = []
    for name, estimator in estimators.items():
        for budget in sorted(set(budgets)):
            sized = _sized(estimator, budget, n)
            if sized is estimator:  # its cost is fixed, and nothing is drawn
                cells.append(_cell(name, sized.cost(n), sized, game, seeds[:1], exact, progress))
                break
            if sized is not None:
                cells.append(_cell(name, budget, sized, game, seeds, exact, progress))
        if not cells or cells[-1].estimator != name:
            why = _why_not(estimator, budgets, n)
            warnings.warn(f"{name} is left out, no budget suffices: {why}", ShapleyWarning, stacklevel=2)
    return CostBenefit(exact, tuple(cells))


def _cell(
    name: str,
    budget: int,
    estimator: ShapleyEstimator,
    game: Game,
    seeds: Sequence[int],
    exact: Tensor,
    progress: Progress | None,
) -> CostBenefitCell:
    results, seconds = [], []
    for seed in seeds:
        begin = time.perf_counter()
        results.append(_quietly(estimator, game, seed, budget, None, progress))
        seconds.append(time.perf_counter() - begin)
    values = torch.stack([result.values for result in results])
    return CostBenefitCell(
        estimator=name,
        budget=budget,
        evaluations=torch.tensor([result.n_evals for result in results]),
        error=((values - exact) ** 2).sum(1) / (exact**2).sum(),
        spearman=torch.tensor([_spearman(row, exact) for row in values], dtype=torch.float64),
        seconds=torch.tensor(seconds, dtype=torch.float64),
    )


def _sized(estimator: ShapleyEstimator, budget: int, n: int) -> ShapleyEstimator | None:
    """The estimator with as much work as the budget allows, or None where it does not suffice."""
    try:
        sized = estimator.with_budget(budget, n)
    except ValueError:
        return None
    return sized if sized.cost(n) <= budget else None


def _why_not(estimator: ShapleyEstimator, budgets: Sequence[int], n: int) -> str:
    try:
        return f"{n} players need {estimator.with_budget(max(budgets, default=0), n).cost(n):,} evaluations"
    except ValueError as error:
        return str(error)


def _quietly(
    estimator: ShapleyEstimator,
    game: Game,
    seed: int,
    budget: int,
    resume: ShapleyResult | None,
    progress: Progress | None = None,
) -> ShapleyResult:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ShapleyWarning)  # small budgets have no error bars, by intent
        stop = StopRule(max_evals=budget)
        result = estimator.estimate(game, generator=seed, resume=resume, stop=stop, progress=progress)
    if result.values.ndim > 1:
        raise ValueError(f"expected scalar values, the game returns vectors of {result.values.shape[1]} components")
    return result


def _spearman(a: Tensor, b: Tensor) -> float:
    from scipy import stats

    if bool(a.isnan().any()) or bool((a == a[0]).all()) or bool((b == b[0]).all()):
        return math.nan
    return float(stats.spearmanr(a.numpy(), b.numpy()).statistic)
