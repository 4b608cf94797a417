"""The gap game: what missing lines cost when they are interpolated from the nearest lines that are left (ours).

Kept lines i < j with none between them leave a gap that costs c(i, j), whatever is kept elsewhere. In the table of
costs lines are numbered 1..n, between the sentinels 0 and n + 1; everywhere else they are numbered 0..n-1. With m(S)
the cost of all gaps that S leaves, v(S) = - offset(|S|) - scale(|S|) m(S). Such a game has what no network offers:
exact Shapley values for any number of lines, and a best subset of every size.

With costs in m^2, offset 0 and scale 1 it is minus the mean squared error of the interpolation. `as_rmse` chooses
offset and scale so that v is close to minus its root, in mm.

Shapes: `n` lines, `C` image columns, `M` coalitions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from lightning_eff.lidar.frames import Frame

COLUMNS = 152  # of 8 pixels in a KITTI image


class GapGame:
    """A game of lines given by the costs of the gaps between them.

    Args:
        costs: `[n + 2, n + 2]`, entry `[i, j]`, i < j, the cost of the gap between i and j; others are not read.
        offset: `[n + 1]`, by number of kept lines; zeros if None.
        scale: `[n + 1]`, likewise; ones if None.

    Raises:
        ValueError: shapes that do not fit each other, fewer than one line, costs that are not finite.

    Example:
        >>> costs = torch.zeros(5, 5)
        >>> costs[0, 2:] = torch.tensor([2.0, 6.0, 12.0])
        >>> costs[1, 3:], costs[2, 4] = torch.tensor([3.0, 4.0]), 1.0
        >>> GapGame(costs).shapley() * 6
        tensor([25., 31., 16.], dtype=torch.float64)
    """

    def __init__(self, costs: Tensor, offset: Tensor | None = None, scale: Tensor | None = None) -> None:
        costs = torch.as_tensor(costs, dtype=torch.float64)
        if costs.ndim != 2 or costs.shape[0] != costs.shape[1] or len(costs) < 3:
            raise ValueError(f"costs must be [n + 2, n + 2] for n >= 1 lines, got {list(costs.shape)}")
        self.n_players = n = len(costs) - 2
        self.costs = torch.where(torch.ones_like(costs).triu(1) > 0, costs, 0.0)
        if not bool(self.costs.isfinite().all()):
            raise ValueError("costs must be finite")
        self.offset = _by_size(offset, n, 0.0, "offset")
        self.scale = _by_size(scale, n, 1.0, "scale")

    def __call__(self, coalitions: Tensor) -> Tensor:
        """As `lightning_eff.shapley.Game.__call__`."""
        size = coalitions.sum(1)
        return -self.offset[size] - self.scale[size] * self.total(coalitions)

    def total(self, coalitions: Tensor) -> Tensor:
        """Cost of the gaps that every one of `coalitions` (bool `[M, n]`) leaves: float64 `[M]`."""
        count, n = coalitions.shape
        kept = torch.nn.functional.pad(coalitions, (1, 1), value=True)  # sentinels are always there
        last = torch.where(kept, torch.arange(n + 2), 0).cummax(1).values  # the last kept one up to here
        gap_ends = self.costs[last[:, :-1], torch.arange(1, n + 2).expand(count, -1)]
        return torch.where(kept[:, 1:], gap_ends, 0.0).sum(1)

    def shapley(self) -> Tensor:
        """Exact Shapley values, float64 `[n]`, in O(n^3).

        A gap pays when its ends are kept and nothing between them is: with a ends that are lines and b lines between,
        what it adds to an end, to a line between and to any other depends on a and b alone.
        """
        n = self.n_players
        ends, between = _ends(n), _between(n)
        end, inside, other = (table[ends, between] for table in (_player_weights(n) @ self.scale).unbind())
        # what every line gets from every gap, then what the ends and the lines inside get beyond that
        values = torch.full((n,), float((self.costs * other).sum()), dtype=torch.float64)
        beyond = self.costs * (end - other)
        values += (beyond.sum(0) + beyond.sum(1))[1:-1]
        # a gap (i, j) reaches the lines i + 1 .. j - 1: enter at i + 1, leave at j
        beyond = self.costs * (inside - other)
        values += (beyond.sum(1).roll(1) - beyond.sum(0)).cumsum(0)[1:-1]
        return -values - (self.offset[n] - self.offset[0]) / n

    def mean_total(self) -> Tensor:
        """Mean of `total` over all coalitions of every size 0..n: float64 `[n + 1]`."""
        n = self.n_players
        return (self.costs[..., None] * _presence(n)[_ends(n), _between(n)]).sum((0, 1))

    def best(self, k: int) -> list[int]:
        """The `k` lines, in 0..n-1 and sorted, that leave the smallest total cost, by dynamic programming, O(k n^2).

        Raises:
            ValueError: unless 0 <= k <= n.
        """
        n = self.n_players
        if not 0 <= k <= n:
            raise ValueError(f"k must lie in 0..{n}, got {k}")
        costs = torch.where(torch.ones_like(self.costs).triu(1) > 0, self.costs, math.inf)
        cheapest = costs[0]  # of everything above line j, which is kept, with as many lines kept as rounds are done
        before = []
        for _ in range(k):
            cheapest, previous = (cheapest[:-1, None] + costs[:-1]).min(0)
            before.append(previous)
        chosen, last = [], n + 1
        for previous in reversed(before):
            last = int(previous[last])
            chosen.append(last - 1)
        return chosen[::-1]

    def as_rmse(self) -> GapGame:
        """The game whose values are close to -1000 sqrt(total): RMSE in mm, from costs in m^2.

        The root is replaced by its tangent at the mean total of each size, so that Shapley values stay exact; with no
        line and with all of them it is the root itself.
        """
        root = self.mean_total().clamp(min=0).sqrt()
        slope = torch.where(root > 0, 1 / torch.where(root > 0, root, 1.0), 0.0)
        return GapGame(self.costs, 500 * root, 500 * slope)

    @classmethod
    def of_frame(cls, frame: Frame, lines: Sequence[int] | Tensor, columns: int = COLUMNS) -> GapGame:
        """The game of one frame, costs in m^2.

        Args:
            frame: the frame.
            lines: the players, numbers of lines in increasing order.
            columns: number of image columns.
        """
        return cls(gap_costs(*line_table(frame.sparse[0], frame.line_idx[0], lines, columns)))


def mean_gap_game(games: Sequence[GapGame]) -> GapGame:
    """The game whose costs are the mean of those of `games`, all of the same lines."""
    return GapGame(torch.stack([game.costs for game in games]).mean(0))


def line_table(
    sparse: Tensor, line_idx: Tensor, lines: Sequence[int] | Tensor, columns: int = COLUMNS
) -> tuple[Tensor, Tensor]:
    """Nearest depth of every line in every image column, and the row where it lies.

    Args:
        sparse: depth `[H, W]` in metres, 0 = none.
        line_idx: `[H, W]`.
        lines: the lines wanted, `n` numbers.
        columns: `C`, number of columns that the image is divided into.

    Returns:
        Depth in metres, 0 = no return, and row in pixels, both float64 `[n, C]`.
    """
    position = torch.full((256,), -1, dtype=torch.int64)
    position[torch.as_tensor(lines, dtype=torch.int64)] = torch.arange(len(lines))
    line = position[line_idx.cpu().long()]
    row, column = ((sparse.cpu() > 0) & (line >= 0)).nonzero(as_tuple=True)
    depth = sparse.cpu()[row, column].double()
    cell = line[row, column] * columns + column * columns // sparse.shape[1]
    # far ones first: the last to be written, the nearest, stays (NumPy keeps that order, torch does not promise it)
    order = depth.argsort(descending=True, stable=True)
    table = torch.zeros(2, len(lines) * columns, dtype=torch.float64)
    cells = cell[order].numpy()
    table[0].numpy()[cells] = depth[order].numpy()
    table[1].numpy()[cells] = row[order].double().numpy()
    depths, rows = table.view(2, len(lines), columns).unbind()
    return depths, rows


def gap_costs(depth: Tensor, height: Tensor, empty_depth: float | None = None) -> Tensor:
    """Mean squared errors of inverse depth interpolated across every gap; planes are interpolated exactly.

    Inverse depth on a plane is linear in the image row, and in the tangent of the elevation as seen from the lidar.

    Args:
        depth: `[n, C]` in metres, 0 = no return; it counts for interpolation what the line shows in the nearest column.
        height: where it was seen, `[n, C]` (or `[n]` for all columns): image rows or tangents.
        empty_depth: depth that is assumed without any line; the mean of all returns if None.

    Returns:
        float64 `[n + 2, n + 2]` in m^2, over all returns; lines without a return cost nothing and help nothing.

    Raises:
        ValueError: there is no return at all, or shapes do not fit.
    """
    depth = depth.double()
    n, n_columns = depth.shape
    real = depth > 0
    if not bool(real.any()):
        raise ValueError("no line has a return")
    height = (height[:, None] if height.ndim == 1 else height).double().expand(n, n_columns)
    inverse, height = _fill(real, torch.where(real, 1 / depth.clamp(min=1e-6), 0.0), height)
    empty = float(depth[real].mean()) if empty_depth is None else empty_depth
    costs = torch.zeros(n + 2, n + 2, dtype=torch.float64)
    for i in range(n + 1):
        for j in range(i + 2, n + 2):
            missing = slice(i, j - 1)  # lines i + 1 .. j - 1 are in these rows
            if i == 0 and j == n + 1:
                guess = torch.full_like(inverse, 1 / empty)
            elif i == 0 or j == n + 1:
                guess = inverse[j - 1 if i == 0 else i - 1].expand(j - i - 1, -1)
            else:
                above, below = height[i - 1], height[j - 1]
                apart = below != above
                share = (height[missing] - above) / torch.where(apart, below - above, 1.0)
                share = torch.where(apart, share.clamp(0, 1), 0.5)  # rows of a hole's neighbours need not be in order
                guess = inverse[i - 1] + share * (inverse[j - 1] - inverse[i - 1])
            error = torch.where(real[missing], 1 / guess - depth[missing], 0.0)
            costs[i, j] = error.square().sum()
    return costs / int(real.sum())


def _fill(real: Tensor, inverse: Tensor, height: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse depth and height with holes taken from the nearest column, empty lines from between their neighbours."""
    columns = torch.arange(real.shape[1])
    distance = (columns[:, None] - columns[None, :]).abs()
    nearest = torch.where(real[:, None, :], distance, distance.max() + 1).argmin(2)  # [n, C]
    inverse, height = inverse.gather(1, nearest), height.gather(1, nearest)
    seen = real.any(1).nonzero().flatten()
    for line in (~real.any(1)).nonzero().flatten().tolist():
        above, below = seen[seen < line], seen[seen > line]
        i, j = (int(above[-1]) if len(above) else int(below[0])), (int(below[0]) if len(below) else int(above[-1]))
        share = 0.5 if i == j else (line - i) / (j - i)
        inverse[line], height[line] = (torch.lerp(x[i], x[j], share) for x in (inverse, height))
    return inverse, height


