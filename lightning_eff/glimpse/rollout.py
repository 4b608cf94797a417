"""How important each patch was to the class token: attention rollout.

Source: S. Abnar, W. Zuidema, arXiv:2005.00928.
Letters: L blocks, B images, N tokens of which the first is the class token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def attention_rollout(attention: Sequence[Tensor], discard_ratio: float = 0.5) -> Tensor:
    """Return how much of each token reached the class token, the row R[0] of R = A~_L ... A~_1.

    A~ = (A + I) / 2 with rows divided by their sums, where the smallest entries of A are 0. Only that row is carried
    from the last block to the first: O(L N^2) rather than the O(L N^3) of the whole product.

    Args:
        attention: Of each block, first block first [B, N, N], averaged over heads, rows sum to 1.
        discard_ratio: Share of the N^2 entries, in [0, 1), that is dropped; A[0, 0] is kept.

    Returns:
        Shares [B, N], which sum to 1.
    """
    row: Tensor | None = None
    for weights in reversed(attention):
        kept = mixed_attention(weights, discard_ratio)
        row = kept[:, 0] if row is None else (row.unsqueeze(1) @ kept).squeeze(1)
    if row is None:
        raise ValueError("expected the attention of at least one block, got none")
    return row


def mixed_attention(weights: Tensor, discard_ratio: float) -> Tensor:
    """Return A~ of the attention A of one block [B, N, N]."""
    if not 0 <= discard_ratio < 1:
        raise ValueError(f"discard_ratio must lie in [0, 1), got {discard_ratio}")
    tokens = weights.shape[-1]
    flat = weights.flatten(1)
    dropped = int(discard_ratio * flat.shape[1])
    if dropped:
        smallest = flat.topk(dropped, dim=1, largest=False, sorted=False).indices
        flat = flat.scatter(1, smallest, 0.0)
        flat = torch.cat([weights[:, 0, :1], flat[:, 1:]], dim=1)
    mixed = flat.view_as(weights) + torch.eye(tokens, dtype=weights.dtype, device=weights.device)
    return mixed / mixed.sum(-1, keepdim=True)
