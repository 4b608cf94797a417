"""One forward and one backward of a network, of which each layer's input and output derivative are kept.

``n`` samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_eff.synthesis.features.blocks import BlockUse
from lightning_eff.synthesis.features.fallback import OtherParameters
from lightning_eff.synthesis.features.layers import CollapsedLayer, ConvolutionLayer, Layer
from lightning_eff.synthesis.features.uses import LayerUse


class Call(NamedTuple):
    """One call of a layer."""

    a: Tensor
    """Its input."""
    output: GradientEdge
    """Where the derivative by its output is found, also if the output is overwritten later."""


@contextmanager
def _recorded_calls(network: nn.Module, layers: Sequence[Layer]) -> Iterator[dict[str, Call]]:
    """Yield a dict that is filled while the network runs; convolutions are run as linear maps meanwhile."""
    calls: dict[str, Call] = {}

    def hook_for(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            calls[path] = Call(args[0] if args else kwargs["input"], get_gradient_edge(output))

        return hook

    modules = {layer.path: network.get_submodule(layer.path) for layer in layers}
    handles = [module.register_forward_hook(hook_for(path), with_kwargs=True) for path, module in modules.items()]
    try:
        for layer in layers:
            if isinstance(layer, ConvolutionLayer):
                module = modules[layer.path]
                module.forward = partial(layer.run, module)
        yield calls
    finally:
        for handle in handles:
            handle.remove()
        for module in modules.values():
            module.__dict__.pop("forward", None)


@contextmanager
def _plain_arithmetic(device: torch.device) -> Iterator[None]:
    """No reduced precision, and attention in the one form that can be differentiated twice."""
    with torch.autocast(device.type, enabled=False), sdpa_kernel(SDPBackend.MATH):
        yield


class Recording(NamedTuple):
    """What a pass left of every layer: the tensors its use is made of."""

    sources: tuple[Layer | OtherParameters, ...]
    tensors: tuple[Tensor, ...]

    def uses(self, tensors: Sequence[Tensor] | None = None) -> list[LayerUse]:
        """Return a use for each source, made of ``tensors`` or of the recorded ones."""
        left = iter(self.tensors if tensors is None else tensors)
        found: list[LayerUse] = []
        for source in self.sources:
            if isinstance(source, OtherParameters):
                found.append(BlockUse(source.names, source.sizes, next(left)))
            elif isinstance(source, CollapsedLayer):
                found.append(source.use(None, next(left)))
            else:
                delta = next(left)
                found.append(source.use(delta, next(left)))
        return found


def record(
    network: nn.Module, layers: Sequence[Layer], others: OtherParameters | None, x: Tensor, *, differentiable: bool
) -> Recording:
    """Run the network forward and backward to the outputs of its layers.

    Args:
        network: Frozen, in evaluation mode.
        layers: Layers known in closed form, each called once.
        others: What is worked out by automatic differentiation.
        x: ``(n, *input_shape)``.
        differentiable: Whether what is recorded is to be differentiable in ``x``.
    """
    with torch.inference_mode(False), torch.enable_grad(), _plain_arithmetic(x.device):
        if x.is_inference():
            x = x.clone()
        if not differentiable:
            # the graph must begin somewhere; no derivative by x is worked out
            x = x.detach().requires_grad_()
        with _recorded_calls(network, layers) as calls:
            result = network(x)
        inner = [calls[layer.path].output for layer in layers if not isinstance(layer, CollapsedLayer)]
        deltas: Iterator[Tensor] = iter(())
        if inner:
            deltas = iter(torch.autograd.grad(result.sum(), inner, create_graph=differentiable))
        tensors: list[Tensor] = []
        for layer in layers:
            if not isinstance(layer, CollapsedLayer):
                tensors.append(next(deltas))
            tensors.append(calls[layer.path].a)
        if others is not None:
            tensors.append(others.gradients(network, x, differentiable))
    if not differentiable:
        tensors = [tensor.detach() for tensor in tensors]
    return Recording((*layers, *([others] if others is not None else [])), tuple(tensors))
