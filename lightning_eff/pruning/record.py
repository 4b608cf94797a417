"""What is known of a pruning run so far: what its report is made of, and what a checkpoint must carry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from lightning_eff.documents import parsed
from lightning_eff.pruning.allocation import Dense
from lightning_eff.pruning.report import PruneReport, Scores, Stage
from lightning_eff.surgery import ChannelGraph, PruningPlan


@dataclass
class Record:
    """The course of a run.

    Attributes:
        dense: the network before the first step.
        stages: the network at each moment it was measured.
        scores: the last scores of each group, with the channels (as scored) that stayed.
        removed_value: sum of the scores of the channels removed, over all steps.
        notes: what a reader of the report must know.
    """

    dense: Dense | None = None
    stages: list[Stage] = field(default_factory=list)
    scores: dict[str, tuple[Scores, list[int]]] = field(default_factory=dict)
    removed_value: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Add a note, once."""
        if text not in self.notes:
            self.notes.append(text)

    def keep(self, scores: Mapping[str, Scores], plan: PruningPlan) -> None:
        """Take up what one step scored and what its plan keeps."""
        for name, kept in plan.keep.items():
            if name in scores:
                self.scores[name] = (scores[name], list(kept))
                gone = torch.ones(len(scores[name].values), dtype=torch.bool)
                gone[list(kept)] = False
                lost = float(scores[name].values[gone].nan_to_num().sum())
                self.removed_value[name] = self.removed_value.get(name, 0.0) + lost

    def quantities(self) -> dict[str, float]:
        """What is logged after a step: costs, as they are and as a part of the first; value before and after."""
        dense, now = self.stages[0], self.stages[-1]
        return {
            "macs": float(now.macs),
            "params": float(now.params),
            "macs_ratio": now.macs / max(dense.macs, 1),
            "params_ratio": now.params / max(dense.params, 1),
            "value_before": self.stages[-2].value,
            "value_after": now.value,
        }

    def plan(self, plan: PruningPlan, settings: Mapping[str, Any]) -> PruningPlan:
        """The plan with the scores that it rests on."""
        assert self.dense is not None
        scores = {name: scores.to_dict() for name, (scores, _) in self.scores.items()}
        return PruningPlan(plan.keep, dict(self.dense.sizes), {"scores": scores, "settings": dict(settings)})

    def report(self, value_name: str, data: str, graph: ChannelGraph) -> PruneReport:
        """Everything to show of the run; ``data`` says what values were measured on."""
        assert self.dense is not None
        return PruneReport(
            value_name, data, self.dense, graph, self.stages, self.scores, self.removed_value, self.notes
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain Python for checkpoints."""
        return {
            "dense": None if self.dense is None else {**vars(self.dense), "sizes": dict(self.dense.sizes)},
            "stages": [dict(vars(stage)) for stage in self.stages],
            "scores": {name: [scores.to_dict(), kept] for name, (scores, kept) in self.scores.items()},
            "removed_value": dict(self.removed_value),
            "notes": list(self.notes),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Record:
        """Read what :meth:`to_dict` wrote; ValueError for anything else."""
        told = parsed(dict[str, Any], data, "the record")
        scores = parsed(dict[str, tuple[dict[str, Any], list[int]]], told.get("scores"), "scores")
        read = {name: (Scores.from_dict(plain), kept) for name, (plain, kept) in scores.items()}
        record: Record = parsed(cls, {**told, "scores": read}, "the record")
        return record
