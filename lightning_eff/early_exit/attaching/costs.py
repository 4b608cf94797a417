"""What it costs to leave at each output: floating point operations, or measured time.

``c_k``, the cost of a sample that leaves at output k, is the backbone up to there plus all enabled heads on the way.
Costs are told as fractions of ``c_base``, the plain backbone; heads can carry them above 1.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightning_eff.batch import batch_size, call_model
from lightning_eff.documents import parsed
from lightning_eff.early_exit.attaching.probe import samples
from lightning_eff.early_exit.inference.hooks import Collect, running
from lightning_eff.surgery.state import quiet_model

if TYPE_CHECKING:
    from lightning_eff.early_exit.network import MultiExitNetwork


@dataclass(frozen=True)
class ExitCosts:
    """Cost of one sample.

    Attributes:
        backbone: cost of the backbone until each of the ``K`` outputs; the last is the plain backbone.
        heads: cost of each of the ``E`` heads.
        unit: ``"FLOPs"`` (two a multiply-add) or ``"s"``.
    """

    backbone: tuple[float, ...]
    heads: tuple[float, ...]
    unit: str = "FLOPs"

    @property
    def base(self) -> float:
        """Cost of the plain backbone."""
        return self.backbone[-1]

    def totals(self, enabled: Sequence[bool] | None = None) -> list[float]:
        """Cost of a sample that leaves at each output, ``K`` numbers.

        Args:
            enabled: exits that are looked at; None is all.
        """
        looked_at = [True] * len(self.heads) if enabled is None else enabled
        heads = accumulate(cost if on else 0.0 for cost, on in zip(self.heads, looked_at, strict=True))
        spent = [*heads] or [0.0]
        return [a + b for a, b in zip(self.backbone, [*spent[: len(self.heads)], spent[-1]], strict=True)]

    def fractions(self, enabled: Sequence[bool] | None = None) -> list[float]:
        """:meth:`totals` divided by the cost of the plain backbone."""
        return [total / self.base for total in self.totals(enabled)]

    def to_dict(self) -> dict[str, Any]:
        """Plain Python, for checkpoints and files."""
        return {"backbone": list(self.backbone), "heads": list(self.heads), "unit": self.unit}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ExitCosts:
        """Undo :meth:`to_dict`; ValueError for anything else."""
        costs: ExitCosts = parsed(cls, values, "the costs")
        if len(costs.backbone) != len(costs.heads) + 1 or not costs.base > 0:
            raise ValueError(f"expected a cost of every output and one head less, got {costs.backbone}, {costs.heads}")
        return costs


def exit_costs(
    network: MultiExitNetwork, example: Any, kind: Literal["flops", "latency"] = "flops", *, repeats: int = 10
) -> ExitCosts:
    """Measure what each output costs.

    Args:
        network: built; left as it was.
        example: inputs of the backbone. Operations are counted on two of its samples, time is taken on all.
        kind: ``"flops"`` or ``"latency"``, the median of ``repeats`` passes.
        repeats: timed passes, >= 1.

    Raises:
        ValueError: an unknown kind, or operations none of which is counted.
    """
    if kind == "latency":
        return _latency(network, example, repeats)
    if kind != "flops":
        raise ValueError(f"expected costs to be 'flops' or 'latency', got {kind!r}")
    with _counting() as counter:
        marks = _marks(network, samples(example, 2), counter.get_total_flops)
    costs = _costs(marks, 2, "FLOPs")
    if costs.base == 0:
        raise ValueError(
            "no floating point operations were counted in the backbone: give costs as a list, or measure latency"
        )
    return costs


@contextmanager
def _counting() -> Iterator[FlopCounterMode]:
    """Count operations; attention in its plain form, its fused kernels and fast path are invisible to the counter."""
    counter = FlopCounterMode(display=False)
    with counter, torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        yield counter


def _latency(network: MultiExitNetwork, example: Any, repeats: int) -> ExitCosts:
    device = next((p.device for p in network.parameters()), torch.device("cpu"))

    def clock() -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter()

    with torch.no_grad():
        _marks(network, example, clock)  # the first pass allocates
        passes = [_costs(_marks(network, example, clock), batch_size(example), "s") for _ in range(repeats)]
    return ExitCosts(
        tuple(statistics.median(values) for values in zip(*(p.backbone for p in passes), strict=True)),
        tuple(statistics.median(values) for values in zip(*(p.heads for p in passes), strict=True)),
        "s",
    )


def _marks(network: MultiExitNetwork, inputs: Any, read: Callable[[], float]) -> list[float]:
    """Readings at the start, before and after each head, and at the end."""
    marks: list[float] = []

    def visit(index: int, feature: Any) -> None:
        marks.append(read())
        network.heads[index](feature)
        marks.append(read())

    with quiet_model(network), running(Collect(network.tape, visit, set())):
        marks.insert(0, read())
        call_model(network.backbone, inputs)
        marks.append(read())
    return marks


def _costs(marks: list[float], batch: int, unit: str) -> ExitCosts:
    spent = [(b - a) / batch for a, b in pairwise(marks)]
    return ExitCosts(tuple(accumulate(spent[0::2])), tuple(spent[1::2]), unit)


def cost_until(backbone: nn.Module, layers: Sequence[str], example: Any) -> list[float]:
    """Fraction of the backbone's operations that are done when each layer, run once, ends.

    Raises:
        ValueError: no operation was counted.
    """
    done: dict[str, int] = {}

    def note(layer: str) -> Callable[..., None]:
        return lambda *_: done.__setitem__(layer, counter.get_total_flops())

    with quiet_model(backbone), _counting() as counter:
        handles = [backbone.get_submodule(layer).register_forward_hook(note(layer)) for layer in layers]
        try:
            call_model(backbone, samples(example, 2))
        finally:
            for handle in handles:
                handle.remove()
    total = counter.get_total_flops()
    if total == 0:
        raise ValueError("no floating point operations were counted in the backbone: name the layers of the exits")
    return [done[layer] / total for layer in layers]
