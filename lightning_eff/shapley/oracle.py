"""The yardstick of rankings: the best set of every size, the Oracle rank made of them, and how near a ranking comes.

Oracle sets O_k = argmax over |S| = k of v(S), and the overlap of a ranking with them when channels are added or
removed: "Shapley Pruning for Neural Network Compression" (arXiv 2407.15875), code `kamadforge/dirichlet_pruning`.
The Oracle rank by counting, regret and area under the curve are ours.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_eff.reporting import Column, Report, Table
from lightning_eff.shapley.estimator import Progress, ShapleyWarning
from lightning_eff.shapley.exact import ExactShapley
from lightning_eff.shapley.games import Game, TableGame, nested_coalitions
from lightning_eff.shapley.greedy import greedy_backward_order
from lightning_eff.shapley.table import coalitions_of, sizes_of, value_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ROUNDING = 1e-12  # values this near, as a share of the largest, are one value


@dataclass(eq=False)
class OracleSets(Report):
    """The best sets of a game with `n` players. They need not be nested, so that no ranking need meet all of them.

    Attributes:
        sizes: int64 `[K]`, numbers k of players kept, ascending.
        kept: bool `[K, n]`, the best set of each size; of equally good ones that with the lexicographically smallest
            indices.
        values: float64 `[K]`, v(O_k).
        ties: int64 `[K]`, how many other sets of the size are as good.
        game: the value of every coalition.
        names: a name for each player, from the game's `names`.
    """

    sizes: Tensor
    kept: Tensor
    values: Tensor
    ties: Tensor
    game: TableGame
    names: list[str] | None = None

    @property
    def n_players(self) -> int:
        """Number of players `n`."""
        return self.kept.shape[1]

    @property
    def nested(self) -> Tensor:
        """Whether each set is part of the next larger one, bool `[K - 1]`."""
        return ~(self.kept[:-1] & ~self.kept[1:]).any(1)

    def keep(self, k: int) -> tuple[int, ...]:
        """The best `k` players to keep, O_k; ValueError for a size that is not in `sizes`."""
        return _players(self.kept[self._row(k)])

    def remove(self, r: int) -> tuple[int, ...]:
        """The best `r` players to remove, N without O_{n-r}; ValueError where n - r is not in `sizes`."""
        return _players(~self.kept[self._row(self.n_players - r)])

    def best(self, k: int, count: int = 5) -> list[tuple[tuple[int, ...], float]]:
        """The `count` best sets of size `k` with their values, best first, ties as in `kept`.

        Raises:
            ValueError: `k` outside 0..n.
        """
        if not 0 <= k <= self.n_players:
            raise ValueError(f"k must lie in 0..{self.n_players}, got {k}")
        codes = _lexicographic_codes(self.n_players)
        codes = codes[sizes_of(codes, self.n_players) == k]
        first = self.game.values[codes].argsort(descending=True, stable=True)[:count]
        members = coalitions_of(codes[first], self.n_players)
        return [(_players(row), float(self.game.values[code])) for row, code in zip(members, codes[first], strict=True)]

    def tables(self) -> dict[str, Table]:
        """One row a size: the set kept, its value, how many are as good, whether it is part of the next."""
        names = self.names or [str(player) for player in range(self.n_players)]
        nested: list[str | None] = [*("yes" if inside else "no" for inside in self.nested.tolist()), None]
        rows = [
            (k, " ".join(names[player] for player in self.keep(k)), self.values[row], self.ties[row], nested[row])
            for row, k in enumerate(self.sizes.tolist())
        ]
        columns: list[str | Column] = [
            "kept",
            Column("best set", align="left"),
            Column("value", ".4f"),
            "ties",
            "part of the next",
        ]
        return {"oracle": Table("Oracle sets", columns, rows, "ties: other sets of the size that are as good.")}

    def _row(self, k: int) -> int:
        found = (self.sizes == k).nonzero().flatten().tolist()
        if not found:
            raise ValueError(f"no oracle set of size {k}: there are those of sizes {self.sizes.tolist()}")
        return int(found[0])


def oracle_sets(game: Game, sizes: Sequence[int] | None = None, *, progress: Progress | None = None) -> OracleSets:
    """The best set of every size, from all 2**n coalitions.

    Values that differ by less than 1e-12 of the largest count as equal.

    Args:
        game: a game with scalar values and at most 20 players.
        sizes: numbers of players kept, within 0..n; by default 1..n-1.
        progress: called with the number of evaluations just done.

    Raises:
        ValueError: too many players, vector values, or a size outside 0..n.
    """
    table = value_table(game, 'use oracle_rank(game, method="greedy"), n (n + 1) / 2 evaluations', progress)
    if table.ndim > 1:
        raise ValueError(f"oracle sets need scalar values, the game returns vectors of {table.shape[1]} components")
    n = game.n_players
    wanted = sorted(set(range(1, n) if sizes is None else sizes))
    if not all(0 <= size <= n for size in wanted):
        raise ValueError(f"sizes must lie in 0..{n}, got {wanted}")
    near = _ROUNDING * float(table.abs().max())
    in_order = _lexicographic_codes(n)
    size_of = sizes_of(in_order, n)
    chosen, best, ties = [], [], []
    for size in wanted:
        codes = in_order[size_of == size]
        equal = table[codes] >= table[codes].max() - near
        chosen.append(codes[equal][0])
        best.append(table[codes].max())
        ties.append(int(equal.sum()) - 1)
    return OracleSets(
        sizes=torch.tensor(wanted, dtype=torch.int64),
        kept=coalitions_of(torch.tensor([int(code) for code in chosen], dtype=torch.int64), n),
        values=torch.tensor([float(value) for value in best], dtype=torch.float64),
        ties=torch.tensor(ties, dtype=torch.int64),
        game=TableGame(table),
        names=getattr(game, "names", None),
    )


def oracle_rank(game: Game | OracleSets, method: Literal["count", "greedy"] = "count") -> Tensor:
    """Players from best to worst by the oracle, int64 `[n]`.

    Args:
        game: the game, or its oracle sets.
        method: `"count"`: by the number of oracle sets of sizes 1..n-1 a player is in, equal counts by Shapley value,
            then by index, from all 2**n coalitions; `"greedy"`: the reverse of greedy backward elimination, n (n + 1)
            / 2 evaluations.

    Raises:
        ValueError: an unknown method, vector values, or more than 20 players to count.
    """
    if method not in ("count", "greedy"):
        raise ValueError(f'method must be "count" or "greedy", got {method!r}')
    if method == "greedy":
        return greedy_backward_order(game.game if isinstance(game, OracleSets) else game)[0].flip(0)
    oracle = _complete(game)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ShapleyWarning)  # a game without signal has an Oracle rank too
        shapley = ExactShapley().estimate(oracle.game).values
    scale = float(shapley.abs().max()) or 1.0
    steps = (shapley / scale / _ROUNDING).round()  # rounding decides no tie
    counts = oracle.kept.sum(0)
    return torch.from_numpy(np.lexsort((-steps.numpy(), -counts.numpy())))  # stable: equal ones by index


@dataclass(frozen=True, eq=False)
class RankQuality:
    """How near one ranking comes to the oracle. `first k` are its k best players, `last r` its r worst.

    Attributes:
        acc_add: sum over k <= kmax of |O_k and first k| / sum of k, in [0, 1].
        acc_rem: the same of the best sets to remove and the last r, r <= kmax.
        overlap: `acc_add` with kmax = n - 1.
        regret: mean over k of v(O_k) - v(first k), >= 0, in the unit of the game.
        auc: mean over k of v(first k).
        spearman: rank correlation with the Oracle rank.
        kendall: Kendall's tau-b with the Oracle rank.
        displacement: mean over players of |place here - place in the Oracle rank|.
        values: float64 `[n - 1]`, v(first k), k = 1..n-1.
        hits: int64 `[n - 1]`, |O_k and first k|.
    """

    acc_add: float
    acc_rem: float
    overlap: float
    regret: float
    auc: float
    spearman: float
    kendall: float
    displacement: float
    values: Tensor
    hits: Tensor


@dataclass(frozen=True, eq=False)
class RankReport(Report):
    """Rankings beside the oracle: table and figure `ranks`.

    Attributes:
        oracle: the oracle sets of sizes 1..n-1.
        reference: the Oracle rank, int64 `[n]`, best first.
        kmax: up to which size `acc_add` and `acc_rem` look.
        rankings: what each ranking reaches.
    """

    oracle: OracleSets
    reference: Tensor
    kmax: int
    rankings: dict[str, RankQuality]

    def tables(self) -> dict[str, Table]:
        """One row a ranking, the best mean value first, the Oracle sets themselves above."""
        columns: list[str | Column] = [
            "ranking",
            *(Column(name, ".3f") for name in ("mean value", "regret", "overlap", "Acc_add", "Acc_rem")),
            *(Column(name, ".2f") for name in ("Spearman", "Kendall", "displacement")),
        ]
        oracle = ("oracle sets", self.oracle.values.mean(), 0.0, 1.0, 1.0, 1.0, None, None, None)
        rows = [
            (name, q.auc, q.regret, q.overlap, q.acc_add, q.acc_rem, q.spearman, q.kendall, q.displacement)
            for name, q in sorted(self.rankings.items(), key=lambda item: -item[1].auc)
        ]
        caption = (
            f"Mean value and regret over the best 1..{self.oracle.n_players - 1} players; Acc_add and Acc_rem up to "
            f"{self.kmax} players; correlations and displacement against the Oracle rank. "
            f"{int(self.oracle.nested.sum())} of {len(self.oracle.nested)} oracle sets are part of the next."
        )
        return {"ranks": Table("Rankings against the oracle", columns, [oracle, *rows], caption)}

    def figures(self) -> dict[str, Figure]:
        """Value of the kept set, and overlap with the oracle sets, against the number of players kept."""
        from lightning_eff.shapley.figures import ranks_figure

        return {"ranks": ranks_figure(self)}


def compare_ranks(
    ranks: Mapping[str, Tensor], game_or_oracle: Game | OracleSets, kmax: int | None = None
) -> RankReport:
    """Hold rankings against the oracle sets of a game.

    Args:
        ranks: players from best to worst, int `[n]`, under the name of the ranking.
        game_or_oracle: a game of 2 to 20 players with scalar values, or its oracle sets.
        kmax: up to which size the overlaps look, in 1..n-1; by default 5, or n - 1 where that is less.

    Raises:
        ValueError: a ranking that is no permutation of 0..n-1, `kmax` outside its range, or as `oracle_sets`.
    """
    oracle = _complete(game_or_oracle)
    n = oracle.n_players
    if n < 2:
        raise ValueError("a single player leaves nothing to rank: compare_ranks needs at least 2 players")
    kmax = min(5, n - 1) if kmax is None else kmax
    if not 1 <= kmax <= n - 1:
        raise ValueError(f"kmax must lie in 1..{n - 1} (the number of players less one), got {kmax}")
    checked = {name: _permutation(name, rank, n) for name, rank in ranks.items()}
    reference = oracle_rank(oracle)
    return RankReport(
        oracle, reference, kmax, {name: _quality(rank, oracle, reference, kmax) for name, rank in checked.items()}
    )


def _quality(rank: Tensor, oracle: OracleSets, reference: Tensor, kmax: int) -> RankQuality:
    from scipy import stats

    n = len(rank)
    first = nested_coalitions(rank[None, : n - 1], n, "empty")[0]  # [n - 1, n]
    values = oracle.game(first)
    hits = (oracle.kept & first).sum(1)
    hits_removing = (~oracle.kept & ~first).sum(1).flip(0)  # of sizes r = 1..n-1
    places, reference_places = rank.argsort(), reference.argsort()
    return RankQuality(
        acc_add=_share(hits, kmax),
        acc_rem=_share(hits_removing, kmax),
        overlap=_share(hits, n - 1),
        regret=float((oracle.values - values).mean()),
        auc=float(values.mean()),
        spearman=float(stats.spearmanr(places.numpy(), reference_places.numpy()).statistic),
        kendall=float(stats.kendalltau(places.numpy(), reference_places.numpy(), variant="b").statistic),
        displacement=float((places - reference_places).abs().double().mean()),
        values=values,
        hits=hits,
    )


def _share(hits: Tensor, kmax: int) -> float:
    return int(hits[:kmax].sum()) / (kmax * (kmax + 1) // 2)


def _complete(game: Game | OracleSets) -> OracleSets:
    """Oracle sets of all sizes 1..n-1, without a new evaluation where the table is known."""
    if not isinstance(game, OracleSets):
        return oracle_sets(game)
    if game.sizes.tolist() == list(range(1, game.n_players)):
        return game
    complete = oracle_sets(game.game)
    complete.names = game.names
    return complete


def _permutation(name: str, rank: Tensor, n: int) -> Tensor:
    rank = torch.as_tensor(rank)
    if rank.is_floating_point() or rank.ndim != 1 or sorted(rank.tolist()) != list(range(n)):
        raise ValueError(
            f"ranking {name!r} must hold each of the players 0..{n - 1} once, best first (result.rank() does), "
            f"got {rank.tolist()}"
        )
    return rank.long()


def _lexicographic_codes(n: int) -> Tensor:
    """Codes of all coalitions; of those of one size, the lexicographically smallest index sets come first."""
    reverse = torch.arange(2**n - 1, -1, -1)  # bit n - 1 - i = player i: a larger number is an earlier index set
    codes = torch.zeros_like(reverse)
    for player in range(n):
        codes |= (reverse >> (n - 1 - player) & 1) << player
    return codes


def _players(mask: Tensor) -> tuple[int, ...]:
    return tuple(mask.nonzero().flatten().tolist())
