"""Cooperative games: what a player, a coalition and a value are, and the checks on every value taken from a game.

A game maps coalitions of *kept* players to values. Protocols tell what a game can do: be evaluated (`Game`), be walked
one player at a time (`WalkableGame`), be toured with players going to and fro (`TourableGame`), be split into groups of
samples (`GroupedGame`). Nothing here knows what the players are.

Shapes: `n` players, `M` coalitions, `P` walks, `K` steps of a walk, `D` components of a vector value, `G` groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, cast, runtime_checkable

import numpy as np
import torch
from torch import Tensor

Start = Literal["full", "empty"]


@runtime_checkable
class Game(Protocol):
    """A value for every coalition. An optional attribute `names` (one string a player) is carried into the results."""

    @property
    def n_players(self) -> int:
        """Number of players `n`."""
        ...

    def __call__(self, coalitions: Tensor, /) -> Tensor:
        """Values of `coalitions` (bool `[M, n]`, True = kept): float `[M]`, or `[M, D]` for a vector-valued game.

        A row's value must not depend on the other rows.
        """
        ...


@runtime_checkable
class WalkableGame(Game, Protocol):
    """A game that evaluates a chain of nested coalitions faster than the same coalitions one by one."""

    def walk(self, orders: Tensor, *, start: Start = "full") -> Tensor:
        """Values along `P` walks: float `[P, K+1]` or `[P, K+1, D]`, entry 0 being the value of the start coalition.

        Args:
            orders: int64 `[P, K]`, distinct players of each walk in the order in which they leave (`start="full"`)
                or join (`"empty"`).
            start: the coalition every walk starts from: all players or none.
        """
        ...


@runtime_checkable
class TourableGame(Game, Protocol):
    """A game that evaluates a path of neighbouring coalitions faster than the same coalitions one by one."""

    @property
    def tour(self) -> Callable[[Tensor, Tensor], Tensor]:
        """A method `(start, flips)`; a game that finds out later that it gains nothing raises AttributeError.

        It takes `start`, bool `[n]`, and `flips`, int64 `[K]`: the player who changes sides at each step, any number
        of times. It returns the values after each step, the start first: float `[K+1]` or `[K+1, D]`.
        """
        ...


@runtime_checkable
class GroupedGame(Game, Protocol):
    """A game that is a weighted mean over groups (of samples, of frames): v(S) = sum_g weight_g v_g(S).

    Estimators then draw coalitions for each group by itself, which costs the same and errs less. A method
    `walk_group(group, orders, *, start)` shaped like `WalkableGame.walk` is used where it exists.
    """

    @property
    def n_groups(self) -> int:
        """Number of groups `G`."""
        ...

    @property
    def group_weights(self) -> Tensor:
        """Float `[G]`, sums to 1."""
        ...

    def call_group(self, group: int, coalitions: Tensor, /) -> Tensor:
        """Values of `coalitions` in one group: float `[M]` or `[M, D]`."""
        ...


def evaluate(game: Game, coalitions: Tensor, *, group: int | None = None) -> Tensor:
    """Values of coalitions, checked on the way in and out.

    Args:
        game: the game.
        coalitions: bool `[M, n]`, True = kept.
        group: evaluate this group of a `GroupedGame` instead of the whole game.

    Returns:
        float64 `[M]` or `[M, D]` on the CPU.

    Raises:
        ValueError: `coalitions` is no bool `[M, n]`; the game returned another number of values, or one that is NaN
            or infinite.
    """
    check_coalitions(coalitions, game.n_players)
    raw = game(coalitions) if group is None else cast(GroupedGame, game).call_group(group, coalitions)
    values = as_values(raw, (len(coalitions),))
    require_finite(values, coalitions)
    return values


def evaluate_walks(
    game: Game, orders: Tensor, *, start: Start = "full", group: int | None = None, chunk_size: int = 256
) -> Tensor:
    """Values after each step of nested walks, by the game's own `walk` where it has one, else coalition by coalition.

    Args:
        game: the game.
        orders: int64 `[P, K]`, the players in the order in which they leave or join.
        start: the coalition every walk starts from.
        group: walk this group of a `GroupedGame` instead of the whole game.
        chunk_size: most coalitions handed to one call of a game that cannot walk.

    Returns:
        float64 `[P, K]` or `[P, K, D]` on the CPU: the start is not among the values and not evaluated for them.

    Raises:
        ValueError: as in `evaluate`.
    """
    coalitions = nested_coalitions(orders, game.n_players, start)
    walk = walker(game, group)
    if walk is not None:
        values = as_values(walk(orders, start=start), (len(orders), orders.shape[1] + 1))[:, 1:]
        require_finite(values.flatten(0, 1), coalitions.flatten(0, 1))
        return values
    parts = [evaluate(game, part, group=group) for part in torch.split(coalitions.flatten(0, 1), chunk_size)]
    return torch.cat(parts).reshape(*orders.shape, *parts[0].shape[1:])


def evaluate_tour(game: Game, start: Tensor, flips: Tensor) -> Tensor:
    """Values along a path on which one player changes sides at each step, by the game's `tour`.

    Args:
        game: a game with a `tour`.
        start: bool `[n]`, the first coalition.
        flips: int64 `[K]`, the player who changes sides.

    Returns:
        float64 `[K+1]` or `[K+1, D]` on the CPU, the start first.

    Raises:
        ValueError: as in `evaluate`.
    """
    check_coalitions(start[None], game.n_players)
    values = as_values(cast(TourableGame, game).tour(start, flips), (len(flips) + 1,))
    if not bool(torch.isfinite(values).all()):
        require_finite(values, toured_coalitions(start, flips))
    return values


def toured_coalitions(start: Tensor, flips: Tensor) -> Tensor:
    """The coalitions of a tour, the start first: bool `[n]` and int64 `[K]` -> bool `[K+1, n]`."""
    turned = torch.zeros(len(flips) + 1, len(start), dtype=torch.int64)
    turned[torch.arange(1, len(flips) + 1), flips] = 1
    return start ^ (turned.cumsum(0) % 2).bool()


def walker(game: Game, group: int | None) -> Callable[..., Tensor] | None:
    """The game's own walk (of one group, if given), or None."""
    if group is None:
        return getattr(game, "walk", None)
    walk_group = getattr(game, "walk_group", None)
    return None if walk_group is None else lambda orders, *, start: walk_group(group, orders, start=start)