def _by_size(values: Tensor | None, n: int, default: float, name: str) -> Tensor:
    values = torch.full((n + 1,), default) if values is None else torch.as_tensor(values)
    if values.shape != (n + 1,) or not bool(values.isfinite().all()):
        raise ValueError(f"{name} must be {n + 1} finite numbers, one for each number of kept lines, got {values}")
    return values.double()


def _ends(n: int) -> Tensor:
    """Number of ends of every gap that are lines and no sentinels, int64 `[n + 2, n + 2]`."""
    line = torch.ones(n + 2, dtype=torch.int64)
    line[0] = line[-1] = 0
    return line[:, None] + line[None, :]


def _between(n: int) -> Tensor:
    """Number of lines inside every gap, int64 `[n + 2, n + 2]` (0 where there is no gap)."""
    position = torch.arange(n + 2)
    return (position[None, :] - position[:, None] - 1).clamp(min=0, max=n)


@lru_cache(maxsize=8)
def _presence(n: int) -> Tensor:
    """Probability that a gap is there in a coalition of size s: `[3, n + 1, n + 1]` by a ends, b between, s."""
    table = torch.zeros(3, n + 1, n + 1, dtype=torch.float64)
    for a, b, s in _places(n):
        table[a, b, s] = math.comb(n - a - b, s - a) / math.comb(n, s)
    return table


