"""Per-sample gradients the slow, indisputable way: `torch.func` over samples, or one backward pass a sample."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_eff.batch import call_model, take


def example_losses(output: Any) -> Tensor:
    """A loss ``[n]`` whose output gradients differ everywhere: the same in the engine and in the reference."""
    output = output[0] if isinstance(output, tuple) else output
    flat = output.flatten(1)
    tilt = torch.linspace(0.5, 1.5, flat.shape[1], dtype=flat.dtype, device=flat.device)
    return (flat.sin() * tilt).sum(1) + 0.5 * (flat**2 * tilt.flip(0)).sum(1)


def vmap_gradients(model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    """Return ``name -> [n, *shape]`` by ``vmap(grad)`` of the whole model."""
    trained = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    frozen = {name: value.detach() for name, value in model.named_parameters() if not value.requires_grad}
    constants = {**frozen, **dict(model.named_buffers())}

    def loss(parameters: Mapping[str, Tensor], example: Any) -> Tensor:
        example = torch.utils._pytree.tree_map(lambda leaf: leaf.unsqueeze(0), example)
        values = (parameters, constants)
        if isinstance(example, Mapping):
            output = torch.func.functional_call(model, values, (), dict(example), tie_weights=True)
        else:
            arguments = example if isinstance(example, tuple) else (example,)
            output = torch.func.functional_call(model, values, arguments, tie_weights=True)
        return example_losses(output).sum()

    gradient = torch.func.grad(loss)
    return torch.func.vmap(gradient, in_dims=(None, 0), randomness="different")(trained, inputs)


def loop_gradients(model: nn.Module, inputs: Any, n: int) -> dict[str, Tensor]:
    """Return ``name -> [n, *shape]`` by one plain backward pass a sample; zeros where a parameter takes no part."""
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    rows = []
    for i in range(n):
        loss = example_losses(call_model(model, take(inputs, slice(i, i + 1)))).sum()
        rows.append(torch.autograd.grad(loss, list(trained.values()), allow_unused=True, materialize_grads=True))
    return {name: torch.stack(column) for name, column in zip(trained, zip(*rows, strict=True), strict=True)}
