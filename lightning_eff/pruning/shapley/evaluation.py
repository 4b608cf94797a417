"""One batch of a network without some of its channels: v(S) coalition by coalition, for any network.

What no channel of the group reaches is computed once and answered from memory (the prefix); ``accelerate="off"`` runs
everything. Faster ways, for networks that allow them: ``linear_reader.py`` and ``linear_tail.py``.

Shapes: ``n`` channels of the group, ``M`` coalitions, ``P`` paths of ``K`` steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_eff.batch import batch_size, call_model
from lightning_eff.pruning.values import ValueFunction, per_sample
from lightning_eff.surgery import Gates, PrefixCache
from lightning_eff.surgery.prefix import Tape, tape_bytes

TOLERANCE = 1e-3  # relative error of the outputs above which a fast way is not trusted


class UnfaithfulError(Exception):
    """A fast way does not give what the network gives; the reason is the message."""


class WrongOutputsError(UnfaithfulError):
    """It looked as if it did, and the outputs differ."""


class Evaluation(Protocol):
    """Values of coalitions on one batch, summed over its samples, float64 on the CPU."""

    @property
    def nbytes(self) -> int:
        """Memory it holds."""
        ...

    @property
    def needs_model(self) -> bool:
        """Whether it runs the network, which then has to be in evaluation mode."""
        ...

    def sums(self, coalitions: Tensor) -> Tensor:
        """Values of ``coalitions`` (bool ``[M, n]``): ``[M]``."""
        ...

    def paths(self, start: Tensor, flips: Tensor) -> Tensor:
        """Values after each step of paths from ``start`` (bool ``[n]``): ``[P, K]``.

        Args:
            start: the coalition that every path starts from.
            flips: int64 ``[P, K]``, the channel that changes sides at each step.
        """
        ...


class NoSamples:
    """The :class:`Evaluation` of a process without samples."""

    nbytes, needs_model = 0, False

    def sums(self, coalitions: Tensor) -> Tensor:
        """Zeros."""
        return torch.zeros(len(coalitions), dtype=torch.float64)

    def paths(self, start: Tensor, flips: Tensor) -> Tensor:
        """Zeros."""
        return torch.zeros(flips.shape, dtype=torch.float64)


class MaskedNetwork:
    """A network, and the gates that close channels of one group at the readers' inputs.

    Args:
        model: the network.
        gates: closed gates on the group alone; open while :meth:`outputs` is called.
        name: the group.
        value: ``(outputs, target) -> [B]``.
        cache: answers what no gate reaches; None runs everything.
    """

    def __init__(
        self, model: nn.Module, gates: Gates, name: str, value: ValueFunction, cache: PrefixCache | None
    ) -> None:
        self.model, self.gates, self.name, self.value, self.cache = model, gates, name, value, cache

    def runner(self, inputs: Any) -> Callable[[], Any]:
        """One ordinary forward pass."""
        return lambda: call_model(self.model, inputs)


class GatedBatch:
    """The :class:`Evaluation` that masks and runs what follows, once per coalition."""

    needs_model = True

    def __init__(self, network: MaskedNetwork, inputs: Any, target: Any) -> None:
        self.network, self._target = network, target
        self._count = batch_size(inputs)
        self._run = network.runner(inputs)
        self._tape: Tape = {} if network.cache is None else network.cache.record(self._run)

    @property
    def nbytes(self) -> int:
        """As :attr:`Evaluation.nbytes`."""
        return tape_bytes(self._tape)

    def replay(self) -> Any:
        """Outputs with the gates and answers that are in place."""
        return self._run() if self.network.cache is None else self.network.cache.replay(self._tape, self._run)

    def outputs(self, kept: Tensor) -> Any:
        """Outputs with only the channels ``kept`` (bool ``[n]``); the gates must be open."""
        self.network.gates.set(self.network.name, kept.to(torch.get_default_dtype()))
        return self.replay()

    def worth(self, outputs: Any) -> Tensor:
        """Sum of values over the samples, float64 ``[]``."""
        return per_sample(self.network.value, outputs, self._target, self._count).sum().cpu()

    def sums(self, coalitions: Tensor) -> Tensor:
        """As :meth:`Evaluation.sums`."""
        with self.network.gates:
            values = [self.worth(self.outputs(kept)) for kept in coalitions]
        return torch.stack(values) if values else torch.zeros(0, dtype=torch.float64)

    def paths(self, start: Tensor, flips: Tensor) -> Tensor:
        """As :meth:`Evaluation.paths`."""
        return self.sums(along(start, flips).flatten(0, 1)).view(flips.shape)


def along(start: Tensor, flips: Tensor) -> Tensor:
    """Coalitions of paths without their start: bool ``[n]``, int64 ``[P, K]`` -> bool ``[P, K, n]``."""
    changes = torch.zeros(*flips.shape, len(start), dtype=torch.int64).scatter_(2, flips[..., None], 1)
    return start ^ (changes.cumsum(1) % 2).bool()


def compare(got: Any, expected: Any, dtype: torch.dtype) -> None:
    """Raise WrongOutputsError where outputs differ by more than rounding in ``dtype``."""
    tolerance = max(TOLERANCE, 8 * torch.finfo(dtype).eps)
    for a, b in zip(pytree.tree_leaves(got), pytree.tree_leaves(expected), strict=True):
        if isinstance(a, Tensor) and a.is_floating_point():
            error, scale = float((a.double() - b.double()).norm()), float(b.double().norm())
            if not error <= tolerance * scale + 1e-6:
                raise WrongOutputsError(f"sums over its channels err by {error / (scale or 1):.1g} of the outputs")


@contextmanager
def quick_pools(model: nn.Module) -> Iterator[None]:
    """Let max pooling of images on a CPU go through channels-last memory: the same bits, several times as fast."""

    def quick(pool: nn.MaxPool2d) -> Callable[[Tensor], Tensor]:
        def forward(input: Tensor) -> Tensor:
            if input.ndim != 4 or input.device.type != "cpu" or input.shape[1] < 8 or not input.is_contiguous():
                return type(pool).forward(pool, input)  # type: ignore[no-any-return]
            output: Tensor = type(pool).forward(pool, input.contiguous(memory_format=torch.channels_last))
            return output.contiguous()

        return forward

    pools = [m for m in model.modules() if isinstance(m, nn.MaxPool2d) and type(m).forward is nn.MaxPool2d.forward]
    plain = [pool for pool in pools if "forward" not in pool.__dict__ and not pool.return_indices]
    try:
        for pool in plain:
            pool.__dict__["forward"] = quick(pool)
        yield
    finally:
        for pool in plain:
            pool.__dict__.pop("forward", None)
