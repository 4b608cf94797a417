"""Which channels of which layers go together: the channel graph of a torch model.

Two layers are coupled when removing channel ``j`` of one forces a removal in the other: a convolution, its norm and
every layer that reads it; both summands of a residual addition; the features that ``flatten`` makes of a channel.
A :class:`ChannelGroup` is one such set; its *channels* are the players of every ranking.

Shape letters: ``C`` channels of a group, ``E`` positions of one tensor axis that belong to the group.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.utils import _pytree as pytree

from lightning_eff.documents import parsed, reading
from lightning_eff.surgery.counting import CostModel, measure_costs
from lightning_eff.surgery.errors import unknown_name

if TYPE_CHECKING:
    from lightning_eff.surgery.gates import Gates
    from lightning_eff.surgery.plan import PruningPlan


@dataclass(frozen=True, eq=False)
class Member:
    """One axis of one module (or bare parameter) that a group runs through.

    Attributes:
        path: module path, or the path of a bare parameter.
        axis: ``"out"`` (what the module produces), ``"in"`` (what it reads) or ``"dim:<d>"`` of a bare parameter.
        index: positions on that axis, int64 ``[E]``.
        root: the group's channel each position belongs to, int64 ``[E]``.
    """

    path: str
    axis: str
    index: Tensor
    root: Tensor

    @cached_property
    def stop(self) -> int:
        """One behind the last position."""
        return int(self.index.max()) + 1


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that are removed together.

    Attributes:
        name: path of the first producer in ``named_modules()`` order.
        size: number of channels ``C``.
        members: every axis the channels run through.
        producers: paths of the layers that compute the channels, first one first; every one is an alias of the name.
        protected: why the group is never pruned, ``""`` when it may be.
        norm_coupled: a norm takes statistics over these channels, so removing is not the same as masking.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    producers: tuple[str, ...]
    protected: str = ""
    norm_coupled: bool = False

    @property
    def consumers(self) -> tuple[Member, ...]:
        """Axes of the layers that read the channels: where a gate equals a removal."""
        return tuple(member for member in self.members if member.axis == "in")

    @property
    def block(self) -> int:
        """Output positions of the first producer per channel: 1, or the blocks of a grouped layer."""
        out = next((m for m in self.members if m.path == self.name and m.axis == "out"), None)
        return 1 if out is None else max(1, len(out.index) // self.size)

    def alias_channels(self, path: str, channels: Sequence[int]) -> list[int]:
        """Translate output positions of the producer ``path`` into channels of the group."""
        member = next(m for m in self.members if m.path == path and m.axis == "out")
        root_of = dict(zip(member.index.tolist(), member.root.tolist(), strict=True))
        return sorted({root_of[c] for c in channels})


@dataclass(frozen=True)
class ChannelGraph:
    """Every channel group of a model, and what any choice of channel counts costs.

    Build it with :meth:`from_model`; after a cut, :meth:`after` gives the graph of the smaller model without another
    trace. Groups are addressed by name or by the path of any of their producers.
    """

    groups: Mapping[str, ChannelGroup]
    costs: CostModel
    aliases: Mapping[str, str] = field(repr=False)

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        example_inputs: Any,
        *,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        allow_norm_coupled: bool = False,
        check: bool = True,
    ) -> ChannelGraph:
        """Trace ``model`` once and group its channels.

        Args:
            model: any torch module; a compiled one is traced through. Nothing about it changes.
            example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments; two samples are plenty.
            include: producer paths or glob patterns (``"layer3.*"``); when given, all other groups are protected.
            exclude: producer paths or glob patterns to protect.
            allow_norm_coupled: also offer groups that pass a LayerNorm or GroupNorm, where removing channels changes
                the statistics and so is more than masking them.
            check: cut a random half of every group on trial and protect the groups where the smaller network does not
                equal the masked one (operations that the tracer maps wrongly). Costs two forward passes.

        Raises:
            ValueError: there is no example, or it holds no sample.
            PruningGraphError: the model cannot be traced.
            KeyError: a name in ``include`` or ``exclude`` matches nothing.
        """
        from lightning_eff.surgery.cut import protect_mismatched
        from lightning_eff.surgery.tracing import trace_groups

        _check_example(example_inputs)
        groups = trace_groups(model, example_inputs)
        if not allow_norm_coupled:
            groups = [
                replace(g, protected=g.protected or "a norm takes statistics over its channels")
                if g.norm_coupled
                else g
                for g in groups
            ]
        costs = measure_costs(model, example_inputs, groups)
        graph = cls._of(groups, costs)._select(include, exclude)
        return protect_mismatched(model, example_inputs, graph) if check else graph

    @classmethod
    def _of(cls, groups: Iterable[ChannelGroup], costs: CostModel) -> ChannelGraph:
        by_name = {group.name: group for group in groups}
        aliases = {path: group.name for group in by_name.values() for path in group.producers}
        return cls(by_name, costs, aliases)

    def _select(self, include: Sequence[str] | None, exclude: Sequence[str]) -> ChannelGraph:
        excluded = self._matching(exclude)
        included = set(self.groups) if include is None else self._matching(include)
        reason = {name: "excluded" if name in excluded else "not included" for name in self.groups}
        return self.protect({name: reason[name] for name in self.groups if name in excluded or name not in included})

    def _matching(self, patterns: Sequence[str]) -> set[str]:
        found: set[str] = set()
        for pattern in patterns:
            hits = {name for path, name in self.aliases.items() if fnmatchcase(path, pattern)}
            if not hits:
                raise unknown_name("prunable layer", pattern, self.aliases)
            found |= hits
        return found

    def protect(self, reasons: Mapping[str, str]) -> ChannelGraph:
        """Return the graph with the named groups protected, each for its reason."""
        groups = {
            name: replace(group, protected=group.protected or reasons.get(name, ""))
            for name, group in self.groups.items()
        }
        return replace(self, groups=groups)

    @property
    def prunable(self) -> tuple[str, ...]:
        """Names of the groups that may lose channels, in network order."""
        return tuple(name for name, group in self.groups.items() if not group.protected and group.size > 1)

    def refuse_nothing(self, where: str = "the network") -> None:
        """Raise ValueError, with the reason of every group, where nothing may be pruned."""
        if not self.prunable:
            reasons = "; ".join(f"{name}: {g.protected or 'one channel'}" for name, g in self.groups.items())
            raise ValueError(f"there is nothing to prune in {where}: {reasons or 'no layers found'}")

    @property
    def sizes(self) -> dict[str, int]:
        """Channels per group."""
        return {name: group.size for name, group in self.groups.items()}

    def resolve(self, path: str) -> ChannelGroup:
        """Return the group named ``path`` or produced by it; KeyError lists close names."""
        if path not in self.aliases:
            raise unknown_name("channel group", path, self.aliases)
        return self.groups[self.aliases[path]]

    def macs(self, config: Mapping[str, int] | Tensor | None = None) -> Tensor:
        """Multiply-adds per sample for channel counts: a mapping (others stay), or ``[N, G]`` -> ``[N]``."""
        return self.costs.macs(self._config(config))

    def params(self, config: Mapping[str, int] | Tensor | None = None) -> Tensor:
        """Parameters (weights, biases, affine terms; no buffers) for channel counts, as :meth:`macs`."""
        return self.costs.params(self._config(config))

    def _config(self, config: Mapping[str, int] | Tensor | None) -> Tensor:
        if isinstance(config, Tensor):
            if config.ndim != 2 or config.shape[1] != len(self.groups):
                raise ValueError(f"expected channel counts of shape [N, {len(self.groups)}], got {list(config.shape)}")
            return config.double()
        counts = self.sizes
        for path, count in (config or {}).items():
            counts[self.resolve(path).name] = count
        return torch.tensor([list(counts.values())], dtype=torch.float64)

    def weight_norms(self, model: nn.Module, p: float = 2) -> dict[str, Tensor]:
        """Norm of the weights that produce each channel, over all producers: float64 ``[C]`` for prunable groups."""
        norms = {}
        for name in self.prunable:
            group = self.groups[name]
            total = torch.zeros(group.size, dtype=torch.float64)
            for m in group.members:
                if m.axis == "out" and m.path in group.producers:
                    layer = model.get_submodule(m.path)
                    weight = layer.get_parameter("weight").detach().double().cpu().abs() ** p
                    if isinstance(layer, _ConvTransposeNd):  # [in, out / groups, ...]: a row per output channel
                        blocks = weight.reshape(layer.groups, -1, *weight.shape[1:])
                        weight = blocks.transpose(1, 2).flatten(0, 1)
                    total.index_add_(0, m.root, weight.flatten(1).sum(1)[m.index])
            norms[name] = total ** (1 / p)
        return norms

    def gate(
        self,
        model: nn.Module,
        values: Mapping[str, Tensor],
        *,
        site: Literal["consumer", "producer"] = "consumer",
    ) -> Gates:
        """Multiply channels by values while the returned context is open; see :class:`~lightning_eff.surgery.Gates`."""
        from lightning_eff.surgery.gates import Gates

        return Gates(self.groups, model, {self.resolve(path).name: value for path, value in values.items()}, site=site)

    def after(self, plan: PruningPlan) -> ChannelGraph:
        """Return the graph of the model that ``plan`` leaves, by renumbering; nothing is traced."""
        keep = plan.keep_masks(self)
        return self.without(keep, axis_masks(self, keep))

    def without(self, keep: Mapping[str, Tensor], axes: Mapping[tuple[str, str], Tensor]) -> ChannelGraph:
        """Return the graph that keep masks ``[C]`` and their :func:`axis_masks` leave."""
        position = {axis: mask.cumsum(0) - 1 for axis, mask in axes.items()}
        groups = []
        for group in self.groups.values():
            kept = keep.get(group.name, torch.ones(group.size, dtype=torch.bool))
            renumber = kept.cumsum(0) - 1
            members = []
            for m in group.members:
                stays = kept[m.root]
                at = position.get((m.path, m.axis))
                index = m.index[stays] if at is None else at[m.index[stays]]
                members.append(Member(m.path, m.axis, index, renumber[m.root[stays]]))
            groups.append(replace(group, size=int(kept.sum()), members=tuple(members)))
        return ChannelGraph._of(groups, self.costs)

    def to_dict(self) -> dict[str, Any]:
        """Plain ints, strings and lists: JSON, and the form that :meth:`from_dict` takes for hand-written groups."""
        return {
            "version": 1,
            "groups": [
                {
                    "name": g.name,
                    "size": g.size,
                    "producers": list(g.producers),
                    "protected": g.protected,
                    "norm_coupled": g.norm_coupled,
                    "members": [
                        {"path": m.path, "axis": m.axis, "index": m.index.tolist(), "root": m.root.tolist()}
                        for m in g.members
                    ],
                }
                for g in self.groups.values()
            ],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], model: nn.Module, example_inputs: Any) -> ChannelGraph:
        """Build the graph from written-down groups, for a model that cannot be traced.

        ``root`` may be left out where it counts 0, 1, 2 ...; ``producers`` where the name is the only one.
        """
        groups = list(groups_from_dict(data).values())
        return cls._of(groups, measure_costs(model, example_inputs, groups))


def groups_from_dict(data: Mapping[str, Any]) -> dict[str, ChannelGroup]:
    """Read the groups of :meth:`ChannelGraph.to_dict`; ValueError where something else is given or does not fit."""
    with reading("not the groups of a network"):
        groups = [_group_from_dict(entry) for entry in data["groups"]]
        return {group.name: group for group in groups}


def _group_from_dict(entry: Mapping[str, Any]) -> ChannelGroup:
    name, size, members = parsed(str, entry["name"], "name"), parsed(int, entry["size"], "size"), []
    for m in entry["members"]:
        index = torch.as_tensor(m["index"], dtype=torch.int64)
        root = torch.as_tensor(m.get("root", list(range(len(index)))), dtype=torch.int64)
        if len(index) != len(root) or (len(root) and not 0 <= int(root.min()) <= int(root.max()) < size):
            raise ValueError(
                f"group {name!r}, member {m['path']!r}: index and root must have one length and root lie in "
                f"0..{size - 1}"
            )
        members.append(Member(parsed(str, m["path"], "path"), parsed(str, m["axis"], "axis"), index, root))
    return ChannelGroup(
        name=name,
        size=size,
        members=tuple(members),
        producers=parsed(tuple[str, ...], entry.get("producers", [name]), "producers"),
        protected=parsed(str, entry.get("protected", ""), "protected"),
        norm_coupled=parsed(bool, entry.get("norm_coupled", False), "norm_coupled"),
    )


def axis_masks(graph: ChannelGraph, keep: Mapping[str, Tensor]) -> dict[tuple[str, str], Tensor]:
    """Spread keep masks bool ``[C]`` of groups over the tensor axes they touch: ``{(path, axis): bool [E]}``.

    Positions behind the last one that any group owns are left out: they stay.
    """
    length: dict[tuple[str, str], int] = {}
    for group in graph.groups.values():
        for m in group.members:
            at = (m.path, m.axis)
            length[at] = max(length.get(at, 0), m.stop)
    masks: dict[tuple[str, str], Tensor] = {}
    for name, mask in keep.items():
        for m in graph.groups[name].members:
            axis = masks.setdefault((m.path, m.axis), torch.ones(length[m.path, m.axis], dtype=torch.bool))
            axis[m.index[~mask[m.root]]] = False
    return masks


def _check_example(example_inputs: Any) -> None:
    if example_inputs is None:
        raise ValueError(
            "example_inputs must be what the model is called with, two samples are plenty, got None: give a tensor, a "
            "tuple of arguments or a dict of keyword arguments (of a LightningModule, its example_input_array)"
        )
    if any(isinstance(leaf, Tensor) and not leaf.numel() for leaf in pytree.tree_leaves(example_inputs)):
        raise ValueError("example_inputs must hold at least one sample, got an empty tensor: two samples are plenty")
