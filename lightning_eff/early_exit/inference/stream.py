"""Answer a whole loader, survivors of several batches put together.

Where many samples leave early, the rest of a batch no longer fills the machine. Here samples wait before each stage of
the backbone until there are enough of them, so that every stage runs on full batches, however small those of the loader
are. Fewer than ``merge_batch`` samples wait before each stage. Shapes: ``B`` batch, ``N`` samples, ``C`` classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_eff.arguments import check_whole
from lightning_eff.batch import SplitBatch, batch_size
from lightning_eff.early_exit.attaching.features import BatchDim, Layout
from lightning_eff.early_exit.inference.leaving import ExitOutput
from lightning_eff.early_exit.inference.policies import State
from lightning_eff.early_exit.inference.stages import CutError, Stages

if TYPE_CHECKING:
    from lightning_eff.early_exit.network import MultiExitNetwork

MERGE_AT_LEAST = 64  # by default; with fewer samples an operator's start costs as much as its work
CUTS = 4  # kinds of inputs the backbone is cut for in one stream; a cut takes seconds
_ROWS = BatchDim(0, 1)


@torch.inference_mode()
def stream(
    network: MultiExitNetwork,
    loader: Iterable[Any],
    merge_batch: int | None = None,
    split_batch: SplitBatch | None = None,
) -> ExitOutput:
    """Answer all samples of a loader; ``network.predict`` gives each batch the same answers.

    The backbone is cut into stages on the first batch. Where it cannot be cut, each batch is answered by itself, and a
    warning tells why.

    Args:
        network: built; runs in evaluation mode and is given back in the modes it was in.
        loader: gives batches of inputs, or of ``(inputs, target)``; inputs are moved to the network's device.
        merge_batch: samples that each stage runs on, >= 1; fewer only at the end. By default as many as the first batch
            has, and at least 64. The first stage takes batches that are larger as they are.
        split_batch: ``batch -> (inputs, target)``, where a batch is neither; ``lambda batch: (batch, None)`` for a
            backbone that takes two tensors.

    Returns:
        Answers to all ``N`` samples in the order in which the loader gave them.

    Raises:
        ValueError: ``merge_batch`` below 1.
    """
    if merge_batch is not None:
        check_whole("merge_batch", merge_batch)
    answers = Departures()
    lines: _Lines | None = None
    device = network.score_thresholds.device
    with network._evaluation:
        for args, kwargs in _arguments(loader, split_batch, device):
            if (batch := batch_size((args, kwargs))) == 0:
                continue
            if lines is None:
                lines = _Lines(network, merge_batch or max(batch, MERGE_AT_LEAST), answers)
            samples = answers.expect(batch, device)
            if (line := lines.of(args, kwargs)) is None:
                answers.add_all(samples, network.predict(*args, **kwargs))
            else:
                line.feed(args, kwargs, samples)
        if lines is not None:
            lines.flush()
    return answers.in_order(network.num_classes, device)


def _arguments(
    loader: Iterable[Any], split_batch: SplitBatch | None, device: torch.device
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    for batch in loader:
        inputs = batch
        if split_batch is not None:
            inputs, _ = split_batch(batch)
        elif isinstance(batch, tuple | list) and len(batch) == 2:
            inputs = batch[0]
        inputs = move_data_to_device(inputs, device)
        if isinstance(inputs, Mapping):
            yield (), dict(inputs)
        else:
            yield tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,), {}


class Departures:
    """What samples got, as they left."""

    def __init__(self) -> None:
        self._count = 0
        self._left: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []  # sample, logits, exit, score

    def expect(self, batch: int, device: torch.device) -> Tensor:
        """Number the samples of a batch that comes in."""
        self._count += batch
        return torch.arange(self._count - batch, self._count, device=device)

    def add(self, samples: Tensor, logits: Tensor, exit_index: int, scores: Tensor) -> None:
        """Keep answers; what is written into the tensors later would be seen."""
        self._left.append((samples, logits, torch.full_like(samples, exit_index), scores))

    def add_all(self, samples: Tensor, answer: ExitOutput) -> None:
        """Keep the answers to a batch."""
        self._left.append((samples, answer.logits, answer.exit_index, answer.confidence))

    def in_order(self, num_classes: int, device: torch.device) -> ExitOutput:
        """Put the answers into the order of the loader."""
        if not self._left:
            nothing = torch.zeros(0, device=device)
            return ExitOutput(nothing.reshape(0, num_classes), nothing.long(), nothing)
        samples, *parts = (torch.cat(column) for column in zip(*self._left, strict=True))
        order = samples.argsort()
        return ExitOutput(*(part.index_select(0, order) for part in parts))


class _Lines:
    """One line of stages for each kind of inputs; lines that take turns finish before the next one begins.

    Args:
        network: the network.
        merge: samples a stage runs on.
        answers: where answers go.
    """

    def __init__(self, network: MultiExitNetwork, merge: int, answers: Departures) -> None:
        self._network, self._merge, self._answers = network, merge, answers
        self._lines: list[_Line] = []
        self._current: _Line | None = None
        self._broken = network.engine == "off"

    def of(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Line | None:
        """Return the line that takes such inputs; None where there can be none."""
        if self._current is not None and self._current.stages.fit(args, kwargs):
            return self._current
        self.flush()
        self._current = next((line for line in self._lines if line.stages.fit(args, kwargs)), None)
        if self._current is None and not self._broken:
            try:
                self._current = _Line(self._network, self._cut(args, kwargs), self._merge, self._answers)
                self._lines.append(self._current)
            except CutError as error:
                self._broken = True
                warnings.warn(
                    f"batches are answered one by one, survivors of several cannot be put together: {error}",
                    stacklevel=4,
                )
        return self._current

    def flush(self) -> None:
        """Let all who wait go through."""
        if self._current is not None:
            self._current.flush()

    def _cut(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Stages:
        if len(self._lines) == CUTS:
            raise CutError(f"inputs have more than {CUTS} different shapes, each needs a cut of its own")
        stages: Stages = self._network.stages((tuple(args), dict(kwargs)))
        return stages


class _Line:
    """Stages with samples waiting before each.

    Args:
        network: gives heads and rule.
        stages: its backbone.
        merge: samples a stage runs on.
        answers: where answers go.
    """

    def __init__(self, network: MultiExitNetwork, stages: Stages, merge: int, answers: Departures) -> None:
        self.stages = stages
        self._network, self._rule, self._merge, self._answers = network, network.rule, merge, answers
        self._waiting = [_Waiting(layout, merge) for layout in stages.batch_dims]
        self._whole: list[Tensor] = []  # inputs without batch

    def feed(self, args: Sequence[Any], kwargs: Mapping[str, Any], samples: Tensor) -> None:
        """Let a batch in."""
        live = self.stages.inputs(args, kwargs)
        whole = [tensor for tensor, where in zip(live, self.stages.batch_dims[0], strict=True) if where is None]
        if any(a is not b and not torch.equal(a, b) for a, b in zip(whole, self._whole, strict=False)):
            self.flush()  # samples that came with another table must not meet these
        self._whole = whole
        self._arrive(0, live, samples, None)

    def flush(self) -> None:
        """Run every stage on who waits before it, from the first to the last."""
        for k, waiting in enumerate(self._waiting):
            if waiting.count:
                self._run(k, *waiting.take())

    def _arrive(
        self, k: int, live: Sequence[Tensor], samples: Tensor, state: State, rows: Tensor | None = None
    ) -> None:
        """Let samples, or those at ``rows`` among them, wait before stage ``k``."""
        waiting = self._waiting[k]
        arriving = len(samples) if rows is None else len(rows)
        if rows is None and not waiting.count and (arriving == self._merge or (k == 0 and arriving > self._merge)):
            return self._run(k, live, samples, state)
        begin = 0
        while begin < arriving:
            end = min(arriving, begin + self._merge - waiting.count)
            waiting.add(live, samples, state, slice(begin, end) if rows is None else rows[begin:end])
            if waiting.count == self._merge:
                # what waits behind is copied before anything is written here again
                self._run(k, *waiting.take())
            begin = end
        return None

    def _run(self, k: int, live: Sequence[Tensor], samples: Tensor, state: State) -> None:
        network, rule = self._network, self._rule
        if k == len(self.stages) - 1:
            logits = network.output_of(self.stages[k](*live))
            scores, _ = rule.score(logits, k, state)
            return self._answers.add(samples.clone(), logits.clone(), k, scores.clone())
        feature, onward = self.stages[k](*live)
        if not rule.enabled(k):
            return self._arrive(k + 1, onward, samples, state)
        logits = network.heads[k](feature)
        scores, state = rule.score(logits, k, state)
        fire = scores >= rule.thresholds[k]
        gone = fire.nonzero().squeeze(1)
        if not len(gone):
            return self._arrive(k + 1, onward, samples, state)
        self._answers.add(samples[gone], logits[gone], k, scores[gone])
        if len(gone) < len(samples):
            self._arrive(k + 1, onward, samples, state, (~fire).nonzero().squeeze(1))
        return None


class _Waiting:
    """Room for the samples that wait before a stage; made once, as large as it can get.

    Args:
        layout: batch dimensions of the tensors the stage takes.
        size: samples that find room.
    """

    def __init__(self, layout: Layout, size: int) -> None:
        self.count = 0
        self._layout, self._size = layout, size
        self._room: list[Any] = []
        self._where: Layout = []
        self._state: pytree.TreeSpec | None = None

    def add(self, live: Sequence[Tensor], samples: Tensor, state: State, rows: slice | Tensor) -> None:
        """Copy samples in."""
        leaves, self._state = pytree.tree_flatten(state)
        arriving = [*live, samples, *leaves]
        if not self._room:
            self._where = [*self._layout, _ROWS, *(_ROWS if isinstance(leaf, Tensor) else None for leaf in leaves)]
            self._room = [
                tensor if where is None else _room(tensor, where, self._size)
                for tensor, where in zip(arriving, self._where, strict=True)
            ]
        number = rows.stop - rows.start if isinstance(rows, slice) else len(rows)
        for i, (tensor, where) in enumerate(zip(arriving, self._where, strict=True)):
            if where is None:
                self._room[i] = tensor
                continue
            dim, factor = where
            place = self._room[i].narrow(dim, self.count * factor, number * factor)
            if isinstance(rows, slice):
                place.copy_(tensor.narrow(dim, rows.start * factor, number * factor))
            else:
                torch.index_select(tensor, dim, _spread(rows, factor), out=place)
        self.count += number

    def take(self) -> tuple[list[Tensor], Tensor, State]:
        """Let all go: carried tensors, samples and state; they are good until the next :meth:`add`."""
        assert self._state is not None
        kept = [
            tensor if where is None else tensor.narrow(where.dim, 0, self.count * where.factor)
            for tensor, where in zip(self._room, self._where, strict=True)
        ]
        self.count = 0
        split = len(self._layout)
        return kept[:split], kept[split], pytree.tree_unflatten(kept[split + 1 :], self._state)


def _spread(rows: Tensor, factor: int) -> Tensor:
    return rows if factor == 1 else (rows[:, None] * factor + torch.arange(factor, device=rows.device)).flatten()


def _room(tensor: Tensor, where: BatchDim, size: int) -> Tensor:
    """Empty tensor for ``size`` samples, its dimensions in memory in the order of ``tensor``: channels_last stays."""
    shape = list(tensor.shape)
    shape[where.dim] = size * where.factor
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    room = tensor.new_empty([shape[dim] for dim in order])
    return room.permute([order.index(dim) for dim in range(tensor.ndim)])
