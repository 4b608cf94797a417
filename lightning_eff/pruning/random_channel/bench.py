"""What all candidates of a search have in common, and how one is cut on trial, repaired and judged."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import isfinite, nan
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_eff.batch import SplitBatch
from lightning_eff.pruning.repair import Moments, Repair, collect_moments
from lightning_eff.pruning.repair import repair as repair_weights
from lightning_eff.surgery import ChannelGraph, PruningPlan
from lightning_eff.surgery.state import channels_last_weights, quiet_model
from lightning_eff.surgery.trial import Trial

ScoreFunction = Callable[[nn.Module], float]
Recalibrate = Literal["auto", "always", "never"]


def ranking_repair(repair: Repair, recalibrate: Recalibrate) -> Repair:
    """Return how candidates are repaired while they are only compared."""
    corrected = repair.update != "none"
    keep = recalibrate == "always" or (recalibrate == "auto" and not corrected)
    return replace(
        repair, update="gram" if repair.update == "auto" else repair.update, bn_samples=repair.bn_samples if keep else 0
    )


class Bench:
    """Everything that candidates have in common: network, scores of channels, and moments for their repair.

    Args:
        model: the network, whole.
        graph: its channel graph.
        scores: of the channels of each prunable group, ``[C]``.
        batches: calibration batches.
        repair: how every candidate is repaired.
        split_batch: ``batch -> (inputs, target)``, for batches of another form.
        seed: of the repair.
        final: repair for what is kept, where ``repair`` makes a difference.
        moments: taken before, to share them between several benches; by default taken here where they are needed.
        nested: factor the moments once for all candidates; no gain where there is only one.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        scores: Mapping[str, Tensor],
        batches: Sequence[Any],
        repair: Repair,
        split_batch: SplitBatch | None = None,
        seed: int = 0,
        *,
        final: bool = False,
        moments: Moments | None = None,
        nested: bool = True,
    ) -> None:
        self.model, self.graph, self.scores, self.batches = model, graph, scores, batches
        self.repair, self.split_batch, self.seed, self.final = repair, split_batch, seed, final
        self.taken = moments or take_moments(model, graph, batches, repair, split_batch, seed, final=final)
        rankings = {name: s.sort(descending=True, stable=True).indices for name, s in scores.items()}
        self.moments = self.taken.nested(rankings) if self.taken is not None and nested else self.taken
        self._told = self.taken is not None  # that there are few samples: once a search will do

    def repaired(self, config: Mapping[str, int]) -> tuple[Trial, float]:
        """Cut to a configuration on trial and repair: the closed trial, and its mean relative error (NaN for none)."""
        trial = Trial(self.model, self.graph, PruningPlan.from_scores(self.graph, self.scores, config))
        with warnings.catch_warnings():
            if self._told:
                warnings.filterwarnings("ignore", message="fewer calibration rows")
            errors = repair_weights(
                trial,
                self.batches,
                self.repair,
                moments=self.moments,
                split_batch=self.split_batch,
                final=self.final,
                seed=self.seed,
            )
        self._told = True
        return trial, fmean(errors.values()) if errors else nan

    def score(self, trial: Trial, score_fn: ScoreFunction) -> float:
        """Judge a trial as :func:`judged` does."""
        with trial:
            return judged(self.model, score_fn)


def judged(model: nn.Module, score_fn: ScoreFunction) -> float:
    """Return what ``score_fn`` says of the network in evaluation mode; NaN for whatever is no finite number."""
    with quiet_model(model), channels_last_weights(model), torch.no_grad():
        score = float(score_fn(model))
    return score if isfinite(score) else nan


def take_moments(
    model: nn.Module,
    graph: ChannelGraph,
    batches: Sequence[Any],
    repair: Repair,
    split_batch: SplitBatch | None,
    seed: int,
    *,
    final: bool = False,
) -> Moments | None:
    """Take the moments that ``repair`` works with; None where it works without."""
    update = ("sequential" if final else "gram") if repair.update == "auto" else repair.update
    if update not in ("gram", "channel"):
        return None
    return collect_moments(model, graph, batches, repair, split_batch=split_batch, seed=seed)
