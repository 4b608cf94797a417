"""Which channels stay: a plan that can be written down, checked, applied and put together over several cuts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_eff.documents import parsed, reading, write_text

if TYPE_CHECKING:
    from lightning_eff.surgery.graph import ChannelGraph

VERSION = 1


@dataclass(frozen=True)
class PruningPlan:
    """The channels that each group keeps.

    Attributes:
        keep: kept channels per group, any alias of a group will do; groups that are not named stay whole.
        sizes: channels per group in the network the indices count in; filled in by :meth:`from_scores`.
        meta: anything else worth keeping with it, plain JSON (scores, settings).
    """

    keep: Mapping[str, Sequence[int]]
    sizes: Mapping[str, int] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_scores(
        cls,
        graph: ChannelGraph,
        scores: Mapping[str, Tensor],
        config: Mapping[str, int],
        meta: Mapping[str, Any] | None = None,
    ) -> PruningPlan:
        """Keep the best-scored channels.

        Args:
            graph: the model's channel graph.
            scores: one score per channel ``[C]`` of every group that loses channels, higher is better; ``[C, K]``
                breaks ties of one column by the next.
            config: channels to keep per group, ``1..C``.
            meta: kept in the plan.

        Raises:
            ValueError: a count out of range, scores of the wrong length or not a number. Equal scores: the lowest
                index stays.
        """
        keep = {}
        for path, count in config.items():
            group = graph.resolve(path)
            if not 1 <= count <= group.size:
                raise ValueError(f"{group.name}: expected to keep 1..{group.size} channels, got {count}")
            if count == group.size:
                continue
            by_name = {graph.resolve(key).name: value for key, value in scores.items()}
            if group.name not in by_name:
                raise ValueError(f"{group.name}: channels are to be removed but it has no scores")
            score = by_name[group.name].detach().double().cpu()
            if score.ndim not in (1, 2) or len(score) != group.size:
                raise ValueError(f"{group.name}: expected {group.size} scores, got {list(score.shape)}")
            columns = score.reshape(group.size, -1)
            if columns.isnan().any():
                bad = columns.isnan().any(1).nonzero().flatten().tolist()
                raise ValueError(f"{group.name}: the scores of channels {bad} are not numbers")
            order = torch.arange(group.size)
            for column in columns.flip(1).T:  # stable sorts from the last column to the first
                order = order[torch.sort(column[order], descending=True, stable=True).indices]
            keep[group.name] = sorted(order[:count].tolist())
        return cls(keep, graph.sizes, meta or {})

    def validate(self, graph: ChannelGraph) -> dict[str, tuple[int, ...]]:
        """Check every entry against ``graph`` before anything is cut; return kept channels by group name.

        Raises:
            KeyError: a group that the model does not have.
            ValueError: nothing kept, duplicates, no indices or indices out of range, a protected group, other sizes
                than planned.
        """
        checked: dict[str, tuple[int, ...]] = {}
        for path, channels in self.keep.items():
            group = graph.resolve(path)
            kept = tuple(int(c) for c in channels)
            if any(whole != given for whole, given in zip(kept, channels, strict=True)):
                raise ValueError(f"{path}: expected the numbers of the channels that are kept, got {list(channels)}")
            planned = self.sizes.get(path, group.size)
            if planned != group.size:
                raise ValueError(f"{path}: the plan was made for {planned} channels, the model has {group.size}")
            if not kept:
                raise ValueError(f"{path}: a plan must keep at least one of its {group.size} channels")
            if len(set(kept)) != len(kept):
                raise ValueError(f"{path}: the plan keeps a channel twice")
            if not 0 <= min(kept) <= max(kept) < group.size:
                raise ValueError(f"{path}: expected channels in 0..{group.size - 1}, got {min(kept)}..{max(kept)}")
            if group.name in checked and checked[group.name] != tuple(sorted(kept)):
                raise ValueError(f"{path}: the plan names the group {group.name} twice with different channels")
            if group.protected and len(kept) < group.size:
                raise ValueError(f"{path} cannot be pruned: {group.protected}")
            checked[group.name] = tuple(sorted(kept))
        return checked

    def keep_masks(self, graph: ChannelGraph) -> dict[str, Tensor]:
        """Return bool ``[C]`` for every group that loses channels."""
        masks = {}
        for name, kept in self.validate(graph).items():
            if len(kept) < graph.groups[name].size:
                mask = torch.zeros(graph.groups[name].size, dtype=torch.bool)
                mask[list(kept)] = True
                masks[name] = mask
        return masks

    def config(self, graph: ChannelGraph) -> dict[str, int]:
        """Return channels kept for every group of ``graph``."""
        return {**graph.sizes, **{name: len(kept) for name, kept in self.validate(graph).items()}}

    def compose(self, later: PruningPlan) -> PruningPlan:
        """Follow this plan by ``later`` (whose indices count in the network this one leaves); indices of the original.

        Both must use group names, as plans made by :meth:`from_scores` do.
        """
        keep = {name: list(kept) for name, kept in self.keep.items()}
        for name, kept in later.keep.items():
            keep[name] = [keep[name][c] for c in kept] if name in keep else list(kept)
        return PruningPlan(keep, {**later.sizes, **self.sizes}, {**self.meta, **later.meta})

    def to_dict(self) -> dict[str, Any]:
        """Plain Python for JSON and checkpoints."""
        return {
            "version": VERSION,
            "keep": {name: [int(c) for c in kept] for name, kept in self.keep.items()},
            "sizes": dict(self.sizes),
            "meta": dict(self.meta),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PruningPlan:
        """Read what :meth:`to_dict` wrote.

        Raises:
            ValueError: it is something else, or of another version.
        """
        with reading("not a pruning plan"):
            if data.get("version") != VERSION:
                raise ValueError(f"expected a pruning plan of version {VERSION}, got {data.get('version')!r}")
            return cls(
                parsed(dict[str, list[int]], data["keep"], "keep"),
                parsed(dict[str, int], data.get("sizes", {}), "sizes"),
                parsed(dict[str, Any], data.get("meta", {}), "meta"),
            )

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        write_text(path, json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> PruningPlan:
        """Read a plan that :meth:`save` wrote.

        Raises:
            ValueError: the file holds something else.
        """
        with reading(f"{path} holds no pruning plan"):
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
