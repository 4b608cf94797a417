"""Backbones that hold one difficulty each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 5


def chain(width: int = 8) -> nn.Sequential:
    """Linear layers of 4 -> 8 -> 8 -> 8 -> C units, always with the same weights; exits at "1" and "3"."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Linear(4, width), nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, CLASSES)]
        for layer in layers:
            nn.init.normal_(layer.weight)  # larger than usual, so that samples differ
    a, b, c, d = layers
    return nn.Sequential(a, nn.ReLU(), b, nn.ReLU(), c, nn.ReLU(), d)


class SkipAround(nn.Module):
    """A tensor goes around the exit on ``b``."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        before = torch.relu(self.a(x))
        return self.c(torch.relu(self.b(before)) + before)


class SequenceFirst(nn.Module):
    """Batch is dimension 1 inside; sequences are as long as a batch of the dry run."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=False) for _ in range(layers)
        )
        self.out = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x).transpose(0, 1)
        for layer in self.layers:
            h = layer(h)
        return self.out(h.mean(0))


class Block(nn.Module):
    """Attention with a padding mask that is given to every block, and a container as result."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, hidden: Tensor, *, mask: Tensor, heads_mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        mixed, weights = self.attention(hidden, hidden, hidden, key_padding_mask=mask, attn_mask=heads_mask)
        hidden = hidden + mixed
        return hidden + self.mlp(hidden), {"weights": weights}


class Masked(nn.Module):
    """A token model called by keyword: one mask a sample, one a sample and head, a table without batch; dict result."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.register_buffer("table", torch.randn(6, 8, generator=torch.Generator().manual_seed(1)))
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.out = nn.Linear(8, CLASSES)

    def forward(self, tokens: Tensor, mask: Tensor) -> dict[str, Any]:
        hidden = self.embed(tokens) + self.table
        scores = torch.zeros(tokens.shape[0], 2, 6, 6)
        per_head = scores.masked_fill(tokens[:, None, None, :] == 3, -5.0).flatten(0, 1)
        padding = torch.zeros(mask.shape).masked_fill(mask, -torch.inf)
        for block in self.blocks:
            hidden, _ = block(hidden, mask=padding, heads_mask=per_head)
        return {"logits": self.out(hidden[:, 0]), "hidden": hidden}


def masked_inputs(batch: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(20, (batch, 6), generator=generator)
    mask = torch.rand(batch, 6, generator=generator) < 0.3
    mask[:, 0] = False
    return {"tokens": tokens, "mask": mask}


class Overwrites(nn.Module):
    """What reads the exit's layer writes into it, as pre-activation blocks do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x), inplace=True))


class Reused(nn.Module):
    """One block runs three times; another layer never."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.out, self.idle = (
            nn.Sequential(nn.Linear(4, 4), nn.Tanh()),
            nn.Linear(4, CLASSES),
            nn.Linear(4, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.block(x)
        return self.out(x)


class SmallNormNet(nn.Module):
    """Convolutions with BatchNorm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.body = nn.Sequential(
            nn.Conv2d(4, 8, 3, padding=1, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5)
        )
        self.out = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(self.stem(x)).mean((2, 3)))
