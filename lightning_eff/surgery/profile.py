"""What a network costs: multiply-adds, parameters, bytes, and measured latency."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_eff.batch import batch_size, call_model
from lightning_eff.reporting import Column, Report, Table
from lightning_eff.surgery.counting import measure_costs
from lightning_eff.surgery.state import quiet_model


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one forward pass: median, 5 % and 95 % quantile."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Profile(Report):
    """Costs of one network: table `profile`.

    Attributes:
        macs: multiply-adds per sample.
        params: parameters (weights, biases, affine terms).
        bytes: memory of parameters and buffers.
        latency: of the example batch, None when not asked for.
    """

    macs: int
    params: int
    bytes: int
    latency: Latency | None = None

    def tables(self) -> dict[str, Table]:
        """One row: MACs, parameters, bytes and, where it was measured, latency."""
        columns: list[Column] = [Column("MACs", ","), Column("parameters", ","), Column("bytes", ",")]
        row: list[float] = [self.macs, self.params, self.bytes]
        if self.latency is not None:
            columns += [Column(name, ".3f") for name in ("latency [ms]", "5 %", "95 %")]
            row += [self.latency.median, self.latency.low, self.latency.high]
        return {"profile": Table("Costs of the network", columns, [row], "MACs of one sample.")}


def profile(model: nn.Module, example_inputs: Any, *, latency: bool = False, repeats: int = 20) -> Profile:
    """Measure what ``model`` costs on ``example_inputs``.

    Args:
        model: any torch module; left as it was.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments.
        latency: also time the forward pass on one thread.
        repeats: timed passes.
    """
    if batch_size(example_inputs) < 1:
        raise ValueError("expected at least one sample, got an empty batch")
    costs = measure_costs(model, example_inputs, [])
    config = torch.zeros(1, 0)
    tensors = (*model.parameters(), *model.buffers())
    timed = measure_latency({"": model}, example_inputs, repeats=repeats)[""] if latency else None
    return Profile(
        round(costs.macs(config).item()),
        round(costs.params(config).item()),
        sum(t.numel() * t.element_size() for t in tensors),
        timed,
    )


def measure_latency(
    models: Mapping[str, nn.Module], example_inputs: Any, *, threads: int = 1, warmup: int = 3, repeats: int = 20
) -> dict[str, Latency]:
    """Time forward passes of several networks, interleaved, in CPU time (wall time on other devices)."""
    times: dict[str, list[float]] = {name: [] for name in models}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for round_ in range(warmup + repeats):
            for name, model in models.items():
                with quiet_model(model), torch.no_grad():
                    clock, wait = _clock(model)
                    wait()
                    start = clock()
                    call_model(model, example_inputs)
                    wait()
                    if round_ >= warmup:
                        times[name].append((clock() - start) * 1e3)
    finally:
        torch.set_num_threads(before)
    out = {}
    for name, taken in times.items():
        cuts = statistics.quantiles(taken, n=20, method="inclusive")
        out[name] = Latency(statistics.median(taken), cuts[0], cuts[-1])
    return out


def _clock(model: nn.Module) -> tuple[Callable[[], float], Callable[[], None]]:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type == "cpu":
        return time.process_time, lambda: None
    return time.perf_counter, lambda: torch.accelerator.synchronize(device)
