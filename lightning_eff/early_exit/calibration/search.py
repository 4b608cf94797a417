"""Three ways to look for thresholds, each exact in what it varies, and coordinate search from where they end.

``uniform``: one threshold for all exits. ``geometric``: quotas ``p^(k+1)``, MSDNet (arXiv 1703.09844). ``lagrangian``:
accuracy minus a price on cost, by coordinate ascent; it finds points on the convex hull of the trade-off only, and may
stop short, which is why it is never used alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from lightning_eff.early_exit.calibration.problem import (
    TOLERANCE,
    Array,
    Goal,
    Problem,
    Setting,
    run_ends,
)

# (right [M], cost [M], allowed [M]) of the thresholds an exit may take -> position of the one it takes
Pick = Callable[[Array, Array, Array], int]

MAX_SWEEPS = 20
PRICE_RATIO = 1.001


def uniform(problem: Problem, goal: Goal) -> Setting:
    """Best common threshold; every score is tried.

    Falling through the scores, the common threshold meets a sample first at its highest score, then at each earlier
    exit that beats all before it: these are the only events.
    """
    scores, exits = problem.scores, problem.exits
    before = np.maximum.accumulate(np.vstack([np.full(problem.samples, -math.inf), scores[:-1]]), axis=0)
    later = np.full(problem.samples, exits)
    values, samples, goes_from, goes_to = [], [], [], []
    for k in reversed(range(exits)):
        index = np.flatnonzero(scores[k] > before[k])
        values.append(scores[k, index])
        samples.append(index)
        goes_from.append(later[index])
        goes_to.append(np.full(len(index), k))
        later[index] = k
    value, sample, old, new = map(np.concatenate, (values, samples, goes_from, goes_to))
    order = np.argsort(-value, kind="stable")
    value, sample, old, new = value[order], sample[order], old[order], new[order]
    ends = run_ends(value)
    right = _totals(problem.correct[new, sample] - problem.correct[old, sample], ends, int(problem.correct[-1].sum()))
    cost = _totals(problem.costs[new] - problem.costs[old], ends, problem.samples * float(problem.costs[-1]))
    allowed = np.ones(len(right), dtype=bool)
    if problem.min_exit_samples:
        for k in range(exits):
            allowed &= problem.allows(_totals((new == k).astype(int) - (old == k), ends, 0))
    position = goal.best(right, cost, allowed)
    threshold = math.inf if position == 0 else float(value[ends[position - 1]])
    return problem.evaluate([threshold] * exits)


def geometric(problem: Problem, goal: Goal) -> Setting:
    """Best of the quotas with p = 1/20, 2/20 .. 39/20."""
    settings = (problem.evaluate(geometric_thresholds(problem, p / 20)) for p in range(1, 40))
    return max(settings, key=goal.rank)


def geometric_thresholds(problem: Problem, p: float) -> list[float]:
    """Thresholds at which the surest ``floor(N q_k)`` of the samples still there leave at exit k.

    ``q_k = p^(k+1) / sum_j p^(j+1)`` for the outputs ``k = 0 .. E``; an exit without quota is disabled.
    """
    quotas = p ** np.arange(1, problem.exits + 2)
    # 1e-9: a quota that is a whole number must not be rounded below it
    wanted = np.floor(problem.samples * quotas / quotas.sum() + 1e-9).astype(int)
    thresholds = []
    left = np.arange(problem.samples)
    for scores, quota in zip(problem.scores, wanted[:-1], strict=True):
        here = scores[left]
        quota = min(int(quota), int((here > -math.inf).sum()))
        if quota < max(1, problem.min_exit_samples):
            thresholds.append(math.inf)
            continue
        thresholds.append(float(np.partition(here, len(here) - quota)[len(here) - quota]))
        left = left[here < thresholds[-1]]
    return thresholds


def lagrangian(problem: Problem, goal: Goal) -> Iterator[Setting]:
    """Settings that maximise accuracy minus price times cost, for prices that close in on the goal."""
    costs = np.unique(problem.costs)
    if len(costs) == 1:
        low = high = 1.0
    else:
        # below, all samples' costs together weigh less than one right answer; above, one answer less than any saving
        low, high = 0.5 / (problem.samples * np.ptp(costs)), 2 / np.diff(costs).min()
    nothing_leaves = (math.inf,) * problem.exits

    def at(price: float) -> Setting:
        return coordinate_search(problem, nothing_leaves, _highest_value(price))

    free = at(low)
    yield free
    if goal.met(free.right, free.cost) == (goal.budget is not None):
        return  # the most accurate setting is affordable, or not accurate enough
    while high / low > PRICE_RATIO:
        price = math.sqrt(low * high)
        setting = at(price)
        yield setting
        if goal.met(setting.right, setting.cost) == (goal.budget is not None):
            high = price
        else:
            low = price


def climb(problem: Problem, goal: Goal, start: Setting) -> Setting:
    """Move one threshold at a time to its best place until no move helps."""
    return max(start, coordinate_search(problem, start.thresholds, goal.best), key=goal.rank)


def coordinate_search(problem: Problem, start: tuple[float, ...], pick: Pick) -> Setting:
    """Set the exits, last to first, to the threshold ``pick`` chooses with all others fixed, until none moves.

    All thresholds of one exit are judged at once: by prefix sums, over the samples that reach it, surest first, of what
    changes when they leave there instead of where they would leave otherwise.
    """
    thresholds = list(start)
    leaves = (problem.scores >= np.array(start)[:, None]) & (np.array(start) < math.inf)[:, None]
    reaches = np.ones_like(leaves)
    now = problem.evaluate(start)
    right, cost = now.right, now.cost
    for _ in range(MAX_SWEEPS):
        for k in range(1, problem.exits):
            reaches[k] = reaches[k - 1] & ~leaves[k - 1]
        otherwise = np.full(problem.samples, problem.exits)
        moved = False
        for k in reversed(range(problem.exits)):
            order, ends, values = problem.ranking[k]
            d_right = (problem.correct[k] - problem.correct[otherwise, np.arange(problem.samples)]) * reaches[k]
            d_cost = (problem.costs[k] - problem.costs[otherwise]) * reaches[k]
            # position 0 is the disabled exit
            rights = _totals(d_right[order], ends, right - int(d_right[leaves[k]].sum()))
            costs = _totals(d_cost[order], ends, cost - float(d_cost[leaves[k]].sum()))
            position = pick(rights, costs, _allowed(problem, k, reaches[k], otherwise))
            if rights[position] != right or abs(costs[position] - cost) > TOLERANCE * cost:
                right, cost, moved = int(rights[position]), float(costs[position]), True
                thresholds[k] = math.inf if position == 0 else float(values[position - 1])
                leaves[k] = problem.scores[k] >= thresholds[k] if position else False
            otherwise[leaves[k]] = k
        if not moved:
            break
    return problem.evaluate(thresholds)


def _totals(changes: Array, ends: Array, start: float) -> Any:
    """Running totals: before any change, and after the changes up to each of ``ends``."""
    return np.concatenate([[start], start + np.cumsum(changes, dtype=type(start))[ends]])


def _allowed(problem: Problem, k: int, reaches: Array, otherwise: Array) -> Array:
    """Which thresholds of exit ``k`` leave it and all later ones with no or enough samples."""
    order, ends, _ = problem.ranking[k]
    allowed = np.ones(len(ends) + 1, dtype=bool)
    if problem.min_exit_samples:
        allowed &= problem.allows(_totals(reaches[order], ends, 0))
        for later in range(k + 1, problem.exits):
            goes_there = reaches & (otherwise == later)
            allowed &= problem.allows(_totals(-goes_there[order].astype(int), ends, int(goes_there.sum())))
    return allowed


def _highest_value(price: float) -> Pick:
    def pick(right: Array, cost: Array, allowed: Array) -> int:
        return int(np.where(allowed, right - price * cost, -math.inf).argmax())

    return pick
