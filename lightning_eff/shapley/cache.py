"""Values of coalitions that were evaluated once and never again: `CachedGame`, in memory and in files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_eff.documents import reading, whole_file, write_text
from lightning_eff.shapley.games import (
    Game,
    Start,
    as_values,
    check_coalitions,
    group_weights,
    nested_coalitions,
    require_finite,
    toured_coalitions,
    walker,
)
from lightning_eff.shapley.official_files import Style, format_official, parse_official

_WHOLE = -1  # group number of values of the whole game


class CachedGame:
    """A game that remembers, group by group where it has groups; a walkable game still walks what is new.

    When the game returns a NaN, the finite values of that call are kept before the error is raised.

    Args:
        game: the game to evaluate where a value is not known yet.
        fingerprint: says what the values depend on beside the coalition (weights, metric, samples); a file with
            another one is refused.

    Attributes:
        hits: coalitions answered from memory.
        misses: coalitions the game had to evaluate.
    """

    def __init__(self, game: Game, fingerprint: str = "") -> None:
        self.game, self.fingerprint = game, fingerprint
        self.n_players = game.n_players
        self.names = getattr(game, "names", None)
        weights = group_weights(game)
        self.n_groups = 1 if weights is None else len(weights)
        self.group_weights = torch.ones(1, dtype=torch.float64) if weights is None else weights
        self.hits = self.misses = 0
        self._known: dict[int, dict[bytes, Any]] = {}  # group -> packed coalition -> float or list of D floats

    def __len__(self) -> int:
        return sum(map(len, self._known.values()))

    def __call__(self, coalitions: Tensor) -> Tensor:
        """As `Game.__call__`."""
        return self._call(_WHOLE, coalitions)

    def call_group(self, group: int, coalitions: Tensor) -> Tensor:
        """As `GroupedGame.call_group`; a game without groups is one group, number 0."""
        return self._call(self._table_of(group), coalitions)

    @property
    def tour(self) -> Callable[[Tensor, Tensor], Tensor]:
        """As `TourableGame.tour`: a tour that meets anything new is made whole.

        Raises:
            AttributeError: the game has no tour.
        """
        inner: Callable[[Tensor, Tensor], Tensor] = self.game.tour  # type: ignore[attr-defined]

        def remembered(start: Tensor, flips: Tensor) -> Tensor:
            coalitions = toured_coalitions(start, flips)
            keys, table = _keys(coalitions), self._known.setdefault(_WHOLE, {})
            new = {key for key in keys if key not in table}
            self._count(len(new), len(keys))
            if new:
                self._remember(table, coalitions, as_values(inner(start, flips), (len(coalitions),)))
            return self._recall(table, keys)

        return remembered

    @property
    def walk(self) -> Callable[..., Tensor]:
        """As `WalkableGame.walk`: a walk that meets anything new is walked whole.

        Raises:
            AttributeError: the game does not walk.
        """
        if walker(self.game, None) is None:
            raise AttributeError("the game does not walk")
        return lambda orders, *, start="full": self._walk(_WHOLE, orders, start)

    @property
    def walk_group(self) -> Callable[..., Tensor]:
        """As `walk`, in one group."""
        if walker(self.game, None if self.n_groups == 1 else 0) is None:
            raise AttributeError("the game does not walk in groups")
        return lambda group, orders, *, start="full": self._walk(self._table_of(group), orders, start)

    def save(self, path: str | Path) -> None:
        """Write an NPZ file; an existing one is replaced in one step.

        It holds `masks` uint8 `[M, ceil(n/8)]` (numpy.packbits, kept = 1), `values` float64 `[M]` or `[M, D]`,
        `group` int64 `[M]` (-1 = whole game), `n`, `groups` (their number) and `fingerprint`.
        """
        rows = [(group, key, value) for group, table in self._known.items() for key, value in table.items()]
        packed = np.frombuffer(b"".join(key for _, key, _ in rows), np.uint8)
        with whole_file(path) as beside, beside.open("wb") as file:
            np.savez_compressed(
                file,
                masks=packed.reshape(len(rows), -(-self.n_players // 8)),
                values=np.array([value for _, _, value in rows], np.float64),
                group=np.array([group for group, _, _ in rows], np.int64),
                n=np.array(self.n_players),
                groups=np.array(self.n_groups),
                fingerprint=np.array(self.fingerprint),
            )

    def load(self, path: str | Path) -> None:
        """Add the values of a file that `save` wrote; values known already stay.

        Raises:
            ValueError: the file was made with another fingerprint, or for another number of players or groups.
        """
        what = f"{path} holds no values of coalitions"
        # opened here: numpy leaves a file open in which it finds no archive
        with reading(what), Path(path).open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            n, n_groups, fingerprint = int(file["n"]), int(file["groups"]), str(file["fingerprint"])
            masks, values, groups = file["masks"], file["values"], file["group"]
            if masks.dtype != np.uint8 or masks.shape != (len(values), -(-n // 8)) or groups.shape != (len(values),):
                raise ValueError(
                    f"expected masks and groups of {len(values)} values, got {masks.shape}, {groups.shape}"
                )
            if values.dtype.kind != "f" or groups.dtype.kind != "i" or not ((groups >= -1) & (groups < n_groups)).all():
                raise ValueError(f"expected groups in -1..{n_groups - 1}, and numbers as values")
        if fingerprint != self.fingerprint:
            raise ValueError(
                f"{path} holds values of another game: its fingerprint is {fingerprint!r}, "
                f"this game's {self.fingerprint!r}; give another path or delete the file"
            )
        if n != self.n_players or n_groups != self.n_groups:
            raise ValueError(
                f"{path} holds values for {n} players and {n_groups} group(s); "
                f"this game has {self.n_players} players and {self.n_groups} group(s)"
            )
        for mask, value, group in zip(masks, values.tolist(), groups.tolist(), strict=True):
            self._known.setdefault(group, {}).setdefault(mask.tobytes(), value)

    def import_official(self, path: str | Path, style: Style | Literal["auto"] = "auto") -> None:
        """Add the values of an official text file (see `official_files`) as values of the whole game.

        Its accuracies in % become fractions; values known already stay. The file does not tell what network, data and
        metric it belongs to, so that nothing is checked but the number of players.

        Raises:
            ValueError: a line that cannot be read, by its number, or a file for another number of players.
        """
        with reading(str(path)):
            kept, values = parse_official(Path(path).read_text(encoding="utf-8"), style)
        if kept.shape[1] != self.n_players:
            raise ValueError(f"{path}: line 1: it is for {kept.shape[1]} players, this game has {self.n_players}")
        table = self._known.setdefault(_WHOLE, {})
        for key, value in zip(_keys(kept), values.tolist(), strict=True):
            table.setdefault(key, value)

    def export_official(self, path: str | Path, style: Style = "indices", decimals: int = 2) -> None:
        """Write the known values of the whole game, not those of groups, as an official text file.

        Args:
            path: the file; an existing one is replaced.
            style: name removed players by their `"indices"` or by `"flags"`.
            decimals: of the accuracies in %; the official 2 round the values.

        Raises:
            ValueError: values that are no fractions in [0, 1].
        """
        table = self._known.get(_WHOLE, {})
        packed = np.frombuffer(b"".join(table), np.uint8).reshape(len(table), -(-self.n_players // 8))
        kept = torch.from_numpy(np.unpackbits(packed, axis=1, count=self.n_players).astype(bool))
        values = torch.tensor(list(table.values()), dtype=torch.float64)
        write_text(path, format_official(kept, values, style, decimals))

    def _table_of(self, group: int) -> int:
        if not 0 <= group < self.n_groups:
            raise ValueError(f"group must lie in 0..{self.n_groups - 1}, got {group}")
        return _WHOLE if self.n_groups == 1 else group

    def _call(self, group: int, coalitions: Tensor) -> Tensor:
        check_coalitions(coalitions, self.n_players)
        keys = _keys(coalitions)
        table = self._known.setdefault(group, {})
        first_row = {key: row for row, key in reversed(list(enumerate(keys))) if key not in table}
        self._count(len(first_row), len(keys))
        if first_row:
            new = coalitions[sorted(first_row.values())]
            raw = self.game(new) if group == _WHOLE else self.game.call_group(group, new)  # type: ignore[attr-defined]
            self._remember(table, new, as_values(raw, (len(new),)))
        return self._recall(table, keys)

    def _walk(self, group: int, orders: Tensor, start: Start) -> Tensor:
        first = torch.full((len(orders), 1, self.n_players), start == "full")
        coalitions = torch.cat([first, nested_coalitions(orders, self.n_players, start)], dim=1)  # [P, K + 1, n]
        flat = coalitions.flatten(0, 1)
        inner = walker(self.game, None if group == _WHOLE else group)
        assert inner is not None
        keys = _keys(flat)
        table = self._known.setdefault(group, {})
        self._count(len({key for key in keys if key not in table}), len(keys))
        new = torch.tensor([key not in table for key in keys]).view(coalitions.shape[:2]).any(1)
        if bool(new.any()):
            walked = as_values(inner(orders[new], start=start), (int(new.sum()), coalitions.shape[1]))
            self._remember(table, coalitions[new].flatten(0, 1), walked.flatten(0, 1))
        values = self._recall(table, keys)
        return values.reshape(*coalitions.shape[:2], *values.shape[1:])

    def _count(self, new: int, asked: int) -> None:
        self.misses += new
        self.hits += asked - new

    @staticmethod
    def _remember(table: dict[bytes, Any], coalitions: Tensor, values: Tensor) -> None:
        finite = torch.isfinite(values.reshape(len(values), -1)).all(1).tolist()
        for key, value, good in zip(_keys(coalitions), values.tolist(), finite, strict=True):
            if good:
                table.setdefault(key, value)
        require_finite(values, coalitions)

    @staticmethod
    def _recall(table: dict[bytes, Any], keys: list[bytes]) -> Tensor:
        return torch.tensor([table[key] for key in keys], dtype=torch.float64)


def _keys(coalitions: Tensor) -> list[bytes]:
    return [row.tobytes() for row in np.packbits(coalitions.cpu().numpy(), axis=1)]
