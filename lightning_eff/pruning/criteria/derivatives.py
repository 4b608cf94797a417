"""Derivatives of a network with respect to gates on its channels: all prunable groups at once, sample by sample.

At open gates the derivative of ``L`` by the gate of channel j is ``sum a_j dL/da_j`` over the values ``a_j`` that are
read of the channel, whichever layers read them. Weights may be frozen: gradients go to gates alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_eff.surgery import ChannelGraph, Gates


@contextmanager
def gates_for_derivatives(
    model: nn.Module, graph: ChannelGraph, samples: int, instead: str
) -> Iterator[dict[str, Tensor]]:
    """Open gates of value one that require gradients on every prunable group.

    Args:
        model: the network.
        graph: its channel graph.
        samples: ``B`` for one gate per sample; 1 for one that all samples share.
        instead: what the user can do where a layer does not see the samples in its first dimension.

    Yields:
        The gates, ``[B, C]`` or ``[C]``, by group.
    """
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    dtype = torch.promote_types(parameter.dtype, torch.float32)  # derivatives in half precision may vanish
    sizes = {name: graph.groups[name].size for name in graph.prunable}
    values = {
        name: torch.ones((samples, size) if samples > 1 else (size,), dtype=dtype, device=parameter.device)
        for name, size in sizes.items()
    }
    for value in values.values():
        value.requires_grad_()
    with Gates(graph.groups, model, values):
        try:
            yield values
        except ValueError as error:
            if "gates per sample" in str(error):
                raise ValueError(
                    f"{error}: the first dimension there is not the batch, so samples cannot have gates of their own; "
                    f"{instead}"
                ) from error
            raise


def derivatives(
    output: Tensor, values: Mapping[str, Tensor], cotangent: Tensor | None = None, *, more: bool = False
) -> dict[str, Tensor]:
    """Differentiate ``output`` (a scalar, or weighed by ``cotangent``): float64 ``[B, C]`` on the CPU, by group.

    Groups that do not reach the output get zeros. ``more``: keep the graph for another call.
    """
    gradients = torch.autograd.grad(
        output, list(values.values()), cotangent, retain_graph=more, allow_unused=True, materialize_grads=True
    )
    sizes = [value.shape[-1] for value in values.values()]
    return {
        name: gradient.reshape(-1, size).cpu().double()
        for (name, size), gradient in zip(zip(values, sizes, strict=True), gradients, strict=True)
    }
