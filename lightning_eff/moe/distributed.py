"""Models with mixtures of experts shared out among processes: weights that are gathered, or experts that stay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lightning_eff.moe.layer import FineGrainedMoE

Experts = Literal["gather", "stay"]


def shard_model(
    model: nn.Module, mesh: DeviceMesh, experts: Experts = "gather", units: Iterable[nn.Module] = ()
) -> nn.Module:
    """Share the weights of ``model`` out among the processes of a mesh (FSDP2), in place.

    Call it in ``configure_model``, under Lightning's ``ModelParallelStrategy(data_parallel_size=..., \
tensor_parallel_size=1)`` with ``self.device_mesh["data_parallel"]``. Gradients, clipping, loss-free biases and balance
    losses are those of one process with the joined batch.

    Args:
        model: Anything with :class:`FineGrainedMoE` layers in it, not yet shared out. It must hold every weight that is
            trained, for nothing outside of it is averaged, and must be what is called.
        mesh: One-dimensional; the processes of data parallelism.
        experts: ``"gather"`` brings a layer's experts together on every process while it runs; every layer is a unit of
            its own. ``"stay"`` leaves each expert on one process and sends the tokens there (expert parallelism): less
            traffic where experts are larger than the tokens of a batch. The number of processes must divide that of
            the experts.
        units: Modules whose weights are gathered at a time, such as the blocks of a Transformer.

    Returns:
        ``model``.

    Raises:
        ValueError: The mesh has two dimensions, or the number of processes does not divide that of the experts.
    """
    if experts not in ("gather", "stay"):
        raise ValueError(f"experts must be 'gather' or 'stay', got {experts!r}")
    if mesh.ndim != 1:
        raise ValueError(
            f"expected the mesh of data parallelism, of one dimension, got {mesh.ndim}: {mesh.mesh_dim_names}; choose "
            "one by name, as mesh['data_parallel']"
        )
    layers = [layer for layer in model.modules() if isinstance(layer, FineGrainedMoE)]
    stay: set[nn.Parameter] = set()
    if experts == "stay":
        shard_experts(model, mesh)
        stay = {parameter for layer in layers for parameter in (layer.w1, layer.w2, layer.b1) if parameter is not None}
    for layer in layers:
        layer.process_group = mesh.get_group()
    for unit in (*layers, *units, model):
        fully_shard(unit, mesh=mesh, ignored_params=stay)
    return model


def shard_experts(model: nn.Module, mesh: DeviceMesh) -> None:
    """Give every process of a mesh its part of the experts of all layers, in place; tokens then travel to them.

    Expert weights become ``DTensor`` parameters with the values of the first process; make optimizers afterwards.
    Their gradients are those of the mean of the processes' losses, so that they must be left out of any other averaging
    (:func:`shard_model` does so). All processes must call the layers, forwards and backwards.

    Args:
        model: Anything with :class:`FineGrainedMoE` layers in it.
        mesh: One-dimensional; all processes that have batches of their own.

    Raises:
        ValueError: The number of processes does not divide that of the experts; nothing has changed then.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, FineGrainedMoE)]
    for layer in layers:
        if layer.config.n_experts % mesh.size():
            raise ValueError(
                f"{mesh.size()} processes must divide the number of experts, got {layer.config.n_experts}; choose "
                "another expansion_rate, or experts='gather'"
            )
        if isinstance(layer.w1, DTensor):
            raise ValueError("the experts are shared out already")
    for layer in layers:
        for name in ("w1", "w2", "b1"):
            parameter = getattr(layer, name)
            if parameter is not None:
                with torch.no_grad():
                    part = distribute_tensor(parameter.detach(), mesh, [Shard(0)])
                setattr(layer, name, nn.Parameter(part, parameter.requires_grad))
        layer.expert_group = layer.process_group = mesh.get_group()
