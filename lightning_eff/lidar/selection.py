"""Which K lines to keep: rules that weigh the lines' values against how they spread, baselines, and searches.

Plain top K clusters: neighbours are worth much because either of them is, and both together little more than one.
Rules after "Lidar Line Selection with Spatially-Aware Shapley Value" (arXiv 2303.11720), whose published code has
`region` and `separation`; `mmr` is maximal marginal relevance (Carbonell and Goldstein 1998), `facility` facility
location.

Lines are numbered 0..n-1 from the top here: candidates, not lines of the sensor. All sets come sorted, and of equal
values the lower number goes first. Shapes: `n` lines, `M` coalitions.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor

from lightning_eff.lidar.lines import LidarWarning
from lightning_eff.shapley.games import Game, evaluate

Rule = Literal["none", "region", "separation", "mmr", "facility"]


def select_lines(
    values: Tensor, k: int, rule: Rule = "region", *, angles: Tensor | None = None, **options: Any
) -> list[int]:
    """Choose lines by value and spread.

    Args:
        values: `[n]`, of the lines from top to bottom.
        k: how many to keep. More than there are: all of them, with a warning.
        rule: `"none"` takes the k most valuable; the others are `region`, `separation`, `mmr` and `facility` below.
        angles: elevations `[n]`, falling, to measure distances by; by number of lines if None.
        **options: of the rule.

    Returns:
        `min(k, n)` distinct lines, sorted.

    Raises:
        ValueError: values that are not finite or no vector, a negative k, an unknown rule or option.

    Example:
        >>> select_lines(torch.tensor([5.0, 1, 4, 4, 0, 9, 2, 2]), 3)
        [0, 5, 6]
    """
    worth = _checked_values(values)
    if rule not in get_args(Rule):
        raise ValueError(f"rule must be one of {', '.join(get_args(Rule))}, got {rule!r}")
    k = _checked_count(k, len(worth))
    place = _places(len(worth), angles)
    if k in (0, len(worth)):
        return list(range(k))
    try:
        return sorted(_RULES[rule](worth, place, k, **options))
    except TypeError as error:
        raise ValueError(f"rule {rule!r} does not take these options: {error}") from None


def by_value(worth: Sequence[float], place: Sequence[float], k: int) -> list[int]:
    """The k most valuable lines, best first."""
    return _falling(worth)[:k]


def region(worth: Sequence[float], place: Sequence[float], k: int) -> list[int]:
    """The most valuable line of each of k regions of equal height.

    A region without lines, which only angles can give, yields to the most valuable line left.
    """
    n = len(worth)
    best: dict[int, int] = {}
    for line in _falling(worth):
        best.setdefault(math.floor(place[line] * k / n), line)
    chosen = list(best.values())
    rest = [line for line in _falling(worth) if line not in chosen]
    return chosen + rest[: k - len(chosen)]


def separation(
    worth: Sequence[float],
    place: Sequence[float],
    k: int,
    gap: int | Literal["auto"] = 1,
    backfill: Literal["relax", "value"] = "relax",
) -> list[int]:
    """Walk lines by falling value and take each that is more than `gap` lines from all taken before.

    Args:
        worth: values of the lines.
        place: where they are.
        k: how many.
        gap: `"auto"`: the largest that gives k lines.
        backfill: what follows when too few are found (the published code keeps too few): `"relax"` walks again with a
            gap smaller by one, and so on; `"value"` takes the most valuable lines left.
    """
    if gap != "auto" and (not isinstance(gap, int) or isinstance(gap, bool) or gap < 0):
        raise ValueError(f'gap must be an int >= 0 or "auto", got {gap!r}')
    if backfill not in ("relax", "value"):
        raise ValueError(f'backfill must be "relax" or "value", got {backfill!r}')
    order = _falling(worth)
    if gap == "auto":
        tried = (_apart([], order, place, k, g) for g in range(len(worth) // max(1, k - 1), -1, -1))
        return next(chosen for chosen in tried if len(chosen) == k)
    chosen = _apart([], order, place, k, gap)
    smaller = range(gap - 1, -1, -1) if backfill == "relax" else [0]
    for g in smaller:
        chosen = _apart(chosen, order, place, k, g)
    return chosen


def mmr(worth: Sequence[float], place: Sequence[float], k: int, balance: float = 0.5) -> list[int]:
    """Begin with the most valuable line, add the one that is best in value and in distance from those taken.

    Args:
        worth: values of the lines.
        place: where they are.
        k: how many.
        balance: weight of the distance against the value, both scaled to 0..1; in [0, 1].
    """
    if not 0 <= balance <= 1:
        raise ValueError(f"balance must lie in [0, 1], got {balance}")
    n, low, high = len(worth), min(worth), max(worth)
    quality = [(value - low) / (high - low) if high > low else 0.0 for value in worth]
    chosen = _falling(worth)[:1]
    while len(chosen) < k:
        rest = [line for line in range(n) if line not in chosen]
        far = {line: min(abs(place[line] - place[other]) for other in chosen) for line in rest}
        chosen.append(max(rest, key=lambda line: (1 - balance) * quality[line] + balance * min(far[line] * k / n, 1.0)))
    return chosen


def facility(worth: Sequence[float], place: Sequence[float], k: int, width: float = 1.0) -> list[int]:
    """Greedy maximisation of the value that the lines taken stand for.

    That is the sum over lines j of max(phi_j, 0) times the maximum over lines s taken of exp(-((j - s) / sigma)^2).

    Args:
        worth: values of the lines.
        place: where they are.
        k: how many.
        width: sigma in units of n / (2 k), half the distance of evenly spread lines; positive.
    """
    if not 0 < width < math.inf:
        raise ValueError(f"width must be positive, got {width}")
    sigma = width * len(worth) / k / 2
    where = torch.tensor(place, dtype=torch.float64)
    near = torch.exp(-(((where[:, None] - where[None, :]) / sigma) ** 2))  # of line j to candidate s
    demand = torch.tensor(worth, dtype=torch.float64).clamp(min=0)
    served = torch.zeros(len(worth), dtype=torch.float64)
    chosen: list[int] = []
    while len(chosen) < k:
        gain = demand @ (near - served[:, None]).clamp(min=0)
        gain[chosen] = -math.inf
        chosen.append(_falling(gain.tolist())[0])
        served = torch.maximum(served, near[:, chosen[-1]])
    return chosen


_RULES: dict[Rule, Callable[..., list[int]]] = {
    "none": by_value,
    "region": region,
    "separation": separation,
    "mmr": mmr,
    "facility": facility,
}


# Rules tried out on the game.


@dataclass(frozen=True)
class Selection:
    """A set of lines that won.

    Attributes:
        rule: what it was chosen by, with its options, as in `selections`.
        lines: sorted, in 0..n-1.
        score: v of the set.
        scores: v of the sets of all rules.
    """

    rule: str
    lines: list[int]
    score: float
    scores: dict[str, float]


def selections(values: Tensor, k: int, *, angles: Tensor | None = None) -> dict[str, list[int]]:
    """The sets that all rules choose, with various options, and evenly spread lines: name -> lines."""

    def chosen(rule: Rule, **options: Any) -> list[int]:
        return select_lines(values, k, rule, angles=angles, **options)

    return {
        "none": chosen("none"),
        "region": chosen("region"),
        **{f"separation, gap {gap}": chosen("separation", gap=gap) for gap in range(5)},
        **{f"mmr, balance {balance}": chosen("mmr", balance=balance) for balance in (0.1, 0.3, 0.5, 0.7, 0.9)},
        **{f"facility, width {width}": chosen("facility", width=width) for width in (0.5, 1.0, 2.0)},
        "uniform": uniform_lines(len(values), k),
    }


def best_selection(values: Tensor, k: int, game: Game, *, angles: Tensor | None = None) -> Selection:
    """The best of `selections` on the game, about 14 evaluations: on its frames never worse than evenly spread lines.

    Args:
        values: `[n]`.
        k: how many to keep.
        game: tells v of every set; a `LineGame` of the calibration frames.
        angles: see `select_lines`.
    """
    sets = selections(values, k, angles=angles)
    distinct = {tuple(lines): 0.0 for lines in sets.values()}
    found = evaluate(game, as_coalitions(distinct, game.n_players)).tolist()
    known = dict(zip(distinct, found, strict=True))
    scores = {rule: known[tuple(lines)] for rule, lines in sets.items()}
    winner = max(scores, key=lambda rule: scores[rule])
    return Selection(winner, sets[winner], scores[winner], scores)


# What rules are compared with.


def uniform_lines(n: int, k: int) -> list[int]:
    """Evenly spread lines, the first and the last among them; a single one lies in the middle."""
    k = _checked_count(k, n)
    return [(n - 1) // 2] if k == 1 else [round(i * (n - 1) / (k - 1)) for i in range(k)]


def uniform_sensor_lines(num_lines: int, k: int, *, official: bool = False) -> list[int]:
    """Evenly spread lines of the whole sensor, those that the camera does not see included.

    Args:
        num_lines: lines of the sensor.
        k: how many to keep.
        official: as the published code does, every (num_lines // k)-th line: more than k unless k divides num_lines.
    """
    if not official:
        return uniform_lines(num_lines, k)
    k = _checked_count(k, num_lines)
    return list(range(0, num_lines, num_lines // k)) if k else []


def random_lines(n: int, k: int, draws: int = 10, seed: int = 0) -> list[list[int]]:
    """`draws` random sets of k lines."""
    k = _checked_count(k, n)
    generator = np.random.default_rng(seed)
    return [sorted(generator.permutation(n)[:k].tolist()) for _ in range(draws)]


def most_points(pixels: Tensor, k: int) -> list[int]:
    """The k lines with most pixels, `pixels` `[n]`."""
    return select_lines(pixels.double(), k, "none")


def spread_ablation(values: Tensor, k: int = 16, most_extra: int = 23, seed: int = 0) -> list[list[int]]:
    """Sets of k lines of falling total value and growing spread: of the k + i most valuable ones, i dropped at random.

    Args:
        values: `[n]`.
        k: how many to keep.
        most_extra: i runs from 0 to this, as far as there are lines.
        seed: of what is dropped.
    """
    generator = np.random.default_rng(seed)
    order = _falling(_checked_values(values))
    k = _checked_count(k, len(order))
    extras = range(min(most_extra, len(order) - k) + 1)
    return [sorted(np.array(order[: k + i])[generator.permutation(k + i)[:k]].tolist()) for i in extras]


# Searches that play the game itself.


def greedy_lines(game: Game, k: int) -> list[int]:
    """Add the line that gains most, k times, sum over j < k of (n - j) evaluations: lines in the order of joining.

    The first j of them are what the search would have chosen for j.
    """
    n = game.n_players
    chosen: list[int] = []
    for _ in range(_checked_count(k, n)):
        rest = [line for line in range(n) if line not in chosen]
        found = evaluate(game, as_coalitions([[*chosen, line] for line in rest], n)).tolist()
        chosen.append(rest[_falling(found)[0]])
    return chosen


def swap_lines(game: Game, lines: Sequence[int], max_swaps: int = 20) -> list[int]:
    """Exchange the pair of a kept and a dropped line that gains most, until nothing gains: k (n - k) evaluations each.

    Args:
        game: tells v of every set.
        lines: the set to begin with.
        max_swaps: most exchanges.

    Returns:
        A set of as many lines, sorted, with v at least that of `lines`.
    """
    n, kept = game.n_players, sorted(lines)
    value = float(evaluate(game, as_coalitions([kept], n)))
    for _ in range(max_swaps):
        others = [line for line in range(n) if line not in kept]
        tried = [sorted({*kept, new} - {old}) for old in kept for new in others]
        if not tried:
            break
        found = evaluate(game, as_coalitions(tried, n)).tolist()
        best = _falling(found)[0]
        if found[best] <= value:
            break
        kept, value = tried[best], found[best]
    return kept


def as_coalitions(sets: Iterable[Iterable[int]], n: int) -> Tensor:
    """Sets of lines as coalitions, bool `[M, n]`."""
    rows = [list(lines) for lines in sets]
    coalitions = torch.zeros(len(rows), n, dtype=torch.bool)
    for row, lines in zip(coalitions, rows, strict=True):
        row[lines] = True
    return coalitions


def _apart(chosen: list[int], order: list[int], place: Sequence[float], k: int, gap: int) -> list[int]:
    """`chosen` and, by `order`, what is more than `gap` from all of it, up to k."""
    chosen = list(chosen)
    for line in order:
        if len(chosen) == k:
            break
        if line not in chosen and all(abs(place[line] - place[other]) > gap for other in chosen):
            chosen.append(line)
    return chosen


def _falling(worth: Sequence[float]) -> list[int]:
    return sorted(range(len(worth)), key=lambda line: -worth[line])


def _places(n: int, angles: Tensor | None) -> list[float]:
    """Where lines are, in mean distances of neighbours: 0 for the first, n - 1 for the last."""
    if angles is None or n == 1:
        return [float(line) for line in range(n)]
    if angles.shape != (n,) or not bool((angles[:-1] > angles[1:]).all()):
        raise ValueError(f"angles must be {n} falling elevations, got {angles.tolist()}")
    return cast("list[float]", ((angles[0] - angles.double()) / (angles[0] - angles[-1]) * (n - 1)).tolist())


def _checked_values(values: Tensor) -> list[float]:
    values = torch.as_tensor(values, dtype=torch.float64)
    if values.ndim != 1 or not len(values) or not bool(values.isfinite().all()):
        raise ValueError(f"values must be [n] finite numbers for n >= 1 lines, got {values}")
    return cast("list[float]", values.tolist())


def _checked_count(k: int, n: int) -> int:
    if not isinstance(k, int) or isinstance(k, bool) or k < 0:
        raise ValueError(f"k must be a whole number >= 0, got {k!r}")
    if k > n:
        warnings.warn(f"k = {k} lines are wanted, there are {n}: all of them are kept", LidarWarning, stacklevel=3)
    return min(k, n)
