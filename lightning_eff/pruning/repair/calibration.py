"""The inputs that corrections are fitted on, and what layers see of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_eff.batch import SplitBatch, batch_size, take
from lightning_eff.batch import split_batch as split_pair
from lightning_eff.pruning.repair.layout import Layout

CHUNK = 2**23  # elements of a matrix of rows that is held at a time


def calibration_inputs(batches: Sequence[Any], split_batch: SplitBatch | None, samples: int | None) -> Iterator[Any]:
    """Yield the inputs of the first ``samples`` samples, batch by batch; ValueError where there is none."""
    left = float("inf") if samples is None else samples
    empty, split = True, split_batch or split_pair
    for batch in batches:
        if left <= 0:
            break
        inputs, _ = split(batch)
        size = batch_size(inputs)
        if size:
            empty = False
            yield inputs if size <= left else take(inputs, slice(0, int(left)))
        left -= size
    if empty:
        raise ValueError("expected at least one calibration sample, got none: pass batches that hold samples")


@dataclass(frozen=True)
class Seen:
    """One call of a layer.

    Attributes:
        module: the layer.
        layout: its layout.
        x: its input ``[B, ...]``.
        output: its output; None before it has run.
        at: positions that rows are taken from, int64 ``[B, P]``.
    """

    module: nn.Module
    layout: Layout
    x: Tensor
    output: Tensor | None
    at: Tensor

    def rows(self) -> Iterator[Tensor]:
        """Rows of the input ``[J, n, K]``, some samples at a time."""
        per_sample = self.at.shape[1] * self.layout.columns * self.layout.blocks
        size = max(1, CHUNK // max(1, per_sample))
        for x, at in zip(torch.split(self.x, size), torch.split(self.at, size), strict=True):
            yield _summable(self.layout.rows(self.module, x, at))

    def output_rows(self) -> Tensor:
        """Rows of the output ``[n, O]``."""
        assert self.output is not None
        return _summable(self.layout.output_rows(self.output, self.at))


def _summable(rows: Tensor) -> Tensor:
    return rows if rows.dtype == torch.float64 else rows.float()


@contextmanager
def exact_products() -> Iterator[None]:
    """Multiply float32 matrices in float32 on GPUs too, not in TF32."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "ieee"
        yield
    finally:
        matmul.fp32_precision = before


@contextmanager
def watched(
    model: nn.Module,
    layouts: Mapping[str, Layout],
    receive: Callable[[str, Seen], None],
    *,
    positions: int,
    seed: int,
    before: bool = False,
) -> Iterator[None]:
    """Hand every call of the layers in ``layouts`` to ``receive`` while the context is open.

    The positions of a layer are drawn by ``seed`` and its place among the layers of the model, so another pass over
    the same batches sees the same ones, whatever other layers are watched.

    Args:
        model: the network.
        layouts: what to watch.
        receive: called with the path and what the layer saw.
        positions: rows a sample.
        seed: of the positions.
        before: call before the layer runs, so that its weights can still be changed; there is no output then.
    """
    number = {path: i for i, (path, _) in enumerate(model.named_modules())}
    draws = {path: torch.Generator().manual_seed(seed * 1_000_003 + number[path]) for path in layouts}

    def hand_over(path: str, module: nn.Module, args: Any, kwargs: Any, output: Tensor | None) -> None:
        x = args[0] if args else kwargs["input"]
        layout = layouts[path]
        if not layout.linear and x.ndim == len(module.kernel_size) + 1:  # type: ignore[arg-type]
            x, output = x.unsqueeze(0), None if output is None else output.unsqueeze(0)
        if x.ndim == 1:
            x, output = x.unsqueeze(0), None if output is None else output.unsqueeze(0)
        at = _drawn(len(x), layout.grid(module, x), positions, draws[path]).to(x.device)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            receive(path, Seen(module, layout, x.detach(), None if output is None else output.detach(), at))

    handles = []
    try:
        for path in layouts:
            module = model.get_submodule(path)
            if before:
                handles.append(module.register_forward_pre_hook(_before(path, hand_over), with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(_behind(path, hand_over), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _before(path: str, hand_over: Callable[..., None]) -> Callable[..., None]:
    return lambda module, args, kwargs: hand_over(path, module, args, kwargs, None)


def _behind(path: str, hand_over: Callable[..., None]) -> Callable[..., None]:
    return lambda module, args, kwargs, output: hand_over(path, module, args, kwargs, output)


def _drawn(samples: int, grid: int, positions: int, generator: torch.Generator) -> Tensor:
    """Spread positions over the grid of each sample, one at random in each of equal parts: int64 ``[B, P]``."""
    if grid <= positions:
        return torch.arange(grid).expand(samples, grid)
    jitter = torch.rand(samples, positions, generator=generator, dtype=torch.float64)
    return ((torch.arange(positions) + jitter) * (grid / positions)).long().clamp(max=grid - 1)
