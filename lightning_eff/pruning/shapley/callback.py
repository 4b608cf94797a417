"""Prune the channels with the smallest Shapley values (arXiv 2407.15875).

The players are the channels of one layer, the pay-off is the network's value without the rest of them. An estimator of
depth ``"matched"`` averages only the first ``k`` removals when ``k`` channels go: cheaper, sometimes better where one
layer is pruned, clearly worse where several wide layers are pruned together. Hence the full value is the default.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer

from lightning_eff.batch import SplitBatch
from lightning_eff.pruning.callback import StructuredPruningCallback
from lightning_eff.pruning.repair import Repair
from lightning_eff.pruning.report import Scores
from lightning_eff.pruning.scoring import Scoring
from lightning_eff.pruning.settings import Allocation, Calibration, Layers, Schedule
from lightning_eff.pruning.shapley.channel_game import ChannelGame, GameOptions
from lightning_eff.pruning.values import Value
from lightning_eff.reporting import progress
from lightning_eff.shapley import (
    ExactShapley,
    GreedyBackward,
    PermutationShapley,
    RegressionShapley,
    ShapleyEstimator,
    ShapleyWarning,
    StopRule,
    TopKShapley,
    choose_estimator,
)
from lightning_eff.shapley.coalition_run import CoalitionEstimator
from lightning_eff.shapley.estimator import resolve_budget
from lightning_eff.shapley.values import automatic_budget


class ShapleyPruningCallback(StructuredPruningCallback):
    """Remove the channels that contribute least, by Shapley value.

    Args:
        amount: fraction **removed** in [0, 1) of what ``allocation.target`` says; or per layer the channels (int) or
            fraction (float) **kept**.
        allocation: how the amount is shared out between layers.
        schedule: when channels are removed, in how many steps, cut or masked.
        layers: which layers may be pruned.
        calibration: the data that channels are judged on.
        split_batch: ``batch -> (inputs, target)``, for batches of another form, e.g. ``BatchKeys("image", "label")``.
        value: what the network is worth on a sample: ``"accuracy"``, ``"neg_loss"`` (for small or saturated
            calibration sets) or a callable ``(outputs, target) -> [B]``, higher is better.
        estimator: how values are estimated; ``"auto"``: exact where ``budget`` allows all coalitions, else regression,
            or walks at small budgets.
        budget: evaluations a layer for the estimator ``"auto"``: a number, a multiple of its channels such as
            ``"20n"``, or ``"auto"``: ``"20n"``, and all coalitions of up to 12 channels.
        stop: when to stop estimating a layer early.
        game: how the network is evaluated without some of its channels.
        repair: how the remaining weights are corrected after a cut; None leaves them.
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
        split_batch: SplitBatch | None = None,
        value: Value = "accuracy",
        estimator: ShapleyEstimator | Literal["auto"] = "auto",
        budget: int | str = "20n",
        stop: StopRule | None = None,
        game: GameOptions = GameOptions(),  # noqa: B008
        repair: Repair | None = None,
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
            split_batch=split_batch,
            value=value,
            repair=repair,
            plan=plan,
            dirpath=dirpath,
            seed=seed,
            verbose=verbose,
        )
        if estimator == "auto":
            resolve_budget(budget, 1, auto=automatic_budget(1))
        elif not isinstance(estimator, ShapleyEstimator):
            raise ValueError(f'estimator must be a ShapleyEstimator or "auto", got {estimator!r}')
        elif isinstance(estimator, GreedyBackward) and allocation.mode == "global":
            raise ValueError(
                "GreedyBackward gives places, not values that compare between layers: use allocation mode "
                '"uniform", "budget" or an amount per layer'
            )
        self.estimator: ShapleyEstimator | Literal["auto"] = estimator
        self.budget = budget
        self.stop = stop
        self.game = game
        self.calibration_groups = game.groups

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As the base, and tell before training when the estimator or its budget does not suit a layer to be scored."""
        super().on_train_start(trainer, pl_module)
        if self._graph is None or self._record.dense is None or self.given_plan is not None:
            return
        anywhere = self._counts.mode not in ("per_layer", "uniform")
        kept = self._counts.before_scores(self._graph, self._record.dense, self.schedule.steps - 1)
        for name in self._graph.prunable:
            size = self._graph.groups[name].size
            if anywhere or kept.get(name, size) < size:
                try:
                    self._check_affordable(size)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None

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
        with progress(title, estimator.cost(game.n_players), enabled=scoring.verbose) as bar, _naming(name):
            result = estimator.estimate(
                game, generator=scoring.seed + 7919 * number, stop=self.stop, progress=bar.advance
            )
        curve = None
        if scoring.curves:
            worst_first = result.values.sort(stable=True).indices
            curve = game.walk(worst_first[None, :-1])[0]
        return Scores(result.values, result.stderr, scoring.graph.weight_norms(scoring.model)[name], curve)

    def _estimator(self, n: int, removed: int) -> ShapleyEstimator:
        estimator = self.estimator
        if estimator == "auto":
            limit = None if self.stop is None else self.stop.max_evals
            budget = resolve_budget(self.budget, n, auto=automatic_budget(n))
            budget = budget if limit is None else min(budget, limit)
            chosen = choose_estimator(n, budget)
            timed = self.stop is not None and self.stop.max_seconds is not None
            # exact values are worth nothing before they are complete; a regression on all coalitions is exact too
            return RegressionShapley(budget) if timed and isinstance(chosen, ExactShapley) else chosen
        if isinstance(estimator, ExactShapley | PermutationShapley) and estimator.depth == "matched":
            return replace(estimator, depth=removed)
        return estimator

    def _check_affordable(self, n: int) -> None:
        estimator, limit = self._estimator(n, removed=1), None if self.stop is None else self.stop.max_evals
        cost = estimator.cost(n)
        if isinstance(estimator, ExactShapley) and cost > 2**estimator.max_players:
            raise ValueError(
                f"exact values need {cost:,} evaluations, max_players={estimator.max_players} allows "
                f"{2**estimator.max_players:,}: take another estimator"
            )
        if isinstance(estimator, CoalitionEstimator | TopKShapley):
            estimator.with_budget(resolve_budget(estimator.budget, n), n)
        if limit is not None and estimator.with_budget(limit, n) is estimator and estimator.cost(n) > limit:
            raise ValueError(f"{estimator.cost(n)} evaluations are needed, stop.max_evals is {limit}")

    def fingerprint_settings(self) -> tuple[Any, ...]:
        """Add what the Shapley values depend on."""
        return (*super().fingerprint_settings(), self.estimator, self.budget, self.stop, self.game)


@contextmanager
def _naming(layer: str) -> Iterator[None]:
    """Say which layer a warning of the estimate is about."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        text = f"{layer}: {warning.message}" if issubclass(warning.category, ShapleyWarning) else str(warning.message)
        warnings.warn(text, warning.category, stacklevel=2)
