"""What a decoder-only Transformer is made of, dense or with mixtures of experts; the recipe of arXiv 2402.07871.

Letters: d model width, T positions of a sequence, V vocabulary, f hidden width of a dense feed-forward network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lightning_eff.arguments import check_number, check_whole
from lightning_eff.moe.config import (
    Activation,
    Initialisation,
    MoEConfig,
    Norm,
)
from lightning_eff.moe.nested import NestedOptions, check_literals
from lightning_eff.moe.scaling.sizes import DecoderShape


@dataclass(frozen=True)
class DecoderConfig(NestedOptions):
    """Options of a :class:`~lightning_eff.moe.DecoderLM`.

    Args:
        vocab_size: V, 256 for bytes.
        d_model: d, a multiple of ``n_heads``.
        n_layers: Number of blocks, each attention and a feed-forward network behind a LayerNorm.
        n_heads: Heads of attention.
        max_seq_len: Most positions of a sequence.
        d_ff: f, hidden width of a dense feed-forward network, of which experts are slices; None is 4 d.
        activation: Of dense feed-forward networks; None is that of the experts, ReLU where there are none.
        moe: Mixture of experts in place of feed-forward networks: a :class:`MoEConfig` or a dict of its fields. None is
            the dense twin.
        moe_every: The last of every so many blocks has the mixture, the others a dense network.
        positions: Learned position embeddings, or rotations of queries and keys (``"rope"``), which need heads of an
            even width.
        ffn_output_norm: Norm of the output of dense feed-forward networks: what a comparison with experts, whose
            output is normed (``moe.output_norm``), should give to the dense twin.
        final_norm: LayerNorm before the head; the paper's code has none.
        tie_embeddings: The head is the embedding of tokens.
        dropout: Of embeddings and of what blocks add, in [0, 1).
        init: Weights of embeddings (fan-in 1; d when tied), attention, dense networks and head at the start.

    Raises:
        ValueError: A value lies outside its range, or two of them exclude each other.

    Example:
        >>> config = DecoderConfig(d_model=512, n_layers=8, n_heads=8, moe={"expansion_rate": 64, "granularity": 8})
        >>> config.shape.n_total
        1082130432
    """

    vocab_size: int = 256
    d_model: int = 256
    n_layers: int = 4
    n_heads: int = 4
    max_seq_len: int = 256
    d_ff: int | None = None
    activation: Activation | None = None
    moe: MoEConfig | None = None
    moe_every: int = 1
    positions: Literal["learned", "rope"] = "learned"
    ffn_output_norm: Norm = "none"
    final_norm: bool = True
    tie_embeddings: bool = False
    dropout: float = 0.0
    init: Initialisation = field(default_factory=Initialisation)

    def __post_init__(self) -> None:
        moe: Any = self.moe
        if isinstance(moe, Mapping):
            object.__setattr__(self, "moe", MoEConfig.of(moe))
        check_literals(self)
        for name in ("vocab_size", "d_model", "n_layers", "n_heads", "max_seq_len", "moe_every"):
            check_whole(name, getattr(self, name))
        if self.d_ff is not None:
            check_whole("d_ff", self.d_ff)
        check_number("dropout", self.dropout, least=0, below=1)
        if self.d_model % self.n_heads:
            raise ValueError(f"n_heads must divide d_model = {self.d_model}, got {self.n_heads}")
        if self.positions == "rope" and self.d_model // self.n_heads % 2:
            raise ValueError(
                f"positions='rope' needs heads of an even width, got d_model / n_heads = {self.d_model // self.n_heads}"
            )
        self._check_experts()

    def dense_twin(self) -> DecoderConfig:
        """Return the decoder of the same active parameters without experts, with their activation and output norm."""
        if self.moe is None:
            return self
        return replace(self, moe=None, moe_every=1, activation=self.moe.activation, ffn_output_norm=self.moe.norm)

    @property
    def hidden_width(self) -> int:
        """Hidden width of a dense feed-forward network, decided."""
        return 4 * self.d_model if self.d_ff is None else self.d_ff

    @property
    def dense_activation(self) -> Activation:
        """Activation of dense feed-forward networks, decided."""
        return self.activation or (self.moe.activation if self.moe else "relu")

    @property
    def shape(self) -> DecoderShape:
        """What decides parameters and FLOPs, for laws and planners."""
        moe, dense_gated = self.moe, self.dense_activation == "swiglu"
        if moe is None:
            return DecoderShape(self.d_model, self.n_layers, d_ff=self.hidden_width, gated=dense_gated)
        return DecoderShape(
            self.d_model,
            self.n_layers,
            moe.expansion_rate,
            moe.granularity,
            moe.top_k,
            self.hidden_width,
            gated=moe.activation == "swiglu",
            n_shared=moe.n_shared,
            moe_every=self.moe_every,
            dense_gated=dense_gated,
        )

    def has_experts(self, block: int) -> bool:
        """Whether a block, counted from 0, has a mixture of experts."""
        return self.moe is not None and (block + 1) % self.moe_every == 0

    def _check_experts(self) -> None:
        moe = self.moe
        if moe is None:
            if self.moe_every != 1:
                raise ValueError(f"moe_every = {self.moe_every} needs moe, the options of a mixture of experts")
            return
        moe.d_expert(self.hidden_width)  # raises unless the granularity divides it
        if self.moe_every > self.n_layers:
            raise ValueError(f"moe_every must be at most n_layers = {self.n_layers}, got {self.moe_every}")
        if self.moe_every == 1:
            if self.activation not in (None, moe.activation):
                raise ValueError(
                    f"activation={self.activation!r} is of dense feed-forward networks, of which there are none; "
                    "use moe={'activation': ...}"
                )
            if self.ffn_output_norm != "none":
                raise ValueError(
                    f"ffn_output_norm={self.ffn_output_norm!r} is of dense feed-forward networks, of which there are "
                    "none; use moe={'output_norm': ...}"
                )
