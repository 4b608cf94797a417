"""Shapley values of lidar lines: frame by frame, in rounds, on any number of processes.

The values of the mean game are the means of the frames' values. Every frame draws coalitions of its own, which costs
the same as shared ones and errs less; they depend on the seed, the frame's id and their number alone, so that frames
may be evaluated in any order and by any process, and rounds may be resumed. With too few coalitions to solve a frame by
itself, all frames are solved in one regression, and there are no values of single frames.

With n lines and 4 n + 6 evaluations or more a frame is solved alone.

Shapes: `n` candidates, `p` players of one frame.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_eff.lidar.frames import Candidates, Frame
from lightning_eff.lidar.game import CompletionOptions, FrameGame, LineGame
from lightning_eff.lidar.gap import GapGame
from lightning_eff.lidar.lines import LidarWarning
from lightning_eff.lidar.official import OfficialLineRegression
from lightning_eff.lidar.records import Fit, FrameId, FrameRecord, best_beta, frame_seed
from lightning_eff.lidar.selection import Rule, select_lines
from lightning_eff.reporting import progress as progress_bar
from lightning_eff.shapley import (
    ExactShapley,
    LeaveOneOut,
    PermutationShapley,
    RegressionShapley,
    ShapleyEstimator,
    StratifiedShapley,
    UnbiasedKernelShapley,
)
from lightning_eff.shapley.coalition_run import CoalitionEstimator

EstimatorName = Literal[
    "regression", "stratified", "unbiased_kernel", "permutation", "exact", "leave_one_out", "official", "gap"
]

_ABSURD_EMPTY = 3  # times the error of the mean depth
# Rows of a regression per unknown, from measurements: a frame with fewer is better pooled with others; pooled frames
# with more together are better off with sizes drawn by the Shapley kernel than with all sizes alike.
_ROWS_ALONE, _ROWS_KERNEL = 2, 6


@dataclass(frozen=True)
class EstimationOptions:
    """How values are estimated.

    Attributes:
        estimator: `"regression"`, `"stratified"` and `"unbiased_kernel"` sample coalitions, which rounds and the
            control variate are for; `"permutation"`, `"exact"` and `"leave_one_out"` do everything in the first round;
            `"official"` is the regression of the published code, which converges to another value; `"gap"` takes the
            values of the gap game, without asking a network. Or an estimator of `lightning_eff.shapley`, whose own
            budget is not read.
        budget: evaluations a frame, those of no line and of all included. `"auto"`: 1,200 for up to 16 frames, 256 for
            up to 200, 128 beyond.
        rounds: rounds that the budget is spread over. They do not change the values.
        control_variate: take out what the gap game explains.
        seed: of all coalitions.

    Raises:
        ValueError: an argument out of range.
    """

    estimator: EstimatorName | ShapleyEstimator = "regression"
    budget: int | Literal["auto"] = "auto"
    rounds: int = 1
    control_variate: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        """Check choices and ranges."""
        if not isinstance(self.estimator, ShapleyEstimator) and self.estimator not in get_args(EstimatorName):
            raise ValueError(
                f"estimator must be one of {get_args(EstimatorName)} or a ShapleyEstimator, got {self.estimator!r}"
            )
        for name, least in (("budget", 1), ("rounds", 1), ("seed", 0)):
            given = getattr(self, name)
            if (name, given) != ("budget", "auto") and (type(given) is not int or given < least):
                raise ValueError(f"{name} must be an int >= {least}, got {given!r}")

    def evaluations(self, n_frames: int) -> int:
        """Evaluations a frame that the budget stands for."""
        if self.budget != "auto":
            return self.budget
        return 1200 if n_frames <= 16 else 256 if n_frames <= 200 else 128

    def build(self, evaluations: int) -> ShapleyEstimator | None:
        """The estimator; None for the gap game."""
        if isinstance(self.estimator, ShapleyEstimator):
            if isinstance(self.estimator, CoalitionEstimator):
                return replace(self.estimator, budget=evaluations)
            return self.estimator
        named: dict[str, ShapleyEstimator] = {
            "regression": RegressionShapley(evaluations),
            "stratified": StratifiedShapley(evaluations),
            "unbiased_kernel": UnbiasedKernelShapley(evaluations),
            "permutation": PermutationShapley(),
            "exact": ExactShapley(),
            "leave_one_out": LeaveOneOut(),
            "official": OfficialLineRegression(evaluations),
        }
        return named.get(self.estimator)


@dataclass(eq=False)
class LineValues:
    """Values of the lines, all tensors float64 on the CPU, in the unit of the metric.

    Attributes:
        lines: the candidates' numbers, `n` of them, in increasing order.
        values: `[n]`: what every line takes off the error between no line and all of them, a mean over the frames.
        stderr: `[n]`: standard errors for these frames, whose choice they do not cover; 0 where nothing was sampled,
            inf or NaN where they cannot be told.
        per_frame: values of every frame `[n]`, exactly 0 for a line that the frame does not show; none where frames
            were pooled.
        per_frame_stderr: likewise.
        error_empty: mean error without any line.
        error_full: mean error with all lines.
        evaluations: coalitions that the network completed, over all frames.
        method: the estimator.
        pooled: whether all frames were solved together.
        proxy_correlation: correlation r of the noise of v and of the gap game; the control variate saved a factor of
            1 / (1 - r^2) in evaluations. None without.
    """

    lines: list[int]
    values: Tensor
    stderr: Tensor
    per_frame: dict[FrameId, Tensor]
    per_frame_stderr: dict[FrameId, Tensor]
    error_empty: float
    error_full: float
    evaluations: int
    method: str
    pooled: bool = False
    proxy_correlation: float | None = None

    def select(
        self,
        k: int,
        rule: Rule = "region",
        *,
        frame: FrameId | None = None,
        angles: Tensor | None = None,
        **options: Any,
    ) -> list[int]:
        """Lines of the sensor to keep; see `select_lines`.

        Args:
            k: how many.
            rule: by which rule.
            frame: by the values of this frame alone, which its own ground truth gave.
            angles: elevations of the candidates.
            **options: of the rule.

        Raises:
            ValueError: also where there are no values of that frame.
        """
        if frame is not None and frame not in self.per_frame:
            least = 4 * len(self.lines) + 6
            hint = f"frames were pooled: budget={least} solves each" if self.pooled else f"{len(self.per_frame)} have"
            raise ValueError(f"frame {frame!r} has no values of its own ({hint})")
        values = self.values if frame is None else self.per_frame[frame]
        return [self.lines[place] for place in select_lines(values, k, rule, angles=angles, **options)]


class LineEstimation:
    """Values in the making: what every frame evaluated, round by round.

    Args:
        lines: the candidates' numbers, in increasing order.
        n_frames: frames of the calibration set, over all processes.
        options: how values are estimated.
        metric: name of what is played for.

    Attributes:
        records: what was evaluated, by the frame's id.
        budget: evaluations a frame.
        pooled: whether all frames are solved together.
        controlled: whether there is a control variate.

    Raises:
        ValueError: the budget is below the smallest estimate.
    """

    def __init__(
        self, lines: Sequence[int], n_frames: int, options: EstimationOptions | None = None, metric: str = "rmse"
    ) -> None:
        self.lines, self.options, self.metric = list(lines), options or EstimationOptions(), metric
        self.records: dict[FrameId, FrameRecord] = {}
        self.budget = self.options.evaluations(n_frames)
        self.estimator = estimator = self.options.build(self.budget)
        n = len(self.lines)
        self.pooled = False
        if isinstance(estimator, RegressionShapley) and n_frames > 1:
            units, least = (self.budget - 2) // estimator.unit_cost, estimator.least_units(n)
            self.pooled = 0 < units < _ROWS_ALONE * least and units * n_frames >= least
            many = units * n_frames >= _ROWS_KERNEL * least
            if self.pooled and many and self.options.estimator == "regression":
                self.estimator = estimator = replace(estimator, sampling="kernel")
        if estimator is not None and n > 1 and not self.pooled:
            estimator.with_budget(self.budget, n)  # raises where it does not suffice
        # what converges to another value than Shapley's must not be corrected by the exact ones of the gap game
        official = isinstance(estimator, OfficialLineRegression) or getattr(estimator, "sampling", "") == "official"
        self.controlled = self.options.control_variate and isinstance(estimator, CoalitionEstimator) and not official

    def advance(self, game: FrameGame) -> int:
        """Evaluate the next round of a frame; after the last nothing is left to do.

        Args:
            game: the frame's game, whose candidates are `lines`.

        Returns:
            Number of coalitions that the network completed.
        """
        before = game.evaluations
        record = self.records.get(game.id)
        if record is None:
            record = self.records[game.id] = self._record(game)
        if record.rounds < self.options.rounds:
            players, estimator = len(record.present), self.estimator
            if isinstance(estimator, CoalitionEstimator) and players > estimator.small:
                self._sample(estimator, game, record)
            elif estimator is not None and players and not record.rounds:
                self._solve(estimator, game, record)
            record.rounds += 1
        record.evaluations += game.evaluations - before
        return game.evaluations - before

    def result(self) -> LineValues:
        """The values so far.

        Raises:
            ValueError: no frame was evaluated yet, or too few coalitions to tell the lines apart.

        Warns:
            LidarWarning: the network is far off without any line.
        """
        if not self.records:
            raise ValueError("no frame was evaluated yet")
        ids = sorted(self.records, key=lambda id_: (isinstance(id_, str), id_))  # sums must not depend on their order
        records = [self.records[id_] for id_ in ids]
        _check_empty(records)
        n, count = len(self.lines), len(records)
        fits = [self._of_all(records)] if self.pooled else list(map(self._of_frame, ids, records))
        beta = best_beta(fits)
        found = torch.zeros(2, len(fits), n, dtype=torch.float64)  # values and squared errors
        for place, (fit, record) in enumerate(zip(fits, records, strict=False)):  # pooled, all have all lines
            found[:, place, record.present] = torch.stack(fit.controlled(beta))
        values, variance = found[0].mean(0), found[1].mean(0) / len(fits)
        noise = sum(fit.noise for fit in fits) / len(fits) ** 2
        left = float(variance[variance.isfinite()].sum())
        correlation = math.sqrt(max(0.0, 1 - left / noise)) if noise > 0 else 0.0
        own = [] if self.pooled else ids
        return LineValues(
            lines=self.lines,
            values=values,
            stderr=variance.sqrt(),
            per_frame=dict(zip(own, found[0], strict=False)),
            per_frame_stderr=dict(zip(own, found[1].sqrt(), strict=False)),
            error_empty=sum(record.empty for record in records) / count,
            error_full=sum(record.full for record in records) / count,
            evaluations=sum(record.evaluations for record in records),
            method="GapGame" if self.estimator is None else type(self.estimator).__name__,
            pooled=self.pooled,
            proxy_correlation=correlation if self.controlled else None,
        )

    # Rounds of several runs and processes.

    def settings(self) -> dict[str, Any]:
        """What coalitions and values depend on, beside network and frames: plain Python."""
        estimator: Any = self.estimator
        named = {} if estimator is None else {"name": type(estimator).__name__, **asdict(estimator)}
        return {
            "lines": self.lines,
            "metric": self.metric,
            "estimator": named,
            "budget": self.budget,
            "rounds": self.options.rounds,
            "control_variate": self.controlled,
            "seed": self.options.seed,
            "pooled": self.pooled,
        }

    def state_dict(self) -> dict[str, Any]:
        """Plain Python and tensors, fit for checkpoints with `weights_only=True` and for sending between processes."""
        records = [[id_, record.to_dict()] for id_, record in self.records.items()]
        return {"settings": self.settings(), "records": records}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take in the frames of a `state_dict`; of a frame known already the record with more rounds is kept.

        Raises:
            ValueError: it was made with other settings; the message names them.
        """
        ours, theirs = self.settings(), state["settings"]
        different = [name for name in ours if ours[name] != theirs.get(name)]
        if different:
            both = "; ".join(f"{name}: {theirs.get(name)!r} there, {ours[name]!r} here" for name in different)
            raise ValueError(f"these values were estimated with other settings ({both}): resume with the same")
        for id_, entries in state["records"]:
            known = self.records.get(id_)
            if known is None or known.rounds < entries["rounds"]:
                self.records[id_] = FrameRecord(**entries)

    # One frame.

    def _record(self, game: FrameGame) -> FrameRecord:
        present = torch.arange(len(self.lines)) if self.pooled else game.present
        gap = None
        if game.n_players and (self.controlled or self.estimator is None):
            gap = self._gap(game, present)
        ends = torch.zeros(2, dtype=torch.float64)
        if gap is not None:
            ends = gap(torch.tensor([[False], [True]]).expand(2, len(present)))
        known = torch.zeros(len(present), dtype=torch.float64) if gap is None else gap.shapley()
        if self.estimator is None:
            empty, full = (-ends).tolist()
            return FrameRecord(present, empty, full, proxy_values=known)
        return FrameRecord(
            present,
            game.empty_error,
            game.full_error,
            game.mean_depth_error if game.asks_empty else math.inf,
            proxy_ends=ends,
            proxy_values=known,
        )

    def _gap(self, game: FrameGame, present: Tensor) -> GapGame:
        return gap_game(game.frame, [self.lines[place] for place in present.tolist()], self.metric)

    def _sample(self, estimator: CoalitionEstimator, game: FrameGame, record: FrameRecord) -> None:
        """The next units of the frame's sequence, so many that all rounds have as many."""
        players, rounds = len(record.present), self.options.rounds
        every = (self.budget - 2) // estimator.unit_cost
        first, last = (every * done // rounds for done in (record.rounds, record.rounds + 1))
        sequence = estimator.sequence(players, frame_seed(self.options.seed, game.id), 0)
        units = sequence.take(last)[first:]
        if not len(units):
            return
        cost = estimator.unit_cost
        coalitions = units if cost == 1 else torch.stack([units, ~units], 1).flatten(0, 1)
        shown = coalitions[:, game.present] if self.pooled else coalitions
        proxy = None
        if self.controlled:
            proxy = torch.zeros(len(units), cost, dtype=torch.float64)
            if game.n_players:
                proxy = self._gap(game, record.present)(coalitions).view(-1, cost)
        record.add(units, game.errors(shown).view(-1, cost), proxy)

    def _solve(self, estimator: ShapleyEstimator, game: FrameGame, record: FrameRecord) -> None:
        """Everything at once; few players are enumerated."""
        whole = ExactShapley() if isinstance(estimator, CoalitionEstimator) or len(record.present) == 1 else estimator
        budgeted = whole.with_budget(self.budget, len(record.present))
        found = budgeted.estimate(game, generator=frame_seed(self.options.seed, game.id))
        record.solved = torch.stack([found.values, found.stderr])

    def _of_frame(self, id_: FrameId, record: FrameRecord) -> Fit:
        estimator, players = self.estimator, len(record.present)
        if estimator is None or not players:
            return Fit.final(record.proxy_values, torch.zeros(players, dtype=torch.float64))
        if record.solved.numel():
            return Fit.final(record.solved[0], record.solved[1] ** 2)
        if isinstance(estimator, CoalitionEstimator) and len(record.units) >= estimator.least_units(players):
            known = record.proxy_values if self.controlled else None
            return Fit.of(estimator, [record.sampled(1.0, self.controlled)], known)
        raise ValueError(
            f"frame {id_!r} has {record.errors.numel()} coalitions after {record.rounds} of {self.options.rounds} "
            f"rounds, too few for {players} lines: evaluate more rounds first, or take fewer rounds"
        )

    def _of_all(self, records: list[FrameRecord]) -> Fit:
        assert isinstance(self.estimator, RegressionShapley)
        drawn, least = sum(len(record.units) for record in records), self.estimator.least_units(len(self.lines))
        if drawn < least:
            raise ValueError(
                f"{len(records)} frames have {drawn * self.estimator.unit_cost} coalitions together, too few for "
                f"{len(self.lines)} lines: evaluate more frames or rounds first"
            )
        samples = [record.sampled(1 / len(records), self.controlled) for record in records]
        known = torch.stack([record.proxy_values for record in records]).mean(0) if self.controlled else None
        return Fit.of(self.estimator, samples, known)


def line_shapley(
    model: nn.Module,
    frames: Iterable[Frame],
    *,
    estimator: EstimatorName | ShapleyEstimator = "regression",
    budget: int | Literal["auto"] = "auto",
    control_variate: bool = True,
    seed: int = 0,
    completion: CompletionOptions | None = None,
    num_lines: int = 64,
    candidates: Candidates = "visible",
    min_pixels: int = 1,
    progress: bool = False,
) -> LineValues:
    """Shapley values of the lines of a lidar, without a Trainer.

    Args:
        model: completes depth; evaluated in evaluation mode and left as it was.
        frames: the calibration set.
        estimator: see `EstimationOptions`, like `budget`, `control_variate` and `seed`.
        budget: see there.
        control_variate: see there.
        seed: see there.
        completion: how the network is asked and what its error is.
        num_lines: lines of the sensor.
        candidates: see `LineGame`, like `min_pixels`.
        min_pixels: see there.
        progress: show a bar with the number of frames.

    Raises:
        ValueError: as `LineGame` and `LineEstimation`.
    """
    game = LineGame(
        model, frames, num_lines=num_lines, candidates=candidates, min_pixels=min_pixels, options=completion
    )
    options = EstimationOptions(estimator, budget, control_variate=control_variate, seed=seed)
    estimation = LineEstimation(game.lines, game.n_groups, options, game.completion.metric)
    title = f"Shapley values of {game.n_players} lines"
    with progress_bar(title, game.n_groups, enabled=progress, unit="frames") as bar:
        for frame in game.frames:
            estimation.advance(frame)
            bar.advance(1)
    return estimation.result()


def gap_game(frame: Frame, lines: Sequence[int], metric: str = "rmse") -> GapGame:
    """The gap game of a frame in the unit of `metric`: exact for `"mse"` in mm^2, else close to the RMSE in mm."""
    game = GapGame.of_frame(frame, lines)
    return GapGame(1e6 * game.costs) if metric == "mse" else game.as_rmse()


def _check_empty(records: list[FrameRecord]) -> None:
    empty, mean_depth = (sum(getattr(record, name) for record in records) for name in ("empty", "mean_depth"))
    if empty > _ABSURD_EMPTY * mean_depth:
        warnings.warn(
            f"without any line the error is {empty / len(records):,.0f}, that of the mean depth "
            f"{mean_depth / len(records):,.0f}: the network was not trained for that, and this drowns the values: take "
            'empty_value="mean_depth", or train with line dropout',
            LidarWarning,
            stacklevel=3,
        )
