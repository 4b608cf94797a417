"""Blocks of vision transformers; arXiv 2010.11929, with the scaled branches of arXiv 2103.17239.

Modules are named as in timm, so that its weights fit. Letters: B images, N tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NORM_EPS = 1e-6


class Block(nn.Module):
    """Attention and a perceptron of four times the width, each behind a normalisation and beside a short cut.

    Args:
        dim: D, a multiple of ``heads``.
        heads: Of the attention.
        layer_scale: Start of the learned factors of both branches; None has no factors.
    """

    def __init__(self, dim: int, heads: int, layer_scale: float | None = None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = Attention(dim, heads)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Perceptron(dim)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return tokens [B, N, D]."""
        tokens = tokens + self.ls1(self.attn(self.norm1(tokens)))
        return tokens + self.ls2(self.mlp(self.norm2(tokens)))  # type: ignore[no-any-return]

    def attention(self, tokens: Tensor) -> Tensor:
        """Return what each token takes from each, the mean over heads [B, N, N]; ``tokens`` are the block's input."""
        return self.attn.weights(self.norm1(tokens))


class Attention(nn.Module):
    """Self-attention of ``heads`` heads."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return tokens [B, N, D]."""
        query, key, value = self._split(self.qkv(tokens), 3)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def weights(self, tokens: Tensor) -> Tensor:
        """Return the mean over heads of the attention [B, N, N], float32; rows sum to 1."""
        dim = tokens.shape[2]
        query, key = self._split(F.linear(tokens, self.qkv.weight[: 2 * dim], self.qkv.bias[: 2 * dim]), 2)
        scores = query @ key.mT * query.shape[-1] ** -0.5
        mean: Tensor = scores.float().softmax(-1).mean(1)
        return mean

    def _split(self, projected: Tensor, parts: int) -> tuple[Tensor, ...]:
        batch, count, width = projected.shape
        heads = projected.view(batch, count, parts, self.heads, width // (parts * self.heads))
        return heads.permute(2, 0, 3, 1, 4).unbind()


class Perceptron(nn.Module):
    """Two layers with four times the width between them."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return tokens [..., D]."""
        return self.fc2(F.gelu(self.fc1(tokens)))  # type: ignore[no-any-return]


class LayerScale(nn.Module):
    """A learned factor for every channel."""

    def __init__(self, dim: int, start: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), start))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return tokens [..., D]."""
        return tokens * self.gamma


def initialise(module: nn.Module) -> None:
    """Give linear layers the usual weights of vision transformers; for ``nn.Module.apply``."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
