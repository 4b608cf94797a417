"""Mixtures of experts in place of the feed-forward networks of any model, fresh or up-cycled from them.

Up-cycling (virtual groups, arXiv 2410.07524): n = E G experts are E copies of G slices of the dense network. Router
rows of one copy are equal at the start, so that a token chooses whole copies; its weights are normalised and
multiplied by G: the output is the dense one.

Letters: d model width, h expert width, E expansion rate, G granularity, k experts a token uses, m 2 with a gate,
else 1.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lightning_eff.arguments import check_choice
from lightning_eff.moe.config import MoEConfig
from lightning_eff.moe.dense import truncated_normal_
from lightning_eff.moe.injection import DropInMoE, share_aux_losses
from lightning_eff.moe.layer import FineGrainedMoE
from lightning_eff.moe.reading import (
    FeedForward,
    is_linear,
    is_transformer_layer,
    linear_layers,
    read_feed_forward,
)

Init = Literal["fresh", "upcycle"]
AuxMode = Literal["inject", "collect"]
Match = str | Callable[[str, nn.Module], bool]


def replace_ffn(
    model: nn.Module,
    match: Match,
    config: MoEConfig | dict[str, Any] | None = None,
    init: Init = "fresh",
    aux_mode: AuxMode = "inject",
) -> list[str]:
    """Replace feed-forward networks of ``model`` by mixtures of experts, in place; all of those matched, or none.

    Call it after dense weights are loaded and before an optimizer is made.

    A network is recognised by what it computes, ``down(activation(up(x)))`` with or without a gate, not by its class:
    those of torchvision and Hugging Face, a plain ``nn.Sequential``, :class:`DenseFFN`. Torch's
    ``TransformerEncoderLayer`` and ``TransformerDecoderLayer`` hold no network of its own: match the layer itself.
    New layers have device, dtype and mode of the old ones and keep the dropout of their output; experts have none on
    their hidden units (UserWarning). Replacing what is replaced already, with the same options, does nothing.

    With ``init="upcycle"`` the output stays what it was, to rounding. A token's experts are then a multiple of G
    (for G = 1: 2), weights normalised and multiplied by G, and no norm follows; weights that were frozen stay so.

    Args:
        model: Any module; it cannot be a feed-forward network itself, but must hold it.
        match: Names as of ``named_modules()``, with ``*`` for anything within a part of a name and ``**`` for anything
            at all: ``"encoder.layers.*.mlp"``; or a function of name and module.
        config: Options of the layers. What a dict leaves out of ``activation`` and ``bias`` is as the network has it.
        init: New weights, or those of the network, E times.
        aux_mode: ``"inject"`` sends auxiliary losses, the mean over the layers of ``model``, into the backward pass,
            whatever the training step does; where the loss is scaled before, see :func:`set_aux_scale` and
            :class:`AuxLossScale`. ``"collect"`` leaves them to :func:`total_aux_loss`, which you add to the loss.

    Returns:
        Names of the new layers, for ``model.get_submodule``.

    Raises:
        ValueError: Nothing matches, what matches is no feed-forward network, options do not fit it, or cannot be
            up-cycled without a change of the output. Nothing has changed then.

    Example:
        >>> model = nn.Sequential(nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)), nn.Linear(8, 2))
        >>> replace_ffn(model, "0", {"expansion_rate": 4, "granularity": 2}, init="upcycle")
        ['0']
    """
    for name, value, allowed in (("init", init, get_args(Init)), ("aux_mode", aux_mode, get_args(AuxMode))):
        check_choice(name, value, allowed)
    matched = _matched(model, match)
    plans: dict[int, _Plan] = {}
    for name, module in matched.items():
        if id(module) in plans:
            continue
        try:
            plans[id(module)] = _plan(module, config, init, aux_mode)
        except ValueError as error:
            raise ValueError(f"{name} ({type(module).__name__}) cannot be replaced: {error}") from error
    lost = max((plan.ffn.hidden_dropout for plan in plans.values() if plan.ffn), default=0.0)
    if lost:
        warnings.warn(
            f"dropout of {lost} on hidden units is left out: experts have none; that on the output stays", stacklevel=2
        )
    made = {key: plan.there or _build(plan, init, aux_mode) for key, plan in plans.items()}
    names = [_put(model, name, module, made[id(module)]) for name, module in matched.items()]
    share_aux_losses(model)
    return names


class _Plan(NamedTuple):
    """What becomes of one network.

    Attributes:
        ffn: What it is; None if it is a mixture already.
        config: Of the new layer.
        there: The mixture that it is already.
    """

    ffn: FeedForward | None
    config: MoEConfig
    there: FineGrainedMoE | None = None


def _matched(model: nn.Module, match: Match) -> dict[str, nn.Module]:
    """Return what matches, also where one module has several names."""
    if not isinstance(match, str) and not callable(match):
        raise ValueError(
            f"match must be text such as 'layers.*.mlp' or a function (name, module) -> bool, got {match!r}"
        )
    test = match if callable(match) else _pattern(match)
    found = {name: module for name, module in model.named_modules(remove_duplicate=False) if test(name, module)}
    if "" in found:
        raise ValueError("the model itself matches; replace_ffn changes what is within a model: put it into another")
    if not found:
        there = [name for name, module in model.named_modules() if name and _looks_like_ffn(module)]
        told = f"what looks like feed-forward networks: {', '.join(there[:6])}" if there else "it has none that show"
        raise ValueError(f"no module of {type(model).__name__} matches {match!r}; {told}")
    for name in found:
        outer = next((other for other in found if name.startswith(f"{other}.")), None)
        if outer is not None:
            raise ValueError(f"{name} lies within {outer}, and both match {match!r}; match one of them")
    return found


def _pattern(match: str) -> Callable[[str, nn.Module], bool]:
    parts = (re.escape(part).replace(r"\*", "[^.]*") for part in match.split("**"))
    compiled = re.compile(".*".join(parts))
    return lambda name, _: bool(name) and compiled.fullmatch(name) is not None


def _looks_like_ffn(module: nn.Module) -> bool:
    layers = linear_layers(module)
    if is_linear(module) or len(layers) not in (2, 3):
        return False
    try:
        return read_feed_forward(module) is not None
    except ValueError:
        return False


def _plan(module: nn.Module, config: MoEConfig | dict[str, Any] | None, init: Init, aux_mode: AuxMode) -> _Plan:
    there = getattr(module, "linear1", None) if is_transformer_layer(module) else module
    if isinstance(there, FineGrainedMoE):
        return _Plan(None, _check_same(there, config, init, aux_mode), there)
    ffn = read_feed_forward(module)
    if init == "upcycle" and any(parameter.is_meta for parameter in module.parameters()):
        raise ValueError("its weights are on the meta device, so that there are none to up-cycle; load them before")
    if any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        raise ValueError("its weights are shared out among processes; replace it before they are")
    given = config if isinstance(config, MoEConfig) else _with_defaults(dict(config or {}), ffn, init)
    made = MoEConfig.of(given)
    made.d_expert(ffn.d_ff)
    if made.router == "expert_choice" and is_transformer_layer(module) and not module.self_attn.batch_first:  # type: ignore[union-attr]
        raise ValueError("expert choice needs sequences in the first dimension: build the layer with batch_first=True")
    return _Plan(ffn, _up_cycled(made, ffn) if init == "upcycle" else made)


def _with_defaults(given: dict[str, Any], ffn: FeedForward, init: Init) -> dict[str, Any]:
    if ffn.activation is None and (init == "upcycle" or "activation" not in given):
        known = ", ".join(("relu", "gelu", "gelu_tanh", "silu", "swiglu"))
        raise ValueError(
            f"it does not compute down(activation(up(x))) with an activation out of {known}"
            + ("" if init == "upcycle" else "; name an activation in config to replace it even so")
        )
    return {"activation": ffn.activation, "bias": ffn.has_bias, **given}


def _up_cycled(config: MoEConfig, ffn: FeedForward) -> MoEConfig:
    """Return options under which the output is the dense network's."""
    g, k, routing = config.granularity, config.top_k, config.routing
    k = max(2, g) if k is None else k
    refused = {
        "router='expert_choice'": config.router == "expert_choice",
        f"output_norm={config.output_norm!r}": config.output_norm not in ("auto", "none"),
        f"n_shared={config.n_shared}": config.n_shared > 0,
        f"capacity_factor={routing.capacity_factor}": routing.capacity_factor is not None,
        f"weight_scale={routing.weight_scale} (granularity {g} needs {g})": routing.weight_scale not in ("auto", g),
        f"activation={config.activation!r} (the network has {ffn.activation!r})": config.activation != ffn.activation,
        "bias=False (the network has biases)": ffn.has_bias and not config.bias,
    }
    wrong = [name for name, is_wrong in refused.items() if is_wrong]
    if wrong:
        raise ValueError(
            f"up-cycling would change the output with {', '.join(wrong)}; leave it out or use init='fresh'"
        )
    if k < 2 or k % g:
        raise ValueError(
            f"up-cycling needs top_k of at least 2 and a multiple of granularity = {g}, so that a token uses whole "
            f"copies of the network, got {k}"
        )
    if k > config.n_experts:
        raise ValueError(
            f"up-cycling with granularity {g} needs {k} experts or more, got {config.n_experts}; raise expansion_rate"
        )
    routing = replace(routing, normalize_weights=True, weight_scale=float(g))
    return MoEConfig.of(config, top_k=k, output_norm="none", routing=routing)


