"""Which estimator of `lightning_eff.shapley` estimates the values of lines, and with which coalitions.

Lidar games are rough where few lines are left: what one line alone or two do to a completion differs from line to line
by metres. Hence the Shapley kernel's share of small coalitions, singles first, once the budget allows; strata of the
same coalitions need least of all, but pull values together, which no number of frames averages out.

Shapes: `n` players, `P` units of two coalitions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from torch import Tensor

from lightning_eff.arguments import check_whole
from lightning_eff.lidar.official import OfficialLineRegression
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
from lightning_eff.shapley.coalitions import CoalitionSequence
from lightning_eff.shapley.estimator import resolve_budget

EstimatorName = Literal[
    "regression", "stratified", "unbiased_kernel", "permutation", "exact", "leave_one_out", "official", "gap"
]

# Rows of a regression per unknown, from measurements on real and synthetic frames. With fewer, a frame is better pooled
# with others.
_ROWS_ALONE = 2
# With more, a frame is better off with single lines first. They stretch the values by some percent, which falls with
# the rows and does not average out: the second number holds for more than a few frames.
_ROWS_SINGLES, _ROWS_SINGLES_MANY, _FEW_FRAMES = 4, 10, 8
# With more in all, pooled frames are better off with sizes drawn by the Shapley kernel.
_ROWS_KERNEL = 6


@dataclass(frozen=True)
class SinglesFirstRegression(RegressionShapley):
    """The regression on the coalitions that strata take: single lines first, then sizes drawn by the Shapley kernel."""

    def sequence(self, n: int, seed: int, group: int) -> CoalitionSequence:
        """As `CoalitionEstimator.sequence`."""
        return _SmallerHalves(StratifiedShapley().sequence(n, seed, group))


class _SmallerHalves:
    """The smaller coalition of every pair, which is how the regression counts pairs of a size."""

    def __init__(self, inner: CoalitionSequence) -> None:
        self._inner, self.length = inner, inner.length

    def take(self, count: int) -> Tensor:
        """As `CoalitionSequence.take`."""
        rows = self._inner.take(count)
        larger = 2 * rows.sum(1) > rows.shape[1]
        return rows ^ larger[:, None]


@dataclass(frozen=True)
class EstimationOptions:
    """How values are estimated.

    Attributes:
        estimator: `"regression"`, `"stratified"` and `"unbiased_kernel"` sample coalitions, which rounds and the
            control variate are for; `"permutation"`, `"exact"` and `"leave_one_out"` do everything in the first round;
            `"official"` is the regression of the published code, which converges to another value; `"gap"` takes the
            values of the gap game, without asking a network. Or an estimator of `lightning_eff.shapley`, whose own
            budget is not read.
        budget: evaluations a frame, those of no line and of all included: a number, a multiple of the candidates such
            as `"20n"`, or `"auto"`: 1,200 for up to 16 frames, 256 for up to 200, 128 beyond.
        rounds: rounds that the budget is spread over. They do not change the values.
        control_variate: take out what the gap game explains.
        seed: of all coalitions.

    Raises:
        ValueError: an argument out of range.
    """

    estimator: EstimatorName | ShapleyEstimator = "regression"
    budget: int | str = "auto"
    rounds: int = 1
    control_variate: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        """Check choices and ranges."""
        if not isinstance(self.estimator, ShapleyEstimator) and self.estimator not in get_args(EstimatorName):
            raise ValueError(
                f"estimator must be one of {', '.join(get_args(EstimatorName))}, or a ShapleyEstimator, got "
                f"{self.estimator!r}"
            )
        resolve_budget(self.budget, 1, auto=1)
        for name, least in (("rounds", 1), ("seed", 0)):
            check_whole(name, getattr(self, name), least)

    def evaluations(self, n_frames: int, n_lines: int) -> int:
        """Evaluations a frame that the budget stands for."""
        return resolve_budget(self.budget, n_lines, auto=1200 if n_frames <= 16 else 256 if n_frames <= 200 else 128)

    def build(self, evaluations: int) -> ShapleyEstimator | None:
        """The estimator, for frames with many lines; None for the gap game."""
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


def regression_alone(n: int, evaluations: int, n_frames: int) -> RegressionShapley:
    """The regression for a frame with `n` lines, one of `n_frames`, that is solved alone.

    Single lines come first unless rows are few, or so many that sizes taken in turn reach all single lines too; those
    draw without replacement.
    """
    regression = RegressionShapley(evaluations)
    units = (evaluations - 2) // regression.unit_cost
    rows = _ROWS_SINGLES if n_frames <= _FEW_FRAMES else _ROWS_SINGLES_MANY
    if rows * regression.least_units(n) <= units < n**2 / 2:
        return SinglesFirstRegression(evaluations)
    return regression


def pooled(estimator: ShapleyEstimator | None, n: int, evaluations: int, n_frames: int) -> bool:
    """Whether frames with `n` lines are better solved together: two and more of a regression, with few rows each."""
    if not isinstance(estimator, RegressionShapley) or n_frames < 2:
        return False
    units, least = (evaluations - 2) // estimator.unit_cost, estimator.least_units(n)
    return 0 < units < _ROWS_ALONE * least and units * n_frames >= least


def regression_together(n: int, evaluations: int, n_frames: int) -> RegressionShapley:
    """The regression for frames that are solved together."""
    regression = RegressionShapley(evaluations)
    rows = (evaluations - 2) // regression.unit_cost * n_frames
    many = rows >= _ROWS_KERNEL * regression.least_units(n)
    return replace(regression, sampling="kernel") if many else regression
