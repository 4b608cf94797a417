"""Which token goes to which expert with which weight: token choice and expert choice of arXiv 2402.07871.

Both give assignments sorted by expert. Those that do not count (padding, tokens beyond an expert's capacity) stand at
the end, behind the counts, so that no shape depends on the data.

Letters: T tokens, S assignments, n experts, k experts a token uses, g sequences of a group, P positions.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor


class Assignment(NamedTuple):
    """Assignments of tokens to experts, sorted by expert.

    Attributes:
        token_index: Token of each assignment [S].
        weights: Weight of each assignment [S], float32 or wider, with a graph.
        counts: Assignments that each expert computes [n], int64. What stands behind their sum is not computed.
        load: Tokens that chose each expert [n], int64: ``counts`` and those dropped for capacity.
    """

    token_index: Tensor
    weights: Tensor
    counts: Tensor
    load: Tensor

    @property
    def dropped(self) -> Tensor:
        """Number of assignments dropped for capacity."""
        return self.load.sum() - self.counts.sum()


class Routed(NamedTuple):
    """What a router decided about a batch.

    Attributes:
        assignment: Who goes where.
        logits: Of the router [T, n], float32 or wider, with a graph.
        scores: Logits normalised [T, n].
    """

    assignment: Assignment
    logits: Tensor
    scores: Tensor


def token_choice(
    scores: Tensor,
    top_k: int,
    *,
    bias: Tensor | None = None,
    normalize: bool = False,
    scale: float = 1.0,
    capacity_factor: float | None = None,
    token_mask: Tensor | None = None,
) -> Assignment:
    """Let every token take the experts of its largest scores.

    Args:
        scores: [T, n].
        top_k: k, from 1 to n.
        bias: Added to the scores for the choice, not for the weights [n].
        normalize: Divide the weights of a token by their sum.
        scale: Multiplied to all weights.
        capacity_factor: An expert keeps the ``max(1, floor(factor * T * k / n))`` assignments of largest weight,
            of equal ones those of lower tokens; None keeps all.
        token_mask: False where a token is padding [T]; it goes nowhere.
    """
    n_tokens, n = scores.shape
    if bias is None:
        weights, chosen = scores.topk(top_k, dim=1, sorted=False)
    else:
        chosen = (scores + bias).topk(top_k, dim=1, sorted=False).indices
        weights = scores.gather(1, chosen)
    if normalize:
        weights = weights / weights.sum(1, keepdim=True)
    if scale != 1.0:
        weights = weights * scale
    # a small type sorts several times faster; n stands for nobody
    experts = chosen.to(torch.int16 if n < torch.iinfo(torch.int16).max else torch.int32)
    if token_mask is not None:
        experts = experts.masked_fill(~token_mask[:, None], n)
    flat_weights, flat_experts = weights.reshape(-1), experts.reshape(-1)
    in_order, order = flat_experts.sort(stable=True)
    load = counts = _counts(in_order, n)
    if capacity_factor is not None:
        capacity = min(n_tokens, max(1, math.floor(capacity_factor * n_tokens * top_k / n)))
        # by expert, within it by weight, within it by token
        by_weight = flat_weights.detach().sort(descending=True, stable=True).indices
        order = by_weight[flat_experts[by_weight].sort(stable=True).indices]
        first = load.cumsum(0) - load
        first = torch.cat([first, first.new_zeros(1)])
        place = torch.arange(order.numel(), device=order.device) - first[flat_experts[order].long()]
        kept = flat_experts[order].masked_fill(place >= capacity, n)
        in_order, moved = kept.sort(stable=True)
        order, counts = order[moved], load.clamp(max=capacity)
    token_index = torch.div(order, top_k, rounding_mode="floor")
    return Assignment(token_index, flat_weights.index_select(0, order), counts, load)


def expert_choice(scores: Tensor, quota: int, *, scale: float = 1.0, token_mask: Tensor | None = None) -> Assignment:
    """Let every expert take, in every group and at every position, the tokens of its largest scores.

    Only tokens at the same position of different sequences compete, so that nothing flows from later positions to
    earlier ones.

    Args:
        scores: [groups, g, P, n]; tokens are numbered in this order.
        quota: Tokens that an expert takes of a group at a position, from 1 to g.
        scale: Multiplied to all weights.
        token_mask: False where a token is padding [groups, g, P]; it is taken last, and its assignment dropped.
    """
    groups, size, positions, n = scores.shape
    wanted = scores if token_mask is None else scores.masked_fill(~token_mask[..., None], -1)
    weights, members = wanted.permute(3, 0, 2, 1).topk(quota, dim=3, sorted=False)
    group = torch.arange(groups, device=scores.device)[:, None, None]
    position = torch.arange(positions, device=scores.device)[:, None]
    token_index = ((group * size + members) * positions + position).reshape(-1)
    weights = weights.reshape(-1) * scale if scale != 1.0 else weights.reshape(-1)
    if token_mask is None:
        counts = torch.full((n,), groups * positions * quota, device=scores.device)
        return Assignment(token_index, weights, counts, counts)
    experts = torch.arange(n, device=scores.device).repeat_interleave(groups * positions * quota)
    in_order, order = experts.masked_fill(~token_mask.reshape(-1)[token_index], n).sort(stable=True)
    counts = _counts(in_order, n)
    return Assignment(token_index[order], weights[order], counts, counts)


def balance_loss(
    scores: Tensor,
    load: Tensor,
    token_mask: Tensor | None = None,
    norm: Literal["topk", "switch"] = "topk",
    top_k: int = 1,
) -> Tensor:
    """Return the load-balance loss ``n * sum_e f_e P_e``: share of the assignments times mean score of each expert.

    1 where loads or scores are uniform, n / k where every token chooses the same k experts with certainty; 0 without
    tokens.

    Args:
        scores: Non-negative [T, n]; rows are divided by their sums.
        load: Tokens that chose each expert [n]; of all processes where the loss is that of the whole batch.
        token_mask: False where a token is padding [T].
        norm: ``"topk"`` divides loads by assignments; ``"switch"`` by tokens, which is ``top_k`` times as much.
        top_k: k, for ``"switch"``.
    """
    share = load.to(scores.dtype) / load.sum().clamp(min=1)
    if norm == "switch":
        share = share * top_k
    mean = _mean_over_tokens(scores / scores.sum(1, keepdim=True), token_mask)
    return scores.shape[1] * (share * mean).sum()


def z_loss(logits: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """Return the mean over tokens of ``logsumexp(logits)^2``, which keeps logits small; 0 without tokens.

    Args:
        logits: [T, n].
        token_mask: False where a token is padding [T].
    """
    return _mean_over_tokens(logits.logsumexp(1, keepdim=True).square(), token_mask).squeeze(0)


def bias_step(load: Tensor, rate: float) -> Tensor:
    """Return how the loss-free bias moves: towards experts of less than the mean load, by ``rate``, with mean 0.

    Args:
        load: Tokens that chose each expert since the last step [n].
        rate: Length of the step.
    """
    load = load.to(torch.float32)
    step = rate * (load.mean() - load).sign()
    return step - step.mean()


def _mean_over_tokens(values: Tensor, token_mask: Tensor | None) -> Tensor:
    if token_mask is None:
        return values.sum(0) / max(1, values.shape[0])
    return values.masked_fill(~token_mask[:, None], 0).sum(0) / token_mask.sum().clamp(min=1)


def _counts(in_order: Tensor, n: int) -> Tensor:
    """Count each of 0..n-1 among sorted numbers; no shape depends on the data, as it does in ``bincount``."""
    ends = torch.searchsorted(in_order, torch.arange(n, dtype=in_order.dtype, device=in_order.device), right=True)
    return ends.diff(prepend=ends.new_zeros(1))
