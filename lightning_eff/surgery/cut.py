"""Remove channels from a network in place: same module objects, same parameter objects, smaller tensors.

Every tensor is sliced once. The smaller network is tried before anything of the old one is touched, and must equal
the network whose removed channels are gated to zero.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from lightning_eff.batch import call_model, take
from lightning_eff.surgery.edits import Edits
from lightning_eff.surgery.errors import SurgeryError
from lightning_eff.surgery.gates import Gates
from lightning_eff.surgery.graph import ChannelGraph, axis_masks
from lightning_eff.surgery.plan import PruningPlan
from lightning_eff.surgery.state import quiet_model
from lightning_eff.surgery.structure import remember_cut

MISMATCH = "removing its channels is not masking them (channel operation or fixed shape in forward)"
TOLERANCE = 1e-4  # relative error allowed between the cut and the gated network in float32


@dataclass(frozen=True)
class Cut:
    """What a plan did to a model.

    Attributes:
        plan: the plan, by group name.
        graph: the channel graph of the smaller model.
        macs: multiply-adds per sample before and after.
        params: parameters before and after.
    """

    plan: PruningPlan
    graph: ChannelGraph
    macs: tuple[int, int]
    params: tuple[int, int]


def apply_plan(
    model: nn.Module,
    plan: PruningPlan,
    example_inputs: Any,
    *,
    graph: ChannelGraph | None = None,
    optimizers: Sequence[Optimizer] = (),
    twins: Sequence[nn.Module] = (),
    verify: bool = True,
) -> Cut:
    """Remove the channels that ``plan`` does not keep, in place.

    Args:
        model: the network; all module and parameter objects stay the same ones. Cutting a part of a LightningModule by
            hand, decorate its class with ``@prunable``, or its checkpoints will not carry the shapes.
        plan: what to keep, in indices of the model as it is now.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments.
        graph: the model's channel graph; traced when not given.
        optimizers: their state is sliced with the parameters.
        twins: copies of the model (averaged weights, a teacher) to cut the same way.
        verify: compare the smaller network with the gated one on ``example_inputs`` first.

    Raises:
        KeyError, ValueError: the plan does not fit the model.
        SurgeryError: the smaller network would fail or differ; the model is as it was, bit for bit.
    """
    graph = graph or ChannelGraph.from_model(model, example_inputs)
    keep = plan.keep_masks(graph)
    named = PruningPlan(plan.validate(graph), graph.sizes, plan.meta)
    axes = axis_masks(graph, keep)
    after = graph.without(keep, axes)
    cut = Cut(
        named,
        after,
        (round(graph.macs().item()), round(after.macs().item())),
        (round(graph.params().item()), round(after.params().item())),
    )
    if not keep:
        return cut
    coupled = [name for name in keep if graph.groups[name].norm_coupled]
    if coupled:
        warnings.warn(
            f"channels of {', '.join(coupled)} pass a norm that takes statistics over them: outputs change by more "
            "than the missing channels, and the cut is checked for shapes only",
            stacklevel=2,
        )
    edits = Edits(model, axes)
    if verify:
        problem = _mismatch(model, example_inputs, graph, keep, edits)
        if problem:
            bad = _bisect(model, example_inputs, graph, keep)
            where = ", ".join(bad) or "several groups together"
            raise SurgeryError(
                f"removing channels of {where} does not give the masked network: {problem}. "
                "Is there a hard-coded shape or a channel operation in forward? Exclude the layer; nothing was changed."
            )
        if all(not bool(t.any()) for t in _masked_outputs(model, example_inputs, graph, keep)):
            warnings.warn("the outputs are zero for the example inputs: the cut could not be checked", stacklevel=2)
    all_edits = [edits, *(Edits(twin, axes) for twin in twins)]
    for one in all_edits:
        remember_cut(one.model, [path for path, _ in one.masks])
        one.commit(optimizers)
    return cut


def protect_mismatched(model: nn.Module, example_inputs: Any, graph: ChannelGraph) -> ChannelGraph:
    """Cut halves of every prunable group on trial and protect the groups that are not what masking is.

    A random half, the first and the last half: a wrong map may be right for one of them by luck.
    """
    generator = torch.Generator().manual_seed(0)
    example = take(example_inputs, slice(0, 2))
    for choose in ("random", "first", "last"):
        keep = {}
        for name in graph.prunable:
            size = graph.groups[name].size
            order = torch.randperm(size, generator=generator) if choose == "random" else torch.arange(size)
            mask = torch.zeros(size, dtype=torch.bool)
            mask[order[size // 2 :] if choose == "last" else order[: (size + 1) // 2]] = True
            if not graph.groups[name].norm_coupled:
                keep[name] = mask
        if keep and _mismatch(model, example, graph, keep):
            graph = graph.protect(dict.fromkeys(_bisect(model, example, graph, keep), MISMATCH))
    return graph


def _bisect(model: nn.Module, example: Any, graph: ChannelGraph, keep: Mapping[str, Tensor]) -> list[str]:
    """Return the groups whose removal alone is wrong, by halving."""
    if not _mismatch(model, example, graph, keep):
        return []
    if len(keep) == 1:
        return list(keep)
    names = list(keep)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    return [bad for half in halves for bad in _bisect(model, example, graph, {name: keep[name] for name in half})]


def _mismatch(
    model: nn.Module,
    example_inputs: Any,
    graph: ChannelGraph,
    keep: Mapping[str, Tensor],
    edits: Edits | None = None,
) -> str:
    """Say how the smaller network differs from the gated one on the example; ``""`` when it does not."""
    edits = edits or Edits(model, axis_masks(graph, keep))
    masked = _masked_outputs(model, example_inputs, graph, keep)
    with quiet_model(model), torch.no_grad():
        try:
            with edits.on_trial():
                smaller = _outputs(model, example_inputs)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    if [(t.shape, t.dtype) for t in masked] != [(t.shape, t.dtype) for t in smaller]:
        return f"output shapes {[list(t.shape) for t in masked]} became {[list(t.shape) for t in smaller]}"
    loose = any(graph.groups[name].norm_coupled for name in keep)
    for a, b in zip(smaller, masked, strict=True):
        if not a.is_floating_point():
            continue
        relative = float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-12))
        if not torch.isfinite(a).all() and torch.isfinite(b).all():
            return "outputs are no longer finite"
        if relative > TOLERANCE * (1 if a.dtype in (torch.float32, torch.float64) else 100) and not loose:
            return f"relative output error {relative:.2g}"
    return ""


def _masked_outputs(
    model: nn.Module, example_inputs: Any, graph: ChannelGraph, keep: Mapping[str, Tensor]
) -> list[Tensor]:
    gates = {name: mask.float() for name, mask in keep.items()}
    with quiet_model(model), torch.no_grad(), Gates(graph.groups, model, gates):
        return _outputs(model, example_inputs)


def _outputs(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    return [leaf.clone() for leaf in pytree.tree_leaves(call_model(model, example_inputs)) if isinstance(leaf, Tensor)]
