"""Two dry runs of a backbone tell what its layers return, in which order they run, and where the batch is.

Evaluation mode, no gradients, random generators and buffers as before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_eff.batch import batch_size, call_model
from lightning_eff.early_exit.attaching.features import Layout, feature_index, feature_of, layout, shapes
from lightning_eff.surgery.state import quiet_model

BATCHES = (2, 3)


@dataclass
class Call:
    """One call of a layer in a dry run.

    Attributes:
        layer: its path.
        number: 1 for its first call.
        inputs: batch dimensions of the leaves of ``(args, kwargs)``.
        output: batch dimensions of the leaves of what it returned.
        feature: position of the feature among those leaves; None where it returned no tensor.
        shape: of the feature with batch size ``BATCHES[0]``; None as before.
        seen: shapes of the feature at both batch sizes, for messages.
        overwritten: a later operation wrote into the feature.
    """

    layer: str
    number: int
    inputs: Layout
    output: Layout
    feature: int | None
    shape: tuple[int, ...] | None
    seen: tuple[Any, Any]
    overwritten: bool

    @property
    def batch_dim(self) -> int | None:
        """Batch dimension of the feature; None where there is none, or where it holds several rows a sample."""
        where = None if self.feature is None else self.output[self.feature]
        return where.dim if where is not None and where.factor == 1 else None


@dataclass
class Probe:
    """What two dry runs saw.

    Attributes:
        calls: in the order in which they ended.
    """

    calls: list[Call]
    by_layer: dict[str, list[Call]] = field(init=False)

    def __post_init__(self) -> None:
        """Index calls by layer."""
        self.by_layer = {}
        for call in self.calls:
            self.by_layer.setdefault(call.layer, []).append(call)


def probe(backbone: nn.Module, example: Any) -> Probe:
    """Run ``backbone`` on two and on three samples made of ``example`` and note what every layer does.

    Raises:
        ValueError: other layers run at another batch size.
    """
    runs = [_record(backbone, samples(example, size)) for size in BATCHES]
    first, second = runs
    if [(c.layer, c.number) for c in first] != [(c.layer, c.number) for c in second]:
        raise ValueError(
            "the backbone runs other layers for other batches: exits need a forward whose order of layers is fixed"
        )
    calls = [
        Call(
            a.layer,
            a.number,
            layout(a.inputs, b.inputs, BATCHES),
            layout(a.output, b.output, BATCHES),
            a.feature,
            None if a.feature is None else a.output[a.feature],
            tuple("nothing" if c.feature is None else c.output[c.feature] for c in (a, b)),  # type: ignore[arg-type]
            a.overwritten(),
        )
        for a, b in zip(first, second, strict=True)
    ]
    return Probe(calls)


def samples(example: Any, size: int, distinct: bool = False) -> Any:
    """Build inputs of ``size`` samples out of ``example``, repeating them where it has fewer.

    Tensors whose dimension 0 is not as long as the batch stay. With ``distinct`` samples are made to differ, whatever
    the example: floating point values are scaled and shifted, integers are rolled along the last dimension.
    """
    count = batch_size(example)

    def tile(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.ndim or leaf.size(0) != count:
            return leaf
        rows = leaf[[i % count for i in range(size)]]
        if not distinct:
            return rows
        parts = []
        for i, row in enumerate(rows):
            if i and row.is_floating_point():
                row = row * (1 + 0.1 * i) + 0.1 * i
            elif i and row.ndim and row.dtype != torch.bool:
                row = row.roll(i, -1)
            parts.append(row)
        return torch.stack(parts)

    return pytree.tree_map(tile, example)


class _Record:
    """Shapes of one call; features are held until the pass is over, to see whether they were written into."""

    def __init__(self, layer: str, number: int, args: Any, kwargs: Any, output: Any) -> None:
        self.layer, self.number = layer, number
        self.inputs, self.output = shapes((args, kwargs)), shapes(output)
        self.feature: int | None = None
        self._held: Tensor | None = None
        try:
            self.feature = feature_index(output)
            if self.output[self.feature] is None:
                self.feature = None
            else:
                self._held = feature_of(output)
                self._version = self._held._version
        except ValueError:
            pass

    def overwritten(self) -> bool:
        return self._held is not None and self._held._version != self._version


def _record(backbone: nn.Module, inputs: Any) -> list[_Record]:
    records: list[_Record] = []
    numbers: dict[str, int] = {}

    def note(layer: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        numbers[layer] = numbers.get(layer, 0) + 1
        records.append(_Record(layer, numbers[layer], args, kwargs, output))

    with observed(backbone, note), quiet_model(backbone), torch.no_grad():
        call_model(backbone, inputs)
    return records


@contextmanager
def observed(backbone: nn.Module, note: Any) -> Iterator[None]:
    """Call ``note(layer, module, args, kwargs, output)`` after every layer."""
    handles = [
        module.register_forward_hook(partial(note, name), with_kwargs=True)
        for name, module in backbone.named_modules()
        if name
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
