"""How many parameters a decoder has and what training it on one token costs.

N, N_act and the cost of routing as in arXiv 2402.07871, and a count of everything for comparing with
other code. Embeddings, biases and norms are in neither.

Letters: d model width, E expansion rate, G granularity, k experts a token uses, f hidden width of the dense
feed-forward network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning_eff.arguments import check_choice, check_number

#: FLOPs a token of one ordinary weight: forward, and backward to inputs and to weights, two each.
FLOPS_PER_PARAMETER = 6.0
#: FLOPs a token of one router weight: 2 for logits, 4 for their gradients, 8 for moving tokens to experts and back.
FLOPS_PER_ROUTER_PARAMETER = 14.0

Convention = Literal["paper", "full"]


@dataclass(frozen=True)
class DecoderShape:
    """What decides the cost of a decoder-only Transformer whose feed-forward networks are mixtures of experts.

    Widths and counts may be fractions: the optimum that a planner finds is one before it is rounded.

    Args:
        d_model: d, > 0.
        n_layers: number of blocks, > 0.
        expansion_rate: E, parameters of a layer's experts over those of the dense feed-forward network; >= 1.
        granularity: G, width of the dense feed-forward network over that of an expert; >= 1.
        top_k: experts a token uses, from 1 to E G; None is G, which keeps the active parameters of the dense network.
        d_ff: f, hidden width of the dense feed-forward network, > 0; None is 4 d.
        gated: experts have a gate beside the first matrix (SwiGLU): three matrices, not two.
        n_shared: experts that every token uses besides, >= 0.
        moe_every: each such block, counted from 1, has the experts, the others a dense network; >= 1.
        dense_gated: as ``gated``, of the dense networks of the other blocks; None is the same.

    Raises:
        ValueError: an argument lies outside its range.

    Example:
        >>> shape = DecoderShape(512, 8, expansion_rate=64, granularity=8)
        >>> shape.n_total, shape.n_active, shape.flops_per_token()
        (1082130432, 25165824, 180355072.0)
    """

    d_model: float
    n_layers: float
    expansion_rate: float = 1
    granularity: float = 1
    top_k: float | None = None
    d_ff: float | None = None
    gated: bool = False
    n_shared: float = 0
    moe_every: int = 1
    dense_gated: bool | None = None

    def __post_init__(self) -> None:
        for name, least in (("expansion_rate", 1), ("granularity", 1), ("n_shared", 0), ("moe_every", 1)):
            check_number(name, getattr(self, name), least=least)
        for name in ("d_model", "n_layers", "d_ff"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), above=0)
        if self.top_k is not None and not 1 <= self.top_k <= self.n_experts:
            raise ValueError(f"expected top_k from 1 to the {self.n_experts:g} experts, got {self.top_k}")

    @property
    def n_experts(self) -> float:
        """Experts in a layer, E G."""
        return self.expansion_rate * self.granularity

    @property
    def d_expert(self) -> float:
        """Hidden width of one expert, f / G."""
        width = (4 * self.d_model if self.d_ff is None else self.d_ff) / self.granularity
        return int(width) if width == int(width) else width

    @property
    def n_total(self) -> float:
        """N: weights of attention and of all experts; with f = 4 d, d^2 (8 E + 4) a layer."""
        return self._weights(self.n_experts)

    @property
    def n_active(self) -> float:
        """N_act: weights of attention and of the experts one token uses; with f = 4 d and k = G, 12 d^2 a layer."""
        return self._weights(self.granularity if self.top_k is None else self.top_k)

    @property
    def n_router(self) -> float:
        """Weights of the routers, d E G a layer; none where there is one expert to choose from."""
        return self.d_model * router_width(self.expansion_rate, self.granularity) * self.n_moe_layers

    @property
    def n_moe_layers(self) -> float:
        """Blocks whose feed-forward network is a mixture of experts."""
        return self.n_layers if self.moe_every == 1 else self.n_layers // self.moe_every

    def flops_per_token(
        self,
        convention: Convention = "paper",
        *,
        vocab_size: int | None = None,
        seq_len: int | None = None,
        causal: bool = False,
        c_f: float = FLOPS_PER_PARAMETER,
        c_r: float = FLOPS_PER_ROUTER_PARAMETER,
    ) -> float:
        """Training FLOPs a token.

        Args:
            convention: ``"paper"``, N_act c_f + n_router c_r, leaves out the head and the products of queries and keys,
                and counts what moves tokens to experts; ``"full"`` is six for every weight of a matrix product, head
                and routers included, and 12 seq_len d a layer for attention.
            vocab_size: width of the head, for ``"full"``.
            seq_len: tokens of a sequence, for ``"full"``.
            causal: half the cost of attention, for ``"full"`` and kernels that skip what a causal mask hides.
            c_f: FLOPs a token of an ordinary weight, for ``"paper"``.
            c_r: FLOPs a token of a router weight, for ``"paper"``.

        Raises:
            ValueError: ``"full"`` without ``vocab_size`` or ``seq_len``, or an unknown convention.
        """
        check_choice("convention", convention, ("paper", "full"))
        if convention == "paper":
            return float(c_f * self.n_active + c_r * self.n_router)
        if vocab_size is None or seq_len is None:
            raise ValueError("convention 'full' counts head and attention: it needs vocab_size and seq_len")
        weights = self.n_active + self.n_router + self.d_model * vocab_size
        attention = (6 if causal else 12) * seq_len * self.d_model * self.n_layers
        return float(6 * weights + attention)

    @property
    def routing_share(self) -> float:
        """Share of the router in the paper's FLOPs, from 0 to 1."""
        return FLOPS_PER_ROUTER_PARAMETER * self.n_router / self.flops_per_token()

    def _weights(self, experts: float) -> float:
        """Weights of attention, of so many experts in blocks that have them, and of the other blocks' networks."""
        d = self.d_model
        width = 4 * d if self.d_ff is None else self.d_ff
        gated = self.gated if self.dense_gated is None else self.dense_gated
        dense = _network(d, width, gated) * (self.n_layers - self.n_moe_layers)
        mixed = _network(d, self.d_expert, self.gated) * (experts + self.n_shared) * self.n_moe_layers
        return 4 * d**2 * self.n_layers + mixed + dense


def _network(d_model: float, width: float, gated: bool) -> float:
    return (3 if gated else 2) * d_model * width


def router_width(expansion_rate: float, granularity: float) -> float:
    """Outputs of a layer's router, E G; none where there is one expert to choose from."""
    experts = expansion_rate * granularity
    return experts if experts > 1 else 0
