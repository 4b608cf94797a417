"""A feed-forward layer of many small experts of which every token uses a few; arXiv 2402.07871.

Letters: T tokens, B sequences, n experts, k experts a token uses, d model width, h expert width, m 2 with a gate.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Self, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_eff.arguments import check_whole
from lightning_eff.moe.config import MoEConfig, Norm
from lightning_eff.moe.dense import DenseFFN, truncated_normal_
from lightning_eff.moe.expert_parallel import expert_parallel_ffn
from lightning_eff.moe.experts.activations import width
from lightning_eff.moe.functional import choose_backend, moe_ffn
from lightning_eff.moe.routing import Assignment, Routed, balance_loss, bias_step, expert_choice, token_choice, z_loss


class FineGrainedMoE(nn.Module):
    """Mixture of experts in place of a feed-forward network, with the same active parameters.

    With token choice, tokens may have any leading dimensions. With expert choice, the first dimension is that of the
    sequences: an expert takes, at every position, the tokens of largest score among ``group_size`` sequences. What a
    token becomes then depends on the other sequences of the batch, in evaluation, too; a batch needs about E sequences
    or more. ``routing={"evaluation": "token_choice"}`` scores single sequences.

    Activation checkpointing: use ``use_reentrant=False``; the other one runs the first pass without a graph, so that
    auxiliary losses would not reach the router. Loads are counted once, not again when a pass is recomputed.

    Args:
        d_model: Width of tokens, d.
        d_ff: Hidden width of the dense network that is replaced; None is 4 d. G must divide it.
        config: Options, or a dict of them; None is the defaults.
        **overrides: Options by name that replace those of ``config``; see :class:`MoEConfig`.

    Attributes:
        router: Weights of the router [n, d].
        w1: First matrices [n, d, m h].
        w2: Second matrices [n, h, d].
        b1: Biases of hidden units [n, m h]; None without ``bias``.
        b2: Bias of the output [d]; None without ``bias``.
        balance_bias: Loss-free bias [n]; None unless ``balance.method`` is ``"bias"``.
        aux_losses: After a forward pass: ``"balance"`` and ``"z"`` as far as the config gives them a weight, before
            that weight, with a graph, float32 or wider.
        last_load: After a forward pass: tokens that chose each expert [n], int64.
        last_counts: After a forward pass: tokens that each expert computed [n]; less than ``last_load`` where
            capacity dropped some.
        process_group: Processes that the global balance scope is about; None is all.
        expert_group: Processes that each hold a part of the experts, see :func:`~lightning_eff.moe.shard_experts`;
            None where this one holds all.

    Raises:
        ValueError: An option lies outside its range, or G does not divide ``d_ff``.

    Example:
        >>> layer = FineGrainedMoE(64, 256, expansion_rate=8, granularity=4)
        >>> layer(torch.randn(2, 16, 64)).shape
        torch.Size([2, 16, 64])
    """

    # what others read who train on samples one by one, or remove channels
    mixes_samples = (
        "an expert works on tokens of several samples at once, and auxiliary losses balance all tokens of a batch, so "
        "that samples have no gradients of their own"
    )
    no_channels = "the experts' hidden units are stacked in tensors whose channels cannot be removed"

    b1: nn.Parameter | None
    b2: nn.Parameter | None
    balance_bias: Tensor | None
    aux_losses: dict[str, Tensor]
    last_load: Tensor | None
    last_counts: Tensor | None

    def __init__(
        self,
        d_model: int,
        d_ff: int | None = None,
        config: MoEConfig | dict[str, Any] | None = None,
        **overrides: Any,
    ) -> None:
        super().__init__()
        self.config = config = MoEConfig.of(config, **overrides)
        self.d_model, self.d_ff = d_model, 4 * d_model if d_ff is None else d_ff
        for name in ("d_model", "d_ff"):
            check_whole(name, getattr(self, name))
        n, h = config.n_experts, config.d_expert(self.d_ff)
        if n > 8 * d_model:
            warnings.warn(
                f"the router of {n} experts is larger than the {8 * d_model} rows of active experts: routing costs "
                "more than computing; a smaller granularity is cheaper",
                stacklevel=2,
            )
        inner = width(config.activation) * h
        self.router = nn.Parameter(torch.empty(n, d_model))
        self.w1 = nn.Parameter(torch.empty(n, d_model, inner))
        self.w2 = nn.Parameter(torch.empty(n, h, d_model))
        self.register_parameter("b1", nn.Parameter(torch.empty(n, inner)) if config.bias else None)
        self.register_parameter("b2", nn.Parameter(torch.empty(d_model)) if config.bias else None)
        self.shared = (
            DenseFFN(d_model, config.n_shared * h, config.activation, init=config.init) if config.n_shared else None
        )
        self.norm = make_norm(config.norm, d_model)
        learns_bias = config.balance.method == "bias"
        self.register_buffer("balance_bias", torch.empty(n, dtype=torch.float32) if learns_bias else None)
        # no buffer: DDP would replace every process' own counts by those of the first
        self._load_since_step = torch.zeros(n, dtype=torch.int64, device="cpu")
        self.process_group: dist.ProcessGroup | None = None
        self.expert_group: dist.ProcessGroup | None = None
        self.aux_losses = {}
        self.last_load = self.last_counts = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights, also of norm and shared experts; biases become zero."""
        init, (_, d, _), (n, h, _) = self.config.init, self.w1.shape, self.w2.shape
        used = n if init.w2_fan_in == "all" else self.config.experts_per_token
        truncated_normal_(self.router, d, init)
        truncated_normal_(self.w1, d, init)
        truncated_normal_(self.w2, used * h, init)
        for bias in (self.b1, self.b2, self.balance_bias):
            if bias is not None:
                nn.init.zeros_(bias)
        for module in (self.shared, self.norm):
            if module is not None:
                module.reset_parameters()

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """Return the output for tokens.

        Args:
            x: [..., d]; with expert choice [B, ..., d].
            token_mask: False where a token is padding [...]: it goes to no expert, counts in no loss and its output
                is 0.

        Returns:
            As ``x``.

        Raises:
            ValueError: The last dimension is not d, the mask does not fit, or expert choice cannot share out so few
                sequences.
        """
        self._check(x, token_mask)
        if token_mask is not None:
            x = x.masked_fill(~token_mask[..., None], 0)  # padding may be anything, NaN as well
        mask = None if token_mask is None else token_mask.reshape(-1)
        routed = self._route(x, mask)
        tokens = x.reshape(-1, self.d_model)
        y = self._experts(tokens, routed.assignment)
        if self.b2 is not None:
            y = y + self.b2
        if self.shared is not None:
            y = y + self.shared(tokens)
        if self.norm is not None:
            y = self.norm(y)
        losses = self._losses(routed, mask)
        if not _recomputing():
            self._record(losses, routed)
        if mask is not None:
            y = y.masked_fill(~mask[:, None], 0)
        y = self._with_losses(y, losses)
        # a reshape that is no view of anything: FSDP2 warns of modules that return views
        out: Tensor = torch.ops.aten._unsafe_view(y, x.shape)
        return out

    def route(self, x: Tensor, token_mask: Tensor | None = None) -> Routed:
        """Return who would go where, in the mode the layer is in; arguments and errors as of :meth:`forward`."""
        self._check(x, token_mask)
        return self._route(x, None if token_mask is None else token_mask.reshape(-1))

    @property
    def aux_weights(self) -> dict[str, float]:
        """Weights of the auxiliary losses that this layer is trained with, none of them 0."""
        balance = self.config.balance
        uses = self.config.router == "token_choice" and balance.method == "aux"
        weights = {"balance": balance.weight if uses else 0.0, "z": balance.z_weight}
        return {name: weight for name, weight in weights.items() if weight}

    @torch.no_grad()
    def update_balance_bias(self) -> None:
        """Move the loss-free bias by the loads since the last call, of all processes; call it after every step.

        Does nothing unless ``balance.method`` is ``"bias"``.
        """
        if self.balance_bias is None:
            return
        load = self._everybodys(self._load_since_step.to(self.balance_bias.device))
        self.balance_bias += bias_step(load, self.config.balance.bias_rate)
        self._load_since_step = torch.zeros_like(load)

    def extra_repr(self) -> str:
        """Name sizes, router and who computes the experts of weights as they are."""
        config = self.config
        backend = choose_backend(self.w1, self.w2) if config.backend == "auto" else config.backend
        chosen = f"{config.experts_per_token} of {config.n_experts} experts of width {self.w2.shape[1]}"
        return (
            f"d_model={self.d_model}, d_ff={self.d_ff}, {chosen}, router={config.router}, "
            f"activation={config.activation}, backend={backend}"
        )

    def _experts(self, tokens: Tensor, assignment: Assignment) -> Tensor:
        token_index, weights, counts, _ = assignment
        options = self.config.activation, self.config.backend
        if self.expert_group is None:
            return moe_ffn(tokens, self.w1, self.w2, weights, token_index, counts, *options, self.b1)
        w1, w2 = (cast(Any, part).to_local() for part in (self.w1, self.w2))
        b1 = None if self.b1 is None else cast(Any, self.b1).to_local()
        return expert_parallel_ffn(tokens, w1, w2, weights, token_index, counts, *options, b1, self.expert_group)

    def _check(self, x: Tensor, token_mask: Tensor | None) -> None:
        if not x.ndim or x.shape[-1] != self.d_model:
            raise ValueError(f"expected tokens of d_model = {self.d_model} features, got shape {list(x.shape)}")
        if token_mask is not None and (token_mask.shape != x.shape[:-1] or token_mask.dtype != torch.bool):
            raise ValueError(
                f"expected a token_mask of bool and shape {list(x.shape[:-1])}, got {token_mask.dtype} and "
                f"{list(token_mask.shape)}"
            )

    def _route(self, x: Tensor, mask: Tensor | None) -> Routed:
        config, routing = self.config, self.config.routing
        choice = config.router if self.training else config.evaluation
        logits = self._logits(x.reshape(-1, self.d_model))
        if choice == "expert_choice":
            shape = (*self._groups(x), config.n_experts)
            masks = None if mask is None else mask.reshape(shape[:3])
            scores = self._scores(logits, shape, masks)
            assignment = expert_choice(
                scores.reshape(shape), self._quota(shape[1]), scale=config.weight_scale, token_mask=masks
            )
            return Routed(assignment, logits, scores)
        scores = logits.softmax(1) if routing.score == "softmax" else logits.sigmoid()
        assignment = token_choice(
            scores,
            config.experts_per_token,
            bias=self.balance_bias,
            normalize=routing.normalize_weights,
            scale=config.weight_scale,
            capacity_factor=routing.capacity_factor,
            token_mask=mask,
        )
        return Routed(assignment, logits, scores)

    def _logits(self, tokens: Tensor) -> Tensor:
        """Return logits [T, n]."""
        jitter = self.config.routing.jitter
        # float32 at least, whatever autocast says: the choice needs close scores told apart
        wide = torch.promote_types(tokens.dtype, torch.float32)
        tokens, router = tokens.to(wide), self.router.to(wide)
        if jitter and self.training:
            tokens = tokens * torch.empty_like(tokens).uniform_(1 - jitter, 1 + jitter)
        if torch.is_autocast_enabled(tokens.device.type):
            with torch.autocast(tokens.device.type, enabled=False):
                return tokens @ router.t()
        return tokens @ router.t()

    def _scores(self, logits: Tensor, shape: tuple[int, ...], masks: Tensor | None) -> Tensor:
        """Return the scores [T, n] of expert choice."""
        if self.config.routing.score == "sigmoid":
            return logits.sigmoid()
        if self.config.routing.softmax_over == "experts":
            return logits.softmax(1)
        logits = logits.reshape(shape)
        if masks is not None:
            logits = logits.masked_fill(~masks[..., None], torch.finfo(logits.dtype).min)
        return logits.softmax(1).reshape(-1, shape[3])

    def _groups(self, x: Tensor) -> tuple[int, int, int]:
        """Return number of groups, sequences of a group and positions."""
        sequences = x.shape[0] if x.ndim > 1 else 1
        size = self.config.routing.group_size or sequences
        if size and sequences % size:
            raise ValueError(
                f"group_size = {size} must divide the batch, got {sequences} sequences; the nearest batch above is "
                f"{math.ceil(sequences / size) * size}"
            )
        return sequences // size if size else 0, size, math.prod(x.shape[1:-1])

    def _quota(self, size: int) -> int:
        """Return how many tokens of a group of ``size`` sequences an expert takes at a position."""
        k, n = self.config.experts_per_token, self.config.n_experts
        quota = round(size * k / n)
        if size and not quota:
            least = n // (2 * k) + 1
            raise ValueError(
                f"a group of {size} sequences leaves no token to each of {n} experts (expansion_rate "
                f"{self.config.expansion_rate}); use {least} sequences or more, or "
                "routing={'evaluation': 'token_choice'} if this is evaluation"
            )
        return quota

    def _losses(self, routed: Routed, mask: Tensor | None) -> dict[str, Tensor]:
        config, load = self.config, routed.assignment.load
        losses = {}
        if "balance" in self.aux_weights:
            everybodys = self._everybodys(load) if self.training and config.balance.scope == "global" else load
            losses["balance"] = balance_loss(
                routed.scores, everybodys, mask, config.balance.norm, config.experts_per_token
            )
        if "z" in self.aux_weights:
            losses["z"] = z_loss(routed.logits, mask)
        return losses

    def _record(self, losses: dict[str, Tensor], routed: Routed) -> None:
        """Keep losses and loads of this pass."""
        load = routed.assignment.load
        self.aux_losses, self.last_load, self.last_counts = losses, load, routed.assignment.counts
        if self.training and self.balance_bias is not None:
            self._load_since_step = self._load_since_step.to(load.device) + load

    def _with_losses(self, y: Tensor, losses: dict[str, Tensor]) -> Tensor:
        """Return the output; what a subclass does to bring the losses into the backward pass it does here."""
        return y

    def _everybodys(self, load: Tensor) -> Tensor:
        """Return the sum of ``load`` over processes."""
        if not (dist.is_available() and dist.is_initialized()):
            return load
        load = load.clone()
        dist.all_reduce(load, group=self.process_group)
        return load

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Keep the loss-free bias in float32: its steps are too small for less."""
        before = self.balance_bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        after = self.balance_bias
        if before is not None and after is not None and after.dtype != torch.float32:
            self.balance_bias = after.float() if before.is_meta else before.to(after.device)
        return self

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:  # an error that tells both configurations, in place of one shape a tensor
        w2 = state_dict.get(f"{prefix}w2")
        if w2 is not None and w2.shape != self.w2.shape:
            errors: list[str] = args[4]
            errors.append(
                f"{prefix or 'the layer'}: the checkpoint holds {_describe(w2.shape, self.d_ff)}, but the layer "
                f"{_describe(self.w2.shape, self.d_ff)}; build it with the options of the checkpoint"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Leave losses out: tensors with a graph can be neither copied nor pickled."""
        return {**self.__dict__, "aux_losses": {}}


def make_norm(kind: Norm, d_model: int) -> nn.LayerNorm | nn.RMSNorm | None:
    """Return the norm over ``d_model`` features; None for ``"none"``."""
    if kind == "none":
        return None
    return nn.LayerNorm(d_model) if kind == "layernorm" else nn.RMSNorm(d_model)


def _describe(shape: torch.Size, d_ff: int) -> str:
    """Say what second matrices [n, h, d] of ``shape`` tell about a layer."""
    n, h, d = shape
    told = f"{n} experts of width {h} (d_model {d}"
    if d_ff % h == 0 and n * h % d_ff == 0:
        told += f"; with d_ff {d_ff}: expansion_rate {n * h // d_ff}, granularity {d_ff // h}"
    return told + ")"


def _recomputing() -> bool:
    """Whether this runs within a backward pass: activation checkpointing repeats a forward pass there."""
    if torch.compiler.is_compiling():
        return False
    return bool(torch._C._current_graph_task_id() != -1)
