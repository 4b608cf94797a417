"""Auxiliary losses that reach the router without being part of the loss: for training steps that are not ours.

The layer's output passes through the identity; in the backward pass that node sends the gradient 1 times a scale into
the auxiliary losses. The gradients are those of ``loss + auxiliary losses`` as long as the scale is what the loss
itself is multiplied by before ``backward()``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_eff.moe.config import MoEConfig
from lightning_eff.moe.layer import FineGrainedMoE

#: Entry of a checkpoint whose name tells whoever loads it into the dense network what to do.
HINT = "mixtures of experts are in this network: call lightning_eff.moe.replace_ffn on the model before it is loaded"


class DropInMoE(FineGrainedMoE):
    """Layer in the place of a feed-forward network in somebody's model.

    Args:
        d_model: As of :class:`FineGrainedMoE`.
        d_ff: As of :class:`FineGrainedMoE`.
        config: As of :class:`FineGrainedMoE`.
        dropout: Probability on the output, in [0, 1): what the network had.
        inject: Send auxiliary losses into the backward pass; ``aux_losses`` then have no graph, so that adding them
            to the loss changes what is logged and nothing else.
        **overrides: As of :class:`FineGrainedMoE`.

    Attributes:
        aux_scale: What the loss is multiplied by before ``backward()``.
        aux_shares: For each auxiliary loss one over the number of layers that have it.
    """

    aux_scale: float | Tensor
    aux_shares: dict[str, float]

    def __init__(
        self,
        d_model: int,
        d_ff: int | None = None,
        config: MoEConfig | dict[str, Any] | None = None,
        *,
        dropout: float = 0.0,
        inject: bool = True,
        **overrides: Any,
    ) -> None:
        super().__init__(d_model, d_ff, config, **overrides)
        self.dropout, self.inject = dropout, inject
        self.aux_scale = 1.0
        self.aux_shares = {}

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """Return the output for tokens, as :meth:`FineGrainedMoE.forward`, after dropout."""
        y = super().forward(x, token_mask)
        return F.dropout(y, self.dropout, self.training) if self.dropout else y

    def extra_repr(self) -> str:
        """Name dropout and where auxiliary losses go besides."""
        told = f"{super().extra_repr()}, aux={'injected' if self.inject else 'collected'}"
        return f"{told}, dropout={self.dropout}" if self.dropout else told

    def _with_losses(self, y: Tensor, losses: dict[str, Tensor]) -> Tensor:
        if not self.inject:
            return y
        self.aux_losses = {name: loss.detach() for name, loss in self.aux_losses.items()}
        if not (losses and self.training and torch.is_grad_enabled()):
            return y
        weights = self.aux_weights
        aux = sum(weights[name] * self.aux_shares.get(name, 1.0) * loss for name, loss in losses.items())
        injected: Tensor = _Injection.apply(y, aux * self.aux_scale)
        return injected

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        state_dict = {key: value for key, value in state_dict.items() if key != prefix + HINT}
        names = [key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)]
        if names and "router" not in names:
            errors: list[str] = args[4]
            errors.append(
                f"{prefix.rstrip('.')} is a mixture of experts, but the checkpoint holds a dense network "
                f"({', '.join(names[:4])}); load it before replace_ffn"
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class _Injection(torch.autograd.Function):
    """Identity of y; in the backward pass, the other argument gets the gradient 1."""

    @staticmethod
    def forward(y: Tensor, aux: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.dtype = inputs[1].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.new_ones((), dtype=ctx.dtype)


def set_aux_scale(model: nn.Module, scale: float | Tensor) -> None:
    """Tell injected auxiliary losses what the loss is multiplied by before ``backward()``; 1 at the start.

    A loop that calls ``(loss / 4).backward()`` four times a step needs 1/4; under Lightning
    :class:`~lightning_eff.moe.AuxLossScale` does it.

    Args:
        model: Anything that :func:`~lightning_eff.moe.replace_ffn` changed, or that holds it.
        scale: A number, or a scalar tensor on the device of the layers.
    """
    for layer in model.modules():
        if isinstance(layer, DropInMoE):
            layer.aux_scale = scale


def share_aux_losses(model: nn.Module) -> None:
    """Make injected losses the mean over all layers of ``model`` that have them, as :func:`total_aux_loss` does."""
    layers = [layer for layer in model.modules() if isinstance(layer, FineGrainedMoE)]
    having = {name: sum(name in layer.aux_weights for layer in layers) for name in ("balance", "z")}
    for layer in layers:
        if isinstance(layer, DropInMoE):
            layer.aux_shares = {name: 1 / having[name] for name in layer.aux_weights}
