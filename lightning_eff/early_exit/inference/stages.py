"""A backbone in stages, from exit to exit, with everything that later stages need carried along.

``torch.export`` writes the backbone as one graph for any batch size, with the exits marked in it, and the graph is cut
at the marks, whatever goes around them. Parameters and buffers stay those of the backbone: training and loading need no
new cut, a changed structure does. Shapes: ``B`` batch, ``E`` exits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from lightning_eff.batch import batch_size
from lightning_eff.early_exit.attaching.features import Layout, feature_of, replace_feature, select
from lightning_eff.early_exit.attaching.probe import samples
from lightning_eff.early_exit.inference.graph_cut import CutError, GraphCut, Stage, brief, mark, trace
from lightning_eff.surgery.state import quiet_model

__all__ = ["CutError", "Stage", "Stages", "cut_stages"]

TRACED = 5  # samples in the trace, where a symbol stands for their number


@dataclass(eq=False)
class Stages:
    """A backbone cut at its exits, ``E + 1`` stages; made by :func:`cut_stages`.

    ``stages[k](*live)`` returns, for ``k < E``, the feature of exit ``k`` with the batch first, and the list of tensors
    that stage ``k + 1`` takes; the last stage returns what the backbone returns. The first takes :meth:`inputs`. They
    compute what the backbone computes in evaluation mode. They can be copied and pickled together with the backbone.

    Attributes:
        backbone: the module whose parameters the stages read.
        stages: what is computed.
        leaves: of the inputs: shape without batch, type and device of a tensor, the value of anything else.
        batched: leaves that carry the batch, in dimension 0.
        inputs_spec: structure of ``(args, kwargs)``.
        output_spec: structure of what the backbone returns.
    """

    backbone: nn.Module
    stages: list[Stage]
    leaves: list[Any]
    batched: list[bool]
    inputs_spec: pytree.TreeSpec
    output_spec: pytree.TreeSpec
    _bound: list[Callable[..., Any]] = field(default_factory=list, repr=False)
    _one_tensor: bool = field(init=False, repr=False)  # the usual inputs, whose structure needs no look

    def __post_init__(self) -> None:
        """Look at the structure of the inputs."""
        alone: Any = pytree.tree_structure(((torch.empty(0),), {}))
        self._one_tensor = bool(self.inputs_spec == alone)

    @property
    def batch_dims(self) -> list[Layout]:
        """Where the batch is in the tensors that each stage takes."""
        return [stage.carried for stage in self.stages]

    def __len__(self) -> int:
        return len(self.stages)

    def __getitem__(self, index: int) -> Callable[..., Any]:
        if not self._bound:
            self._bound = [self._bind(stage) for stage in self.stages]
        return self._bound[index]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bound": []}  # a copy reads the parameters of its own backbone

    def inputs(self, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> list[Tensor]:
        """Return the tensors that the first stage takes.

        Raises:
            CutError: the stages were cut for other inputs; only the batch size may differ.
        """
        leaves = self.flatten(args, kwargs or {})
        if leaves is None:
            expected = pytree.tree_unflatten(["..."] * self.inputs_spec.num_leaves, self.inputs_spec)
            raise CutError(f"the backbone was cut for arguments {expected}, got others: cut it again for these")
        if problem := self._misfit(leaves):
            raise CutError(problem)
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def fit(self, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> bool:
        """Whether the stages were cut for inputs that differ from these in nothing but the batch size."""
        leaves = self.flatten(args, kwargs or {})
        return leaves is not None and not self._misfit(leaves)

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any] | None:
        """Return the leaves of the inputs, None if their structure is another one."""
        if self._one_tensor and not kwargs and len(args) == 1 and isinstance(args[0], Tensor):
            return [args[0]]
        names = self.inputs_spec.child(1).context
        if set(names) != set(kwargs):
            return None
        leaves, spec = pytree.tree_flatten((tuple(args), {name: kwargs[name] for name in names}))
        return leaves if spec == self.inputs_spec else None

    def select(self, index: int, live: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
        """Keep samples ``rows`` [n] of the tensors that stage ``index`` takes."""
        return [
            tensor if where is None else select(tensor, where, rows)
            for tensor, where in zip(live, self.stages[index].carried, strict=True)
        ]

    def _bind(self, stage: Stage) -> Callable[..., Any]:
        run, dim = stage.bind(self.backbone), stage.feature
        if dim is None:
            return lambda *live: pytree.tree_unflatten(run(*live), self.output_spec)

        def until_exit(*live: Tensor) -> tuple[Tensor, list[Tensor]]:
            feature, *onward = run(*live)
            return feature if dim == 0 else feature.movedim(dim, 0), onward

        return until_exit

    def _misfit(self, leaves: list[Any]) -> str:
        sizes = set()
        for leaf, expected, batched in zip(leaves, self.leaves, self.batched, strict=True):
            if (got := _kind_of(leaf, batched)) != expected:
                return f"the backbone was cut for an input {_text(expected)}, got {_text(got)}: cut it again for these"
            if batched:
                sizes.add(leaf.size(0))
        return "" if len(sizes) == 1 else f"expected one batch size in all inputs, got {sorted(sizes)}"


def cut_stages(
    backbone: nn.Module, exits: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any] | None = None
) -> Stages:
    """Cut ``backbone`` behind the layers ``exits``.

    The stages are checked before they are returned: what drops out at the exits must not change the answers to others.

    Args:
        backbone: left as it was.
        exits: paths of layers in the order in which they run; ``name@2`` is the second call of a layer.
        args: inputs of the backbone, one sample or more; those whose dimension 0 is as long as that of the first carry
            the batch. The stages serve any batch size, but only inputs of these shapes, types and devices.
        kwargs: inputs by keyword.

    Raises:
        CutError: the backbone cannot be written as one graph, a tensor mixes samples, or the stages answer otherwise
            than the backbone.
    """
    inputs = (tuple(args), dict(kwargs or {}))
    if (count := batch_size(inputs)) == 0:
        raise CutError("expected at least one sample to cut the backbone by, got an empty batch")
    with quiet_model(backbone), torch.no_grad():
        few = samples(inputs, TRACED, distinct=True)
        batched = {
            id(new)
            for old, new in zip(pytree.tree_leaves(inputs), pytree.tree_leaves(few), strict=True)
            if isinstance(old, Tensor) and old.ndim and old.size(0) == count
        }
        program = _export(backbone, exits, few, batched)
        graph = GraphCut(program, exits)
        if graph.writes_into_shared_memory():
            graph = GraphCut(program.run_decompositions({}), exits)
        spec = program.call_spec
        leaves = pytree.tree_leaves((few[0], {name: few[1][name] for name in spec.in_spec.child(1).context}))
        carry = [id(leaf) in batched for leaf in leaves]
        kinds = [_kind_of(leaf, here) for leaf, here in zip(leaves, carry, strict=True)]
        stages = Stages(backbone, graph.stages(), kinds, carry, spec.in_spec, spec.out_spec)
        _check(stages, few)
    return stages


def _kind_of(leaf: Any, batched: bool) -> Any:
    """What stages are cut for: shape (without batch), type and device of a tensor, or the value of anything else."""
    return (tuple(leaf.shape[batched:]), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf


def _text(kind: Any) -> str:
    if not isinstance(kind, tuple):
        return repr(kind)
    shape, dtype, device = kind
    return f"{list(shape)} of {dtype} on {device} (shape without batch)"


def _export(backbone: nn.Module, exits: Sequence[str], inputs: Any, batched: set[int]) -> ExportedProgram:
    batch = Dim("B", min=2)
    shapes = pytree.tree_map(lambda leaf: {0: batch} if id(leaf) in batched else None, inputs)
    try:
        with _marked(backbone, exits):
            return trace(backbone, inputs[0], inputs[1], shapes)
    except CutError as error:
        raise CutError(f"{type(backbone).__name__} cannot be cut into stages: {error}") from error.__cause__


@contextmanager
def _marked(backbone: nn.Module, exits: Sequence[str]) -> Iterator[None]:
    handles = []
    try:
        for index, name in enumerate(exits):
            layer, _, number = name.partition("@")
            handles.append(backbone.get_submodule(layer).register_forward_hook(_Mark(index, int(number or 0))))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Mark:
    def __init__(self, index: int, number: int) -> None:
        self.index, self.number, self.calls = index, number, 0

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        self.calls += 1
        if self.number not in (0, self.calls):
            return None
        return replace_feature(output, mark(feature_of(output), self.index))


def _check(stages: Stages, inputs: Any) -> None:
    """Compare with the backbone: samples dropped one an exit, and one sample alone."""
    args, kwargs = inputs
    name = type(stages.backbone).__name__
    expected = pytree.tree_leaves(stages.backbone(*args, **kwargs))
    live = stages.inputs(args, kwargs)
    everyone = torch.arange(TRACED, device=live[0].device)
    for start in (everyone, everyone[:1]):
        try:
            got, rows = _answers(stages, stages.select(0, live, start), start)
        except Exception as error:  # sizes of the trace may be written into the graph in any way
            raise CutError(
                f"{name} was cut into stages, but for {len(start)} samples they fail: {brief(error)}"
            ) from error
        for a, b in zip(got, expected, strict=True):
            off = _difference(a, b, rows)
            if not off <= (5e-2 if isinstance(a, Tensor) and a.element_size() < 4 else 1e-4):
                raise CutError(
                    f"{name} was cut into stages, but with {len(start)} samples, {len(rows)} of them to the end, their "
                    f"answer differs from the backbone's by {off:.2g} of its largest value: a layer mixes samples, "
                    "or is random in evaluation mode"
                )


def _answers(stages: Stages, live: list[Tensor], rows: Tensor) -> tuple[list[Any], Tensor]:
    for k in range(len(stages) - 1):
        _, live = stages[k](*live)
        if len(rows) > 1:
            stay = (torch.arange(len(rows), device=rows.device) != k % len(rows)).nonzero().squeeze(1)
            live, rows = stages.select(k + 1, live, stay), rows[stay]
    return pytree.tree_leaves(stages[len(stages) - 1](*live)), rows


def _difference(a: Any, b: Any, rows: Tensor) -> float:
    if not isinstance(a, Tensor):
        return 0.0 if a == b else float("inf")
    if not a.numel():
        return 0.0
    for dim, (one, other) in enumerate(zip(a.shape, b.shape, strict=True)):
        if one != other:
            b = b.index_select(dim, rows)
            break
    a, b = a.double(), b.double()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-12))
