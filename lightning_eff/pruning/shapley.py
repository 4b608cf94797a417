"""Prune the channels with the smallest Shapley values (arXiv 2407.15875).

The players are the channels of one layer, the pay-off is the network's value without the rest of them. An estimator of
depth ``"matched"`` averages only the first ``k`` removals when ``k`` channels go: cheaper, sometimes better where one
layer is pruned, clearly worse where several wide layers are pruned together. Hence the full value is the default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lightning_eff.pruning.callback import StructuredPruningCallback
from lightning_eff.pruning.channel_game import ChannelGame, GameOptions
from lightning_eff.pruning.report import Scores
from lightning_eff.pruning.scoring import Scoring
from lightning_eff.pruning.settings import Allocation, Calibration, Layers, Schedule
from lightning_eff.pruning.values import Value
from lightning_eff.reporting import progress
from lightning_eff.shapley import ExactShapley, PermutationShapley, ShapleyEstimator, StopRule


class ShapleyPruningCallback(StructuredPruningCallback):
    """Remove the channels that contribute least, by Shapley value.

    Args:
        amount: fraction **removed** in [0, 1) of what ``allocation.target`` says; or per layer the channels (int) or
            fraction (float) **kept**.
        allocation: how the amount is shared out between layers.
        schedule: when channels are removed, in how many steps, cut or masked.
        layers: which layers may be pruned.
        calibration: the data that channels are judged on.
        value: what the network is worth on a sample: ``"accuracy"``, ``"neg_loss"`` (for small or saturated
            calibration sets) or a callable ``(outputs, target) -> [B]``, higher is better.
        estimator: how values are estimated; None takes 32 antithetic permutations, or exact values
            where those cost no more.
        stop: when to stop estimating a layer early.
        game: how the network is evaluated without some of its channels.
        plan: path of a plan to follow instead of scoring.
        dirpath: where plan, report, figure, the final weights (``pruned.ckpt``) and unfinished scores are written; None
            writes nothing.
        seed: of the permutations; the global generators are never touched.
        verbose: print progress and the report.
    """

    technique = "shapley"
    calibration_groups = None

    def __init__(
        self,
        amount: float | dict[str, int | float] = 0.5,
        *,
        allocation: Allocation = Allocation(),  # noqa: B008 (frozen)
        schedule: Schedule = Schedule(),  # noqa: B008
        layers: Layers = Layers(),  # noqa: B008
        calibration: Calibration = Calibration(),  # noqa: B008
        value: Value = "accuracy",
        estimator: ShapleyEstimator | None = None,
        stop: StopRule | None = None,
        game: GameOptions = GameOptions(),  # noqa: B008
        plan: str | Path | None = None,
        dirpath: str | Path | None = None,
        seed: int = 0,
        verbose: bool = True,
    ) -> None:
        super().__init__(
            amount,
            allocation=allocation,
            schedule=schedule,
            layers=layers,
            calibration=calibration,
            value=value,
            plan=plan,
            dirpath=dirpath,
            seed=seed,
            verbose=verbose,
        )
        self.estimator = estimator
        self.stop = stop
        self.game = game
        self.calibration_groups = game.groups

    def score(self, scoring: Scoring) -> Mapping[str, Scores]:
        """Estimate the Shapley values of every group that loses channels."""
        removed = {name: scoring.graph.groups[name].size - kept for name, kept in scoring.expected.items()}
        names = [name for name in scoring.graph.prunable if removed.get(name, 0) > 0]
        return {
            name: scoring.remembered(name, partial(self._group, scoring, name, removed[name], names)) for name in names
        }

    def _group(self, scoring: Scoring, name: str, removed: int, names: list[str]) -> Scores:
        game = ChannelGame(
            scoring.model,
            scoring.graph,
            name,
            scoring.samples,
            value=self.value,
            options=self.game,
            autocast=scoring.trainer.precision_plugin.forward_context,
        )
        estimator = self._estimator(game.n_players, removed)
        number = names.index(name)
        title = f"{name} ({number + 1}/{len(names)}, {game.n_players} channels)"
        with progress(title, estimator.cost(game.n_players), enabled=scoring.verbose) as bar:
            result = estimator.estimate(
                game, generator=scoring.seed + 7919 * number, stop=self.stop, progress=bar.advance
            )
        curve = None
        if scoring.curves:
            worst_first = result.values.sort(stable=True).indices
            coalitions = torch.ones(game.n_players, game.n_players, dtype=torch.bool)
            for r in range(1, game.n_players):
                coalitions[r:, worst_first[r - 1]] = False
            curve = game(coalitions)
        return Scores(result.values, result.stderr, scoring.graph.weight_norms(scoring.model)[name], curve)

    def _estimator(self, n: int, removed: int) -> ShapleyEstimator:
        estimator = self.estimator
        if estimator is None:
            walks = PermutationShapley(walks=32)
            exact_is_cheap = 2**n <= walks.walks * n and self.stop is None
            estimator = ExactShapley() if exact_is_cheap else walks
        if any(field.name == "depth" for field in fields(estimator)) and estimator.depth == "matched":  # type: ignore[arg-type,attr-defined]
            estimator = replace(estimator, depth=removed)  # type: ignore[type-var]
        return estimator

    def fingerprint_settings(self) -> tuple[Any, ...]:
        """Add what the Shapley values depend on."""
        return (*super().fingerprint_settings(), self.estimator, self.stop, self.game)
