"""The choice among equivalent ways to the norms and the sum of a layer's weight gradients.

All ways are exact. Which one is fastest depends on shapes, on the machine and on what is selected, so it is timed once
for each of them and remembered; batches of about the same size (the same power of two) share a choice, because Poisson
sampling never draws the same size twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from functools import cache, partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lightning_eff.privacy.engine.uses import CHUNK_ELEMENTS, weighted_sum

if TYPE_CHECKING:
    from lightning_eff.privacy.engine.weights import WeightUse

# numbers in a chunk beyond which no chunk is tried: 32 MB, far more than a cache holds
_LARGEST_CHUNK = 1 << 23
# bytes beyond which the C library never keeps freed memory for the next tensor
_ALWAYS_FRESH = 1 << 25


class Plan(NamedTuple):
    """How the norms of a weight are computed."""

    method: str
    chunk: int
    store: bool


class Tuner:
    """Remembers plans, and keeps the memory budget of stored per-sample gradients.

    Args:
        memory_budget: bytes that stored gradients may take beyond what they let go of.
        timed: False decides by counting operations.
    """

    def __init__(self, memory_budget: int, *, timed: bool) -> None:
        self.memory_budget = memory_budget
        self.timed = timed
        self._left = memory_budget
        self._plans: dict[Hashable, Plan] = {}

    def start_batch(self) -> None:
        """Free the budget for the next physical batch."""
        self._left = self.memory_budget

    def store(self, size: int) -> bool:
        """Take ``size`` bytes from the budget; False where they are not left."""
        fits = size <= self._left
        if fits:
            self._left -= size
        return fits

    def plan(self, use: WeightUse) -> Plan:
        """Return the plan for a use that has received its gradient, and take what it stores from the budget."""
        fits = use.stored_bytes <= self._left
        key = (*use.key, use.samples.bit_length(), fits)
        plan = self._plans.get(key)
        if plan is None:
            choose = _timed_plan if self.timed else _counted_plan
            plan = self._plans[key] = choose(use, fits)
        if plan.store:
            self._left -= use.stored_bytes
        return plan


def _counted_plan(use: WeightUse, fits: bool) -> Plan:
    """Choose by the number of operations."""
    gradient = max(1, use.selection.block_shape.numel())
    methods = use.methods()
    rows = use.selection.block_shape[0]
    gram = use.positions * (rows + gradient // max(1, rows)) < gradient
    if "gram" in methods and gram:
        return Plan("gram", max(1, CHUNK_ELEMENTS // use.positions**2), store=False)
    return Plan(methods[0], max(1, CHUNK_ELEMENTS // gradient), store=fits)


def _timed_plan(use: WeightUse, fits: bool) -> Plan:
    """Choose by running every way that is not clearly too slow twice."""
    gradient = max(1, use.selection.block_shape.numel())
    device = use.gradient.device
    cost: dict[Plan, float] = {}
    for method in use.methods():
        size = use.positions**2 if method == "gram" else gradient
        # nothing is made in chunks where only what is active is made
        sizes = (use.samples,) if method == "sampled" else (2, 8, 32, use.samples)
        chunks = {min(chunk, use.samples) for chunk in sizes}
        for chunk in sorted(chunks):
            if chunk * size <= _LARGEST_CHUNK or chunk == min(chunks):
                plan = Plan(method, chunk, store=False)
                cost[plan] = _seconds(partial(use.run, plan), device, min(cost.values(), default=None))
    factors = torch.ones(use.samples, device=device)
    summing = _seconds(partial(use.weight_sum, factors), device)
    best = min(cost, key=cost.__getitem__)
    if not fits:
        return best
    total = {plan: seconds + summing for plan, seconds in cost.items()}
    fastest = sorted((plan for plan in cost if plan.method != "gram"), key=cost.__getitem__)[:2]
    for plan in fastest:
        stored = plan._replace(store=True)
        total[stored] = _seconds(partial(_store_and_sum, use, stored, factors), device) + _fresh_memory(use, plan)
    return min(total, key=total.__getitem__)


def _store_and_sum(use: WeightUse, plan: Plan, factors: Tensor) -> None:
    _, stored = use.run(plan)
    assert stored is not None
    weighted_sum(factors, stored)


def _fresh_memory(use: WeightUse, plan: Plan) -> float:
    """Return the seconds that the operating system takes to hand out what is stored.

    Timing a layer again and again gets the same memory again; in a step, that of all layers is held at once.
    """
    stored = use.selection.count if plan.method == "sampled" else use.selection.block_shape.numel()
    size = 4 * use.samples * stored
    if use.gradient.device.type != "cpu" or size > _ALWAYS_FRESH:
        return 0.0
    return size * _seconds_per_fresh_byte()


@cache
def _seconds_per_fresh_byte() -> float:
    size = 2 * _ALWAYS_FRESH
    start = time.thread_time()
    block = torch.empty(size, dtype=torch.uint8).fill_(0)
    middle = time.thread_time()
    block.fill_(0)
    return max(0.0, 2 * middle - start - time.thread_time()) / size


def _seconds(run: Callable[[], object], device: torch.device, to_beat: float | None = None) -> float:
    """Time a run twice and return the shorter time; once where it takes over twice the time that is to beat."""
    # time of this thread, so that other work on the machine does not decide; a GPU works elsewhere
    clock = time.thread_time if device.type == "cpu" else time.perf_counter
    shortest = float("inf")
    for _ in range(2):
        _wait(device)
        start = clock()
        run()
        _wait(device)
        shortest = min(shortest, clock() - start)
        if to_beat is not None and shortest > 2 * to_beat:
            break
    return shortest


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
