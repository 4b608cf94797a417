"""How much two players are worth together beyond what each is worth alone: the Shapley interaction index of pairs.

I_ij = sum over S in N without i, j of s! (n - s - 2)! / (n - 1)! [v(S+i+j) - v(S+i) - v(S+j) + v(S)] (M. Grabisch,
M. Roubens, 1999). Positive: they complement each other; negative: they stand in for each other; 0 for all pairs: the
game is additive.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_eff.shapley.estimator import Progress
from lightning_eff.shapley.games import Game
from lightning_eff.shapley.table import sizes_of, value_table

_INSTEAD = "make a game of fewer players, e.g. of groups of players that come and go together"


def shapley_interaction(game: Game, i: int, j: int) -> Tensor:
    """Shapley interaction index of players `i` and `j`, float64 `[]`, or `[D]` for a vector-valued game.

    It takes all 2**n values; `shapley_interactions` gives those of all pairs for the same price.

    Raises:
        ValueError: more than 20 players, or `i`, `j` that are not two different players.
    """
    n = game.n_players
    if i == j or not (0 <= i < n and 0 <= j < n):
        raise ValueError(f"i and j must be two different players in 0..{n - 1}, got {i} and {j}")
    return _interaction(value_table(game, _INSTEAD), _weights(n), i, j)


def shapley_interactions(game: Game, *, progress: Progress | None = None) -> Tensor:
    """Shapley interaction indices of all pairs, from all 2**n values.

    Args:
        game: a game with at most 20 players.
        progress: called with the number of evaluations just done.

    Returns:
        float64 `[n, n]`, or `[n, n, D]`: symmetric, with a diagonal of 0.

    Raises:
        ValueError: more than 20 players.

    Example:
        >>> from lightning_eff.shapley import TableGame
        >>> shapley_interactions(TableGame([0.0, 1.0, 1.0, 1.5]))  # together they bring 0.5 less than alone
        tensor([[ 0.0000, -0.5000],
                [-0.5000,  0.0000]], dtype=torch.float64)
    """
    n, values = game.n_players, value_table(game, _INSTEAD, progress)
    weights = _weights(n)
    pairs = torch.zeros(n, n, *values.shape[1:], dtype=torch.float64)
    for j in range(n):
        for i in range(j):
            pairs[i, j] = pairs[j, i] = _interaction(values, weights, i, j)
    return pairs


def _weights(n: int) -> Tensor:
    """Weights s! (n - s - 2)! / (n - 1)! of the coalitions of all others, by their codes: float64 `[2**(n - 2)]`."""
    if n < 2:
        return torch.ones(0, dtype=torch.float64)
    of_size = torch.tensor([1 / ((n - 1) * math.comb(n - 2, size)) for size in range(n - 1)], dtype=torch.float64)
    return of_size[sizes_of(torch.arange(2 ** (n - 2)), n - 2)]


def _interaction(values: Tensor, weights: Tensor, i: int, j: int) -> Tensor:
    """I_ij of the table `[2**n(, D)]`, whose axis is cut into bits: above the higher player, his, between, ..."""
    n, (low, high) = len(values).bit_length() - 1, sorted((i, j))
    cube = values.reshape(2 ** (n - 1 - high), 2, 2 ** (high - low - 1), 2, 2**low, *values.shape[1:])
    both = cube[:, 1, :, 1] - cube[:, 1, :, 0] - cube[:, 0, :, 1] + cube[:, 0, :, 0]
    return torch.einsum("s,s...->...", weights, both.flatten(0, 2))
