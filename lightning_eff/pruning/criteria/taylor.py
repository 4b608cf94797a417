"""First-order Taylor criterion on activations (arXiv 1611.06440, 1906.10771): how much the loss notices a channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_eff.batch import LossFunction, batch_size
from lightning_eff.pruning.borrowing import borrowed
from lightning_eff.pruning.criteria.derivatives import derivatives, gates_for_derivatives
from lightning_eff.pruning.criteria.registry import Needs, check_needs, register_criterion
from lightning_eff.pruning.settings import check_choices
from lightning_eff.surgery import ChannelGraph


@register_criterion("taylor")
@dataclass(frozen=True)
class Taylor:
    """``E (sum a_j dL/da_j)^2``, the sum over all values that are read of channel j; one backward pass per batch.

    Attributes:
        granularity: ``"sample"`` squares the sum of every sample, with the sample's own loss; ``"batch"`` that of a
            whole batch, with the batch's mean loss, as the weight form ``(sum g w)^2`` does.
    """

    granularity: Literal["sample", "batch"] = "sample"

    needs: ClassVar[Needs] = Needs(data=True, loss=True)

    def __post_init__(self) -> None:
        """Check the choice."""
        check_choices(self)

    def __call__(
        self, model: nn.Module, graph: ChannelGraph, batches: Sequence[Any], loss_fn: LossFunction | None
    ) -> dict[str, Tensor]:
        """Scores float64 ``[C]`` of every prunable group.

        Args:
            model: the network, left as it was.
            graph: its channel graph.
            batches: trees of tensors whose first dimension is the batch.
            loss_fn: ``(model, batch) -> loss``, the mean over the batch.

        Raises:
            ValueError: there is no batch or no loss, the loss is no scalar or does not depend on the channels, or a
                layer does not see the samples in its first dimension.
        """
        check_needs(self, batches, loss_fn)
        assert loss_fn is not None
        scores = {name: torch.zeros(graph.groups[name].size, dtype=torch.float64) for name in graph.prunable}
        if not scores:
            return scores
        count = 0
        with borrowed(model):
            for batch in batches:
                samples = batch_size(batch) if self.granularity == "sample" else 1
                count += samples
                for name, derivative in self._derivatives(model, graph, batch, loss_fn, samples).items():
                    scores[name] += (derivative * samples).square().sum(0)
        return {name: total / count for name, total in scores.items()}

    @staticmethod
    def _derivatives(
        model: nn.Module, graph: ChannelGraph, batch: Any, loss_fn: LossFunction, samples: int
    ) -> dict[str, Tensor]:
        """Of the mean loss of one batch: ``[samples, C]`` by group."""
        with gates_for_derivatives(model, graph, samples, 'use Taylor(granularity="batch")') as values:
            loss = loss_fn(model, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"expected loss_fn(model, batch) to give one number, the mean over the batch, got {got}")
        if not loss.requires_grad:
            raise ValueError(
                "the loss does not depend on any prunable channel, or is detached: loss_fn(model, batch) must run the "
                "model it is given, with gradients enabled"
            )
        return derivatives(loss.reshape(()), values)
