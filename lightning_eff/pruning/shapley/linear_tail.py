"""Where everything from the reader to the logits is affine, so are the logits: logits(S) = c + sum_{i in S} g_i.

Then no network is run for a coalition. The sums over each five channels, 32 of them, are tabulated, a coalition adds
up one entry of every table, and accuracies or losses are taken of many coalitions at once.

Shapes: ``n`` channels of the group, ``M`` coalitions, ``P`` paths of ``K`` steps, ``B`` samples, ``C`` classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_eff.batch import batch_size
from lightning_eff.pruning.shapley.evaluation import GatedBatch, MaskedNetwork, UnfaithfulError, along, compare
from lightning_eff.pruning.shapley.linear_reader import DeltaBatch, LinearReader
from lightning_eff.pruning.values import Accuracy, NegativeLoss, ValueFunction, per_sample

STACK = 2**21  # numbers of the reader's output that are handed on at a time
TABULATED = 5  # channels a table
BLOCK = 2**17  # numbers that are worked on at a time: what the processor's own memory holds


def affine_logits(example: DeltaBatch) -> Tensor | None:
    """Logits of an example where what follows the reader is affine, else None.

    That is tried far outside of what masks can reach: random outputs of the reader, of both signs and up to 10^4 times
    their usual size, wake every activation, also one that no coalition reaches.
    """
    usual = example.full
    scale = float(usual.square().mean().sqrt()) or 1.0
    generator = torch.Generator().manual_seed(0)

    def noise(size: float) -> Tensor:
        return (size * scale * torch.randn(usual.shape, generator=generator)).to(usual)

    with example.answered() as outputs:

        def tail(y: Tensor) -> Tensor:
            return logits_of(example.gated.network, outputs(y.clone())).double()

        try:
            constant = tail(torch.zeros_like(usual))
        except UnfaithfulError:
            return None
        for size in (1e2, 1.0, 1e4):
            a, b = noise(size), noise(size)
            at_a = tail(a) - constant
            allowed = 1e-4 * at_a.abs().max() + 2e-6 * constant.abs().max()
            if not bool((at_a + (tail(-a) - constant)).abs().max() <= allowed):
                return None
            at_b = tail(b) - constant
            allowed += 1e-4 * at_b.abs().max()
            if not bool((at_a + at_b - (tail(a + b) - constant)).abs().max() <= allowed):
                return None
    return constant


def logits_of(network: MaskedNetwork, outputs: Any) -> Tensor:
    """The tensor among the model's outputs that the value looks at; UnfaithfulError where that is not known."""
    key = network.value.output if isinstance(network.value, Accuracy | NegativeLoss) else None
    try:
        logits = outputs if key is None else outputs[key]
    except (KeyError, IndexError, TypeError):
        logits = None
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise UnfaithfulError(f"the outputs are a {type(outputs).__name__}")
    return logits


