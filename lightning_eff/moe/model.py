"""A decoder-only Transformer with mixtures of experts or, for comparison, without; arXiv 2402.07871.

Letters: B sequences, T positions, V vocabulary, d model width, H heads, c width of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_eff.moe.config import Initialisation, Norm
from lightning_eff.moe.decoder import DecoderConfig
from lightning_eff.moe.dense import DenseFFN, InitialisedLinear, truncated_normal_
from lightning_eff.moe.layer import FineGrainedMoE, make_norm
from lightning_eff.moe.scaling.sizes import FLOPS_PER_PARAMETER, FLOPS_PER_ROUTER_PARAMETER

#: Base of the wave lengths of rotary positions (arXiv 2104.09864).
_ROPE_BASE = 10000.0


class DecoderLM(nn.Module):
    """Language model: tokens to logits of the next token.

    With expert choice, sequences of a batch compete at every position, see :class:`FineGrainedMoE`; nothing flows from
    later positions.

    Args:
        config: Options, or a dict of them; None is the defaults, a dense model over bytes.
        **overrides: Options by name that replace those of ``config``; see :class:`DecoderConfig`.

    Attributes:
        config: The options.

    Raises:
        ValueError: An option lies outside its range.

    Example:
        >>> model = DecoderLM(d_model=64, n_layers=2, moe={"expansion_rate": 8, "granularity": 4})
        >>> model(torch.zeros(2, 16, dtype=torch.long)).shape
        torch.Size([2, 16, 256])
    """

    def __init__(self, config: DecoderConfig | Mapping[str, Any] | None = None, **overrides: Any) -> None:
        super().__init__()
        self.config = config = DecoderConfig.of(config, **overrides)
        d, init = config.d_model, config.init
        # rows are looked up, not summed over: fan-in 1; a tied head sums over d
        self.embedding = _Embedding(config.vocab_size, d, d if config.tie_embeddings else 1, init)
        self.positions = _Embedding(config.max_seq_len, d, 1, init) if config.positions == "learned" else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, config.has_experts(i)) for i in range(config.n_layers))
        self.norm = nn.LayerNorm(d) if config.final_norm else None
        self.head = None if config.tie_embeddings else InitialisedLinear(d, config.vocab_size, init)

    def forward(self, tokens: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """Return logits of the token that follows each.

        Args:
            tokens: Integers from 0 to V - 1 [B, T].
            token_mask: False where a token is padding [B, T]: experts leave it out. Attention does not: padding belongs
                behind a sequence, where nothing looks at it.

        Returns:
            [B, T, V].

        Raises:
            ValueError: Not two dimensions, or more positions than ``max_seq_len``.
        """
        if tokens.ndim != 2 or tokens.shape[1] > self.config.max_seq_len:
            raise ValueError(
                f"expected tokens [B, T] with T up to max_seq_len = {self.config.max_seq_len}, got {list(tokens.shape)}"
            )
        x: Tensor = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        x = self.dropout(x)
        turns = self._turns(x) if self.config.positions == "rope" else None
        for block in self.blocks:
            x = block(x, turns, token_mask)
        if self.norm is not None:
            x = self.norm(x)
        logits: Tensor = F.linear(x, self.embedding.weight) if self.head is None else self.head(x)
        return logits

    @property
    def n_total(self) -> int:
        """N: weights of attention and feed-forward networks, all experts; no router, norm, bias, embedding or head."""
        return self._count(all_experts=True)

    @property
    def n_active(self) -> int:
        """N_act: as :attr:`n_total`, but of the experts those one token uses; under expert choice on average."""
        return self._count(all_experts=False)

    @property
    def n_router(self) -> int:
        """Weights of routers that have a choice."""
        return sum(layer.router.numel() for layer in self.mixtures if layer.config.n_experts > 1)

    @property
    def mixtures(self) -> list[FineGrainedMoE]:
        """Mixtures of experts, from the first block to the last."""
        return [ffn for ffn in self._networks() if isinstance(ffn, FineGrainedMoE)]

    @property
    def flops_per_token(self) -> int:
        """Training FLOPs a token as the paper counts: 6 N_act + 14 for a router weight; without attention and head."""
        return int(FLOPS_PER_PARAMETER * self.n_active + FLOPS_PER_ROUTER_PARAMETER * self.n_router)

    def _count(self, all_experts: bool) -> int:
        total = sum(block.attention.n_weights for block in self._blocks())
        for ffn in self._networks():
            dense: nn.Module | None = ffn
            if isinstance(ffn, FineGrainedMoE):
                n = ffn.config.n_experts
                used = n if all_experts else ffn.config.experts_per_token
                total += (ffn.w1.numel() + ffn.w2.numel()) // n * used
                dense = ffn.shared
            if isinstance(dense, DenseFFN):
                total += dense.up.weight.numel() + dense.down.weight.numel()
        return total

    def _blocks(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]

    def _networks(self) -> list[nn.Module]:
        return [block.ffn for block in self._blocks()]

    def _turns(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines of the angles by which halves of a head turn [T, c / 2], of the dtype of ``x``."""
        half = self.config.d_model // self.config.n_heads // 2
        # float32 whatever x is: bfloat16 cannot tell positions apart beyond 256
        rates = _ROPE_BASE ** -(torch.arange(half, device=x.device, dtype=torch.float32) / half)
        angles = torch.arange(x.shape[1], device=x.device, dtype=torch.float32)[:, None] * rates
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class Block(nn.Module):
    """Attention and a feed-forward network, each behind a LayerNorm and added to what came in.

    Args:
        config: Options of the decoder.
        experts: Whether the feed-forward network is a mixture of experts.
    """

    ffn: nn.Module

    def __init__(self, config: DecoderConfig, experts: bool) -> None:
        super().__init__()
        d = config.d_model
        self.attention_norm = nn.LayerNorm(d)
        self.attention = Attention(d, config.n_heads, config.init)
        self.ffn_norm = nn.LayerNorm(d)
        norm: Norm = "none"  # a mixture brings its own
        if experts:
            self.ffn = FineGrainedMoE(d, config.hidden_width, config.moe)
        else:
            self.ffn = DenseFFN(d, config.hidden_width, config.dense_activation, init=config.init)
            norm = config.ffn_output_norm
        self.ffn_output_norm = make_norm(norm, d)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, turns: tuple[Tensor, Tensor] | None = None, token_mask: Tensor | None = None
    ) -> Tensor:
        """Return what goes to the next block [B, T, d]; ``turns`` as of :class:`Attention`."""
        x = x + self.dropout(self.attention(self.attention_norm(x), turns))
        y = self.ffn_norm(x)
        # what stands here may have been replaced since
        y = self.ffn(y, token_mask) if isinstance(self.ffn, FineGrainedMoE) else self.ffn(y)
        if self.ffn_output_norm is not None:
            y = self.ffn_output_norm(y)
        out: Tensor = x + self.dropout(y)
        return out


