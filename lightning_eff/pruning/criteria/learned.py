"""Shapley values and importance switches of the package's other pruning rules, as criteria."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from lightning_eff.batch import LossFunction, SplitBatch
from lightning_eff.pruning.criteria.registry import Needs, check_needs, register_criterion
from lightning_eff.pruning.dirichlet.options import DirichletOptions
from lightning_eff.pruning.dirichlet.scoring import dirichlet_scores
from lightning_eff.pruning.samples import Samples
from lightning_eff.pruning.shapley.channel_game import ChannelGame, GameOptions
from lightning_eff.pruning.values import Value, value_function
from lightning_eff.shapley import ShapleyEstimator, choose_estimator
from lightning_eff.shapley.estimator import resolve_budget
from lightning_eff.shapley.values import automatic_budget
from lightning_eff.surgery import ChannelGraph


@register_criterion("shapley")
@dataclass(frozen=True)
class ShapleyCriterion:
    """Shapley values of the channels of one group in the game of what the network is worth without the others.

    Attributes:
        value: what the network is worth on a sample: ``"accuracy"``, ``"neg_loss"`` or a callable
            ``(outputs, target) -> [B]``, higher is better.
        estimator: how values are estimated; ``"auto"``: exact where ``budget`` allows all coalitions, else regression,
            or walks at small budgets.
        budget: evaluations a group for the estimator ``"auto"``: a number, a multiple of its channels such as
            ``"20n"``, or ``"auto"``: ``"20n"``, and all coalitions of up to 12 channels.
        game: how the network is evaluated without some of its channels.
        split_batch: ``batch -> (inputs, target)``; None takes that of the call.
        seed: of the coalitions; None takes that of the call.
    """

    value: Value = "neg_loss"
    estimator: ShapleyEstimator | Literal["auto"] = "auto"
    budget: int | str = "20n"
    game: GameOptions = GameOptions()  # noqa: RUF009 (frozen)
    split_batch: SplitBatch | None = None
    seed: int | None = None

    needs: ClassVar[Needs] = Needs(data=True)

    def __post_init__(self) -> None:
        """Check value, estimator and budget."""
        value_function(self.value)
        if self.estimator == "auto":
            resolve_budget(self.budget, 1, auto=automatic_budget(1))
        elif not isinstance(self.estimator, ShapleyEstimator):
            raise ValueError(f'estimator must be a ShapleyEstimator or "auto", got {self.estimator!r}')

    def __call__(
        self, model: nn.Module, graph: ChannelGraph, batches: Sequence[Any], loss_fn: Any = None
    ) -> dict[str, Tensor]:
        """Scores float64 ``[C]`` of every prunable group.

        Raises:
            ValueError: there is no batch, or the estimator or its budget does not suit a group.
        """
        check_needs(self, batches, loss_fn)
        samples = Samples.collect(batches, sys.maxsize, self.split_batch, groups=self.game.groups)
        scores = {}
        for number, name in enumerate(graph.prunable):
            game = ChannelGame(model, graph, name, samples, value=self.value, options=self.game)
            estimator = self.estimator
            if estimator == "auto":
                estimator = choose_estimator(game.n_players, self.budget)
            result = estimator.estimate(game, generator=(self.seed or 0) + 7919 * number)
            scores[name] = result.values
        return scores


@register_criterion("dirichlet")
@dataclass(frozen=True)
class DirichletCriterion:
    """Expected importance switches, in units of an average channel of the group.

    Attributes:
        options: how switches are trained; calibration sets are small, so several passes are taken.
        seed: of draws; None takes that of the call.
    """

    options: DirichletOptions = DirichletOptions(epochs=10)  # noqa: RUF009 (frozen)
    seed: int | None = None

    needs: ClassVar[Needs] = Needs(data=True, loss=True)

    def __call__(
        self, model: nn.Module, graph: ChannelGraph, batches: Sequence[Any], loss_fn: LossFunction | None
    ) -> dict[str, Tensor]:
        """Scores float64 ``[C]`` of every prunable group.

        Raises:
            ValueError: there is no batch or no loss, or the loss does not depend on a group.
        """
        check_needs(self, batches, loss_fn)
        assert loss_fn is not None
        if not graph.prunable:
            return {}
        posteriors = dirichlet_scores(
            model, graph, list(batches), loss_fn, options=self.options, seed=self.seed or 0, progress=False
        )
        return {name: posteriors[name].relative.detach().cpu().double() for name in graph.prunable}
