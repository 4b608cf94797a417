"""What a coordinate is worth before training, from its value, from public data or from nothing but the network.

SNIP is arXiv 1810.02340, SynFlow arXiv 2006.05467. Every score is of the shape of its parameter; higher is kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_eff.batch import LossFunction, call_model
from lightning_eff.privacy.public_data import mean_gradients
from lightning_eff.surgery.state import parameters_require_grad, quiet_model

Scores = dict[str, Tensor]


def magnitude_scores(parameters: Mapping[str, Tensor]) -> Scores:
    """``|theta|``: sensible where the values were trained on public data; of random values it is random in disguise."""
    return {name: parameter.detach().abs() for name, parameter in parameters.items()}


def snip_scores(
    module: nn.Module,
    batches: Iterable[Any],
    parameters: Mapping[str, Tensor],
    *,
    loss_fn: LossFunction | None = None,
    most: int | None = 1,
    seed: int = 0,
) -> Scores:
    """``|theta dL/dtheta|`` with the mean loss over public batches.

    Arguments are those of :func:`~lightning_eff.privacy.public_data.mean_gradients`.
    """
    gradients = mean_gradients(module, batches, parameters, loss_fn=loss_fn, most=most, seed=seed)
    return {name: (gradient * parameters[name].detach()).abs() for name, gradient in gradients.items()}


class SynFlow:
    """``|theta dR/dtheta|`` where R sums the outputs of the network for inputs of ones, all weights made positive.

    It is computed in evaluation mode and float64, where the products over many layers have room. The module does not
    change.

    Args:
        module: the network.
        inputs: what it is called with, of any values; floating point tensors in it are replaced by one sample of
            ones, ``[1, ...]``.
        parameters: by name, whose scores are wanted.

    Raises:
        ValueError: an input is not floating point, e.g. token numbers.
    """

    def __init__(self, module: nn.Module, inputs: Any, parameters: Mapping[str, Tensor]) -> None:
        for leaf in pytree.tree_leaves(inputs):
            if isinstance(leaf, Tensor) and not leaf.is_floating_point():
                raise ValueError(
                    f'score="synflow" feeds the network ones, but an input is {leaf.dtype}: use score="magnitude", '
                    '"random", or "snip" with public data'
                )
        self._module, self._names = module, list(parameters)
        self._device = next(module.parameters()).device
        if self._device.type == "mps":  # has no float64
            self._device = torch.device("cpu")
        self._inputs = pytree.tree_map(self._ones, inputs)

    def scores(self, masks: Mapping[str, Tensor] | None = None) -> Scores:
        """Score every coordinate, those where a mask (by name, bool) is False being zero.

        Raises:
            ValueError: the network has no ``forward``, does not run in float64, or R is not finite.
        """
        tensors = {name: self._positive(one) for name, one in self._module.named_parameters()}
        for name, mask in (masks or {}).items():
            tensors[name] *= mask.to(self._device)
        buffers = {
            name: self._positive(one) if one.is_floating_point() else one.to(self._device)
            for name, one in self._module.named_buffers()
        }
        leaves = [tensors[name].requires_grad_() for name in self._names]
        with quiet_model(self._module), torch.enable_grad(), parameters_require_grad(self._module, False):
            try:
                output = torch.func.functional_call(
                    _Called(self._module), _within({**tensors, **buffers}), (self._inputs,)
                )
            except (RuntimeError, NotImplementedError) as error:
                kind = type(self._module).__name__
                if isinstance(error, NotImplementedError) and '"forward"' in str(error):
                    raise ValueError(
                        f'score="synflow" runs the network and {kind} has no forward: give it one '
                        "(def forward(self, x): return self.net(x)), or use another score"
                    ) from error
                shapes = [list(one.shape) for one in pytree.tree_leaves(self._inputs) if isinstance(one, Tensor)]
                raise ValueError(
                    f"SynFlow calls {kind} in float64 with ones of shapes {shapes}, which "
                    f"failed: {error}. Give input_shape, or use another score"
                ) from error
            total = sum(one.sum() for one in pytree.tree_leaves(output) if isinstance(one, Tensor))
            if not isinstance(total, Tensor) or not math.isfinite(total.item()):
                raise ValueError(f"SynFlow's sum of outputs is {total}, expected a finite number: use another score")
            gradients = torch.autograd.grad(total, leaves, allow_unused=True)
        return {
            name: torch.zeros_like(leaf) if gradient is None else leaf.detach() * gradient.abs()
            for name, leaf, gradient in zip(self._names, leaves, gradients, strict=True)
        }

    def _ones(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.ndim:
            return leaf
        return torch.ones(1, *leaf.shape[1:], dtype=torch.float64, device=self._device)

    def _positive(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self._device, torch.float64).abs()


class _Called(nn.Module):
    """The module as a child, so that inputs of every form can be handed to it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.called = module

    def forward(self, inputs: Any) -> Any:
        return call_model(self.called, inputs)


def _within(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"called.{name}": tensor for name, tensor in tensors.items()}
