"""All 2**n values of a small game in one tensor: what oracle sets and interactions are read from."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_eff.shapley.estimator import Progress, player_count
from lightning_eff.shapley.games import Game, evaluate

MAX_PLAYERS = 20  # 2**20 values are 8 MB


def value_table(game: Game, instead: str, progress: Progress | None = None, chunk_size: int = 4096) -> Tensor:
    """Values of all coalitions.

    Args:
        game: the game.
        instead: what to use where there are too many players, for the error message.
        progress: called with the number of evaluations just done.
        chunk_size: most coalitions a call of the game.

    Returns:
        float64 `[2**n]` or `[2**n, D]`; entry `c` belongs to the coalition that keeps player i where bit i of `c` is
        set.

    Raises:
        ValueError: more than 20 players, or a value that is not finite.
    """
    n = player_count(game)
    if n > MAX_PLAYERS:
        raise ValueError(
            f"all coalitions of {n} players are 2**{n} = {2**n:,} evaluations, the limit is {MAX_PLAYERS} players; "
            f"{instead}"
        )
    parts = []
    for codes in torch.split(torch.arange(2**n), chunk_size):
        parts.append(evaluate(game, coalitions_of(codes, n)))
        if progress is not None:
            progress(len(codes))
    return torch.cat(parts)


def coalitions_of(codes: Tensor, n: int) -> Tensor:
    """The coalitions with these codes, int64 `[M]` -> bool `[M, n]`."""
    return (codes[:, None] >> torch.arange(n) & 1).bool()


def sizes_of(codes: Tensor, n: int) -> Tensor:
    """Number of players in the coalitions with these codes, int64 `[M]` -> int64 `[M]`."""
    sizes = torch.zeros_like(codes)
    for player in range(n):
        sizes += codes >> player & 1
    return sizes