def nested_coalitions(orders: Tensor, n_players: int, start: Start) -> Tensor:
    """The coalitions that walks pass through after each step: int64 `[P, K]` -> bool `[P, K, n]`."""
    n_walks, steps = orders.shape
    step_of = torch.full((n_walks, n_players), steps, dtype=torch.int64)  # `steps`: not touched by this walk
    step_of.scatter_(1, orders, torch.arange(steps).expand(n_walks, steps))
    moved = step_of[:, None, :] <= torch.arange(steps)[None, :, None]
    return moved if start == "empty" else ~moved


def check_coalitions(coalitions: Tensor, n_players: int) -> None:
    """Raises ValueError unless `coalitions` is bool `[M, n]`."""
    if coalitions.dtype != torch.bool or coalitions.ndim != 2 or coalitions.shape[1] != n_players:
        raise ValueError(
            f"coalitions must be bool [M, {n_players}] (one row a coalition, True = kept), "
            f"got {str(coalitions.dtype).removeprefix('torch.')} {list(coalitions.shape)}"
        )


def as_values(raw: Any, shape: tuple[int, ...]) -> Tensor:
    """What a game returned as float64 on the CPU; ValueError unless shaped `shape` or `shape + (D,)`."""
    values = torch.as_tensor(raw).detach().to("cpu", torch.float64)
    if values.shape[: len(shape)] != shape or values.ndim > len(shape) + 1:
        raise ValueError(f"the game must return {list(shape)} or {[*shape, 'D']} values, got {list(values.shape)}")
    return values


def require_finite(values: Tensor, coalitions: Tensor) -> None:
    """Raises ValueError naming the first of `coalitions` `[M, n]` whose value (of `[M]` or `[M, D]`) is not finite."""
    finite = torch.isfinite(values.reshape(len(coalitions), -1)).all(1)
    if not bool(finite.all()):
        first = int((~finite).nonzero()[0])
        players = tuple(coalitions[first].nonzero().flatten().tolist())
        raise ValueError(
            f"the game returned {values[first].tolist()} for the coalition that keeps players {players} "
            f"({int((~finite).sum())} of {len(finite)} values of this call are not finite); values must be finite"
        )


def group_weights(game: Game) -> Tensor | None:
    """Checked float64 weights `[G]` of a game with two or more groups; None for any other game."""
    if not isinstance(game, GroupedGame) or game.n_groups < 2:
        return None
    weights = torch.as_tensor(game.group_weights).detach().to("cpu", torch.float64)
    if weights.shape != (game.n_groups,) or bool((weights < 0).any()) or abs(float(weights.sum()) - 1) > 1e-6:
        raise ValueError(f"group_weights must be {game.n_groups} numbers >= 0 that sum to 1, got {weights.tolist()}")
    return weights


