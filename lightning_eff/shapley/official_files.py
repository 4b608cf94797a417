"""Text files of coalition values as the code of "Shapley Pruning for Neural Network Compression" writes them.

The first line holds the number of players n. Every other line is one coalition, by the players that are *removed*, and
the accuracy in % that is left: either their indices, `3,7,9: 87.25` (nothing removed: `: 99.27`), or a flag for each
player, `0,0,0,1,...: 87.25`.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from lightning_eff.arguments import check_choice, check_whole

Style = Literal["indices", "flags"]


def parse_official(text: str, style: Style | Literal["auto"] = "auto") -> tuple[Tensor, Tensor]:
    """Coalitions and values of an official file.

    Args:
        text: what the file holds; empty lines do not count.
        style: how lines name the removed players. `"auto"`: by flags where a line has n entries, all 0 or 1, by
            indices otherwise. With n <= 2 players such a line can mean both: `"auto"` takes flags if every line is
            like that, and a file where this is wrong needs its style named.

    Returns:
        Kept players, bool `[M, n]`, and accuracies as fractions in [0, 1], float64 `[M]`, in the order of the lines.

    Raises:
        ValueError: with the number of the line that is wrong.
    """
    check_choice("style", style, ("auto", "indices", "flags"))
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines or not lines[0][1].isdecimal() or int(lines[0][1]) < 1:
        where, found = lines[0] if lines else (1, "")
        raise ValueError(f"line {where}: expected the number of players, at least 1, got {found!r}")
    n = int(lines[0][1])
    rows = [(number, *_split(number, line)) for number, line in lines[1:]]
    if style == "auto":
        flags = [len(left) == n and set(left) <= {"0", "1"} for _, left, _ in rows]
        style = "flags" if (any(flags) if n > 2 else all(flags)) else "indices"
    kept = torch.ones(len(rows), n, dtype=torch.bool)
    for row, (number, entries, _) in enumerate(rows):
        kept[row, _removed(number, entries, n, style)] = False
    return kept, torch.tensor([value for _, _, value in rows], dtype=torch.float64)


def format_official(kept: Tensor, values: Tensor, style: Style, decimals: int = 2) -> str:
    """The text of an official file with a line for each of the coalitions, those that remove least first.

    Args:
        kept: bool `[M, n]`.
        values: fractions in [0, 1], `[M]`.
        style: how to name the removed players.
        decimals: of the accuracy in %; the official files have 2, which rounds.

    Raises:
        ValueError: values that are no fractions, an unknown style, or fewer than 0 decimals.
    """
    check_choice("style", style, ("indices", "flags"))
    check_whole("decimals", decimals, 0)
    if values.ndim != 1 or not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError(
            "official files hold accuracies in %: the values of the game must be fractions in [0, 1], got "
            + (f"vectors of {values.shape[1]}" if values.ndim > 1 else f"{values.min()} to {values.max()}")
        )
    removals = [(~row).nonzero().flatten().tolist() for row in kept]
    lines = [str(kept.shape[1])]
    for removed, value in sorted(zip(removals, values.tolist(), strict=True), key=lambda one: (len(one[0]), one[0])):
        left = removed if style == "indices" else [int(player in removed) for player in range(kept.shape[1])]
        lines.append(f"{','.join(map(str, left))}: {100 * value:.{decimals}f}")
    return "\n".join(lines) + "\n"


def _split(number: int, line: str) -> tuple[list[str], float]:
    left, colon, right = line.partition(":")
    try:
        value = float(right) / 100
    except ValueError:
        value = math.nan
    if not colon or not 0 <= value <= 1:
        raise ValueError(f"line {number}: expected removed players, a colon and an accuracy in 0..100 %, got {line!r}")
    entries = [entry.strip() for entry in left.split(",")] if left.strip() else []
    if not all(entry.isdecimal() for entry in entries):
        raise ValueError(f"line {number}: expected whole numbers before the colon, got {left!r}")
    return entries, value


def _removed(number: int, entries: list[str], n: int, style: Style) -> list[int]:
    if style == "flags":
        if len(entries) != n or not set(entries) <= {"0", "1"}:
            raise ValueError(f"line {number}: expected a 0 or 1 for each of the {n} players, got {','.join(entries)!r}")
        return [player for player, flag in enumerate(entries) if flag == "1"]
    removed = [int(entry) for entry in entries]
    if len(set(removed)) != len(removed) or not all(player < n for player in removed):
        raise ValueError(f"line {number}: expected different players in 0..{n - 1}, got {','.join(entries)!r}")
    return removed
