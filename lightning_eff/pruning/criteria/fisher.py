"""The KL criterion to second order: ``1/2 g_j^T F g_j`` with the Fisher information F of the predictions.

``g_j = d logits / d gate_j``, ``F = diag(p) - p p^T``. With classes in falling order of p and ``T_r`` the mass of class
r and all after it, the law of total variance splits F into one log-odds per class, without any error:

``F = sum_r w_r c_r c_r^T``, ``w_r = p_r T_{r+1} / T_r``, ``c_r = e_r - sum_{s>r} (p_s / T_{r+1}) e_s``

(is it class 1? if not, is it class 2? ...). One backward pass gives ``c_r^T g_j`` of all samples and channels. The
weights fall so fast that few terms are enough; the others go into one pass together, with random signs, which is right
in the mean.

Shapes: ``B`` samples, ``K`` classes, ``P`` positions (pixels, tokens; 1 for plain classification).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_eff.arguments import check_whole
from lightning_eff.batch import SplitBatch, batch_size, call_model
from lightning_eff.batch import split_batch as split_pair
from lightning_eff.pruning.borrowing import borrowed
from lightning_eff.pruning.criteria.derivatives import derivatives, gates_for_derivatives
from lightning_eff.pruning.criteria.outputs import OutputKind, select
from lightning_eff.pruning.criteria.registry import Needs, check_needs, register_criterion
from lightning_eff.pruning.settings import check_choices
from lightning_eff.surgery import ChannelGraph


@register_criterion("kl_fisher")
@dataclass(frozen=True)
class KLFisher:
    """``1/2 mean_x sum_y p_y (d log p_y / d gate_j)^2``: what ``"kl"`` is for small changes, all channels at once.

    Attributes:
        backwards: backward passes per batch, >= 1; None takes as many as leave nothing to chance (K - 1 for K
            classes). Outputs with positions (pixels, tokens) are always added up with random signs.
        output: as of :class:`~lightning_eff.pruning.criteria.KL`.
        key: likewise.
        split_batch: likewise.
        seed: of the random signs; None takes that of the call.

    Raises:
        ValueError: ``backwards`` below 1.
    """

    backwards: int | None = 3
    output: OutputKind = "softmax"
    key: str | int | None = None
    split_batch: SplitBatch | None = None
    seed: int | None = None

    needs: ClassVar[Needs] = Needs(data=True)

    def __post_init__(self) -> None:
        """Check choice and range."""
        check_choices(self)
        if self.backwards is not None:
            check_whole("backwards", self.backwards)

    def __call__(
        self, model: nn.Module, graph: ChannelGraph, batches: Sequence[Any], loss_fn: Any = None
    ) -> dict[str, Tensor]:
        """Scores float64 ``[C]`` of every prunable group.

        Raises:
            ValueError: there is no batch, the outputs are not what ``output`` says, or a layer does not see the
                samples in its first dimension.
        """
        check_needs(self, batches, loss_fn)
        split, generator = self.split_batch or split_pair, torch.Generator().manual_seed(self.seed or 0)
        scores = {name: torch.zeros(graph.groups[name].size, dtype=torch.float64) for name in graph.prunable}
        if not scores:
            return scores
        count = 0
        with borrowed(model):
            for batch in batches:
                inputs, _ = split(batch)
                samples = batch_size(inputs)
                count += samples
                with gates_for_derivatives(model, graph, samples, 'use the criterion "kl"') as values:
                    outputs = select(call_model(model, inputs), self.output, self.key)
                for cotangent in self._cotangents(outputs.detach(), generator):
                    found = derivatives(outputs, values, cotangent.to(outputs), more=True)
                    for name, derivative in found.items():
                        scores[name] += derivative.square().sum(0)
        half = 0.5 if self.output == "softmax" else 1.0  # a mean squared difference has no factor 1/2
        return {name: half * total / count for name, total in scores.items()}

    def _cotangents(self, outputs: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
        if self.output == "gaussian":
            return gaussian_factors(outputs, self.backwards, generator)
        return softmax_factors(outputs, self.backwards, generator)


def softmax_factors(logits: Tensor, backwards: int | None, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield ``v`` such that the sum of ``v v^T`` is F, the mean over positions; shaped like ``logits [B, K, ...]``."""
    p, order = logits.double().reshape(*logits.shape[:2], -1).softmax(1).sort(dim=1, descending=True)
    rest = torch.zeros_like(p)  # T_{r+1}
    rest[:, :-1] = p.flip(1).cumsum(1).flip(1)[:, 1:]
    weights = p * rest / (p + rest).clamp(min=torch.finfo(p.dtype).tiny)
    root = (weights / max(1, p[0, 0].numel())).sqrt()
    signs = _signs(root, generator) if root[0, 0].numel() > 1 else torch.ones_like(root)
    terms = p.shape[1] - 1
    alone = terms if backwards is None or terms <= backwards else backwards - 1
    for r in range(alone):
        single = torch.zeros_like(root)
        single[:, r] = root[:, r] * signs[:, r]
        yield _by_class(single, p, rest, order).reshape(logits.shape)
    if alone < terms:
        together = root * _signs(root, generator)
        together[:, :alone] = 0
        yield _by_class(together, p, rest, order).reshape(logits.shape)


def _by_class(amounts: Tensor, p: Tensor, rest: Tensor, order: Tensor) -> Tensor:
    """``sum_r amounts_r c_r``, back in the order of the classes: ``[B, K, P]``."""
    share = torch.where(rest > 0, amounts / rest.clamp(min=torch.finfo(p.dtype).tiny), 0.0)
    before = torch.zeros_like(p)  # sum over r < s
    before[:, 1:] = share.cumsum(1)[:, :-1]
    return torch.zeros_like(p).scatter_(1, order, amounts - p * before)


def gaussian_factors(outputs: Tensor, backwards: int | None, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield ``v`` such that the sum of ``v v^T`` is the identity over the number of outputs of a sample."""
    size = outputs[0].numel()
    if backwards is None or size <= backwards:
        for i in range(size):
            unit = torch.zeros(len(outputs), size, device=outputs.device)
            unit[:, i] = size**-0.5
            yield unit.reshape(outputs.shape)
    else:
        for _ in range(backwards):
            yield _signs(outputs, generator) * (size * backwards) ** -0.5


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    return (2 * torch.randint(0, 2, like.shape, generator=generator) - 1).to(like)
