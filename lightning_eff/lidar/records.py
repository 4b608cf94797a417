"""What frames evaluated, and the values that follow from it.

Control variate: the gap game w of a frame (`gap.py`) is known exactly, and v - beta w is less noisy than v. As phi(v) =
phi(v - beta w) + beta phi(w) for any beta, the one with the smallest estimated error is taken. It is found in the same
samples: an estimate is linear in the values, so that estimates and errors of v, w and v - w tell those of v - beta w.

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
class Solved:
    """Values and their squared standard errors, `[p]`; `noise` is the sum of the latter without control variate."""

    values: Tensor
    variance: Tensor
    noise: float = 0.0

    def among(self, present: Tensor, n: int) -> Solved:
        """The same for `n` candidates: those that are not `present` are worth exactly 0."""
        values, variance = torch.zeros(2, n, dtype=torch.float64)
        values[present], variance[present] = self.values, self.variance
        return Solved(values, variance, self.noise)


def solve(estimator: CoalitionEstimator, samples: Sequence[Sampled], known: Tensor | None) -> Solved:
    """Values from samples, frames with weights that sum to 1.

    Args:
        estimator: what fits them.
        samples: `D` = 1, or v, w and v - w.
        known: exact values of w, `[p]`; None without control variate.
    """
    values, errors = estimator.fit(samples)
    variance = errors**2
    if known is None:
        return Solved(values[:, 0], variance[:, 0], _total(variance[:, 0]))
    ours, theirs, difference = variance.unbind(1)
    covariance = (ours + theirs - difference) / 2
    told = variance.isfinite().all(1)
    noise = float(theirs[told].sum())
    beta = float(covariance[told].sum()) / noise if noise > 0 else 0.0
    controlled = values[:, 0] + beta * (known - values[:, 1])
    left = torch.where(told, (ours - 2 * beta * covariance + beta**2 * theirs).clamp(min=0), ours)
    return Solved(controlled, left, _total(ours))


def _total(variance: Tensor) -> float:
    return float(variance[variance.isfinite()].sum())


def frame_seed(seed: int, id_: FrameId) -> int:
    """The seed of one frame's coalitions: the same on every machine and in every process."""
    name = f"{seed}:{id_!r}" if isinstance(id_, str) else f"{seed}:{int(id_)}"
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "big")
