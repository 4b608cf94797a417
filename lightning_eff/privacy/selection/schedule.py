"""A rate that changes while training goes on, e.g. gradual cooling (arXiv 2112.00845): from dense to sparse."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lightning_eff.arguments import check_choice, check_number


@dataclass(frozen=True)
class RateSchedule:
    """A drop rate that goes from ``initial`` to ``final`` and stays there.

    Args:
        final: rate at the end, in [0, 1).
        initial: rate at the beginning, in [0, 1).
        kind: ``"linear"``; ``"cosine"`` leaves the initial rate and reaches the final one slowly; ``"constant"`` is
            ``final`` all along.
        over: ``"fit"`` reaches the final rate at the last step, or with a selection an epoch in the last epoch: in
            epoch e of E it is ``initial + (final - initial) e / (E - 1)``. A number of optimizer steps reaches it
            there.

    Raises:
        ValueError: an argument lies outside its range.
    """

    final: float
    initial: float = 0.0
    kind: Literal["constant", "linear", "cosine"] = "linear"
    over: Literal["fit"] | int = "fit"

    def __post_init__(self) -> None:
        for name, rate in (("final", self.final), ("initial", self.initial)):
            check_number(f"RateSchedule's {name}", rate, least=0, below=1)
        check_choice("RateSchedule's kind", self.kind, ("constant", "linear", "cosine"))
        if self.over != "fit" and (not isinstance(self.over, int) or isinstance(self.over, bool) or self.over < 1):
            raise ValueError(f'RateSchedule\'s over must be "fit" or a number of steps >= 1, got {self.over!r}')

    def rate(self, done: float, whole: float) -> float:
        """Return the rate after ``done`` of ``whole`` equal parts; part ``whole - 1`` has the final rate."""
        if self.kind == "constant":
            return self.final
        share = 1.0 if whole <= 1 else min(1.0, max(0.0, done / (whole - 1)))
        if self.kind == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return self.initial + (self.final - self.initial) * share
