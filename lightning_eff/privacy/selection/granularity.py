"""Units of choice: single coordinates, rows, rows and columns, or whole tensors.

A row is an index of dimension 0, an output neuron or channel of a linear or convolutional layer; a column is one of
dimension 1, an input. The bias of a layer whose rows are chosen goes with them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from lightning_eff.privacy.selection.selected import Selection, count_true, flat_positions
from lightning_eff.privacy.selection.subsets import largest_subset, random_subset

Granularity = Literal["element", "row", "row_col", "tensor"]
Scope = Literal["layerwise", "global"]

_Flags = dict[str, Tensor | None]  # of units by tensor, bool [units]; None is all of them


class Units:
    """The units of several tensors, of which a share is chosen again and again.

    Args:
        candidates: by name, what of a tensor may be chosen.
        granularity: what a unit is. With ``row_col`` each of the two sides keeps the square root of the share.
        scope: ``"layerwise"`` keeps the share in every tensor, at least one unit; ``"global"`` keeps it of all units
            together, so that tensors may go empty. Whole tensors are always compared with each other.
    """

    def __init__(self, candidates: Mapping[str, Selection], granularity: Granularity, scope: Scope) -> None:
        self.candidates = dict(candidates)
        self.granularity = granularity
        self.scope = scope
        by_rows = granularity in ("row", "row_col")
        self._leader = {name: leader for name in candidates if by_rows and (leader := self._weight_of(name))}
        own = [name for name in candidates if name not in self._leader]
        self._sides: list[_Flags] = []
        self._sizes: list[dict[str, int]] = []
        if granularity == "element":
            self._sides.append({name: None if (one := candidates[name]).is_all else _flat(one) for name in own})
            self._sizes.append({name: math.prod(candidates[name].shape) for name in own})
        elif granularity == "tensor":
            self._sides.append(dict.fromkeys(own))
            self._sizes.append(dict.fromkeys(own, 1))
        else:
            for axis in range(1 if granularity == "row" else 2):
                names = [name for name in own if len(candidates[name].shape) > axis]
                self._sides.append({name: _along(candidates[name], axis) for name in names})
                self._sizes.append({name: candidates[name].shape[axis] for name in names})

    def choose(
        self,
        keep: float,
        generator: torch.Generator,
        scores: Mapping[str, Tensor] | None = None,
        explore: float = 0.0,
    ) -> dict[str, Selection]:
        """Choose units: the best by ``scores``, or any.

        Args:
            keep: share of the units in (0, 1].
            generator: of what is random; on the device of the tensors.
            scores: by name, of every coordinate; those of a unit are averaged over what may be chosen of it. None
                chooses at random.
            explore: share of the chosen units that is random although there are scores.
        """
        sided = keep if len(self._sides) == 1 else math.sqrt(keep)
        chosen = []
        for axis, (allowed, sizes) in enumerate(zip(self._sides, self._sizes, strict=True)):
            of_units = None if scores is None else {name: self._score(name, scores[name], axis) for name in allowed}
            chosen.append(self._choose_side(allowed, sizes, sided, generator, of_units, explore))
        selections = {
            name: self._selection(name, [side[name] for side in chosen if name in side]) for name in chosen[0]
        }
        for name, candidate in self.candidates.items():
            if not candidate.shape and self.granularity not in ("element", "tensor"):
                selections[name] = candidate
        for name, leader in self._leader.items():
            own = self.candidates[name]
            followed = Selection(own.shape, rows=selections[leader].rows)
            selections[name] = followed if own.is_all else followed.intersect(own.full_mask())
        return {name: selections[name] for name in self.candidates}

    def _choose_side(
        self,
        allowed: _Flags,
        sizes: Mapping[str, int],
        keep: float,
        generator: torch.Generator,
        scores: Mapping[str, Tensor] | None,
        explore: float,
    ) -> _Flags:
        together = self.scope == "global" or self.granularity == "tensor"
        chosen: _Flags = {}
        for group in [list(allowed)] if together else [[name] for name in allowed]:
            lengths = [sizes[name] for name in group]
            joined = _join([allowed[name] for name in group], lengths)
            units = sum(lengths) if joined is None else count_true(joined)
            k = max(1, round(keep * units))
            if k >= units:
                chosen.update(dict.fromkeys(group))
                continue
            if scores is None:
                flags = random_subset(sum(lengths), k, generator, allowed=joined)
            else:
                at_random = round(explore * k)
                flags = largest_subset(torch.cat([scores[name] for name in group]), k - at_random, allowed=joined)
                if at_random:
                    rest = ~flags if joined is None else joined & ~flags
                    flags |= random_subset(sum(lengths), at_random, generator, allowed=rest)
            chosen.update(zip(group, torch.split(flags, lengths), strict=True))
        return chosen

    def _selection(self, name: str, flags: list[Tensor | None]) -> Selection:
        candidate = self.candidates[name]
        rows, columns = (*flags, None)[:2]
        if rows is None and columns is None:
            return candidate
        if rows is not None and self.granularity == "tensor":
            return candidate if rows else Selection.none(candidate.shape, rows.device)
        if rows is not None and self.granularity == "element":
            return Selection(candidate.shape, mask=rows.reshape(candidate.shape))
        return Selection(
            candidate.shape,
            candidate.rows if rows is None else flat_positions(rows),
            candidate.columns if columns is None else flat_positions(columns),
            candidate.mask,
        )

    def _score(self, name: str, scores: Tensor, axis: int) -> Tensor:
        """Scores of the units of one tensor, ``[units]``."""
        if self.granularity == "element":
            return scores.reshape(-1)
        candidate = self.candidates[name]
        others = [dim for dim in range(scores.ndim) if self.granularity == "tensor" or dim != axis]
        if not others:
            return scores.reshape(-1)
        if candidate.is_all:
            return scores.mean(others).reshape(-1)
        mask = candidate.full_mask()
        return (scores.masked_fill(~mask, 0).sum(others) / mask.sum(others).clamp(min=1)).reshape(-1)

    def _weight_of(self, name: str) -> str | None:
        """The weight whose rows a bias belongs to."""
        weight = f"{name.removesuffix('bias')}weight"
        if not name.endswith("bias") or weight not in self.candidates or len(self.candidates[weight].shape) < 2:
            return None
        return weight if self.candidates[name].shape == self.candidates[weight].shape[:1] else None


def _flat(selection: Selection) -> Tensor:
    return selection.full_mask().reshape(-1)


def _along(selection: Selection, axis: int) -> Tensor | None:
    """Which indices of a dimension hold something that may be chosen; None for all."""
    if selection.is_all:
        return None
    mask = selection.full_mask()
    others = [dim for dim in range(mask.ndim) if dim != axis]
    found = mask.any(others) if others else mask
    return None if found.all() else found


def _join(flags: list[Tensor | None], lengths: list[int]) -> Tensor | None:
    """Put flags of several tensors one after the other."""
    if len(flags) == 1:
        return flags[0]
    present = next((flag for flag in flags if flag is not None), None)
    if present is None:
        return None
    return torch.cat([present.new_ones(n) if flag is None else flag for flag, n in zip(flags, lengths, strict=True)])
