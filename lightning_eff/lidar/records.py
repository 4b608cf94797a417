"""What frames evaluated, and the values that follow from it.

Control variate: the gap game w of a frame (`gap.py`) is known exactly, and v - beta w is less noisy than v. As phi(v) =
phi(v - beta w) + beta phi(w) for any beta, the one with the smallest estimated error is taken. It is found in the same
samples: an estimate is linear in the values, so that estimates and errors of v, w and v - w tell those of v - beta w.
The slope of v on w over random coalitions, another common choice, removes less noise and may add some.

Shapes: `p` players, `P` units of `c` coalitions (2: a coalition and its complement), `D` components of a value.
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

    def to_dict(self) -> dict[str, Any]:
        """Tensors and numbers, fit for checkpoints with `weights_only=True`; `FrameRecord(**entries)` takes them."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}

    def add(self, units: Tensor, errors: Tensor, proxy: Tensor | None) -> None:
        """Take in more units, bool `[P, p]`, with their errors and values of the gap game, `[P, c]`."""
        self.units, self.errors = torch.cat([self.units, units]), torch.cat([self.errors, errors])
        if proxy is not None:
            self.proxy = torch.cat([self.proxy, proxy])

    def sampled(self, weight: float, controlled: bool) -> Sampled:
        """As samples of v, or of v, w and v - w where controlled (`D` = 1 or 3)."""
        values, ends = self.empty - self.errors, torch.tensor([0.0, self.empty - self.full], dtype=torch.float64)
        parts, end_parts = [values], [ends]
        if controlled:
            parts += [self.proxy, values - self.proxy]
            end_parts += [self.proxy_ends, ends - self.proxy_ends]
        packed = np.packbits(self.units.numpy(), axis=1)
        return Sampled(weight, packed, torch.stack(parts, 2), torch.stack(end_parts, 1), self.units.shape[1])


@dataclass(eq=False)
class Fit:
    """Estimates from the samples of a frame, or of all: values and squared standard errors, `[p, D]`.

    Attributes:
        values: of v, or of v, w and v - w.
        variance: likewise.
        known: exact values of w, `[p]`; None without control variate.
    """

    values: Tensor
    variance: Tensor
    known: Tensor | None = None

    @classmethod
    def of(cls, estimator: CoalitionEstimator, samples: Sequence[Sampled], known: Tensor | None) -> Fit:
        """Fit samples, of frames with weights that sum to 1."""
        values, errors = estimator.fit(samples)
        return cls(values, errors**2, known)

    @classmethod
    def final(cls, values: Tensor, variance: Tensor) -> Fit:
        """Values `[p]` that are what they are."""
        return cls(values[:, None], variance[:, None])

    @property
    def noise(self) -> float:
        """Sum of the squared errors of v, where they are known."""
        return _total(self.variance[:, 0])

    @property
    def slope(self) -> Tensor:
        """Sums of the covariances of the errors of v and w and of the squared errors of w: `[2]`."""
        if self.known is None:
            return torch.zeros(2, dtype=torch.float64)
        return torch.stack([self._covariance, self.variance[:, 1]])[:, self._told].sum(1)

    def controlled(self, beta: float) -> tuple[Tensor, Tensor]:
        """Values and squared errors, `[p]` each, with `beta` of the gap game taken out."""
        values, variance = self.values[:, 0], self.variance[:, 0]
        if self.known is None:
            return values, variance
        less = (variance - 2 * beta * self._covariance + beta**2 * self.variance[:, 1]).clamp(min=0)
        return values + beta * (self.known - self.values[:, 1]), torch.where(self._told, less, variance)

    @property
    def _told(self) -> Tensor:
        return self.variance.isfinite().all(1)

    @property
    def _covariance(self) -> Tensor:
        ours, theirs, difference = self.variance.unbind(1)
        return (ours + theirs - difference) / 2


def best_beta(fits: Sequence[Fit]) -> float:
    """The share of the gap game whose removal leaves least noise in the mean of `fits`; 0 where it explains nothing.

    One for all frames: one for each frame would follow the noise of few coalitions.
    """
    covariance, variance = torch.stack([fit.slope for fit in fits]).sum(0).tolist()
    return covariance / variance if variance > 0 else 0.0


def _total(variance: Tensor) -> float:
    return float(variance[variance.isfinite()].sum())


def frame_seed(seed: int, id_: FrameId) -> int:
    """The seed of one frame's coalitions: the same on every machine and in every process."""
    name = f"{seed}:{id_!r}" if isinstance(id_, str) else f"{seed}:{int(id_)}"
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "big")
