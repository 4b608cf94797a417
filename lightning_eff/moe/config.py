"""What a fine-grained mixture-of-experts layer is made of; the choices of arXiv 2402.07871 and their alternatives.

Letters: E expansion rate, G granularity, n = E G experts, k experts a token uses, d model width.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Literal

from lightning_eff.arguments import check_number, check_whole
from lightning_eff.moe.nested import NestedOptions, check_literals

Activation = Literal["relu", "gelu", "gelu_tanh", "silu", "swiglu"]
Backend = Literal["auto", "fused", "grouped", "reference"]
Choice = Literal["token_choice", "expert_choice"]
Norm = Literal["layernorm", "rmsnorm", "none"]


@dataclass(frozen=True)
class Routing:
    """How scores become weights, and who is chosen.

    Args:
        score: Softmax over the experts, or a sigmoid of each logit.
        normalize_weights: Token choice: divide a token's weights by their sum. With one expert a token they would
            all be 1 and the router would learn nothing, so that is refused.
        weight_scale: Constant all weights are multiplied by, > 0. ``"auto"`` is E where softmax weights of about
            1/n would otherwise make the output small: neither normalised nor followed by an output norm; else 1.
        capacity_factor: Token choice: an expert keeps at most ``factor * T * k / n`` of T tokens, those of largest
            weight; > 0. None drops nothing.
        jitter: Token choice, training: inputs of the router are multiplied by noise from 1 - jitter to 1 + jitter;
            in [0, 1).
        group_size: Expert choice: sequences whose tokens at one position compete; must divide the batch. None is
            the whole batch.
        softmax_over: Expert choice: normalise scores over the experts (what the paper found to be better) or over
            the tokens of a group.
        evaluation: Who chooses in evaluation mode; None is the same as in training. ``"token_choice"`` lets a
            layer trained with expert choice score single sequences.

    Raises:
        ValueError: A value lies outside its range.
    """

    score: Literal["softmax", "sigmoid"] = "softmax"
    normalize_weights: bool = False
    weight_scale: float | Literal["auto"] = "auto"
    capacity_factor: float | None = None
    jitter: float = 0.0
    group_size: int | None = None
    softmax_over: Literal["experts", "tokens"] = "experts"
    evaluation: Choice | None = None

    def __post_init__(self) -> None:
        check_literals(self)
        if self.weight_scale != "auto":
            check_number("weight_scale", self.weight_scale, above=0)
        if self.capacity_factor is not None:
            check_number("capacity_factor", self.capacity_factor, above=0)
        check_number("jitter", self.jitter, least=0, below=1)
        if self.group_size is not None:
            check_whole("group_size", self.group_size)


@dataclass(frozen=True)
class Balance:
    """What keeps experts equally busy and router logits small.

    Args:
        method: ``"aux"`` adds a load-balance loss; ``"bias"`` adds to the scores, for the choice alone, a bias that
            moves after every optimizer step (loss-free); ``"none"`` does neither. Expert choice needs none.
        weight: Weight of the load-balance loss, >= 0.
        z_weight: Weight of the z-loss, the mean squared log-sum-exp of the logits, >= 0.
        bias_rate: Step of the loss-free bias, > 0.
        scope: Loads of all processes of a data-parallel run, or of each on its own. ``"global"`` makes the mean of
            the gradients that of the whole batch.
        norm: Loads divided by assignments, so that equal loads give 1 (``"topk"``), or by tokens, k times as much
            (``"switch"``, as in the paper's code).

    Raises:
        ValueError: A value lies outside its range.
    """

    method: Literal["aux", "bias", "none"] = "aux"
    weight: float = 0.01
    z_weight: float = 1e-3
    bias_rate: float = 1e-3
    scope: Literal["global", "local"] = "global"
    norm: Literal["topk", "switch"] = "topk"

    def __post_init__(self) -> None:
        check_literals(self)
        for name in ("weight", "z_weight"):
            check_number(name, getattr(self, name), least=0)
        check_number("bias_rate", self.bias_rate, above=0)


@dataclass(frozen=True)
class Initialisation:
    """Truncated normal weights of standard deviation ``sqrt(scale / fan_in)``.

    Args:
        scale: > 0; 0.1 in the paper's code.
        truncation: Cut at two standard deviations, or at plus and minus ``2 * scale`` as the paper's code does.
        w2_fan_in: Fan-in of the second matrix: hidden units that a token uses (the variance of the dense network),
            or those of all experts.

    Raises:
        ValueError: A value lies outside its range.
    """

    scale: float = 0.1
    truncation: Literal["std", "scale"] = "std"
    w2_fan_in: Literal["active", "all"] = "active"

    def __post_init__(self) -> None:
        check_literals(self)
        check_number("scale", self.scale, above=0)


@dataclass(frozen=True)
class MoEConfig(NestedOptions):
    """Options of a fine-grained mixture-of-experts layer.

    Args:
        expansion_rate: E, parameters of all experts over those of the dense network, >= 1.
        granularity: G, width of the dense network over that of an expert, >= 1.
        top_k: Experts a token uses, from 1 to E G; None is G, which keeps the dense network's active parameters.
        router: Tokens choose experts, or experts choose tokens (the paper's setting).
        activation: Of the experts; ``"gelu_tanh"`` is GPT-2's approximation of ``"gelu"``, ``"swiglu"`` has a gate and
            three matrices.
        bias: Experts have a bias on their hidden units, the layer has one on its output.
        n_shared: Expert widths of an ordinary feed-forward network that every token uses besides, >= 0.
        output_norm: Norm of the output over features. ``"auto"`` is a LayerNorm, but none for token choice with
            one expert a token: there a norm cancels the only weight and the router gets no gradient.
        backend: Who computes the experts; ``"auto"`` decides by device, dtype and alignment.
        routing: How scores become weights.
        balance: What keeps experts equally busy.
        init: Weights at the start.

    Raises:
        ValueError: A value lies outside its range, or two of them exclude each other.

    Example:
        >>> MoEConfig.of({"expansion_rate": 4, "routing": {"capacity_factor": 1.25}}, granularity=2).n_experts
        8
    """

    expansion_rate: int = 8
    granularity: int = 4
    top_k: int | None = None
    router: Choice = "token_choice"
    activation: Activation = "relu"
    bias: bool = False
    n_shared: int = 0
    output_norm: Literal["auto"] | Norm = "auto"
    backend: Backend = "auto"
    routing: Routing = field(default_factory=Routing)
    balance: Balance = field(default_factory=Balance)
    init: Initialisation = field(default_factory=Initialisation)

    def __post_init__(self) -> None:
        check_literals(self)
        check_whole("expansion_rate", self.expansion_rate)
        check_whole("granularity", self.granularity)
        check_whole("n_shared", self.n_shared, least=0)
        if self.top_k is not None:
            check_whole("top_k", self.top_k)
            if self.top_k > self.n_experts:
                raise ValueError(
                    f"top_k must be at most expansion_rate * granularity = {self.n_experts} experts, got {self.top_k}"
                )
        self._check_choices()

    @property
    def n_experts(self) -> int:
        """Number of experts, n = E G."""
        return self.expansion_rate * self.granularity

    @property
    def experts_per_token(self) -> int:
        """Experts a token uses, k; under expert choice on average."""
        return self.granularity if self.top_k is None else self.top_k

    @property
    def norm(self) -> Norm:
        """Output norm, decided."""
        if self.output_norm != "auto":
            return self.output_norm
        return "none" if self.router == "token_choice" and self.experts_per_token == 1 else "layernorm"

    @property
    def weight_scale(self) -> float:
        """Constant that weights are multiplied by, decided."""
        if self.routing.weight_scale != "auto":
            return float(self.routing.weight_scale)
        # sigmoid scores are about 1/2 whatever the number of experts
        small = self.norm == "none" and not self.routing.normalize_weights and self.routing.score == "softmax"
        return float(self.expansion_rate) if small else 1.0

    @property
    def evaluation(self) -> Choice:
        """Who chooses in evaluation mode, decided."""
        return self.routing.evaluation or self.router

    def d_expert(self, d_ff: int) -> int:
        """Return the width of an expert, d_ff / G.

        Raises:
            ValueError: G does not divide ``d_ff``.
        """
        if d_ff % self.granularity:
            divisors = [g for g in range(1, d_ff + 1) if d_ff % g == 0]
            nearest = min(divisors, key=lambda g: (abs(g - self.granularity), g))
            raise ValueError(
                f"granularity must divide d_ff = {d_ff}, got {self.granularity}; the nearest that does is {nearest}"
            )
        return d_ff // self.granularity

    def _check_choices(self) -> None:
        one = self.router == "token_choice" and self.experts_per_token == 1
        routing = self.routing
        if one and routing.normalize_weights:
            raise ValueError(
                "normalize_weights with one expert a token makes every weight 1, and the router learns nothing; "
                "use top_k >= 2 or normalize_weights=False"
            )
        if one and self.output_norm not in ("auto", "none"):
            warnings.warn(
                f"output_norm={self.output_norm!r} with one expert a token cancels the only weight: the task's loss "
                "hardly reaches the router; use output_norm='none' or top_k >= 2",
                stacklevel=4,
            )
        if self.router == "expert_choice":
            only_token = {
                "normalize_weights": routing.normalize_weights,
                "capacity_factor": routing.capacity_factor is not None,
                "jitter": routing.jitter > 0,
            }
            if any(only_token.values()):
                named = ", ".join(name for name, given in only_token.items() if given)
                raise ValueError(f"{named}: means something for router='token_choice' only; leave it out")
            if self.balance.method == "bias":
                raise ValueError("balance method 'bias' is for token choice: under expert choice all loads are equal")
            if routing.softmax_over == "tokens" and (routing.score == "sigmoid" or self.evaluation != self.router):
                raise ValueError(
                    "softmax_over='tokens' needs score='softmax' and expert choice in evaluation, too; "
                    "use softmax_over='experts'"
                )
        elif routing.group_size is not None or routing.softmax_over == "tokens" or self.evaluation != self.router:
            raise ValueError(
                "group_size, softmax_over='tokens' and evaluation='expert_choice' belong to router='expert_choice'"
            )
