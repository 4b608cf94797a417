"""Find out how a network is built, and prove the closed forms on it before they are used."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_eff.surgery.state import untouched_generators
from lightning_eff.synthesis.features.fallback import OtherParameters
from lightning_eff.synthesis.features.layers import CollapsedLayer, Layer, closed_form
from lightning_eff.synthesis.features.recording import record


class Structure(NamedTuple):
    """How the gradients of a network are worked out."""

    layers: tuple[Layer, ...]
    others: OtherParameters | None
    layout: dict[str, tuple[int, ...]]
    """Stored shape of each block, in the order of the network's parameters."""
    sample_floats: int
    """Numbers a sample needs beyond those of dense layers."""


def frozen_copy(network: nn.Module) -> nn.Module:
    """Return a copy in evaluation mode, without gradients and without layers that work in place.

    It is in float64 where all weights are, else in float32: gradients of half precision are not of norm one.
    """
    if not isinstance(network, nn.Module):
        raise TypeError(f"expected a module as feature network, got a {type(network).__name__}")
    inner = copy.deepcopy(network).eval().requires_grad_(False)
    inner.to(torch.float64 if all(p.dtype == torch.float64 for p in inner.parameters()) else torch.float32)
    for name, module in inner.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise ValueError(
                f"the batch norm {name!r} has no running statistics: one sample's gradient would depend on the others; "
                "use track_running_stats=True or another normalisation"
            )
        if getattr(module, "inplace", False) is True:
            module.inplace = False
    return inner


def find_input_shape(network: nn.Module) -> tuple[int, ...]:
    """Return ``network.input_shape``, or the inputs of a network that begins with a dense layer."""
    told = getattr(network, "input_shape", None)
    if told is not None:
        return tuple(int(size) for size in told)
    for module in network.modules():
        if not list(module.children()):
            if isinstance(module, nn.Linear):
                return (module.in_features,)
            break
    raise ValueError("the shape of one sample is not known: pass input_shape=, without the batch axis")


def examine(network: nn.Module, input_shape: Sequence[int], collapse_last: bool, drop_final_bias: bool) -> Structure:
    """Find closed forms for as many parameters as possible and check them on two random samples.

    Args:
        network: From :func:`frozen_copy`.
        input_shape: Shape of one sample.
        collapse_last: See ``NTKFeatures``.
        drop_final_bias: See ``NTKFeatures``.

    Raises:
        ValueError: no parameter has a gradient, one sample's output depends on another sample, or the network keeps
            something of the samples it has seen.
    """
    weights = list(network.parameters())
    if not weights:
        raise ValueError("the feature network has no parameters, so there are no gradients to take as features")
    generator = torch.Generator().manual_seed(0)
    # whatever the default device and type are, as in trainer.init_module()
    x, other = torch.rand(2, 2, *input_shape, generator=generator, device="cpu", dtype=torch.float32).to(weights[0])
    x, other = 2 * x - 1, 2 * other - 1
    _require_no_memory(network, x, other)
    expected = _by_autograd(network, x)
    if not expected:
        raise ValueError("no parameter of the feature network has a gradient")
    # what rounding alone may do to a gradient that is zero
    slack = 1e-5 * math.sqrt(sum(float(gradient.square().sum()) for gradient in expected.values()))
    proven, known = _proven_layers(network, x, expected, slack, collapse_last, drop_final_bias)
    rest = {name: tuple(gradient.shape[1:]) for name, gradient in expected.items() if name not in known}
    others = OtherParameters(rest) if rest else None
    if others is not None:
        actual = torch.split(others.gradients(network, x, differentiable=False), others.sizes, 1)
        for name, found in zip(rest, actual, strict=True):
            if not _close(found, expected[name], slack):
                raise ValueError(
                    f"the gradient of {name!r} depends on how samples are batched: use another layer there"
                )
        owners = {name: type(network.get_submodule(name.rpartition(".")[0])).__name__ for name in rest}
        warnings.warn(
            f"no closed form for {', '.join(f'{name} ({owner})' for name, owner in owners.items())}: per-sample "
            f"gradients of these {sum(others.sizes)} numbers are written out, which takes more time and memory",
            stacklevel=3,
        )
    shapes = dict(rest)
    for layer in proven:
        shapes.update(layer.shapes)
    layout = {name: shapes[name] for name, _ in network.named_parameters() if name in shapes}
    return Structure(proven, others, layout, _sample_floats(network, proven, others, x))


