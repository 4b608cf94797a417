"""Games whose values are known: tables, grouped and walkable ones, and one that counts its evaluations."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_eff.shapley import TableGame
from lightning_eff.shapley.games import nested_coalitions


def random_game(n: int, seed: int = 0, components: int | None = None) -> TableGame:
    generator = torch.Generator().manual_seed(seed)
    shape = (2**n,) if components is None else (2**n, components)
    return TableGame(torch.randn(shape, generator=generator, dtype=torch.float64))


def all_coalitions(n: int) -> Tensor:
    return (torch.arange(2**n)[:, None] >> torch.arange(n) & 1).bool()


def saturating_game(n: int, seed: int = 0) -> TableGame:
    """A smooth monotone game, as an accuracy is: 1 - exp(-sum of weights), with one strong pair of substitutes."""
    weights = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 4 / n
    kept = all_coalitions(n).double()
    return TableGame(1 - torch.exp(-(kept @ weights)) + 0.3 * torch.maximum(kept[:, 0], kept[:, 1]))


def three_and_one(coalitions: Tensor) -> Tensor:
    """The five-player game [0, 1, 2 all kept] + 0.5 [3 kept]: player 4 is null."""
    return coalitions[:, :3].all(1).double() + 0.5 * coalitions[:, 3].double()


class CountingGame:
    """Hands on to another game and counts the coalitions it is asked for."""

    def __init__(self, game: TableGame) -> None:
        self.game, self.n_players, self.count = game, game.n_players, 0

    def __call__(self, coalitions: Tensor) -> Tensor:
        self.count += len(coalitions)
        return self.game(coalitions)


class WalkableTable(TableGame):
    """A table that can walk, and counts the walks."""

    walks = 0

    def walk(self, orders: Tensor, *, start: str = "full") -> Tensor:
        self.walks += len(orders)
        first = torch.full((len(orders), 1, self.n_players), start == "full")
        coalitions = torch.cat([first, nested_coalitions(orders, self.n_players, start)], dim=1)
        values = self(coalitions.flatten(0, 1))
        return values.reshape(*coalitions.shape[:2], *values.shape[1:])


class GroupedTable:
    """The weighted mean of tables, one a group; counts the coalitions evaluated in groups and as a whole."""

    def __init__(self, tables: list[TableGame], weights: list[float]) -> None:
        self.tables, self.n_players = tables, tables[0].n_players
        self.n_groups, self.group_weights = len(tables), torch.tensor(weights, dtype=torch.float64)
        self.mean = TableGame(sum(w * table.values for w, table in zip(weights, tables, strict=True)))
        self.whole_count = self.group_count = 0

    def __call__(self, coalitions: Tensor) -> Tensor:
        self.whole_count += len(coalitions)
        return self.mean(coalitions)

    def call_group(self, group: int, coalitions: Tensor) -> Tensor:
        self.group_count += len(coalitions)
        return self.tables[group](coalitions)


def grouped_saturating_game(n: int, groups: int) -> GroupedTable:
    tables = [saturating_game(n, seed) for seed in range(groups)]
    weights = torch.arange(1, groups + 1, dtype=torch.float64)
    return GroupedTable(tables, (weights / weights.sum()).tolist())
