"""Embeddings: a sample's gradient has as many rows that are not zero as it has different tokens.

The output gradients of equal tokens of one sample are added first, so norms and sums cost what the tokens cost, not
what the table does. Shapes: ``n`` samples of ``T`` tokens, ``V`` rows of ``E`` columns, ``G`` pairs of a sample and
one of its tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from lightning_eff.privacy.engine.recording import Recorder, rule
from lightning_eff.privacy.engine.uses import LayerUse, Part, masked, wide


@rule(functional.embedding)
def record_embedding(
    recorder: Recorder,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Look rows up; the row ``padding_idx`` gets no gradient.

    Raises:
        ValueError: ``max_norm`` or ``scale_grad_by_freq`` is set: both let the whole batch act on one sample.
    """
    if max_norm is not None:
        raise ValueError(
            "an embedding with max_norm rescales in place the rows that the batch happens to name, which no noise "
            "protects: set max_norm=None"
        )
    if scale_grad_by_freq:
        raise ValueError(
            "an embedding with scale_grad_by_freq=True divides by how often a token comes in the whole batch, so no "
            "sample has a gradient of its own: set it to False"
        )
    output = functional.embedding(input, recorder.detached(weight), padding_idx)
    part = recorder.part(weight)
    if part is None:
        return output
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.size(0)
    tokens = recorder.split(input, part.name).flatten(1)
    return recorder.tap(output, EmbeddingUse(part, tokens, padding_idx))


@rule(functional.embedding_bag)
def record_embedding_bag(
    recorder: Recorder,
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Reduce the rows of each bag ``[n, T]``.

    Raises:
        ValueError: bags are told by ``offsets``: then the first dimension is not that of the samples.
    """
    if input.ndim != 2:
        raise ValueError(
            "an embedding bag with offsets has no dimension of samples: give it tokens of shape [batch, length], with "
            "padding_idx where bags are of different lengths"
        )
    rows = record_embedding(recorder, input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq)
    if padding_idx is None:
        kept = torch.ones_like(input, dtype=torch.bool)
    else:
        kept = input != padding_idx % weight.size(0)
    if mode == "max":
        # an empty bag is zero
        best = rows.masked_fill(~kept.unsqueeze(-1), -torch.inf).max(1).values
        return torch.where(kept.any(1, keepdim=True), best, 0.0)
    factors = kept.to(rows.dtype) if per_sample_weights is None else kept * per_sample_weights
    total = (rows * factors.unsqueeze(-1)).sum(1)
    return total if mode == "sum" else total / kept.sum(1, keepdim=True).clamp(min=1)


class EmbeddingUse(LayerUse):
    """A look-up in a table.

    Args:
        weight: the table ``[V, E]``.
        tokens: ``[n, T]``.
        padding_idx: the row that gets no gradient, counted from the front.
    """

    def __init__(self, weight: Part, tokens: Tensor, padding_idx: int | None) -> None:
        super().__init__([weight], tokens.size(0))
        self._weight = weight
        self._tokens: Tensor | None = tokens.clone()  # somebody may write to them before the gradient comes
        self._padding_idx = padding_idx
        self._samples: Tensor
        self._rows: Tensor
        self._values: Tensor

    def receive(self, gradient: Tensor) -> None:
        """Add the gradients of equal tokens of a sample; keep only active rows and columns."""
        assert self._tokens is not None
        tokens, chosen = self._tokens, self._weight.selection
        count = chosen.block_shape[0]
        values = wide(gradient).reshape(tokens.numel(), chosen.shape[1])
        if chosen.columns is not None:
            values = values.index_select(1, chosen.columns)
        samples = torch.arange(len(tokens), device=tokens.device).unsqueeze(1).expand_as(tokens).reshape(-1)
        rows = tokens.reshape(-1).long()
        kept = torch.ones_like(rows, dtype=torch.bool) if self._padding_idx is None else rows != self._padding_idx
        if chosen.rows is not None:
            place = torch.searchsorted(chosen.rows, rows).clamp(max=max(0, count - 1))
            kept &= chosen.rows[place] == rows
            rows = place
        keys, group = (samples[kept] * count + rows[kept]).unique(return_inverse=True)  # type: ignore[no-untyped-call]
        self._samples, self._rows = keys // count, keys % count
        summed = values.new_zeros(len(keys), values.size(1)).index_add_(0, group, values[kept])
        mask = chosen.block_mask
        self._values = summed if mask is None else torch.where(mask[self._rows], summed, 0.0)
        self._tokens = None

    def per_sample(self, name: str, samples: slice) -> Tensor:
        """Spread the pairs of some samples over the block, ``[m, *block]``."""
        chosen = range(self.samples)[samples]
        mine = (self._samples >= chosen.start) & (self._samples < chosen.stop)
        gradients = self._values.new_zeros(len(chosen), *self._weight.selection.block_shape)
        gradients[self._samples[mine] - chosen.start, self._rows[mine]] = self._values[mine]
        return masked(gradients, self._weight.selection)

    def zero_samples(self, index: Tensor) -> None:
        """Make their pairs zero."""
        out = torch.isin(self._samples, index).unsqueeze(1)
        self._values = torch.where(out, 0.0, self._values)

    def square_norms(self, names: Collection[str]) -> dict[str, Tensor]:
        """Add the squares of each sample's pairs, ``[n]``."""
        squares = self._values.new_zeros(self.samples)
        squares.index_add_(0, self._samples, self._values.square().sum(1))
        return dict.fromkeys(names, squares)

    def clipped_sums(self, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Add the pairs, times the factors of their samples, into the block."""
        name, chosen = self._weight
        scaled = self._values * factors[name].to(self._values.dtype)[self._samples].unsqueeze(1)
        return {name: self._values.new_zeros(chosen.block_shape).index_add_(0, self._rows, scaled)}
