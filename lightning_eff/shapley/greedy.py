"""Greedy backward elimination: remove, again and again, the player whose removal hurts least.

No Shapley value, but a strong yardstick for rankings where enumeration is impossible.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_eff.shapley.estimator import Request, ShapleyEstimator, check_counts, player_count
from lightning_eff.shapley.exact import Enumeration
from lightning_eff.shapley.games import Game, evaluate
from lightning_eff.shapley.result import ShapleyResult


@dataclass(frozen=True)
class GreedyBackward(ShapleyEstimator):
    """Rank players by greedy removal: `result.rank()` is the reverse order of removal.

    The values are places, 0 for the player that goes first to n - 1 for the last one: they have no unit, do not add up
    to anything and cannot be compared between games. `result.state["path"]` has the value after 0..n removals.

    Args:
        chunk_size: most coalitions a call of the game; it has no influence on the order.

    Raises:
        ValueError: an argument out of range; from `estimate` also a vector-valued game, or a budget below `cost`.
    """

    chunk_size: int = 256

    def __post_init__(self) -> None:
        check_counts(self, "chunk_size")

    def cost(self, n: int) -> int:
        """As `ShapleyEstimator.cost`."""
        return 1 + n * (n + 1) // 2

    def run(self, game: Game, request: Request) -> ShapleyResult:
        """As `ExactShapley.run`, and raises likewise."""
        n = player_count(game)
        work = Enumeration(self.cost(n), request)
        order, path = greedy_backward_order(game, self.chunk_size, work)
        place = torch.empty(n, dtype=torch.float64)
        place[order] = torch.arange(n, dtype=torch.float64)
        result = work.result(game, place, "greedy_backward", n, "remove", path[0], path[-1])
        result.state = {"order": order.tolist(), "path": path.tolist()}
        return result


def greedy_backward_order(game: Game, chunk_size: int = 256, work: Enumeration | None = None) -> tuple[Tensor, Tensor]:
    """Order of removal and the values on the way: v(all) and n (n + 1) / 2 more evaluations.

    Args:
        game: a game with scalar values.
        chunk_size: most coalitions a call of the game; it has no influence on the order.
        work: counts evaluations.

    Returns:
        The players, first removed first, int64 `[n]`, and v after 0..n removals, float64 `[n + 1]`. Of players that
        are equally good to remove, the one of highest index goes first, so that the lowest ranks best.

    Raises:
        ValueError: a game without players, with vector values, or with values that are not finite.
    """
    n = player_count(game)
    kept = torch.ones(n, dtype=torch.bool)
    path = [_values(game, kept[None], chunk_size, work)[0]]
    order = []
    for _ in range(n):
        candidates = kept.nonzero().flatten().flip(0)  # the first of equals will go
        coalitions = kept.repeat(len(candidates), 1)
        coalitions[torch.arange(len(candidates)), candidates] = False
        values = _values(game, coalitions, chunk_size, work)
        best = int((values == values.max()).nonzero()[0])
        order.append(candidates[best])
        path.append(values[best])
        kept[candidates[best]] = False
    return torch.stack(order), torch.stack(path)


def _values(game: Game, coalitions: Tensor, chunk_size: int, work: Enumeration | None) -> Tensor:
    parts = [evaluate(game, part) for part in torch.split(coalitions, chunk_size)]
    values = torch.cat(parts if work is None else [work.done(part) for part in parts])
    if values.ndim > 1:
        raise ValueError(f"greedy removal needs scalar values, the game returns vectors of {values.shape[1]}")
    return values
