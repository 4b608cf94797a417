"""The choice among equivalent computations of per-sample quantities."""

from __future__ import annotations


class Tuner:
    """Chooses how a layer's norms and sums are computed, and keeps the memory budget."""

    def __init__(self, memory_budget: int, *, timed: bool) -> None:
        self.memory_budget = memory_budget
        self.timed = timed

    def start_batch(self) -> None:
        """Free the budget for the next physical batch."""
