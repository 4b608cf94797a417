"""Linear layers.

One position (T = 1): the gradient of a sample is ``b a^T``, so its squared norm is ``|b|^2 |a|^2``, and under any
mask M of elements ``(b^2)^T M (a^2)``: one matrix product of squares, and never a per-sample gradient. Several
positions: see ``weights.py``.
"""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lightning_eff.privacy.engine.recording import Recorder, rule
from lightning_eff.privacy.engine.tuning import Tuner
from lightning_eff.privacy.engine.uses import Part, cut, masked_, wide
from lightning_eff.privacy.engine.weights import Gradients, WeightUse, scaled_pair


@rule(F.linear)
def record_linear(recorder: Recorder, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """Record ``input [..., I]`` times ``weight [O, I]``."""
    parts = recorder.part(weight), recorder.part(bias)
    input = recorder.cast(input)
    output = F.linear(input, recorder.detached(weight), recorder.detached(bias))
    name = next((part.name for part in parts if part is not None), None)
    if name is None:
        return output
    inputs = recorder.split(input if input.ndim > 1 else input.unsqueeze(0), name)
    return recorder.tap(output, LinearUse(*parts, inputs, recorder.tuner))


class LinearUse(WeightUse):
    """A call of a linear layer.

    Args:
        weight: ``[O, I]``, None if frozen or dropped.
        bias: ``[O]``, None if frozen or dropped.
        inputs: ``[n, ..., I]``; the gradient that comes is ``[..., O]`` with its other elements in the same order.
        tuner: chooses among ways where a sample has several positions.
    """

    def __init__(self, weight: Part | None, bias: Part | None, inputs: Tensor, tuner: Tuner) -> None:
        self._positions = math.prod(inputs.shape[1:-1])
        samples = inputs.size(0)
        if weight is not None and weight.selection.columns is not None:
            inputs = cut(inputs, inputs.ndim - 1, weight.selection.columns)
        super().__init__(weight, bias, inputs, samples, tuner)

    @property
    def positions(self) -> int:
        """T."""
        return self._positions

    def receive(self, gradient: Tensor) -> None:
        """Keep the selected rows, ``[n, T, R]``."""
        gradient = gradient.reshape(self.samples, self._positions, -1)
        kept = gradient
        if self._weight is not None and self.selection.rows is not None:
            kept = cut(gradient, 2, self.selection.rows)
        self.keep(kept, None if self._bias is None else _sum_positions(gradient))

    def gradient_methods(self) -> dict[str, Gradients]:
        """One batched matrix product."""
        return {"product": self.product}

    def unfolded(self, samples: slice) -> tuple[Tensor, Tensor]:
        """Return what is kept, in float32 or wider."""
        inputs = self.inputs[samples].flatten(1, -2) if self.inputs.ndim > 2 else self.inputs[samples].unsqueeze(1)
        return wide(inputs), wide(self.gradient[samples])

    def weight_norms(self) -> Tensor:
        """Without a per-sample gradient where T = 1."""
        if self._positions != 1:
            return super().weight_norms()
        inputs, gradient = (side.squeeze(1).square() for side in self.unfolded(slice(None)))
        mask = self.selection.block_mask
        if mask is None:
            return gradient.sum(1) * inputs.sum(1)
        if self.sparse:
            # row o of the mask is a bag of the columns that it keeps
            rows, columns = self.compressed
            bags = F.embedding_bag(columns, inputs.T.contiguous(), rows, mode="sum", include_last_offset=True)
            return bags.mul_(gradient.T).sum(0)
        return ((gradient @ mask.to(gradient.dtype)) * inputs).sum(1)

    def weight_sum(self, factors: Tensor) -> Tensor:
        """One matrix product over all positions of all samples, ``[R, J]``."""
        inputs, gradient = scaled_pair(factors, *self.unfolded(slice(None)))
        inputs, gradient = inputs.flatten(0, 1), gradient.flatten(0, 1)
        if not self.sparse:
            return masked_(gradient.T @ inputs, self.selection)
        return self.selection.unpack(self.sampled([(inputs, gradient)])[0])


def _sum_positions(gradient: Tensor) -> Tensor:
    return gradient.squeeze(1) if gradient.size(1) == 1 else wide(gradient).sum(1)
