"""Parameters whose gradient is not known in closed form: per-sample automatic differentiation of those alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap


class OtherParameters:
    """Per-sample gradients of some parameters, by ``vmap`` where that can run the network, else by a loop.

    Args:
        shapes: Shape of each parameter by its name in the network.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.shapes = shapes
        self.sizes = [math.prod(shape) for shape in shapes.values()]
        self._loop = False

    @property
    def names(self) -> tuple[str, ...]:
        """Names of its blocks."""
        return tuple(self.shapes)

    def gradients(self, network: nn.Module, x: Tensor, differentiable: bool) -> Tensor:
        """Return ``(n, P)`` gradients of the outputs' sum, parameter after parameter."""
        parameters = {name: network.get_parameter(name).detach() for name in self.shapes}
        if not self._loop:
            try:
                by_name = vmap(grad(lambda values, one: _total(network, values, one)), in_dims=(None, 0))(parameters, x)
                return torch.cat([by_name[name].flatten(1) for name in self.shapes], 1)
            except (RuntimeError, NotImplementedError, ValueError):
                # recurrent layers and whatever else has no batching rule; where the loop fails too, its error is shown
                self._loop = True
        rows = []
        for sample in x:
            values = {name: value.clone().requires_grad_() for name, value in parameters.items()}
            total = _total(network, values, sample)
            found = torch.autograd.grad(total, list(values.values()), create_graph=differentiable)
            rows.append(torch.cat([gradient.flatten() for gradient in found]))
        return torch.stack(rows)


def _total(network: nn.Module, values: dict[str, Tensor], sample: Tensor) -> Tensor:
    result: Tensor = functional_call(network, values, (sample[None],)).sum()
    return result
