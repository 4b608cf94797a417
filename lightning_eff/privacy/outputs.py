"""What training steps return for physical batches, joined as if there had been one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def loss_of(output: Any) -> Tensor | None:
    """Return the loss in what a training step returned; None where it returned none.

    Raises:
        TypeError: It is neither a tensor nor a mapping with a tensor under ``"loss"``.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if (loss is not None and not isinstance(loss, Tensor)) or (loss is None and output is not None):
        raise TypeError(
            "expected training_step to return a loss tensor, a mapping with one under 'loss', or None, got "
            f"{type(output).__name__}"
        )
    return loss


def join_outputs(outputs: Sequence[Any], sizes: Sequence[int]) -> Any:
    """Join by key: tensors with a row for each example one after the other, scalars by their mean over examples.

    Anything else is that of the last batch. Outputs that are None count for nothing.
    """
    pairs = [(output, size) for output, size in zip(outputs, sizes, strict=True) if output is not None]
    if len(pairs) < 2:
        return pairs[0][0] if pairs else None
    kept, kept_sizes = zip(*pairs, strict=True)
    if isinstance(kept[-1], Mapping):
        return {key: _join([output.get(key) for output in kept], kept_sizes) for key in kept[-1]}
    return _join(kept, kept_sizes)


def _join(values: Sequence[Any], sizes: Sequence[int]) -> Any:
    if not all(isinstance(value, Tensor) for value in values):
        return values[-1]
    if all(value.ndim == 0 for value in values):
        weights = torch.tensor(sizes, dtype=values[0].dtype, device=values[0].device)
        return (torch.stack(list(values)) * weights).sum() / weights.sum()
    if all(value.ndim and len(value) == size for value, size in zip(values, sizes, strict=True)):
        return torch.cat(list(values))
    return values[-1]
