"""Thresholds for a budget or an accuracy, from scores recorded on validation data."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch

from lightning_eff.arguments import check_choice, check_number, check_whole
from lightning_eff.documents import parsed
from lightning_eff.early_exit.calibration import search
from lightning_eff.early_exit.calibration.problem import Goal, Problem, Setting

Method = Literal["lagrangian", "uniform", "geometric"]

# below these, thresholds of single exits follow the samples rather than the distribution they come from
ENOUGH_EVENTS = 10_000
ENOUGH_EXIT_SAMPLES = 30


@dataclass(frozen=True)
class Calibration:
    """Thresholds that were found, and what they give on the data they were found on.

    Attributes:
        thresholds: ``[E]`` in the domain of the scores: a sample leaves if its score is at least that; +inf disables an
            exit, at -inf every sample leaves.
        accuracy: share of right answers, in [0, 1].
        cost: mean cost of a sample, in the unit of the costs.
        met: whether the goal is; if not, this is the setting that comes nearest.
        exit_rate: ``[K]``, share of the samples that leave at each output.
        method: how they were looked for.
    """

    thresholds: tuple[float, ...]
    accuracy: float
    cost: float
    met: bool
    exit_rate: tuple[float, ...]
    method: Method

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python, for checkpoints."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Calibration:
        """Undo :meth:`to_dict`; ValueError for anything else."""
        found: Calibration = parsed(cls, state, "the calibration")
        if len(found.exit_rate) != len(found.thresholds) + 1:
            raise ValueError(f"expected one exit rate more than thresholds, got {found.exit_rate}, {found.thresholds}")
        return found


def calibrate(
    scores: Any,
    correct: Any,
    costs: Any,
    *,
    budget: float | None = None,
    target_accuracy: float | None = None,
    max_drop: float | None = None,
    method: Method = "lagrangian",
    min_exit_samples: int = 0,
) -> Calibration:
    """Find the most accurate thresholds within a budget, or the cheapest that keep an accuracy.

    Use validation data, never test data. Of equally good settings the cheaper one is taken. ``"uniform"``: one
    threshold for all exits, exact. ``"geometric"``: quotas of MSDNet (arXiv 1703.09844). ``"lagrangian"``: accuracy
    minus a price on cost, by coordinate ascent; then the best of all three methods, each climbed on from one threshold
    at a time, so that it is never below them on these data.

    Args:
        scores: ``[E, N]`` of each exit and sample, tensor or array, higher is surer.
        correct: ``[K, N]``, K = E + 1, whether each output is right; the last is the backbone's own.
        costs: ``[K]`` of a sample that leaves at each output, > 0, in any unit; with all heads on, a disabled one
            makes it cheaper than told.
        budget: mean cost of a sample, > 0, in the unit of ``costs``.
        target_accuracy: share of right answers, in [0, 1].
        max_drop: share of right answers that may be lost against the backbone's own output, in [0, 1].
        method: how to look.
        min_exit_samples: an exit takes none or at least that many samples, >= 0; raise it against thresholds that
            follow single samples.

    Raises:
        ValueError: not exactly one goal is given, shapes disagree, there are fewer than two samples, or a value is out
            of its range.

    Warns:
        UserWarning: the goal cannot be reached (``met`` is False), or the data are so few that thresholds of single
            exits are likely to follow them rather than what they stand for.

    Example:
        >>> scores = [[0.9, 0.8, 0.3, 0.2]]
        >>> correct = [[1, 1, 0, 1], [1, 1, 1, 1]]
        >>> calibrate(scores, correct, [0.5, 1.0], max_drop=0, method="uniform").cost
        0.75
    """
    check_goal(budget, target_accuracy, max_drop)
    check_method(method, min_exit_samples)
    problem = _problem(scores, correct, costs, min_exit_samples)
    if max_drop is not None:
        target_accuracy = float(problem.correct[-1].mean()) - max_drop
    goal = Goal(problem.samples, budget, target_accuracy)
    best = _search(problem, goal, method)
    met = bool(goal.met(best.right, best.cost))
    found = Calibration(
        thresholds=best.thresholds,
        accuracy=best.right / problem.samples,
        cost=best.cost / problem.samples,
        met=met,
        exit_rate=tuple(count / problem.samples for count in best.counts),
        method=method,
    )
    if not met:
        _warn_unreachable(found, budget, target_accuracy)
    elif method != "uniform":
        _warn_few(problem, best)
    return found


def _search(problem: Problem, goal: Goal, method: Method) -> Setting:
    if method == "uniform":
        best = search.uniform(problem, goal)
    elif method == "geometric":
        best = search.geometric(problem, goal)
    else:
        starts = [search.uniform(problem, goal), search.geometric(problem, goal)]
        starts.append(max(search.lagrangian(problem, goal), key=goal.rank))
        best = max((search.climb(problem, goal, start) for start in starts), key=goal.rank)
        best = _tightened(problem, best)
    return best if goal.met(best.right, best.cost) else max(problem.cheapest(), best, key=goal.rank)


def _tightened(problem: Problem, setting: Setting) -> Setting:
    """The same exits for all samples by the highest thresholds; an exit that no sample takes is disabled."""
    left_at = problem.left_at(setting.thresholds)
    return replace(
        setting,
        thresholds=tuple(float(problem.scores[k, left_at == k].min(initial=math.inf)) for k in range(problem.exits)),
    )


def check_goal(budget: float | None, target_accuracy: float | None, max_drop: float | None) -> None:
    """Raise ValueError unless exactly one goal is given, in its range."""
    goals = {"budget": budget, "target_accuracy": target_accuracy, "max_drop": max_drop}
    given = {name: value for name, value in goals.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"expected one of budget, target_accuracy and max_drop, got {given or 'none'}")
    for name, value in given.items():
        if name == "budget":
            check_number(name, value, above=0)
        else:
            check_number(name, value, least=0, most=1)


def check_method(method: str, min_exit_samples: int) -> None:
    """Raise ValueError for an unknown method or a number of samples that is none."""
    check_choice("method", method, get_args(Method))
    check_whole("min_exit_samples", min_exit_samples, 0)


def _problem(scores: Any, correct: Any, costs: Any, min_exit_samples: int) -> Problem:
    scores, correct, costs = (_array(values) for values in (scores, correct, costs))
    shapes = f"scores {list(scores.shape)}, correct {list(correct.shape)}, costs {list(costs.shape)}"
    if scores.ndim != 2 or not len(scores) or correct.shape != (len(scores) + 1, scores.shape[1]):
        raise ValueError(f"expected scores [E, N], correct [E + 1, N] and costs [E + 1], got {shapes}")
    if costs.shape != correct.shape[:1]:
        raise ValueError(f"expected one cost for each of the {len(correct)} outputs, got {shapes}")
    if scores.shape[1] < 2:
        raise ValueError(f"expected at least two samples to calibrate on, got {scores.shape[1]}")
    if np.isnan(scores).any():
        raise ValueError(f"scores of exit {int(np.isnan(scores).any(1).argmax())} are NaN; a sample never sure is -inf")
    if not np.isin(correct, (0, 1)).all():
        raise ValueError("expected correct to hold only 0 and 1, or booleans")
    if not (np.isfinite(costs) & (costs > 0)).all():
        raise ValueError(f"expected finite costs > 0, got {costs.tolist()}")
    if scores.dtype not in (np.float32, np.float64):
        scores = scores.astype(np.float64)
    return Problem(scores, correct.astype(np.int8), costs.astype(np.float64), min_exit_samples)


def _array(values: Any) -> Any:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        # NumPy has no bfloat16
        return (values.float() if values.is_floating_point() and values.itemsize < 4 else values).numpy()
    return np.asarray(values)


def _warn_unreachable(found: Calibration, budget: float | None, target_accuracy: float | None) -> None:
    if budget is not None:
        text = f"a mean cost of {budget:.4g} is out of reach: the cheapest setting costs {found.cost:.4g}"
    else:
        text = (
            f"an accuracy of {target_accuracy:.4g} is out of reach: the most accurate setting has {found.accuracy:.4g}"
        )
    warnings.warn(f"{text}; its thresholds are returned with met=False", stacklevel=3)


def _warn_few(problem: Problem, best: Setting) -> None:
    reasons = []
    if problem.samples * problem.exits < ENOUGH_EVENTS:
        reasons.append(f"{problem.samples} samples x {problem.exits} exits are fewer than {ENOUGH_EVENTS:,} scores")
    few = [k for k, count in enumerate(best.counts[:-1]) if 0 < count < ENOUGH_EXIT_SAMPLES]
    if few:
        counts = ", ".join(f"{best.counts[k]} at exit {k}" for k in few)
        reasons.append(f"fewer than {ENOUGH_EXIT_SAMPLES} samples leave at some exits ({counts})")
    if reasons:
        warnings.warn(
            f"thresholds of single exits are likely to over-fit: {'; '.join(reasons)}. Use more validation data, "
            f'method="uniform", or min_exit_samples={ENOUGH_EXIT_SAMPLES} or more',
            stacklevel=3,
        )
