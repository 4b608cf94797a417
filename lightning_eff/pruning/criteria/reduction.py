"""One score per channel where several layers produce or read it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["mean", "sum", "max", "first"]


def reduced(scores: Sequence[tuple[Tensor, Tensor]], size: int, reduction: Reduction) -> Tensor:
    """Bring the scores of several layers together.

    ``"mean"`` first scales the scores of every layer to mean 1, so that a layer with large weights has no more say
    than another, and then brings the result back to the mean of the layers' means: with one layer nothing changes,
    and groups stay comparable.

    Args:
        scores: for each layer its channels (int64 ``[E]``, each at most once) and their scores ``[E]``.
        size: channels of the group ``C``.
        reduction: ``"mean"``, ``"sum"``, ``"max"`` or ``"first"`` (the first layer that has the channel).

    Returns:
        float64 ``[C]``; NaN where no layer has the channel.
    """
    table = torch.full((len(scores), size), torch.nan, dtype=torch.float64)
    for row, (channels, values) in zip(table, scores, strict=True):
        row[channels.cpu()] = values.detach().cpu().double()
    if len(table) == 1:
        return table[0]
    if reduction == "mean":
        means = table.nanmean(1, keepdim=True)
        scaled = table / torch.where(means == 0, 1.0, means)  # a layer of zeros scores zero
        return scaled.nanmean(0) * means.mean()
    there = ~table.isnan()
    if reduction == "sum":
        return torch.where(there.any(0), table.nansum(0), torch.nan)
    if reduction == "max":
        return torch.where(there.any(0), table.nan_to_num(-torch.inf).amax(0), torch.nan)
    return table.gather(0, there.int().argmax(0, keepdim=True))[0]
