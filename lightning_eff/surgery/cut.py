"""Remove channels from a network in place: same module objects, same parameter objects, smaller tensors.

Every tensor is sliced once. The smaller network is tried before anything of the old one is touched, and must equal
the network whose removed channels are gated to zero.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from lightning_eff.batch import call_model, take
from lightning_eff.surgery.counting import CHANNEL_NORMS, is_depthwise
from lightning_eff.surgery.errors import SurgeryError
from lightning_eff.surgery.gates import Gates
from lightning_eff.surgery.graph import ChannelGraph, axis_masks
from lightning_eff.surgery.optimizer import slice_state
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
    edits = _Edits(model, axes)
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
    all_edits = [edits, *(_Edits(twin, axes) for twin in twins)]
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
    edits: _Edits | None = None,
) -> str:
    """Say how the smaller network differs from the gated one on the example; ``""`` when it does not."""
    edits = edits or _Edits(model, axis_masks(graph, keep))
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


@dataclass
class _TensorEdit:
    store: dict[str, Any]  # a module's _parameters or _buffers
    name: str
    old: Tensor
    new: Tensor
    dims: dict[int, Tensor]  # dimension -> kept positions


class _Edits:
    """Every tensor and attribute that changes, worked out before anything is touched."""

    def __init__(self, model: nn.Module, masks: Mapping[tuple[str, str], Tensor]) -> None:
        self.model = model
        self.masks = masks
        self.tensors: list[_TensorEdit] = []
        self.attributes: list[tuple[nn.Module, str, Any, Any]] = []
        modules = dict(model.named_modules(remove_duplicate=False))
        by_path: dict[str, dict[str, Tensor]] = {}
        for (path, axis), mask in masks.items():
            by_path.setdefault(path, {})[axis] = mask
        for path, axes in by_path.items():
            if path in modules:
                self._edit_module(path, modules[path], axes)
            else:
                owner, _, name = path.rpartition(".")
                dims = {int(axis.removeprefix("dim:")): mask for axis, mask in axes.items()}
                self._edit_tensor(modules[owner]._parameters, name, dims)

    def _edit_module(self, path: str, module: nn.Module, axes: Mapping[str, Tensor]) -> None:
        if isinstance(module, _ConvNd):
            out, into = axes.get("out"), axes.get("in")
            if is_depthwise(module):
                width = self._kept(out, module.out_channels)
                self._edit_tensor(module._parameters, "weight", {0: out})
                self._edit_tensor(module._parameters, "bias", {0: out})
                self._set(module, in_channels=width, out_channels=width, groups=width)
                return
            dim_out, dim_in = (1, 0) if isinstance(module, _ConvTransposeNd) else (0, 1)
            dims = {dim_out: out, dim_in: into}
            blocked = dim_out if isinstance(module, _ConvTransposeNd) else dim_in  # the axis that lies within a block
            if module.groups > 1 and dims[blocked] is not None:
                length = module.out_channels if blocked == dim_out else module.in_channels
                blocks = self._full(dims[blocked], length).reshape(module.groups, -1)
                if not (blocks == blocks[0]).all():
                    raise SurgeryError(f"{path}: a grouped convolution must lose the same positions of every block")
                dims[blocked] = blocks[0]
            self._edit_tensor(module._parameters, "weight", dims)
            self._edit_tensor(module._parameters, "bias", {0: out})
            self._set(
                module,
                out_channels=self._kept(out, module.out_channels),
                in_channels=self._kept(into, module.in_channels),
            )
        elif isinstance(module, nn.Linear):
            out, into = axes.get("out"), axes.get("in")
            self._edit_tensor(module._parameters, "weight", {0: out, 1: into})
            self._edit_tensor(module._parameters, "bias", {0: out})
            self._set(
                module,
                out_features=self._kept(out, module.out_features),
                in_features=self._kept(into, module.in_features),
            )
        elif isinstance(module, nn.Embedding):
            self._edit_tensor(module._parameters, "weight", {1: axes["out"]})
            self._set(module, embedding_dim=self._kept(axes["out"], module.embedding_dim))
        elif isinstance(module, CHANNEL_NORMS):
            self._edit_norm(module, axes["out"])
        else:
            raise SurgeryError(f"{path}: a {type(module).__name__} cannot be cut")

    def _edit_norm(self, module: nn.Module, mask: Tensor) -> None:
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None and tensor.ndim and tensor.shape[-1] > 1:
                    self._edit_tensor(store, name, {tensor.ndim - 1: mask})
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            *outer, width = module.normalized_shape
            self._set(module, normalized_shape=(*outer, self._kept(mask, width)))
        elif isinstance(module, nn.GroupNorm):
            self._set(module, num_channels=self._kept(mask, module.num_channels))
        elif isinstance(module, nn.PReLU):
            if module.num_parameters > 1:
                self._set(module, num_parameters=self._kept(mask, module.num_parameters))
        else:
            self._set(module, num_features=self._kept(mask, int(module.num_features)))  # type: ignore[arg-type]

    @staticmethod
    def _full(mask: Tensor | None, length: int) -> Tensor:
        full = torch.ones(length, dtype=torch.bool)
        if mask is not None and len(mask) > length:
            raise SurgeryError(
                "the channel graph is of another state of the model: use the graph its last cut returned"
            )
        if mask is not None:
            full[: len(mask)] = mask
        return full

    def _kept(self, mask: Tensor | None, length: int) -> int:
        return int(self._full(mask, length).sum())

    def _edit_tensor(self, store: dict[str, Any], name: str, masks: Mapping[int, Tensor | None]) -> None:
        old = store.get(name)
        dims = {d: mask for d, mask in masks.items() if mask is not None}
        if old is None or not dims:
            return
        if old.is_inference():
            raise SurgeryError(
                f"{name} was created under torch.inference_mode and cannot be cut: clone the model first"
            )
        kept = {d: self._full(mask, old.shape[d]).nonzero().flatten() for d, mask in dims.items()}
        self.tensors.append(_TensorEdit(store, name, old, _sliced(old.detach(), kept), kept))

    def _set(self, module: nn.Module, **values: Any) -> None:
        self.attributes += [(module, name, getattr(module, name), value) for name, value in values.items()]

    @contextmanager
    def on_trial(self) -> Iterator[None]:
        """Put smaller stand-ins in place of the tensors; the old ones come back untouched."""
        try:
            for module, name, _, value in self.attributes:
                setattr(module, name, value)
            for edit in self.tensors:
                parameter = isinstance(edit.old, nn.Parameter)
                edit.store[edit.name] = nn.Parameter(edit.new, requires_grad=False) if parameter else edit.new
            yield
        finally:
            for module, name, value, _ in self.attributes:
                setattr(module, name, value)
            for edit in self.tensors:
                edit.store[edit.name] = edit.old

    def commit(self, optimizers: Sequence[Optimizer]) -> None:
        """Make the tensors smaller for good, gradients and optimizer state with them.

        ``Tensor.set_`` keeps the Python object, so parameter groups, hooks and weak references stay valid.
        """
        for module, name, _, value in self.attributes:
            setattr(module, name, value)
        for edit in self.tensors:
            shape, gradient = edit.old.shape, edit.old.grad
            with torch.no_grad():
                edit.old.grad = None
                edit.old.set_(edit.new)  # type: ignore[call-overload]
                if gradient is not None:
                    edit.old.grad = _sliced(gradient, edit.dims)
            for optimizer in optimizers:
                slice_state(optimizer, edit.old, shape, edit.dims)


def _sliced(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    """Index several dimensions of ``tensor``; channels-last tensors stay so."""
    out = tensor
    for d, positions in kept.items():
        out = out.index_select(d, positions.to(tensor.device))
    if tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        return out.contiguous(memory_format=torch.channels_last)
    return out.contiguous()
