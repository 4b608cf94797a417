"""What frames evaluated, and the values that follow from it.

Two games whose values are known exactly take over what they can of the noise: the gap game w of a frame (`gap.py`), and
the game u that pays 1 to every coalition but the empty one, of which every line gets 1 / p. As phi(v) = phi(v - b w - c
u) + b phi(w) + c phi(u) for any b and c, those with the smallest estimated error are taken. They are found in the same
samples: estimates are linear in the values, so that errors of sums and differences tell those of any combination. (The
slope of v on w over random coalitions, another common choice, removes less noise and may add some.) Because of u an
error without any line that is out of all proportion adds no noise.

Shapes: `p` players, `P` units of `c` coalitions (2: a coalition and its complement), `k` games: v, u and, where there
is one, w.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_eff.shapley.coalition_run import CoalitionEstimator, Sampled

FrameId = str | int
_ROUNDING = 1e-20  # squared and relative to the values: float64 gets some 1e-32 wrong


def _nothing() -> Tensor:
    return torch.zeros(0, dtype=torch.float64)  # torch.cat takes it for any shape


@dataclass(eq=False)
class FrameRecord:
    """What was evaluated of one frame: all that its values follow from.

    Attributes:
        present: players as positions among the candidates, int64 `[p]`.
        empty: error without any line.
        full: error with all lines.
        mean_depth: error of the frame's mean depth; inf where it is no measure for `empty`.
        rounds: rounds done.
        evaluations: coalitions that the network completed.
        units: coalitions, of pairs the first, bool `[P, p]`.
        errors: of the coalitions, float64 `[P, c]`.
        proxy: values of the gap game for them, float64 `[P, c]`; empty without control variate.
        proxy_ends: its values of no line and of all, float64 `[2]`; likewise.
        proxy_values: its Shapley values, float64 `[p]`; likewise.
        solved: values and standard errors of an estimator that does everything in the first round, float64 `[2, p]`.
        fingerprint: digest of what the frame shows; empty where it is not known.
    """

    present: Tensor
    empty: float
    full: float
    mean_depth: float = math.inf
    rounds: int = 0
    evaluations: int = 0
    units: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    errors: Tensor = field(default_factory=_nothing)
    proxy: Tensor = field(default_factory=_nothing)
    proxy_ends: Tensor = field(default_factory=_nothing)
    proxy_values: Tensor = field(default_factory=_nothing)
    solved: Tensor = field(default_factory=_nothing)
    fingerprint: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Tensors and numbers, fit for checkpoints with `weights_only=True`; `FrameRecord(**entries)` takes them."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}

    def add(self, units: Tensor, errors: Tensor, proxy: Tensor | None) -> None:
        """Take in more units, bool `[P, p]`, with their errors and values of the gap game, `[P, c]`."""
        self.units, self.errors = torch.cat([self.units, units]), torch.cat([self.errors, errors])
        if proxy is not None:
            self.proxy = torch.cat([self.proxy, proxy])

    def sampled(self, weight: float, controls: int) -> Sampled:
        """As samples of v and of the first of (u, w), as many as `controls`, and of their differences.

        Components are the games, then game i - game j for all i < j.
        """
        value = self.empty - self.errors
        games = [(value, [0.0, self.empty - self.full])]
        games += [(torch.zeros_like(value), [0.0, 1.0]), (self.proxy, self.proxy_ends.tolist())][:controls]
        values = torch.stack([values for values, _ in games], 2)
        ends = torch.tensor([pair for _, pair in games], dtype=torch.float64).T
        packed = np.packbits(self.units.numpy(), axis=1)
        return Sampled(weight, packed, with_differences(values), with_differences(ends), self.units.shape[1])


def with_differences(games: Tensor) -> Tensor:
    """`[..., k]` and after it the differences of all pairs, `[..., k + k (k - 1) / 2]`."""
    i, j = torch.triu_indices(games.shape[-1], games.shape[-1], 1)
    return torch.cat([games, games[..., i] - games[..., j]], -1)


@dataclass(eq=False)
class Fit:
    """Estimates from the samples of a frame, or of all.

    Attributes:
        values: of v and the games known, `[p, k]`.
        covariance: of their errors, `[p, k, k]`; entries that cannot be told are not finite.
        known: exact values of the games known, `[p, k - 1]`.
    """

    values: Tensor
    covariance: Tensor
    known: Tensor

    @classmethod
    def of(cls, estimator: CoalitionEstimator, samples: Sequence[Sampled], known: Tensor) -> Fit:
        """Fit samples, of frames with weights that sum to 1."""
        values, errors = estimator.fit(samples)
        k = known.shape[1] + 1
        own, differences = (errors**2)[:, :k], (errors**2)[:, k:]
        covariance = torch.diag_embed(own)
        i, j = torch.triu_indices(k, k, 1)
        covariance[:, i, j] = covariance[:, j, i] = (own[:, i] + own[:, j] - differences) / 2
        return cls(values[:, :k], covariance, known)

    @classmethod
    def final(cls, values: Tensor, variance: Tensor) -> Fit:
        """Values `[p]` that are what they are, with squared errors."""
        return cls(values[:, None], variance[:, None, None], torch.zeros(len(values), 0, dtype=torch.float64))

    @property
    def noise(self) -> Tensor:
        """Sum of `covariance` over the lines of which it can be told, `[k, k]`."""
        return self.covariance[self._told].sum(0)

    def varies(self, game: int) -> bool:
        """Whether the noise of a game known is more than rounding: with few lines the regression solves u exactly."""
        return bool(self.noise[game, game] > _ROUNDING * self.known[:, game - 1].square().sum())

    def controlled(self, slope: float) -> tuple[Tensor, Tensor]:
        """Values and squared errors, `[p]` each, with `slope` of w taken out, and of u what is best then."""
        if not self.known.shape[1]:
            return self.values[:, 0], self.covariance[:, 0, 0]
        noise = self.noise
        share = torch.zeros(self.known.shape[1], dtype=torch.float64)
        share[1:] = slope
        if self.varies(1):
            share[0] = (noise[0, 1] - (share[1:] * noise[2:, 1]).sum()) / noise[1, 1]
        weights = torch.cat([torch.ones(1, dtype=torch.float64), -share])
        left = (weights @ self.covariance @ weights).clamp(min=0)
        variance = torch.where(self._told, left, self.covariance[:, 0, 0])
        return self.values @ weights + self.known @ share, variance

    @property
    def _told(self) -> Tensor:
        return self.covariance.isfinite().all(2).all(1)


def best_slope(fits: Sequence[Fit]) -> float:
    """The share of the gap game whose removal leaves least noise in the mean of `fits`; 0 where it explains nothing.

    One for all frames: one for each frame would follow the noise of few coalitions.
    """
    above = below = 0.0
    for fit in fits:
        if fit.known.shape[1] == 2 and fit.varies(2):
            noise = fit.noise  # what u cannot take over: its Schur complement
            inverse = 1 / noise[1, 1] if fit.varies(1) else torch.zeros((), dtype=torch.float64)
            above += float(noise[0, 2] - noise[0, 1] * inverse * noise[1, 2])
            below += float(noise[2, 2] - noise[2, 1] * inverse * noise[1, 2])
    return above / below if below > 0 else 0.0


def frame_seed(seed: int, id_: FrameId) -> int:
    """The seed of one frame's coalitions: the same on every machine and in every process."""
    name = f"{seed}:{id_!r}" if isinstance(id_, str) else f"{seed}:{int(id_)}"
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "big")