def _check_same(
    there: FineGrainedMoE, config: MoEConfig | dict[str, Any] | None, init: Init, aux_mode: AuxMode
) -> MoEConfig:
    wanted = config.to_dict() if isinstance(config, MoEConfig) else config or {}
    # what up-cycling decides by itself
    decided = ("top_k", "output_norm", "routing") if init == "upcycle" else ()
    wanted = {name: value for name, value in wanted.items() if name not in decided}
    has = there.config.to_dict()
    other = [name for name, value in wanted.items() if not _within(value, has.get(name))]
    if isinstance(there, DropInMoE) and there.inject != (aux_mode == "inject"):
        other.append("aux_mode")
    if other:
        raise ValueError(f"it is a mixture of experts already, with other options ({', '.join(other)})")
    return there.config


def _within(value: Any, has: Any) -> bool:
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping) and isinstance(has, Mapping):
        return all(_within(part, has.get(name)) for name, part in value.items())
    return bool(value == has)


def _build(plan: _Plan, init: Init, aux_mode: AuxMode) -> DropInMoE:
    ffn = plan.ffn
    assert ffn is not None
    weight = ffn.down.weight
    assert isinstance(weight, torch.Tensor)  # a parametrized one is no parameter
    upcycles = init == "upcycle"
    with torch.device("meta" if upcycles else weight.device):
        layer = DropInMoE(ffn.d_model, ffn.d_ff, plan.config, dropout=ffn.output_dropout, inject=aux_mode == "inject")
    layer = layer.to(weight.dtype).train(ffn.down.training)
    return _upcycle(layer.to_empty(device=weight.device), ffn) if upcycles else layer


