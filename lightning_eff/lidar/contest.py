"""What a selection of lines is measured beside: other ways to choose as many, with what they cost.

Shapes: `n` candidates, `L` lines of the sensor, `M` coalitions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_eff.lidar.choosing import gap_choices
from lightning_eff.lidar.evaluation import ALL, NONE, RANDOM, Contestant
from lightning_eff.lidar.frames import Frame
from lightning_eff.lidar.game import FrameGame
from lightning_eff.lidar.gap import GapGame
from lightning_eff.lidar.records import FrameId
from lightning_eff.lidar.report import LineSelection, in_order
from lightning_eff.lidar.selection import (
    greedy_lines,
    most_points,
    random_lines,
    select_lines,
    uniform_lines,
    uniform_sensor_lines,
)
from lightning_eff.lidar.settings import Settings
from lightning_eff.lidar.values import LineValues

DRAWS = 10  # of lines at random

Gather = Callable[[Any], list[Any]]
"""Hands an object to all processes and returns those of all, in their order."""

Frames = Callable[[], Iterable[Frame]]
"""Reads the calibration frames of this process once more."""


def alone(mine: Any) -> list[Any]:
    """The `Gather` of a single process."""
    return [mine]


class PassGame:
    """v of sets of candidates, a mean over calibration frames that are read again at every call.

    Args:
        n_players: `n`.
        frames: reads the frames of this process.
        played: the game of a frame; None without ground truth.
        gather: how processes tell each other what they know.

    Attributes:
        n_players: `n`.
        forwards: of the network, over all processes.
    """

    def __init__(
        self, n_players: int, frames: Frames, played: Callable[[Frame], FrameGame | None], gather: Gather
    ) -> None:
        self.n_players, self.forwards = n_players, 0
        self._frames, self._played, self._gather = frames, played, gather

    def __call__(self, coalitions: Tensor) -> Tensor:
        """As `lightning_eff.shapley.Game.__call__`."""
        found: dict[FrameId, tuple[Tensor, int]] = {}
        for frame in self._frames():
            game = None if frame.id in found else self._played(frame)
            if game is not None:
                shown = coalitions[:, game.present]
                found[frame.id] = game(shown), len(torch.unique(shown, dim=0))
        every = {id_: one for part in self._gather(found) for id_, one in part.items()}
        self.forwards += sum(count for _, count in every.values())
        return torch.stack([every[id_][0] for id_ in in_order(every)]).mean(0)

    def without_one(self) -> Tensor:
        """What leaving out each candidate alone costs, `[n]`."""
        n = self.n_players
        values = self(torch.cat([torch.ones(1, n, dtype=torch.bool), ~torch.eye(n, dtype=torch.bool)]))
        return values[0] - values[1:]


def baseline_lines(
    asked: Settings, found: LineValues, pixels: Tensor, game: PassGame | None, gap: GapGame | None
) -> tuple[dict[str, dict[int, list[int]]], dict[str, int]]:
    """The lines that every baseline keeps, for every k, and the forwards that it took.

    Args:
        asked: which baselines.
        found: values of the candidates.
        pixels: of every line of the sensor, `[L]`.
        game: asks the network; what needs it is left out without.
        gap: the gap game of all frames, likewise.
    """
    n, lines, sizes = len(found.lines), found.lines, list(asked.k)
    sets: dict[str, dict[int, list[int]]] = {}
    forwards: dict[str, int] = {}

    def keep(name: str, places: Callable[[int], Sequence[int]]) -> None:
        sets[name] = {k: sorted(lines[place] for place in places(min(k, n))) for k in sizes}

    for name in asked.baselines:
        before = 0 if game is None else game.forwards
        if name == "uniform":
            keep(name, lambda k: uniform_lines(n, k))
        elif name == "uniform_sensor":
            sets[name] = {k: uniform_sensor_lines(asked.num_lines, k) for k in sizes}
        elif name == "top":
            keep(name, lambda k: select_lines(found.values, k, "none"))
            forwards[name] = found.evaluations
        elif name == "most_points":
            keep(name, lambda k: most_points(pixels[lines], k))
        elif name == "loo" and game is not None:
            worth = game.without_one()
            keep(name, lambda k, worth=worth: select_lines(worth, k, "none"))  # type: ignore[misc]
        elif name == "greedy" and game is not None:
            order = greedy_lines(game, min(max(sizes), n))
            keep(name, lambda k, order=order: order[:k])  # type: ignore[misc]
        if game is not None and game.forwards > before:
            forwards[name] = game.forwards - before
    if gap is not None:
        best, greedy = gap_choices(gap, sizes, lines)
        sets |= {name: one for name, one in {"gap_greedy": greedy, "gap_dp": best}.items() if name in asked.baselines}
    return sets, forwards


def contestants(result: LineSelection, asked: Settings) -> list[Contestant]:
    """All that is measured side by side: the selection, its baselines, draws at random, all lines and none."""
    own = str(result.settings.get("spread", asked.spread.rule))
    if {*result.rules.values()} == {"greedy"}:
        own = "greedy"
    rows = [Contestant(own, k, (tuple(lines),), result.forwards) for k, lines in result.selected.items()]
    for name, sets in result.baselines.items():
        if name != own and (name, own) != ("top", "none"):
            spent = result.baseline_forwards.get(name, 0)
            rows += [Contestant(name, k, (tuple(lines),), spent) for k, lines in sets.items()]
    if RANDOM in asked.baselines:
        n = len(result.lines)
        for k in result.selected:
            draws = random_lines(n, min(k, n), DRAWS, asked.estimation.seed)
            rows.append(Contestant(RANDOM, k, tuple(tuple(result.lines[p] for p in places) for places in draws)))
    if asked.dynamic is not None:
        rows += [Contestant(f"dynamic {asked.dynamic.source}", k, None) for k in result.selected]
    return [*rows, Contestant(ALL, None, (tuple(range(asked.num_lines)),)), Contestant(NONE, None, ((),))]
