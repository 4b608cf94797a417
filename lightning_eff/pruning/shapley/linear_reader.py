"""Where one layer reads the channels, its output is a sum over them: y(S) = y(none) + sum_{i in S} h_i.

All h_i together cost about one such layer. Then a removal is one subtraction, a walk is a running sum, and only what
follows the reader is run. Holds for a convolution or a linear layer that is called once, whatever the network does
before and behind.

Shapes: ``n`` channels of the group, ``Y`` the shape of the reader's output, ``K`` steps of a path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_eff.pruning.shapley.evaluation import GatedBatch, MaskedNetwork, UnfaithfulError, along, compare
from lightning_eff.surgery.graph import ChannelGroup

REFRESH = 64  # steps after which a running sum is formed anew, against float32 drift
WORK_PER_ADDITION = 16  # multiply-adds of a layer that take as long as one addition from memory (measured)

_LAYERS = {nn.Conv1d: 3, nn.Conv2d: 4, nn.Conv3d: 5, nn.Linear: 0}  # dimensions of the input, 0: any


class LinearReader:
    """The one layer that reads the channels of a group.

    Args:
        model: the network.
        group: the channels.
        fill: for the reader's path the constant ``[E]`` that a removed input becomes, as :attr:`Gates.fill`.

    Raises:
        UnfaithfulError: other layers read the channels too, or the layer is of another kind.
    """

    def __init__(self, model: nn.Module, group: ChannelGroup, fill: Mapping[str, Tensor]) -> None:
        modules = dict(model.named_modules(remove_duplicate=False))
        if len(group.consumers) != 1:
            raise UnfaithfulError(f"{len(group.consumers)} layers read its channels")
        (member,) = group.consumers
        self.module = modules[member.path]
        kind = next((k for k in _LAYERS if type(self.module).forward is getattr(k, "forward", None)), None)
        if kind is None or "forward" in self.module.__dict__ or getattr(self.module, "groups", 1) != 1:
            raise UnfaithfulError(f"{member.path}, which reads its channels, is no plain convolution or linear layer")
        self.path, self.size = member.path, group.size
        self._dims = _LAYERS[kind]
        self._axis = 1 if self._dims else -1
        self._all = member.index
        self._positions = [member.index[member.root == channel] for channel in range(group.size)]
        self._fill = fill.get(member.path)
        weight = self.module.weight
        self.fan_in = weight[0].numel()

    def observe(self, network: MaskedNetwork, inputs: Any, target: Any) -> tuple[GatedBatch, Tensor, torch.dtype]:
        """One forward pass: the batch with its prefix, what the reader read, and the type of what it returned.

        Raises:
            UnfaithfulError: the reader is not called exactly once, or reads something unusual.
        """
        calls: list[tuple[Tensor, torch.dtype]] = []
        forward = self.module.forward

        def noting(input: Tensor) -> Tensor:
            output: Tensor = forward(input)
            calls.append((input.clone(), output.dtype))
            return output

        with self.instead(noting):
            batch = GatedBatch(network, inputs, target)
            if not calls:  # nothing to record
                network.runner(inputs)()
        if len(calls) != 1:
            raise UnfaithfulError(f"{self.path}, which reads its channels, is called {len(calls)} times")
        x, dtype = calls[0]
        if (self._dims and x.ndim != self._dims) or not x.is_floating_point():
            raise UnfaithfulError(f"{self.path}, which reads its channels, gets {x.dtype} {list(x.shape)}")
        return batch, x, dtype

    @contextmanager
    def instead(self, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Compute something else in the place of the layer."""
        self.module.__dict__["forward"] = forward
        try:
            yield
        finally:
            self.module.__dict__.pop("forward", None)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs for the input ``x`` without the channels and with all of them, ``[*Y]``, and what they change in it.

        In float32 at least, whatever the precision context.
        """
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        index, axis = self._all.to(x.device), self._axis % x.ndim
        closed = torch.zeros((), dtype=x.dtype, device=x.device)
        if self._fill is not None:
            closed = self._fill.to(x)[index].reshape([-1 if d == axis else 1 for d in range(x.ndim)])
        rest = x.index_copy(axis, index, closed.expand_as(x.index_select(axis, index)).contiguous())
        weight = self.module.weight.to(x.dtype)
        bias = None if self.module.bias is None else self.module.bias.to(x.dtype)
        return self._apply(rest, weight, bias), self._apply(x, weight, bias), x - rest

    def alone(self, x: Tensor) -> Iterator[Tensor]:
        """What each channel adds, ``n`` times ``[*Y]``, from the third thing that :meth:`parts` returns."""
        weight = self.module.weight.to(x.dtype)
        for positions in self._positions:
            at = positions.to(x.device)
            yield self._apply(x.index_select(self._axis, at), weight.index_select(1, at), None)

    def _apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            if not self._dims:
                return F.linear(x, weight, bias)
            output: Tensor = self.module._conv_forward(x, weight, bias)
            return output


class DeltaBatch:
    """The :class:`Evaluation` that answers the reader with sums and runs what follows.

    The sum of a coalition depends on nothing but the coalition, that of a path on nothing but the path.

    Args:
        network: the masked network.
        reader: of its channels.
        inputs: of the model, ``B`` samples.
        target: of the samples.

    Attributes:
        needs_model: True.
        empty: the reader's output without the channels, ``[*Y]``.
        full: that with all of them, ``[*Y]``.

    Raises:
        UnfaithfulError: the reader is not called exactly once.
    """

    needs_model = True

    def __init__(self, network: MaskedNetwork, reader: LinearReader, inputs: Any, target: Any) -> None:
        self._reader = reader
        self.gated, x, self._dtype = reader.observe(network, inputs, target)
        self.empty, self.full, self._change = reader.parts(x)

    @property
    def nbytes(self) -> int:
        """As :attr:`Evaluation.nbytes`, with the parts, which are computed when they are needed."""
        return self.gated.nbytes + self._change.nbytes + (self.size + 2) * self.empty.nbytes

    @property
    def size(self) -> int:
        """Number of channels ``n``."""
        return self._reader.size

    def each(self) -> Iterator[Tensor]:
        """What each channel adds to the reader's output: ``n`` times ``[*Y]``."""
        return self._reader.alone(self._change)

    @cached_property
    def _parts(self) -> Tensor:
        parts = self.empty.new_empty(self.size, *self.empty.shape)
        for stored, part in zip(parts, self.each(), strict=True):
            stored.copy_(part)
        return parts

    def sums(self, coalitions: Tensor) -> Tensor:
        """As :meth:`Evaluation.sums`; where a sum has so many terms that the layer itself is faster, it is run."""
        members = coalitions.sum(1)
        terms = torch.minimum(members, self.size - members)
        summed = WORK_PER_ADDITION * terms <= self._reader.fan_in
        values = torch.zeros(len(coalitions), dtype=torch.float64)
        if bool(summed.any()):
            with self.answered() as outputs:
                worths = [self.gated.worth(outputs(self._sum(kept))) for kept in coalitions[summed]]
            values[summed] = torch.stack(worths)
        if not bool(summed.all()):
            values[~summed] = self.gated.sums(coalitions[~summed])
        return values

    def paths(self, start: Tensor, flips: Tensor) -> Tensor:
        """As :meth:`Evaluation.paths`."""
        values = torch.zeros(flips.shape, dtype=torch.float64)
        with self.answered() as outputs:
            for row, path in enumerate(flips):
                for step, total in enumerate(self._running(start, path)):
                    values[row, step] = self.gated.worth(outputs(total))
        return values

    def check(self) -> None:
        """Compare the end of a walk that removes every other channel with the masked network itself.

        Raises:
            WrongOutputsError: they differ by more than rounding.
        """
        start = torch.ones(self.size, dtype=torch.bool)
        flips = torch.arange(0, self.size, 2)
        *_, total = self._running(start, flips)
        with self.answered() as outputs:
            got = outputs(total)
        with self.gated.network.gates:
            compare(got, self.gated.outputs(along(start, flips[None])[0, -1]), self._dtype)

    @contextmanager
    def answered(self) -> Iterator[Callable[[Tensor], Any]]:
        """A function from the reader's output ``[*Y]``, which may be written to, to the model's outputs."""
        answer = [self.empty]

        def outputs(y: Tensor) -> Any:
            answer[0] = y.to(self._dtype)
            return self.gated.replay()

        with self._reader.instead(lambda input: answer[0]):
            yield outputs

    def _sum(self, kept: Tensor) -> Tensor:
        """Output from scratch, over the fewer of those who stay and those who leave: a new tensor ``[*Y]``."""
        few = 2 * int(kept.sum()) <= len(kept)
        total = (self.empty if few else self.full).clone()
        for channel in (kept if few else ~kept).nonzero().flatten().tolist():
            total.add_(self._parts[channel], alpha=1 if few else -1)
        return total

    def _running(self, start: Tensor, flips: Tensor) -> Iterator[Tensor]:
        """Output after each flip; the next is formed before one is handed out, which may be written to."""
        kept = start.clone()
        current, spare = self.empty, None  # set at step 0
        for step, channel in enumerate(flips.tolist()):
            kept[channel] = not kept[channel]
            if step % REFRESH == 0 or int(kept.sum()) in (0, len(kept)):
                following = self._sum(kept)
            else:
                sign = 1 if kept[channel] else -1
                following = torch.add(current, self._parts[channel], alpha=sign, out=spare)
            if step > 0:
                yield current
                spare = current
            current = following
        if len(flips):
            yield current
