"""What training steps return for physical batches, joined as if there had been one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def loss_of(output: Any) -> Tensor:
    """Return the loss in what a training step returned.

    Raises:
        ValueError: It is None.
        TypeError: It is neither a tensor nor a mapping with a tensor under ``"loss"``.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if output is None:
        raise ValueError(
            "training_step returned None, which leaves all samples of a batch out: whether a sample takes part "
            "would depend on the others, and no noise covers that. Return the loss of every batch; samples whose "
            "gradient is not finite are left out by themselves"
        )
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"expected training_step to return a loss tensor or a mapping with one under 'loss', got "
            f"{type(output).__name__}"
        )
    return loss


def join_outputs(outputs: Sequence[Any], sizes: Sequence[int]) -> Any:
    """Join by key: tensors with a row for each sample one after the other, scalars by their mean over samples.

    Anything else is that of the last batch.
    """
    if len(outputs) == 1:
        return outputs[0]
    if isinstance(outputs[-1], Mapping):
        return {key: _join([output.get(key) for output in outputs], sizes) for key in outputs[-1]}
    return _join(outputs, sizes)


def _join(values: Sequence[Any], sizes: Sequence[int]) -> Any:
    if not all(isinstance(value, Tensor) for value in values):
        return values[-1]
    if all(value.ndim == 0 for value in values):
        weights = torch.tensor(sizes, dtype=values[0].dtype, device=values[0].device)
        return (torch.stack(list(values)) * weights).sum() / weights.sum()
    if all(value.ndim and len(value) == size for value, size in zip(values, sizes, strict=True)):
        return torch.cat(list(values))
    return values[-1]
