"""A cheap game that resembles the real one takes over most of the sampling noise.

Shapley values, partial ones too, are linear in the game: phi(v) = phi(v - beta w) + beta phi(w). Where the values of
the proxy w are known exactly, only the difference is left to sample, and it varies less the more alike the two are:
a control variate, as in any Monte Carlo estimate.

What counts is the noise that the estimator has not got rid of by itself: antithetic walks and paired regression are
exact for games of pairwise interactions, so a proxy helps them only where it shares the higher ones, and one that has
higher ones of its own can make them worse. The slope that `beta="fit"` finds matches values; it need not be the one of
least variance.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from lightning_eff.shapley.estimator import ShapleyEstimator, ShapleyWarning, StopRule, player_count
from lightning_eff.shapley.exact import ExactShapley
from lightning_eff.shapley.games import (
    Game,
    GroupedGame,
    Start,
    as_values,
    evaluate,
    evaluate_walks,
    group_weights,
    walker,
)
from lightning_eff.shapley.greedy import GreedyBackward
from lightning_eff.shapley.result import ShapleyResult
from lightning_eff.shapley.sampling import generator_of
from lightning_eff.shapley.top_k import TopKShapley

_PILOT_SEED = 0x5A11E  # of its own, so that pilots and samples are independent whatever seed the caller takes


class ControlVariate:
    """The game v - beta * proxy, walked and split into groups like v; `estimate` gives the values of v itself.

    Groups are those of `game`. A proxy with the same groups is split like it, any other enters every group whole.

    Args:
        game: the game v whose values are wanted.
        proxy: a cheap game of as many players and components.
        proxy_values: exact values of the proxy, `[n]` or `[n, D]`, of the same depth and direction as the estimate;
            None enumerates the proxy's coalitions, at most 20 players at full depth.
        beta: how much of the proxy to subtract; any number leaves the estimate unbiased. `"fit"`: the least-squares
            slope of v on the proxy over 2 n random coalitions, which are counted in `n_evals`.

    Raises:
        ValueError: another number of players or shape of values, or a `beta` that is neither finite nor `"fit"`.
    """

    def __init__(
        self, game: Game, proxy: Game, proxy_values: Tensor | None = None, beta: float | Literal["fit"] = 1.0
    ) -> None:
        n = player_count(game)
        if proxy.n_players != n:
            raise ValueError(f"game and proxy must have as many players, got {n} and {proxy.n_players}")
        if beta != "fit" and not abs(float(beta)) < float("inf"):
            raise ValueError(f'beta must be a finite number or "fit", got {beta!r}')
        if proxy_values is not None and len(proxy_values) != n:
            raise ValueError(f"proxy_values must hold a value for each of {n} players, got {list(proxy_values.shape)}")
        self.game, self.proxy, self.n_players = game, proxy, n
        self.proxy_values = None if proxy_values is None else torch.as_tensor(proxy_values, dtype=torch.float64)
        self.names = getattr(game, "names", None)
        self.pilots = 2 * n if beta == "fit" else 0
        self._beta: float | None = None if beta == "fit" else float(beta)
        # a game without an ability must not seem to have it: estimators look
        if walker(game, None) is not None:
            self.walk: Callable[..., Tensor] = self._walk
        weights = group_weights(game)
        if weights is not None:
            self.n_groups, self.group_weights = len(weights), weights
            self.call_group: Callable[[int, Tensor], Tensor] = self._call
            if walker(game, 0) is not None:
                self.walk_group: Callable[..., Tensor] = self._walk_group
            shared = group_weights(proxy)
            self._split = shared is not None and shared.shape == weights.shape and torch.allclose(shared, weights)

    @property
    def beta(self) -> float:
        """How much of the proxy is subtracted; the first look evaluates the pilots where it is to be fitted."""
        if self._beta is None:
            self._beta = self._fit()
        return self._beta

    def __call__(self, coalitions: Tensor) -> Tensor:
        """As `Game.__call__`."""
        return self._call(None, coalitions)

    def estimate(
        self,
        estimator: ShapleyEstimator,
        *,
        resume: ShapleyResult | None = None,
        stop: StopRule | None = None,
        **options: Any,
    ) -> ShapleyResult:
        """Values of `game`: those of the difference, estimated, plus beta times those of the proxy, exact.

        Args:
            estimator: what samples the difference; evaluations of the proxy are not counted.
            resume: an earlier result of the same call.
            stop: see `ShapleyEstimator.estimate`; `max_evals` includes the pilots.
            **options: see `ShapleyEstimator.estimate`.

        Raises:
            ValueError: as the estimator, an estimator or stop rule that judges the values themselves, which are not
                those of the difference; more players than can be enumerated without `proxy_values`; a `resume` made
                with another beta.
        """
        if isinstance(estimator, TopKShapley | GreedyBackward) or (stop is not None and stop.asks_precision):
            raise ValueError(
                "top-k, greedy removal and stop rules on precision would judge the difference, not the game: with a "
                "control variate use another estimator, and max_evals or max_seconds"
            )
        if resume is not None and resume.state is not None and resume.state.get("beta") != self.beta:
            raise ValueError(
                f"resume does not fit: it was made with beta {resume.state.get('beta')}, this one is {self.beta}"
            )
        progress = options.get("progress")
        if callable(progress) and self.pilots and resume is None:
            progress(self.pilots)
        if stop is not None and stop.max_evals is not None and self.pilots:
            if stop.max_evals <= self.pilots:
                raise ValueError(f"fitting beta takes {self.pilots} evaluations, the budget is {stop.max_evals}")
            stop = replace(stop, max_evals=stop.max_evals - self.pilots)
        inner = resume
        if resume is not None and resume.state is not None:
            inner = replace(resume, state={k: v for k, v in resume.state.items() if k != "beta"})
        with warnings.catch_warnings():
            # a difference that hardly varies is what the proxy is for
            warnings.filterwarnings("ignore", "no signal|zero variance", ShapleyWarning)
            result = estimator.estimate(self, resume=inner, stop=stop, **options)
            known = self._known(result.depth, getattr(estimator, "direction", "remove"))
        if known.shape != result.values.shape:
            raise ValueError(
                f"proxy_values must be shaped like the values, {list(result.values.shape)}, got {list(known.shape)}"
            )
        ends = self.beta * evaluate(self.proxy, torch.tensor([[False], [True]]).expand(-1, self.n_players))
        return replace(
            result,
            values=result.values + self.beta * known,
            n_evals=result.n_evals + self.pilots,
            n_unique=result.n_unique + self.pilots,
            v_empty=None if result.v_empty is None else result.v_empty + ends[0],
            v_full=None if result.v_full is None else result.v_full + ends[1],
            state=None if result.state is None else {**result.state, "beta": self.beta},
        )

    def _known(self, depth: int, direction: Literal["remove", "add"]) -> Tensor:
        if self.proxy_values is not None:
            return self.proxy_values
        return ExactShapley(depth=depth, direction=direction).estimate(self.proxy).values

    def _fit(self) -> float:
        """Slope of v on the proxy, both centred component by component; 0 for a proxy that does not vary."""
        generator = generator_of(_PILOT_SEED)
        sizes = torch.randint(self.n_players + 1, (self.pilots, 1), generator=generator)
        coalitions = torch.rand(self.pilots, self.n_players, generator=generator).argsort(1).argsort(1) < sizes
        ours, theirs = (evaluate(game, coalitions) for game in (self.game, self.proxy))
        _check_alike(ours, theirs)
        ours, theirs = ours - ours.mean(0), theirs - theirs.mean(0)
        spread = float((theirs**2).sum())
        return float((ours * theirs).sum()) / spread if spread > 0 else 0.0

    def _call(self, group: int | None, coalitions: Tensor) -> Tensor:
        raw = self.game(coalitions) if group is None else cast(GroupedGame, self.game).call_group(group, coalitions)
        return self._less(as_values(raw, (len(coalitions),)), evaluate(self.proxy, coalitions, group=self._part(group)))

    def _walk(self, orders: Tensor, *, start: Start = "full") -> Tensor:
        return self._walk_group(None, orders, start=start)

    def _walk_group(self, group: int | None, orders: Tensor, *, start: Start = "full") -> Tensor:
        own = walker(self.game, group)
        assert own is not None
        ours = as_values(own(orders, start=start), (len(orders), orders.shape[1] + 1))
        first = evaluate(self.proxy, torch.full((1, self.n_players), start == "full"), group=self._part(group))
        steps = evaluate_walks(self.proxy, orders, start=start, group=self._part(group))
        return self._less(ours, torch.cat([first.expand(len(orders), *first.shape), steps], dim=1))

    def _part(self, group: int | None) -> int | None:
        return group if group is not None and self._split else None

    def _less(self, ours: Tensor, theirs: Tensor) -> Tensor:
        _check_alike(ours, theirs)
        return ours - self.beta * theirs


def _check_alike(ours: Tensor, theirs: Tensor) -> None:
    if ours.shape != theirs.shape:
        raise ValueError(f"game and proxy must return values alike, got {list(ours.shape)} and {list(theirs.shape)}")
