"""How much the predictions change without a channel (CURL, arXiv 2002.07376): mean KL(p_dense || p_without_j).

One masked forward pass per channel; what lies before the channel is answered from memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_eff.batch import SplitBatch, batch_size, call_model, take
from lightning_eff.batch import split_batch as split_pair
from lightning_eff.pruning.borrowing import borrowed
from lightning_eff.pruning.criteria.outputs import OutputKind, divergence, select
from lightning_eff.pruning.criteria.registry import Needs, check_needs, register_criterion
from lightning_eff.pruning.settings import check_choices
from lightning_eff.surgery import ChannelGraph, Gates, PrefixCache


@register_criterion("kl")
@dataclass(frozen=True)
class KL:
    """``mean_x KL(p_dense(.|x) || p_without_j(.|x))`` in nats.

    Attributes:
        output: ``"softmax"`` for logits ``[B, K, ...]``; ``"gaussian"`` for regression: the mean squared difference of
            the outputs, the divergence of normal distributions up to a factor.
        key: where the outputs are when the model returns a dict (key) or a tuple (number); None for a tensor.
        split_batch: ``batch -> (inputs, target)``; None takes that of the call.
    """

    output: OutputKind = "softmax"
    key: str | int | None = None
    split_batch: SplitBatch | None = None

    needs: ClassVar[Needs] = Needs(data=True)

    def __post_init__(self) -> None:
        """Check the choice."""
        check_choices(self)

    def __call__(
        self, model: nn.Module, graph: ChannelGraph, batches: Sequence[Any], loss_fn: Any = None
    ) -> dict[str, Tensor]:
        """Scores float64 ``[C]`` of every prunable group.

        Raises:
            ValueError: there is no batch, or the outputs are not what ``output`` says.
        """
        check_needs(self, batches, loss_fn)
        split = self.split_batch or split_pair
        scores = {name: torch.zeros(graph.groups[name].size, dtype=torch.float64) for name in graph.prunable}
        count = 0
        with borrowed(model), torch.no_grad():
            channels = {name: _Channels(model, graph, name, split(batches[0])[0]) for name in graph.prunable}
            for batch in batches:
                inputs, _ = split(batch)
                count += batch_size(inputs)
                dense = select(call_model(model, inputs), self.output, self.key)
                for name, score in scores.items():
                    for j, outputs in enumerate(channels[name].without_each(inputs)):
                        score[j] += divergence(dense, select(outputs, self.output, self.key), self.output).sum().cpu()
        return {name: total / count for name, total in scores.items()}


class _Channels:
    """Run a network without one channel of a group after the other."""

    def __init__(self, model: nn.Module, graph: ChannelGraph, name: str, inputs: Any) -> None:
        self._model, self._name = model, name
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._open = torch.ones(graph.groups[name].size, device=device)
        self._gates = Gates(graph.groups, model, {name: self._open})
        last = batch_size(inputs) - 1
        run, other = (partial(call_model, model, take(inputs, samples)) for samples in ([0, last], [last, 0]))
        with self._gates:
            self._cache = PrefixCache(model, run, self._gates, name, len(self._open), device=device, other=other)

    def without_each(self, inputs: Any) -> Any:
        """Yield the outputs without channel 0, 1, 2 ..."""
        run = partial(call_model, self._model, inputs)
        with self._gates:
            self._gates.set(self._name, self._open)
            tape = self._cache.record(run)
            for j in range(len(self._open)):
                closed = self._open.clone()
                closed[j] = 0
                self._gates.set(self._name, closed)
                yield self._cache.replay(tape, run)