class TableGame:
    """The game given by all its 2**n values.

    Args:
        values: `[2**n]` or `[2**n, D]`, n >= 1; entry `c` is the value of the coalition that keeps player i where bit
            i of `c` is set.

    Raises:
        ValueError: the number of values is no power of two, or below 2.

    Example:
        >>> TableGame([0.0, 1.0, 2.0, 5.0])(torch.tensor([[False, True]]))
        tensor([2.], dtype=torch.float64)
    """

    def __init__(self, values: Any) -> None:
        self.values = torch.as_tensor(values, dtype=torch.float64)
        size = len(self.values)
        if size < 2 or size & (size - 1):
            raise ValueError(f"a table needs 2**n values for n >= 1 players, got {size}")
        self.n_players = size.bit_length() - 1
        self.names: list[str] | None = None

    def __call__(self, coalitions: Tensor) -> Tensor:
        """As `Game.__call__`."""
        return self.values[(coalitions.long() << torch.arange(self.n_players)).sum(1)]


class FunctionGame:
    """A plain function of coalitions (bool `[M, n]` -> `[M]` or `[M, D]`, tensor or array) as a game."""

    def __init__(self, function: Callable[[Tensor], Any], n_players: int) -> None:
        self.function, self.n_players = function, n_players
        self.names: list[str] | None = None

    def __call__(self, coalitions: Tensor) -> Tensor:
        """As `Game.__call__`."""
        return torch.as_tensor(self.function(coalitions))


def as_game(obj: Any, n_players: int | None = None, *, names: Sequence[str] | None = None) -> Game:
    """Make a game of what describes one.

    Args:
        obj: a `Game` (returned as it is); a callable on coalitions (bool `[M, n]` -> `[M]` or `[M, D]`), with
            `n_players`; a dict from the tuple of kept players to the value, all 2**n of them, `()` included; or 2**n
            values as `TableGame` takes them.
        n_players: number of players; needed for a callable, otherwise checked.
        names: a name for each player, carried into the results; a `Game` has its own, in its attribute `names`.

    Raises:
        ValueError: a callable without `n_players`, a dict with missing or unknown coalitions, another number of
            players than `n_players`, or of names; names for a `Game`.
        TypeError: `obj` is nothing of the above.
    """
    game: Game
    if isinstance(obj, Game):
        if names is not None:
            raise ValueError("a Game names its players itself: give it an attribute names")
        game = obj
    elif isinstance(obj, Mapping):
        game = _game_of_dict(obj, n_players)
    elif callable(obj):
        if n_players is None:
            raise ValueError("a callable does not tell its number of players: pass n_players")
        game = FunctionGame(obj, n_players)
    elif isinstance(obj, Tensor | np.ndarray | list | tuple):
        game = TableGame(obj)
    else:
        raise TypeError(f"expected a Game, a callable, a dict or 2**n values, got {type(obj).__name__}")
    if n_players is not None and game.n_players != n_players:
        raise ValueError(f"the game has {game.n_players} players, n_players says {n_players}")
    if isinstance(game, FunctionGame | TableGame) and names is not None:
        if len(names) != game.n_players:
            raise ValueError(f"expected one name for each of {game.n_players} players, got {len(names)}")
        game.names = list(names)
    return game


def _game_of_dict(table: Mapping[tuple[int, ...], Any], n_players: int | None) -> TableGame:
    n = n_players if n_players is not None else 1 + max((max(kept, default=-1) for kept in table), default=-1)
    values: list[Any] = [None] * 2**n
    for kept, value in table.items():
        if len(set(kept)) != len(kept) or not all(0 <= player < n for player in kept):
            raise ValueError(f"a coalition is a tuple of distinct players in 0..{n - 1}, got {kept}")
        code = sum(1 << player for player in kept)
        if values[code] is not None:
            raise ValueError(f"coalition {kept} is there twice, with its players in another order")
        values[code] = value
    missing = [code for code, value in enumerate(values) if value is None]
    if missing:
        first = tuple(player for player in range(n) if missing[0] >> player & 1)
        raise ValueError(
            f"{n} players have 2**{n} = {2**n} coalitions, {len(missing)} have no value, the first is {first}"
        )
    return TableGame(values)
