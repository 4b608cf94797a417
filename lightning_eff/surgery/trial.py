"""A smaller network for a while: a plan carried out with stand-ins, and taken back without a trace.

Trying many plans on one network needs neither copies of it nor real cuts: the tensors that a plan makes smaller are
sliced once and put in the place of the old ones for as long as a context is open.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_eff.surgery.counting import CHANNEL_NORMS
from lightning_eff.surgery.edits import Edits
from lightning_eff.surgery.errors import SurgeryError, unknown_name
from lightning_eff.surgery.graph import ChannelGraph, axis_masks
from lightning_eff.surgery.plan import PruningPlan


class Trial:
    """A plan that is carried out for as long as a context is open.

    Inside, ``model`` is the smaller network: the same module objects with stand-ins for what the plan slices, for all
    weights and biases of the layers it slices, for the parameters of norms, and for all buffers. Those may be written
    to, also while the context is closed, and keep what was written; every other tensor is the model's own. On leaving,
    old tensors, attributes and modes are back bit for bit, also after an exception. May be opened many times, and
    opened while it is open.

    Args:
        model: the network, whole.
        graph: its channel graph.
        plan: what to keep.

    Attributes:
        model: the network.
        plan: the plan, by group name.
        dense_graph: the channel graph of the whole network.
        graph: the channel graph of the smaller one.
        keep: kept channels bool ``[C]`` of every group that loses some.
        axes: the same for every tensor axis that becomes shorter, ``{(path, axis): bool [E]}``; positions behind the
            last one stay.

    Raises:
        KeyError, ValueError: the plan does not fit the model.
        SurgeryError: a layer cannot be cut as planned; on opening: the tensors are not those the trial was made of.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph, plan: PruningPlan) -> None:
        self.model = model
        self.plan = PruningPlan(plan.validate(graph), graph.sizes, plan.meta)
        self.keep = plan.keep_masks(graph)
        self.axes = axis_masks(graph, self.keep)
        self.dense_graph = graph
        self.graph = graph.without(self.keep, self.axes)
        with torch.inference_mode(False), torch.no_grad():
            edits = Edits(model, self.axes)
            self._attributes = edits.attributes
            self._stand_ins = _stand_ins(model, edits, {path for path, _ in self.axes})
        self._depth = 0
        self._modes: list[tuple[nn.Module, bool]] = []

    def __enter__(self) -> Trial:
        if not self._depth:
            self._put()
            self._modes = [(module, module.training) for module in self.model.modules()]
        self._depth += 1
        return self

    def __exit__(self, *exception: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._take_back()
            for module, mode in self._modes:
                module.training = mode

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Show the whole network while this context is open, also inside of the open trial; modes stay."""
        depth, self._depth = self._depth, 0
        if depth:
            self._take_back()
        try:
            yield
        finally:
            if depth:
                self._put()
            self._depth = depth

    def tensor(self, path: str, name: str) -> Tensor | None:
        """Return the stand-in of a layer's tensor, detached but the same memory; None where the layer has none."""
        stand_in = self._stand_ins.get(f"{path}.{name}" if path else name)
        return None if stand_in is None else stand_in.new.detach()

    def state(self) -> dict[str, Tensor]:
        """Copy the stand-ins, by name in the state dict: what to load into the network after a real cut."""
        return {name: s.new.detach().clone() for name, s in self._stand_ins.items() if s.persistent}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Write what :meth:`state` returned into the stand-ins.

        Raises:
            KeyError: a tensor that has no stand-in.
            ValueError: a tensor of another shape; nothing was written.
        """
        for name, tensor in state.items():
            if name not in self._stand_ins:
                raise unknown_name("tensor of the trial", name, self._stand_ins)
            if self._stand_ins[name].new.shape != tensor.shape:
                shape = list(self._stand_ins[name].new.shape)
                raise ValueError(f"{name}: expected the shape {shape} of this trial, got {list(tensor.shape)}")
        with torch.no_grad():
            for name, tensor in state.items():
                self._stand_ins[name].new.copy_(tensor)

    def _put(self) -> None:
        changed = [name for name, s in self._stand_ins.items() if s.store.get(s.name) is not s.old]
        if changed:
            raise SurgeryError(
                f"{changed[0]} is another tensor than when the trial was made: is another trial open, or was the model "
                "changed since? Make the trial anew"
            )
        for module, name, _, value in self._attributes:
            setattr(module, name, value)
        for stand_in in self._stand_ins.values():
            stand_in.store[stand_in.name] = stand_in.new

    def _take_back(self) -> None:
        for module, name, value, _ in self._attributes:
            setattr(module, name, value)
        for stand_in in self._stand_ins.values():
            stand_in.new = stand_in.store[stand_in.name]  # a forward pass may have put another tensor there
            stand_in.store[stand_in.name] = stand_in.old


@dataclass
class _StandIn:
    store: dict[str, Any]  # a module's _parameters or _buffers
    name: str
    old: Tensor
    new: Tensor
    persistent: bool  # whether it is in the state dict


def _stand_ins(model: nn.Module, edits: Edits, touched: set[str]) -> dict[str, _StandIn]:
    """Stand-ins for what is sliced, and copies of what else may be written to, by full name."""
    sliced = {(id(edit.store), edit.name): edit.new for edit in edits.tensors}
    copies: dict[int, Tensor] = {}  # by identity, so that tied tensors stay tied
    found: dict[str, _StandIn] = {}
    for path, module in model.named_modules():
        copied = isinstance(module, CHANNEL_NORMS) or (isinstance(module, _ConvNd | nn.Linear) and path in touched)
        for store, every in ((module._parameters, copied), (module._buffers, True)):
            for name, old in store.items():
                new = sliced.get((id(store), name))
                if old is None or (new is None and not every):
                    continue
                if id(old) not in copies:
                    data = old.detach().clone() if new is None else new
                    parameter = isinstance(old, nn.Parameter)
                    copies[id(old)] = nn.Parameter(data, requires_grad=old.requires_grad) if parameter else data
                new = copies[id(old)]
                persistent = name not in module._non_persistent_buffers_set
                found[f"{path}.{name}" if path else name] = _StandIn(store, name, old, new, persistent)
    return found
