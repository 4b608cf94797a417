"""Channel groups by one trace of torch-pruning, the only place that calls it.

torch-pruning (arXiv 2301.12900) finds which layers are coupled; here its groups become index maps. It leaves a model in
evaluation mode, needs gradients on every parameter and knows the channels of a grouped layer only one by one: all
three are mended here. Nothing is ever cut with it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from lightning_eff.batch import call_model
from lightning_eff.surgery.counting import CHANNEL_NORMS, is_depthwise
from lightning_eff.surgery.errors import PruningGraphError
from lightning_eff.surgery.graph import ChannelGroup, Member
from lightning_eff.surgery.state import parameters_require_grad, quiet_model

CUTTABLE = (_ConvNd, nn.Linear, nn.Embedding, *CHANNEL_NORMS)


def trace_groups(model: nn.Module, example_inputs: Any) -> list[ChannelGroup]:
    """Return the channel groups of ``model`` in network order; PruningGraphError when it cannot be traced."""
    import torch_pruning as tp

    if any(nn.parameter.is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        raise PruningGraphError("the model has lazy parameters without a shape: run one forward pass first")
    _refuse_readers_elsewhere(model)
    root = getattr(model, "_orig_mod", model)
    graph = tp.DependencyGraph()
    try:
        with quiet_model(model), torch.enable_grad(), parameters_require_grad(model, True), _no_tracer_warnings():
            graph.build_dependency(
                root,
                example_inputs,
                forward_fn=call_model,
                output_transform=_differentiable_leaves,
                verbose=False,
            )
            raw = [list(group) for group in graph.get_all_groups(root_module_types=(_ConvNd, nn.Linear))]
    except Exception as error:
        for path, module in model.named_modules():
            if reason := getattr(module, "no_channels", ""):
                raise PruningGraphError(
                    f"{type(model).__name__} cannot be traced with {path} ({type(module).__name__}) in it: {reason}. "
                    "Prune the dense network before (replace_ffn with init='upcycle' keeps what it computes then), or "
                    "a part without such layers (a callback: layers.submodule)"
                ) from error
        raise PruningGraphError(
            f"{type(model).__name__} cannot be traced ({type(error).__name__}: {error}). Give the groups by hand with "
            "ChannelGraph.from_dict, or prune a part of the model that can be traced."
        ) from error
    order = {module: number for number, module in enumerate(model.modules())}
    paths: dict[Any, str] = {}
    for path, module in model.named_modules():
        paths.setdefault(module, path)
    for path, parameter in model.named_parameters():
        paths.setdefault(parameter, path)
    tied = _tied_modules(model)
    groups = [_group(items, graph, paths, tied) for items in raw]
    first = {path: order[module] for module, path in paths.items() if isinstance(module, nn.Module)}
    return sorted(groups, key=lambda group: first[group.name])


def _refuse_readers_elsewhere(model: nn.Module) -> None:
    """Raise where a hook hands what a layer makes to modules that are no part of the model: they would not be cut."""
    own = set(model.modules())
    for path, module in model.named_modules():
        for hook in module._forward_hooks.values():
            strangers = [reader for reader in getattr(hook, "readers", ()) if reader not in own]
            if strangers:
                raise PruningGraphError(
                    f"what {path or 'the model'!r} makes is also read by a {type(strangers[0]).__name__} outside of "
                    f"this {type(model).__name__} (an early exit): removing channels would leave it behind. Prune the "
                    "network that holds both (a callback: leave layers.submodule empty), or take the exits off first"
                )


@contextmanager
def _no_tracer_warnings() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _differentiable_leaves(output: Any) -> list[Tensor]:
    leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.grad_fn is not None]
    if not leaves:
        raise RuntimeError("no output tensor depends on the parameters")
    return leaves


def _tied_modules(model: nn.Module) -> set[str]:
    """Paths of modules that hold a parameter which another module holds too."""
    owners: dict[int, set[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(module)
    shared = {module for holders in owners.values() if len(holders) > 1 for module in holders}
    return {path for path, module in model.named_modules() if module in shared}


def _group(items: Sequence[Any], graph: Any, paths: dict[Any, str], tied: set[str]) -> ChannelGroup:
    members: list[Member] = []
    producers: list[str] = []
    reason, norm_coupled = "", False
    positions_tied: list[Tensor] = []
    size = len(items[0].idxs)
    for item in items:
        node = item.dep.target
        module = node.module
        if type(module).__name__ == "_OutputOp":
            reason = reason or "its channels reach the network's output"
        if module not in paths:
            continue
        path = paths[module]
        index, root = torch.tensor(list(item.idxs)), torch.tensor(list(item.root_idxs))
        if isinstance(module, nn.Parameter):
            members.append(Member(path, f"dim:{node.pruning_dim}", index, root))
            continue
        if not isinstance(module, CUTTABLE):
            if any(True for _ in module.parameters()):
                reason = reason or f"{path} is a {type(module).__name__}, which is not cut"
            continue
        reads = isinstance(module, _ConvNd | nn.Linear) and not is_depthwise(module)
        axis = "in" if reads and not graph.is_out_channel_pruning_fn(item.dep.handler) else "out"
        if int(index.max()) >= _width(module, axis):
            reason = reason or f"the tracer maps its channels wrongly onto {path}"
            continue
        members.append(Member(path, axis, index, root))
        if axis == "out" and reads:
            producers.append(path)
        norm_coupled |= isinstance(module, nn.LayerNorm | nn.RMSNorm) or (
            isinstance(module, nn.GroupNorm) and module.num_groups < module.num_channels
        )
        if path in tied:
            reason = reason or f"{path} shares a parameter with another layer"
        if parametrize.is_parametrized(module) or ("weight" in dir(module) and _computed_weight(module)):
            reason = reason or f"the weight of {path} is computed (parametrization or weight norm)"
        positions_tied.extend(_tied_positions(module, axis, index, root))
    if not any(m.axis == "in" for m in members):
        reason = reason or "it feeds only the network's output"
    members, size = _merge_roots(members, size, positions_tied)
    if size == 1:
        reason = reason or "its channels can only be removed all together"
    name_order = {path: number for number, path in enumerate(paths.values())}
    producers.sort(key=name_order.__getitem__)
    if not producers:
        producers = [paths[items[0].dep.target.module]]
    return ChannelGroup(producers[0], size, tuple(members), tuple(dict.fromkeys(producers)), reason, norm_coupled)


def _width(module: nn.Module, axis: str) -> int:
    """Length of an axis of a layer that can be cut."""
    names = ("in_channels", "in_features") if axis == "in" else ("out_channels", "out_features")
    for name in (*names, "num_features", "num_channels", "num_parameters", "embedding_dim"):
        if isinstance(width := getattr(module, name, None), int):
            return width
    assert isinstance(module, nn.LayerNorm | nn.RMSNorm)
    return module.normalized_shape[-1]


def _computed_weight(module: nn.Module) -> bool:
    return isinstance(getattr(module, "weight", None), Tensor) and "weight" not in module._parameters


def _tied_positions(module: nn.Module, axis: str, index: Tensor, root: Tensor) -> list[Tensor]:
    """Roots that must go together because a grouped layer needs equally many channels in every block.

    A player of a layer with ``g`` blocks is the same position in each of them.
    """
    if isinstance(module, nn.GroupNorm):
        blocks, length = module.num_groups, module.num_channels
    elif isinstance(module, _ConvNd) and module.groups > 1 and not is_depthwise(module):
        blocks, length = module.groups, module.in_channels if axis == "in" else module.out_channels
    else:
        return []
    slot = index % (length // blocks)
    return [root[slot == s] for s in sorted(set(slot.tolist()))]


def _merge_roots(members: list[Member], size: int, together: list[Tensor]) -> tuple[list[Member], int]:
    """Renumber channels so that each set in ``together`` is one channel (union-find)."""
    parent = list(range(size))

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for roots in together:
        first, *others = roots.tolist()
        for other in others:
            low, high = sorted((find(first), find(other)))
            parent[high] = low
    leaders = sorted({find(i) for i in range(size)})
    number = torch.tensor([leaders.index(find(i)) for i in range(size)]) if len(leaders) < size else torch.arange(size)
    return [Member(m.path, m.axis, m.index, number[m.root]) for m in members], len(leaders)
