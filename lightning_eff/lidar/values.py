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
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_eff.documents import whole_state
from lightning_eff.lidar.estimators import (
    EstimationOptions,
    EstimatorName,
    pooled,
    regression_alone,
    regression_together,
)
from lightning_eff.lidar.frames import Candidates, Frame
from lightning_eff.lidar.game import CompletionOptions, FrameGame, LineGame
from lightning_eff.lidar.gap import GapGame
from lightning_eff.lidar.lines import LidarWarning
from lightning_eff.lidar.official import OfficialLineRegression
from lightning_eff.lidar.records import Fit, FrameId, FrameRecord, best_slope, frame_seed
from lightning_eff.lidar.selection import Rule, select_lines
from lightning_eff.reporting import progress as progress_bar
from lightning_eff.shapley import ExactShapley, RegressionShapley, ShapleyEstimator
from lightning_eff.shapley.coalition_run import CoalitionEstimator

_ABSURD_EMPTY = 3  # times the error of the mean depth


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
        self._n_frames = n_frames
        self.budget = self.options.evaluations(n_frames, len(self.lines))
        self.estimator = estimator = self.options.build(self.budget)
        n = len(self.lines)
        self.pooled = pooled(estimator, n, self.budget, n_frames)
        if self.pooled and self.options.estimator == "regression":
            self.estimator = regression_together(n, self.budget, n_frames)
        elif estimator is not None and n > 1 and not self.pooled:
            estimator.with_budget(self.budget, n)  # raises where it does not suffice
        # what converges to another value than Shapley's must not be corrected by exact ones
        official = isinstance(estimator, OfficialLineRegression) or getattr(estimator, "sampling", "") == "official"
        correctable = isinstance(estimator, CoalitionEstimator) and not official
        self.controlled = correctable and self.options.control_variate
        self._controls = 0 if not correctable else 2 if self.controlled else 1

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
            players = len(record.present)
            estimator = self._estimator(players)
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
        slope = best_slope(fits)
        found = torch.zeros(2, len(fits), n, dtype=torch.float64)  # values and squared errors
        left, before = 0.0, 0.0
        for place, (fit, record) in enumerate(zip(fits, records, strict=False)):  # pooled, all have all lines
            values, variance = fit.controlled(slope)
            found[:, place, record.present] = torch.stack([values, variance])
            told = variance.isfinite()
            left += float(variance[told].sum())
            before += float(fit.controlled(0.0)[1][told].sum())
        values, variance = found[0].mean(0), found[1].mean(0) / len(fits)
        correlation = math.sqrt(max(0.0, 1 - left / before)) if before > 0 else 0.0
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
            "frames": self._n_frames,
            "rounds": self.options.rounds,
            "control_variate": self.controlled,
            "seed": self.options.seed,
            "pooled": self.pooled,
        }

    def state_dict(self) -> dict[str, Any]:
        """Plain Python and tensors, fit for checkpoints with `weights_only=True` and for sending between processes."""
        records = [[id_, record.to_dict()] for id_, record in self.records.items()]
        return {"settings": self.settings(), "records": records}

    @whole_state
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

    def _estimator(self, players: int) -> ShapleyEstimator | None:
        if self.options.estimator == "regression" and not self.pooled:
            return regression_alone(players, self.budget, self._n_frames)
        return self.estimator

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
        players = len(record.present)
        estimator = self._estimator(players)
        if estimator is None or not players:
            return Fit.final(record.proxy_values, torch.zeros(players, dtype=torch.float64))
        if record.solved.numel():
            return Fit.final(record.solved[0], record.solved[1] ** 2)
        if isinstance(estimator, CoalitionEstimator) and len(record.units) >= estimator.least_units(players):
            return Fit.of(estimator, [record.sampled(1.0, self._controls)], self._known([record]))
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
        samples = [record.sampled(1 / len(records), self._controls) for record in records]
        return Fit.of(self.estimator, samples, self._known(records))

    def _known(self, records: list[FrameRecord]) -> Tensor:
        """Exact values of the games that take over noise, of frames with as many players: `[p, k - 1]`."""
        players = len(records[0].present)
        shared = torch.full((players,), 1 / players, dtype=torch.float64)
        gap = torch.stack([record.proxy_values for record in records]).mean(0)
        return torch.stack([shared, gap][: self._controls], 1) if self._controls else shared[:, None][:, :0]


def line_shapley(
    model: nn.Module,
    frames: Iterable[Frame],
    *,
    estimator: EstimatorName | ShapleyEstimator = "regression",
    budget: int | str = "auto",
    control_variate: bool = True,
    seed: int = 0,
    completion: CompletionOptions | None = None,
    num_lines: int = 64,
    candidates: Candidates = "visible",
    min_pixels: int = 1,
    progress: bool = True,
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
