"""From values of lines to the lines that are kept, of the sensor's own numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_eff.lidar.gap import GapGame
from lightning_eff.lidar.selection import best_selection, greedy_lines, select_lines, swap_lines
from lightning_eff.lidar.settings import Spread
from lightning_eff.shapley import Game


@dataclass(frozen=True)
class Choice:
    """Lines that were chosen.

    Attributes:
        lines: numbers of the sensor, in increasing order.
        rule: what chose them, with its options.
        scores: v of what all rules chose, where they were tried out.
    """

    lines: list[int]
    rule: str
    scores: dict[str, float] = field(default_factory=dict)


def choose(
    values: Tensor, sizes: Sequence[int], lines: Sequence[int], spread: Spread, game: Game | None = None
) -> dict[int, Choice]:
    """Choose lines by their values.

    Args:
        values: `[n]`, of the candidates from top to bottom.
        sizes: how many to keep, each a number of its own.
        lines: the candidates' numbers, increasing.
        spread: by what rule.
        game: tells v of sets of candidates. Without it what needs one is left out: `"auto"` is `"region"`, nothing is
            refined.

    Returns:
        What was chosen for every size.
    """
    if game is not None and spread.refine == "greedy":
        order = greedy_lines(game, min(max(sizes, default=0), len(lines)))
        return {k: Choice(_numbers(order[:k], lines), "greedy") for k in sizes}
    chosen = {}
    for k in sizes:
        places, rule, scores = _by_rule(values, k, lines, spread, game)
        if game is not None and spread.refine == "swap" and 0 < len(places) < len(lines):
            better = swap_lines(game, places, spread.max_swaps)
            places, rule = better, rule if better == places else f"{rule}, swapped"
        chosen[k] = Choice(_numbers(places, lines), rule, scores)
    return chosen


def _by_rule(
    values: Tensor, k: int, lines: Sequence[int], spread: Spread, game: Game | None
) -> tuple[list[int], str, dict[str, float]]:
    angles = None
    if spread.distance == "angle":
        angles = torch.tensor(spread.angles, dtype=torch.float64)[list(lines)]
    if spread.rule == "auto" and game is not None and 0 < k < len(lines):
        won = best_selection(values, k, game, angles=angles)
        return won.lines, won.rule, won.scores
    rule = "region" if spread.rule == "auto" else spread.rule
    return select_lines(values, k, rule, angles=angles, **spread.options), rule, {}


def gap_choices(game: GapGame, sizes: Sequence[int], lines: Sequence[int]) -> tuple[dict[int, list[int]], ...]:
    """The best lines of the gap game for every size, and those that were added one by one; no network is asked."""
    n = len(lines)
    order = greedy_lines(game, min(max(sizes, default=0), n))
    best = {k: _numbers(game.best(min(k, n)), lines) for k in sizes}
    return best, {k: _numbers(order[:k], lines) for k in sizes}


def kept_pixels(sparse: Tensor, line_idx: Tensor, lines: Sequence[int] | Mapping[int, Sequence[int]]) -> Tensor:
    """Where a pixel belongs to one of the lines, bool shaped like `line_idx` `[B, 1, H, W]`.

    Args:
        sparse: `[B, 1, H, W]`.
        line_idx: `[B, 1, H, W]`.
        lines: numbers of the sensor, for all frames or by the frame's place in the batch.
    """
    if not isinstance(lines, Mapping):
        return torch.isin(line_idx.long(), _on(lines, line_idx)) & (sparse > 0)
    rows = [torch.isin(line_idx[place].long(), _on(lines[place], line_idx)) for place in range(len(line_idx))]
    return torch.stack(rows) & (sparse > 0)


def _on(lines: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(list(lines), dtype=torch.int64, device=like.device)


def _numbers(places: Sequence[int], lines: Sequence[int]) -> list[int]:
    return sorted(lines[place] for place in places)