def table_bytes(n: int, logits: Tensor) -> int:
    """Memory of the tables for ``n`` channels and outputs like ``logits``."""
    itemsize = torch.promote_types(logits.dtype, torch.float32).itemsize
    return -(-n // TABULATED) * (1 << TABULATED) * logits.numel() * itemsize


class TailTables:
    """The :class:`Evaluation` by tables of logits. A coalition's value depends on nothing but the coalition.

    Args:
        network: the masked network.
        reader: of its channels; what follows it is affine.
        inputs: of the model, ``B`` samples.
        target: of the samples.

    Raises:
        UnfaithfulError: the reader is not called exactly once, or the logits of half of the channels are not those of
            the masked network.
    """

    def __init__(self, network: MaskedNetwork, reader: LinearReader, inputs: Any, target: Any) -> None:
        self._value, self._target, self._count = network.value, target, batch_size(inputs)
        batch = DeltaBatch(network, reader, inputs, target)
        with batch.answered() as outputs:

            def tail(y: Tensor) -> Tensor:
                logits = logits_of(network, outputs(y))
                return logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)

            constant = tail(batch.empty.clone())
            rows = _effects(tail, batch, constant)
        self._shape = constant.shape
        self._swap = _target_first(network.value, constant, target)
        self._table = _tabulated(self._arranged(constant[None]), self._arranged(rows))
        self._check(batch.gated, reader.size)

    @property
    def needs_model(self) -> bool:
        """As :attr:`Evaluation.needs_model`: for values of one's own only, which may look at anything."""
        return self._swap is None

    @property
    def nbytes(self) -> int:
        """As :attr:`Evaluation.nbytes`."""
        return self._table.nbytes

    def sums(self, coalitions: Tensor) -> Tensor:
        """As :meth:`Evaluation.sums`."""
        rows = max(1, BLOCK // self._table.shape[1])
        parts = [self._worth(self._logits(part)) for part in torch.split(coalitions, rows)] if len(coalitions) else []
        return torch.cat([torch.zeros(0, dtype=torch.float64), *(part.cpu() for part in parts)])

    def paths(self, start: Tensor, flips: Tensor) -> Tensor:
        """As :meth:`Evaluation.paths`."""
        return self.sums(along(start, flips).flatten(0, 1)).view(flips.shape)

    def _check(self, batch: GatedBatch, size: int) -> None:
        kept = torch.arange(size) % 2 == 0
        with batch.network.gates:
            expected = logits_of(batch.network, batch.outputs(kept))
            compare(self._logits(kept[None])[0], self._arranged(expected[None])[0], expected.dtype)

    def _arranged(self, logits: Tensor) -> Tensor:
        """Logits ``[M, B, ...]`` as rows of numbers; ``[B, C]`` as ``[C, B]`` with the target's class in row 0."""
        if self._swap is not None:
            logits = logits.transpose(1, 2).gather(1, self._swap.expand(len(logits), -1, -1))
        return logits.flatten(1)

    def _logits(self, coalitions: Tensor) -> Tensor:
        """Arranged logits, ``[M, C * B]``."""
        device = self._table.device
        bits = F.pad(coalitions.float(), (0, -coalitions.shape[1] % TABULATED)).view(len(coalitions), -1, TABULATED)
        entry = (bits @ 2.0 ** torch.arange(TABULATED)).long() + 2**TABULATED * torch.arange(bits.shape[1])
        return F.embedding_bag(entry.to(device), self._table, mode="sum")

    def _worth(self, rows: Tensor) -> Tensor:
        """Arranged logits ``[M, C * B]`` -> sum of values, float64 ``[M]``."""
        if self._swap is None:
            worths = [per_sample(self._value, row.view(self._shape), self._target, self._count).sum() for row in rows]
            return torch.stack(worths)
        logits = rows.view(len(rows), -1, self._count)
        own = logits[:, 0]
        if isinstance(self._value, NegativeLoss):
            return (own - logits.logsumexp(1)).sum(1, dtype=torch.float64)
        best = logits[:, 1:].amax(1)
        right = torch.count_nonzero(own > best, 1)
        unclear = right + torch.count_nonzero(own < best, 1) < self._count  # ties go to the lowest class
        if bool(unclear.any()):
            classes = logits[unclear].gather(1, self._swap.expand(int(unclear.sum()), -1, -1))
            right[unclear] = (classes.argmax(1) == self._target).sum(1)
        return right.double()


def _effects(tail: Callable[[Tensor], Tensor], batch: DeltaBatch, constant: Tensor) -> Tensor:
    """What each channel adds to the logits: ``[n, B, ...]``.

    Many channels are run as one batch where the network takes that, and gives the last sample what it gives it alone.
    """
    together = max(1, STACK // batch.empty.numel())
    rows, waiting = [], list[Tensor]()
    for number, part in enumerate(batch.each(), start=1):
        waiting.append(batch.empty + part)
        if len(waiting) < together and number < batch.size:
            continue
        last = tail(waiting[-1].clone())
        stacked = _stacked(tail, waiting, last) if together > 1 else None
        if stacked is None:
            together = 1
            stacked = torch.stack([*(tail(y) for y in waiting[:-1]), last])
        rows.append(stacked - constant)
        waiting = []
    return torch.cat(rows)


def _stacked(tail: Callable[[Tensor], Tensor], outputs: list[Tensor], last: Tensor) -> Tensor | None:
    try:
        logits = tail(torch.cat(outputs))
        stacked = logits.view(len(outputs), len(last), *logits.shape[1:])
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, UnfaithfulError):  # the network expects the batch it has seen
        return None
    same = stacked.shape[1:] == last.shape and bool((stacked[-1] - last).norm() <= 1e-5 * last.norm())
    return stacked if same else None


def _target_first(value: ValueFunction, logits: Tensor, target: Any) -> Tensor | None:
    """Which class each row of ``[C, B]`` shows when the target's changes places with class 0; None: value unknown."""
    if type(value) not in (Accuracy, NegativeLoss) or logits.ndim != 2 or logits.shape[1] < 2:
        return None
    if not isinstance(target, Tensor) or target.shape != logits.shape[:1] or target.is_floating_point():
        return None
    if bool(((target < 0) | (target >= logits.shape[1])).any()):
        return None
    swap = torch.arange(logits.shape[1], device=target.device)[:, None].repeat(1, len(target))
    swap.scatter_(0, target.long()[None], 0)
    swap[0] = target
    return swap


def _tabulated(constant: Tensor, rows: Tensor) -> Tensor:
    """Sums over all subsets of each five of the ``rows`` ``[n, X]``, the ``constant`` ``[1, X]`` with the first five.

    Returns:
        ``[32 * ceil(n / 5), X]``: entry ``32 t + c`` holds the rows ``5 t + j`` where bit j of ``c`` is set.
    """
    tables = []
    for number, five in enumerate(torch.split(rows, TABULATED)):
        table = constant if number == 0 else torch.zeros_like(constant)
        for row in five:
            table = torch.cat([table, table + row])
        tables.append(table)
    return torch.cat(tables)
