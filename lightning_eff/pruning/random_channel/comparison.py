"""Criteria compared as they should be: the same configurations, data and repair for each, and paired statistics.

Y. Li et al., Revisiting Random Channel Pruning for Neural Network Compression, CVPR 2022, arXiv 2205.05676: what a
criterion seems to gain is often the luck of its configurations. Two criteria that prune the same configurations differ
by themselves alone.

Shape letters: ``K`` criteria, ``N`` configurations, ``R`` resamples.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from scipy import stats
from torch import Tensor, nn

from lightning_eff.arguments import check_choice
from lightning_eff.batch import LossFunction, SplitBatch
from lightning_eff.pruning.criteria import Criterion, Random, check_needs, importance, resolve_criterion
from lightning_eff.pruning.random_channel.bench import Bench, ScoreFunction, judged, take_moments
from lightning_eff.pruning.random_channel.candidates import Mode
from lightning_eff.pruning.random_channel.sampling import config_of
from lightning_eff.pruning.repair import Repair
from lightning_eff.reporting import Column, Report, Table
from lightning_eff.reporting import progress as progress_bar
from lightning_eff.surgery import ChannelGraph, apply_plan
from lightning_eff.surgery.state import untouched_generators

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESAMPLES = 10_000
CONTROL = "random"


@dataclass(frozen=True)
class PairedDifference:
    """How one criterion does against another on the same configurations.

    Attributes:
        criterion: the one.
        reference: the other.
        mean: of ``score - score of the reference`` over configurations.
        low: lower end of the 95 % bootstrap interval of the mean.
        high: upper end.
        win_rate: share of configurations where the criterion is better; ties count half.
    """

    criterion: str
    reference: str
    mean: float
    low: float
    high: float
    win_rate: float

    @property
    def contains_zero(self) -> bool:
        """Whether the interval does not tell the two apart."""
        return self.low <= 0 <= self.high


@dataclass(frozen=True)
class ComparisonReport(Report):
    """Scores of every criterion on every configuration, and what they say: ``criteria``, ``paired`` and ``scores``.

    Attributes:
        criteria: names.
        before: scores before fine-tuning, float64 ``[K, N]``; NaN where one could not be told.
        after: scores after fine-tuning; None without.
        errors: relative reconstruction errors ``[K, N]``.
        seconds: to score channels, by criterion.
        configs: channel counts ``[N, G]``.
        mode: whether ``"max"`` or ``"min"`` is best.
        dense_score: score of the whole network.
        macs: multiply-adds of each configuration as a fraction of the whole network's, ``[N]``.
    """

    data_tables = frozenset({"scores"})

    criteria: Sequence[str]
    before: Tensor
    after: Tensor | None
    errors: Tensor
    seconds: Sequence[float]
    configs: Tensor
    mode: Mode
    dense_score: float
    macs: Tensor

    @property
    def scores(self) -> Tensor:
        """Scores that decide: after fine-tuning where there is one, ``[K, N]``."""
        return self.before if self.after is None else self.after

    @property
    def usable(self) -> Tensor:
        """Configurations that every criterion has a score for, bool ``[N]``; only these are compared."""
        return _usable(self.before, self.after)

    @property
    def order(self) -> list[str]:
        """Criteria by mean score, best first; equal ones in the order they were given in."""
        means = self.scores[:, self.usable].mean(1)
        return [self.criteria[k] for k in means.argsort(descending=self.mode == "max", stable=True).tolist()]

    def difference(
        self, criterion: str, reference: str, *, after: bool | None = None, level: float = 0.95
    ) -> PairedDifference:
        """Compare two criteria.

        Args:
            criterion: the one.
            reference: the other; differences are ``criterion - reference``.
            after: take scores after fine-tuning; None takes those that decide.
            level: of the interval.

        Raises:
            ValueError: a criterion that is not in the report, or there was no fine-tuning.
        """
        scores = self.scores if after is None else self.after if after else self.before
        if scores is None:
            raise ValueError("there are no scores after fine-tuning: pass fine_tune to compare_criteria")
        one, other = (scores[self._row(name), self.usable] for name in (criterion, reference))
        gain = one - other
        low, high = bootstrap_interval(gain, level)
        better = gain if self.mode == "max" else -gain
        wins = float(((better > 0).double() + (better == 0).double() / 2).mean())
        return PairedDifference(criterion, reference, float(gain.mean()), low, high, wins)

    def _row(self, name: str) -> int:
        if name not in self.criteria:
            raise ValueError(f"criterion must be one of {', '.join(self.criteria)}, got {name!r}")
        return list(self.criteria).index(name)

    @property
    def verdict(self) -> str:
        """Which criterion wins, or that none does clearly, and which are better than ``random``.

        The first is picked out of all after looking, so its interval is as wide as so many comparisons ask for
        (Bonferroni), and so are those against ``random``.
        """
        if len(self.criteria) == 1:
            return f"Only {self.criteria[0]} was tried."
        first, second = self.order[:2]
        pair = self.difference(first, second, level=self._level)
        numbers = f"{pair.mean:+.4f}, interval {pair.low:+.4f} to {pair.high:+.4f}, {_count(self)}"
        if pair.contains_zero:
            found = f"No clear winner: {first} and {second} come first and cannot be told apart ({numbers})."
        else:
            found = f"{first} is better than {second}, the next best, on this network ({numbers})."
        return found + self._against_chance()

    @property
    def _level(self) -> float:
        return 1 - 0.05 / max(1, len(self.criteria) - 1)

    def _against_chance(self) -> str:
        if CONTROL not in self.criteria:
            return ""
        ahead = self.order[: self.order.index(CONTROL)]
        sure = [name for name in ahead if not self.difference(name, CONTROL, level=self._level).contains_zero]
        return f" Better than {CONTROL}: {', '.join(sure) or 'none for sure'}."

    def tables(self) -> dict[str, Table]:
        """A row a criterion, a row a pair, and a row a configuration with a column a criterion."""
        return {"criteria": self._criteria(), "paired": self._paired(), "scores": self._scores()}

    def figures(self) -> dict[str, Figure]:
        """Scores of each criterion and paired differences."""
        from lightning_eff.pruning.random_channel.figures import comparison_figure

        return {"criteria": comparison_figure(self)}

    def _criteria(self) -> Table:
        """One row a criterion, best first: best, mean and spread of its scores, before and after fine-tuning."""
        stages = [("", self.before)] if self.after is None else [(" before", self.before), (" after", self.after)]
        columns: list[str | Column] = ["criterion"]
        for suffix, _ in stages:
            columns += [Column(f"{what}{suffix}", format=".4f") for what in ("best", "mean", "std")]
        columns += [Column("reconstruction error", format=".4f"), Column("scoring s", format=".2f")]
        rows = []
        for name in self.order:
            k = self._row(name)
            row: list[Any] = [name]
            for _, scores in stages:
                values = scores[k, self.usable]
                best = values.max() if self.mode == "max" else values.min()
                row += [best, values.mean(), values.std() if len(values) > 1 else math.nan]
            rows.append([*row, self.errors[k, self.usable].mean(), self.seconds[k]])
        caption = f"{_count(self)}; the whole network has {self.dense_score:.4f}. {self.verdict}"
        return Table("Criteria", columns, rows, caption=caption)

    def _paired(self) -> Table:
        """One row a criterion and reference (the best one, and ``random`` where it took part)."""
        references = list(dict.fromkeys([self.order[0], *(name for name in self.criteria if name == CONTROL)]))
        stages = [("", None)] if self.after is None else [("before", False), ("after", True)]
        rows = []
        for reference in references:
            for stage, after in stages:
                for name in self.order:
                    if name != reference:
                        pair = self.difference(name, reference, after=after)
                        known = (pair.mean, pair.low, pair.high, pair.win_rate)
                        rows.append((name, reference, *([stage] if stage else []), *known))
        columns: list[str | Column] = ["criterion", "against", *(["fine-tuning"] if self.after is not None else [])]
        columns += [Column(name, format="+.4f") for name in ("difference", "low", "high")]
        columns.append(Column("win rate", format=".0%"))
        caption = (
            f"Differences on the same configurations with 95 % bootstrap intervals, {_count(self)}. {self.verdict}"
        )
        return Table("Paired differences", columns, rows, caption=caption)

    def _scores(self) -> Table:
        """One row a configuration, one column a criterion."""
        columns: list[str | Column] = ["configuration", Column("MACs kept", format=".3f")]
        stages = [("", self.before)] if self.after is None else [(" before", self.before), (" after", self.after)]
        columns += [Column(f"{name}{suffix}", format=".4f") for suffix, _ in stages for name in self.criteria]
        rows = [
            (i, self.macs[i], *(scores[k, i] for _, scores in stages for k in range(len(self.criteria))))
            for i in range(len(self.configs))
        ]
        return Table("Scores", columns, rows)


def bootstrap_interval(values: Tensor, level: float = 0.95) -> tuple[float, float]:
    """Bootstrap interval of the mean of ``values`` ``[N]``: 10,000 resamples, always the same ones.

    The percentile interval, expanded about the mean by ``t(N - 1) / z * sqrt(N / (N - 1))``, without which it is too
    narrow for few values (T. Hesterberg, What Teachers Should Know About the Bootstrap, 2015). Values that are all
    equal give an interval of length zero, a single value one from minus to plus infinity.
    """
    if bool((values == values[0]).all()) and len(values) > 1:
        return float(values[0]), float(values[0])
    if len(values) < 2:
        return -math.inf, math.inf
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    means = values.double()[drawn].mean(1)
    low, high = torch.quantile(means, torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    n, centre = len(values), float(values.double().mean())
    wider = stats.t.ppf((1 + level) / 2, n - 1) / stats.norm.ppf((1 + level) / 2) * math.sqrt(n / (n - 1))
    return centre + wider * (low - centre), centre + wider * (high - centre)


def compare_criteria(
    model: nn.Module,
    graph: ChannelGraph,
    criteria: Mapping[str, str | Criterion] | Sequence[str],
    *,
    configs: Tensor,
    batches: Sequence[Any],
    score_fn: ScoreFunction,
    mode: Mode = "max",
    loss_fn: LossFunction | None = None,
    repair: Repair = Repair("gram"),  # noqa: B008 (frozen)
    fine_tune: Callable[[nn.Module], float] | None = None,
    split_batch: SplitBatch | None = None,
    seed: int = 0,
    progress: bool = True,
) -> ComparisonReport:
    """Judge criteria on the same configurations, with the same data and the same repair.

    The model is the same afterwards, bit for bit: candidates are cut on trial, and only copies are fine-tuned.

    Args:
        model: the trained network.
        graph: its channel graph.
        criteria: names, or criteria by the name they shall have in the report. With ``"random"`` among them, all are
            compared with chance, which draws channels anew for every configuration.
        configs: channel counts ``[N, G]`` of :func:`sample_configs`; ten or more give intervals worth looking at.
        batches: calibration batches on the model's device.
        score_fn: ``model -> score``; called in evaluation mode without gradients.
        mode: whether the ``"max"`` or the ``"min"`` score is best.
        loss_fn: ``(model, batch) -> loss``, the mean over the batch, for criteria that need a loss.
        repair: how weights are corrected; every field means what it says, BatchNorm statistics included.
        fine_tune: trains the smaller network that it is given, a copy, and returns its score; called once for each
            criterion and configuration, always with the same state of the global random generators.
        split_batch: ``batch -> (inputs, target)``, for batches of another form.
        seed: of criteria and of the repair.
        progress: show a bar.

    Raises:
        ValueError: no criteria, unknown ones, data or a loss that one needs is missing, or no configuration has a score
            for every criterion.
    """
    named: dict[str, str | Criterion] = (
        dict(criteria) if isinstance(criteria, Mapping) else {name: name for name in criteria}
    )
    if not named or not len(configs):
        raise ValueError(f"expected criteria and configurations, got {len(named)} and {len(configs)}")
    check_choice("mode", mode, ("max", "min"))
    for criterion in named.values():
        check_needs(criterion, batches, loss_fn)
    dense_score = judged(model, score_fn)
    moments = take_moments(model, graph, batches, repair, split_batch, seed)
    before, after, errors = (torch.full((len(named), len(configs)), math.nan, dtype=torch.float64) for _ in range(3))
    seconds = []
    with progress_bar("compare criteria", before.numel(), enabled=progress, unit="candidates") as bar:
        for k, (name, criterion) in enumerate(named.items()):
            start = time.perf_counter()
            scores = importance(model, graph, criterion, batches, loss_fn, split_batch=split_batch, seed=seed)
            seconds.append(time.perf_counter() - start)
            bench = Bench(model, graph, scores, batches, repair, split_batch, seed, moments=moments)
            for i, row in enumerate(configs):
                if i and _is_chance(criterion):
                    scores = importance(model, graph, criterion, seed=seed + i)
                    bench = Bench(
                        model, graph, scores, batches, repair, split_batch, seed, moments=moments, nested=False
                    )
                trial, error = bench.repaired(config_of(graph, row))
                before[k, i], errors[k, i] = bench.score(trial, score_fn), error
                if fine_tune is not None:
                    smaller = copy.deepcopy(model)
                    apply_plan(smaller, trial.plan, None, graph=graph, verify=False)
                    smaller.load_state_dict(trial.state(), strict=False)
                    with untouched_generators():
                        after[k, i] = float(fine_tune(smaller))
                bar.advance(1, name)
    trained = None if fine_tune is None else after
    if not bool(_usable(before, trained).any()):
        raise ValueError("no configuration has a finite score for every criterion: look at score_fn and fine_tune")
    macs = graph.macs(configs) / graph.macs()
    return ComparisonReport(list(named), before, trained, errors, seconds, configs, mode, dense_score, macs)


def _is_chance(criterion: str | Criterion) -> bool:
    """Whether channels are drawn by lot: then anew for every configuration, or one lucky draw would stand for all."""
    found = resolve_criterion(criterion)
    return isinstance(found, Random) and (isinstance(criterion, str) or found.seed is None)


def _usable(before: Tensor, after: Tensor | None) -> Tensor:
    return (before if after is None else before + after).isfinite().all(0)


def _count(report: ComparisonReport) -> str:
    used, every = int(report.usable.sum()), len(report.configs)
    return f"{used} configurations" if used == every else f"{used} of {every} configurations, the others without score"