@torch.no_grad()
def _upcycle(layer: DropInMoE, ffn: FeedForward) -> DropInMoE:
    """Fill empty experts with slices of the dense network, and the router with equal rows for each copy of it."""
    config, (n, h, d) = layer.config, layer.w2.shape
    copies, slices = config.expansion_rate, config.granularity
    inner = layer.w1.shape[2]
    (first, first_bias), (second, second_bias) = ffn.first(), ffn.second()
    # [m f, d] -> [m, G, h, d] -> [G, d, m h]
    cut = first.reshape(-1, slices, h, d).permute(1, 3, 0, 2).reshape(slices, d, inner)
    layer.w1.view(copies, slices, d, inner).copy_(cut)
    layer.w2.view(copies, slices, h, d).copy_(second.reshape(d, slices, h).permute(1, 2, 0))
    for bias in (layer.b1, layer.b2, layer.balance_bias):
        if bias is not None:
            bias.zero_()
    if layer.b1 is not None and first_bias is not None:
        layer.b1.view(copies, slices, inner).copy_(
            first_bias.reshape(-1, slices, h).transpose(0, 1).reshape(slices, inner)
        )
    if layer.b2 is not None and second_bias is not None:
        layer.b2.copy_(second_bias)
    rows = torch.empty(copies, d, dtype=layer.router.dtype, device=layer.router.device)
    truncated_normal_(rows, d, config.init)
    layer.router.copy_(rows.repeat_interleave(n // copies, 0))
    for parameters, layers in (((layer.w1, layer.b1), ffn.up), ((layer.w2, layer.b2), (ffn.down,))):
        for parameter in parameters:
            if parameter is not None:
                parameter.requires_grad_(any(dense.weight.requires_grad for dense in layers))
    return layer


def _put(model: nn.Module, name: str, module: nn.Module, layer: FineGrainedMoE) -> str:
    """Put the layer to where the network was, and return its name."""
    if is_transformer_layer(module):
        module.linear1 = layer
        module.activation = module.dropout = module.linear2 = nn.Identity()
        # keeps evaluation off the fused kernels, which read dense weights
        module.activation_relu_or_gelu = 0  # type: ignore[assignment]
        for encoder in model.modules():
            if isinstance(encoder, nn.TransformerEncoder) and any(layer is module for layer in encoder.layers):
                encoder.use_nested_tensor = False
        return f"{name}.linear1"
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, layer)
    return name
