"""What a dense feed-forward network of anyone's making computes: found out by running a twin of it.

The twin has random weights in place of the real ones. If ``down(activation(up(x)))`` of them is what it gives, that is
what the network is, whatever its class and the names of its layers; a norm, a residual or a scale inside would show.

Letters: d model width, f hidden width, m 2 with a gate, else 1.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_eff.moe.config import Activation
from lightning_eff.moe.experts.activations import activate
from lightning_eff.surgery.state import untouched_generators

#: Of the largest output; single precision gets some 1e-6 wrong, GPT-2's approximation of GELU some 3e-4.
_TOLERANCE = 2e-5
#: Tokens of two sizes: the small ones tell smooth activations apart, the large ones whether there is a ceiling.
_SIZES = (1.0, 100.0)
_PLAIN: tuple[Activation, ...] = ("relu", "gelu", "gelu_tanh", "silu")


class FeedForward(NamedTuple):
    """A dense feed-forward network, understood.

    Attributes:
        up: Layer to the hidden units; or two of them, the one of the gates first.
        down: Layer back.
        d_model: d.
        d_ff: f.
        activation: Of the hidden units; None where it is none of ours.
        gate_last: The one layer ``up`` gives gates behind the others, where it gives both.
        hidden_dropout: Probability on the hidden units.
        output_dropout: Probability on the output; 0 where a Transformer layer of torch keeps it to itself.
    """

    up: tuple[nn.Module, ...]
    down: nn.Module
    d_model: int
    d_ff: int
    activation: Activation | None
    gate_last: bool
    hidden_dropout: float
    output_dropout: float

    def first(self) -> tuple[Tensor, Tensor | None]:
        """Return weight [m f, d] and bias [m f] of the first product, gates first."""
        weights, biases = zip(*(_weight_and_bias(layer) for layer in self.up), strict=True)
        weight = torch.cat(weights)
        if all(bias is None for bias in biases):
            return self._in_order(weight), None
        given = [w.new_zeros(w.shape[0]) if b is None else b for w, b in zip(weights, biases, strict=True)]
        return self._in_order(weight), self._in_order(torch.cat(given))

    def second(self) -> tuple[Tensor, Tensor | None]:
        """Return weight [d, f] and bias [d] of the second product."""
        return _weight_and_bias(self.down)

    @property
    def has_bias(self) -> bool:
        """Whether any of the layers has a bias."""
        return any(getattr(layer, "bias", None) is not None for layer in (*self.up, self.down))

    def _in_order(self, stacked: Tensor) -> Tensor:
        return stacked.roll(self.d_ff, 0) if self.gate_last else stacked


def read_feed_forward(module: nn.Module) -> FeedForward:
    """Find out what a module computes; it is neither run nor changed, and may be on the meta device.

    Args:
        module: Two layers, or three with a gate, ``nn.Linear`` or Hugging Face's ``Conv1D``; or a Transformer layer
            of torch, whose feed-forward network is spread over the layer itself.

    Raises:
        ValueError: It is no feed-forward network; the message tells why.
    """
    kept = linear_layers(module)
    if len(kept) not in (2, 3):
        told = "layer itself is one linear layer" if is_linear(module) else f"module has {len(kept)} linear layers"
        raise ValueError(f"the {told}; a feed-forward network has 2, or 3 with a gate")
    twin = _twin(module)
    linears, by_twin = linear_layers(twin), {}
    for theirs, ours in zip(linears, kept, strict=True):
        by_twin[theirs] = ours
    with _order_of_calls(twin, linears) as calls:
        x, y = _run_on_tokens(twin, linears, calls)
    d_model = x.shape[-1]
    called = [layer for layer in calls if layer in by_twin]
    if sorted(map(id, called)) != sorted(map(id, linears)):
        raise ValueError("its linear layers are not called once each")
    up, down = tuple(called[:-1]), called[-1]
    d_ff = _sizes(down)[1]
    widths = [_sizes(layer) for layer in up]
    fits = widths in ([(d_ff, d_model)], [(2 * d_ff, d_model)], [(d_ff, d_model)] * 2)
    if not fits or _sizes(down)[0] != d_model or y.shape != x.shape:
        sizes = ", ".join(f"{i} -> {o}" for o, i in (_sizes(layer) for layer in called))
        raise ValueError(f"its linear layers ({sizes}) do not lead from {d_model} features to a hidden width and back")
    activation, order, gate_last = _recognise(x, y, up, down, d_ff)
    before, after = _dropouts(calls, down)
    if is_transformer_layer(module):
        after = 0.0  # what stands behind linear2 stays where it is
    real = tuple(by_twin[layer] for layer in order)
    return FeedForward(real, by_twin[down], d_model, d_ff, activation, gate_last, before, after)


def linear_layers(module: nn.Module) -> list[nn.Module]:
    """Return the linear layers of a feed-forward network, without those of the attention beside it."""
    if is_transformer_layer(module):
        return [module.linear1, module.linear2]  # type: ignore[list-item]
    return [layer for layer in module.modules() if is_linear(layer)]


def is_transformer_layer(module: nn.Module) -> bool:
    """Whether ``linear1``, ``activation``, ``dropout`` and ``linear2`` of the layer itself are the network."""
    return isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer)


def is_linear(module: nn.Module) -> bool:
    """Whether this is ``nn.Linear``, or Hugging Face's ``Conv1D``, which is the same with the weight transposed."""
    return isinstance(module, nn.Linear) or _is_transposed(module)