def _require_no_memory(network: nn.Module, x: Tensor, other: Tensor) -> None:
    """Refuse a network that other samples change: those were private ones, and it goes into checkpoints."""
    with torch.no_grad(), untouched_generators():
        before = network(x.clone())
        kept = {name: tensor.clone() for name, tensor in _tensors(network).items()}
        network(other.clone())
        after = _tensors(network)
        for name, tensor in after.items():
            if name not in kept or tensor.shape != kept[name].shape or not _equal(tensor, kept[name]):
                raise ValueError(
                    f"the network writes {name!r} when it is called, so it would keep private records and later "
                    "features would depend on them: use a network that a call leaves as it was"
                )
        again = network(x.clone())
    if isinstance(before, Tensor) and not torch.allclose(before, again, rtol=1e-4, atol=1e-5, equal_nan=True):
        raise ValueError(
            "the network gives another output for the same sample when it is called again: its output must depend on "
            "the sample alone, without a state and without random numbers"
        )


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def _equal(one: Tensor, other: Tensor) -> bool:
    return bool(((one == other) | ((one != one) & (other != other))).all())


def _proven_layers(
    network: nn.Module,
    x: Tensor,
    expected: dict[str, Tensor],
    slack: float,
    collapse_last: bool,
    drop_final_bias: bool,
) -> tuple[tuple[Layer, ...], set[str]]:
    """Return the layers whose closed form gives the expected gradients, and the names of their parameters."""
    shared = _shared(network)
    proven: list[Layer] = []
    known: set[str] = set()
    for path, call in _single_calls(network, x).items():
        layer = closed_form(path, network.get_submodule(path))
        if layer is None or not set(layer.names) <= expected.keys() or set(layer.names) & shared:
            continue
        module = network.get_submodule(path)
        if call.ends and isinstance(module, nn.Linear) and call.output.ndim == 2:
            check: Layer = CollapsedLayer(path, module, False, False)
            kept: Layer = CollapsedLayer(path, module, collapse_last, drop_final_bias)
        else:
            check = kept = layer
        recorded = record(network, [check], None, x, differentiable=False)
        try:
            sizes = [math.prod(shape) for shape in layer.shapes.values()]
            gradients = torch.split(recorded.uses()[0].per_sample(), sizes, 1)
        except RuntimeError:  # no sample axis in front, or positions that are not the sample's
            continue
        if all(_close(g, expected[name], slack) for name, g in zip(layer.names, gradients, strict=True)):
            proven.append(kept)
            known |= set(layer.names)
    return tuple(proven), known


class _SingleCall(NamedTuple):
    a: Tensor
    output: Tensor
    ends: bool


def _single_calls(network: nn.Module, x: Tensor) -> dict[str, _SingleCall]:
    """Return the calls of leaf modules that are called once, whose input nobody changes in place afterwards."""
    calls: dict[str, list[tuple[Tensor, int, Tensor]]] = {}

    def hook_for(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            a = args[0] if args else kwargs.get("input")
            if isinstance(a, Tensor) and isinstance(output, Tensor):
                calls.setdefault(path, []).append((a, a._version, output))

        return hook

    leaves = [(path, module) for path, module in network.named_modules() if not list(module.children())]
    handles = [module.register_forward_hook(hook_for(path), with_kwargs=True) for path, module in leaves]
    try:
        with torch.no_grad():
            result = network(x.clone())
    finally:
        for handle in handles:
            handle.remove()
    return {
        path: _SingleCall(found[0][0], found[0][2], found[0][2] is result)
        for path, found in calls.items()
        if len(found) == 1 and found[0][0]._version == found[0][1]
    }


def _shared(network: nn.Module) -> set[str]:
    """Return names of parameters that more than one module holds."""
    holders: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        holders.setdefault(id(parameter), []).append(name)
    return {name for names in holders.values() if len(names) > 1 for name in names}


def _by_autograd(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return the gradients of each sample for itself, of all parameters that have any."""
    found: dict[str, list[Tensor | None]] = {}
    for sample in x:
        values = {name: value.detach().clone().requires_grad_() for name, value in network.named_parameters()}
        total = functional_call(network, values, (sample[None].clone(),)).sum()
        gradients = torch.autograd.grad(total, list(values.values()), allow_unused=True)
        for name, gradient in zip(values, gradients, strict=True):
            found.setdefault(name, []).append(gradient)
    return {
        name: torch.stack([g for g in gradients if g is not None])
        for name, gradients in found.items()
        if all(g is not None for g in gradients)
    }


def _close(actual: Tensor, expected: Tensor, slack: float) -> bool:
    """Whether two gradients are the same but for rounding; a wrong one differs by much more."""
    return bool((actual.flatten() - expected.flatten()).norm() <= 1e-3 * expected.norm() + slack)


def _sample_floats(network: nn.Module, layers: Sequence[Layer], others: OtherParameters | None, x: Tensor) -> int:
    calls = _single_calls(network, x)
    numbers = sum(
        layer.sample_floats(calls[layer.path].output.shape[1:], calls[layer.path].a.shape[1:]) for layer in layers
    )
    return numbers + (sum(others.sizes) if others is not None else 0)