class Attention(nn.Module):
    """Causal attention.

    Args:
        d_model: d, a multiple of ``n_heads``.
        n_heads: H.
        init: Weights at the start.
    """

    def __init__(self, d_model: int, n_heads: int, init: Initialisation) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.qkv = InitialisedLinear(d_model, 3 * d_model, init)
        self.out = InitialisedLinear(d_model, d_model, init)

    @property
    def n_weights(self) -> int:
        """Weights of its matrices."""
        return self.qkv.weight.numel() + self.out.weight.numel()

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Return what each position takes from itself and those before it.

        Args:
            x: [B, T, d].
            turns: Cosines and sines of rotary positions [T, c / 2]; None for none.

        Returns:
            [B, T, d].
        """
        qkv = self.qkv(x).unflatten(-1, (3, self.n_heads, -1)).transpose(1, 3)  # [B, H, 3, T, c]
        q, k, v = qkv.unbind(2)
        if turns is not None:
            q, k = _turn(q, *turns), _turn(k, *turns)
        y: Tensor = self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return y


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs, one from each half of a head, by the angles of their positions."""
    one, other = x.chunk(2, -1)
    return torch.cat((one * cos - other * sin, one * sin + other * cos), -1)


class _Embedding(nn.Embedding):
    """Embedding that knows how its weights begin, so that one made on the meta device gets them, too."""

    def __init__(self, rows: int, width: int, fan_in: int, init: Initialisation) -> None:
        self.fan_in, self.init = fan_in, init  # the base class draws weights at once
        super().__init__(rows, width)

    def reset_parameters(self) -> None:
        """Draw new weights."""
        truncated_normal_(self.weight, self.fan_in, self.init)