def _is_transposed(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _weight_and_bias(layer: Any) -> tuple[Tensor, Tensor | None]:
    return (layer.weight.t() if _is_transposed(layer) else layer.weight), layer.bias


def _sizes(layer: nn.Module) -> tuple[int, int]:
    """Return features out and in."""
    out, into = _weight_and_bias(layer)[0].shape
    return out, into


def _twin(module: nn.Module) -> nn.Module:
    """Copy a module with random weights in single precision on the CPU; the real ones are not copied even for that."""
    random = torch.Generator().manual_seed(0)
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        if not parameter.is_floating_point():
            raise ValueError(f"it has weights of {parameter.dtype}")
        drawn = _normal(parameter.shape, random)
        if parameter.ndim > 1:
            drawn /= drawn.shape[-1] ** 0.5
        memo[id(parameter)] = nn.Parameter(drawn, requires_grad=False)
    twin = copy.deepcopy(module, memo)
    return twin.to("cpu", torch.float32).eval()


def _normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    # whatever default device and dtype are while a trainer builds its model
    return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")


def _run_on_tokens(twin: nn.Module, linears: list[nn.Module], calls: list[nn.Module]) -> tuple[Tensor, Tensor]:
    """Return random tokens of a width that the twin takes, and its output; widths are tried in the order of layers."""
    errors = []
    for width in dict.fromkeys(_sizes(layer)[1] for layer in linears):
        x = _normal((len(_SIZES), 8, width), torch.Generator().manual_seed(1)) * torch.tensor(
            _SIZES, dtype=torch.float32, device="cpu"
        ).view(-1, 1, 1)
        calls.clear()
        try:
            return x, _run(twin, x)
        except ValueError as error:
            errors.append(error)
    raise errors[0]


def _run(twin: nn.Module, x: Tensor) -> Tensor:
    forward: Callable[[Tensor], Tensor] = twin._ff_block if is_transformer_layer(twin) else twin  # type: ignore[assignment]
    try:
        with torch.no_grad(), untouched_generators(), torch.device("cpu"), torch.autocast("cpu", enabled=False):
            y = forward(x)
    except Exception as error:
        raise ValueError(f"it cannot be run on tokens {list(x.shape)} alone: {error}") from error
    if not isinstance(y, Tensor):
        raise ValueError(f"it returns a {type(y).__name__}, not one tensor")
    return y


@contextmanager
def _order_of_calls(twin: nn.Module, linears: list[nn.Module]) -> Iterator[list[nn.Module]]:
    """Note linear layers and dropouts as they are called."""
    calls: list[nn.Module] = []
    watched = [*linears, *(layer for layer in twin.modules() if isinstance(layer, nn.Dropout))]
    handles = [layer.register_forward_pre_hook(lambda layer, _: calls.append(layer)) for layer in watched]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _recognise(
    x: Tensor, y: Tensor, up: tuple[nn.Module, ...], down: nn.Module, d_ff: int
) -> tuple[Activation | None, tuple[nn.Module, ...], bool]:
    """Return activation, first layers with that of the gates first, and whether one layer's gates come last."""
    products = [F.linear(x, *_weight_and_bias(layer)) for layer in up]
    candidates: list[tuple[Activation, tuple[nn.Module, ...], bool, Tensor]]
    if len(up) == 2:
        candidates = [
            ("swiglu", up, False, torch.cat(products, -1)),
            ("swiglu", up[::-1], False, torch.cat(products[::-1], -1)),
        ]
    elif products[0].shape[-1] == d_ff:
        candidates = [(activation, up, False, products[0]) for activation in _PLAIN]
    else:
        candidates = [("swiglu", up, last, products[0].roll(d_ff * last, -1)) for last in (False, True)]
    for activation, order, gate_last, pre in candidates:
        expected = F.linear(activate(pre, activation), *_weight_and_bias(down))
        if bool(((y - expected).abs().amax((1, 2)) <= _TOLERANCE * expected.abs().amax((1, 2))).all()):
            return activation, order, gate_last
    return None, up, False


def _dropouts(calls: list[nn.Module], down: nn.Module) -> tuple[float, float]:
    """Return the probabilities on the hidden units and on the output."""
    place = calls.index(down)
    before, after = (
        max((layer.p for layer in part if isinstance(layer, nn.Dropout)), default=0.0)
        for part in (calls[:place], calls[place + 1 :])
    )
    return float(before), float(after)