@lru_cache(maxsize=8)
def _player_weights(n: int) -> Tensor:
    """What a gap that pays 1 to coalitions of size s adds to the Shapley value of a line.

    `[3, 3, n + 1, n + 1]`: for an end, a line between and any other line; by a ends, b between, s.
    """
    table = torch.zeros(3, 3, n + 1, n + 1, dtype=torch.float64)
    for a, b, s in _places(n):
        others = n - a - b
        if a:  # joins as the last of coalition S
            table[0, a, b, s] = math.comb(others, s - a) / (n * math.comb(n - 1, s - 1))
        if b:  # joining S closes the gap
            table[1, a, b, s] = -math.comb(others, s - a) / (n * math.comb(n - 1, s))
        if others:  # it changes the size only: S has it, or would get it
            with_it = math.comb(others - 1, s - a - 1) / (n * math.comb(n - 1, s - 1)) if s > a else 0.0
            without = math.comb(others - 1, s - a) / (n * math.comb(n - 1, s)) if s < n - b else 0.0
            table[2, a, b, s] = with_it - without
    return table


def _places(n: int) -> list[tuple[int, int, int]]:
    """All (a, b, s) for which a coalition of size s can leave a gap with a ends and b lines between."""
    return [(a, b, s) for a in range(3) for b in range(n - a + 1) for s in range(a, n - b + 1)]
