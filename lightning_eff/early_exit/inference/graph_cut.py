"""Take the graph of a backbone, in which exits are marked, apart into stages.

What a later stage reads of an earlier one is carried from stage to stage if it is a tensor, and computed anew if it is
a number, which can only depend on the batch size. Shapes: ``B`` batch, ``E`` exits.
"""

from __future__ import annotations

import inspect
import io
import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind

from lightning_eff.early_exit.attaching.features import BatchDim, Layout

_aten = torch.ops.aten
_DROPOUTS = {
    _aten.dropout.default,
    _aten.dropout_.default,
    _aten.feature_dropout.default,
    _aten.feature_dropout_.default,
    _aten.alpha_dropout.default,
    _aten.alpha_dropout_.default,
}

# A traced operator is called through its schema, which costs a small layer as much again as its work; the functions
# Python programs call take the same arguments and do not.
_BINDINGS: dict[Any, Callable[..., Any]] = {
    _aten.conv1d.default: torch.conv1d,
    _aten.conv2d.default: torch.conv2d,
    _aten.linear.default: nn.functional.linear,
    _aten.batch_norm.default: torch.batch_norm,
    _aten.layer_norm.default: torch.layer_norm,
    _aten.group_norm.default: torch.group_norm,
    _aten.relu.default: torch.relu,
    _aten.relu_.default: torch.relu_,
    _aten.gelu.default: nn.functional.gelu,
    _aten.add.Tensor: torch.add,
    _aten.add_.Tensor: torch.Tensor.add_,
    _aten.mul.Tensor: torch.mul,
    _aten.mean.dim: torch.mean,
    _aten.flatten.using_ints: torch.flatten,
    _aten.max_pool2d.default: torch.max_pool2d,
    _aten.adaptive_avg_pool2d.default: nn.functional.adaptive_avg_pool2d,
}


class CutError(ValueError):
    """The backbone cannot be cut, or its stages do not fit the inputs; the message tells why and what to do."""


@dataclass(eq=False)
class Stage:
    """What a backbone computes between two exits.

    Attributes:
        module: takes the carried tensors, then parameters, buffers and constants; returns a tuple.
        sources: what it takes behind the carried tensors: names in the backbone, or constants of the trace.
        carried: batch dimension of each carried tensor; None where there is no batch in it.
        feature: batch dimension of the feature, which it returns first; None behind the last exit.
    """

    module: fx.GraphModule
    sources: list[str | Tensor]
    carried: Layout
    feature: int | None

    def bind(self, backbone: nn.Module) -> Callable[..., tuple[Any, ...]]:
        """Return the stage as a function of the carried tensors that reads the backbone's parameters at each call."""
        tables = [_table(backbone, source) for source in self.sources]
        forward = self.module.forward

        def run(*live: Tensor) -> tuple[Any, ...]:
            result: tuple[Any, ...] = forward(*live, *[table[key] for table, key in tables])
            return result

        return run


def _table(backbone: nn.Module, source: str | Tensor) -> tuple[Mapping[str, Any], str]:
    """Return the dict, and the key in it, that holds a parameter or a buffer for as long as its module lives."""
    if isinstance(source, Tensor):
        return {"": source}, ""
    path, _, name = source.rpartition(".")
    module = backbone.get_submodule(path)
    return (module._parameters if name in module._parameters else module._buffers), name


@torch.library.custom_op("lightning_eff::exit_mark", mutates_args=())
def mark(feature: Tensor, exit_index: int) -> Tensor:
    """Stand in a graph where an exit is; what comes out is what went in."""
    return feature.clone()


@mark.register_fake
def _(feature: Tensor, exit_index: int) -> Tensor:
    return torch.empty_like(feature)


def trace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any) -> ExportedProgram:
    """Write ``module`` as a graph.

    Args:
        module: in evaluation mode.
        args: example inputs.
        kwargs: example inputs by keyword.
        shapes: ``(args, kwargs)`` with the dimensions that may vary, as torch.export takes them, in place of tensors.

    Raises:
        CutError: it cannot be written as one graph; the message tells why.
    """
    named = inspect.signature(module.forward).bind(*shapes[0], **shapes[1]).arguments
    try:
        # a graph that got stuck half-way would be printed; what matters of it is in the error
        with redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(module, args, kwargs, dynamic_shapes=named, strict=False)
    except Exception as error:  # tracing runs the module's own code
        raise CutError(f"torch.export cannot write it as one graph for any batch size: {brief(error)}") from error


class GraphCut:
    """Decide what each stage computes and takes.

    Args:
        program: a backbone, its exits marked by :func:`mark`.
        exits: names of the exits.

    Raises:
        CutError: an exit is missing, or a tensor mixes samples.
    """

    def __init__(self, program: ExportedProgram, exits: Sequence[str]) -> None:
        self.program = program
        self.sources: dict[fx.Node, str | Tensor] = {}
        self.constants: dict[fx.Node, Any] = {}
        self.inputs: list[fx.Node] = []
        self._read_inputs()
        sizes = [size for node in self.inputs for size in node.meta["val"].shape if not isinstance(size, int)]
        self.batch = sizes[0].node.expr
        self.same: dict[fx.Node, fx.Node] = {}  # nodes that do nothing -> what they hand on
        self.born = dict.fromkeys(self.inputs, 0)  # the stage a tensor comes from
        self.features: list[fx.Node] = []
        self.computed: list[list[fx.Node]] = [[]]
        self._assign(exits)
        returned: Any = next(iter(program.graph.find_nodes(op="output"))).args[0]
        self.outputs = [
            self.resolve(value)
            for value, spec in zip(returned, program.graph_signature.output_specs, strict=True)
            if spec.kind == OutputKind.USER_OUTPUT
        ]
        self.reads = [self._reads(k) for k in range(len(self.computed))]
        self.carried = [self.inputs]
        for k in range(1, len(self.computed)):
            later = {node for reads in self.reads[k:] for node in reads}
            self.carried.append([node for node, stage in self.born.items() if stage < k and node in later])

    def stages(self) -> list[Stage]:
        """Write every stage as a graph of its own."""
        last = len(self.features)
        stages = []
        for k in range(last + 1):
            writer = _Writer(self, k)
            for node in self.computed[k]:
                writer.copy(node)
            results = self.outputs if k == last else [self.features[k], *self.carried[k + 1]]
            module = writer.finish(results)
            layout = [self.batch_dim(node) for node in self.carried[k]]
            stages.append(Stage(module, writer.sources, layout, None if k == last else self._feature_dim(k)))
        return stages

    def resolve(self, value: Any) -> Any:
        """The node behind one that does nothing; anything else as it is."""
        return self.same.get(value, value) if isinstance(value, fx.Node) else value

    def multiple(self, size: Any) -> int | None:
        """How many times the batch size a size is; 0 if it does not depend on it, None if otherwise."""
        if isinstance(size, int) or self.batch not in size.node.expr.free_symbols:
            return 0
        factor = size.node.expr / self.batch
        return int(factor) if factor.is_Integer else None

    def batch_dim(self, node: fx.Node) -> BatchDim | None:
        """Where the batch is in a tensor."""
        sizes = [self.multiple(size) for size in node.meta["val"].shape]
        found = [BatchDim(dim, factor) for dim, factor in enumerate(sizes) if factor]
        if None in sizes or len(found) > 1:
            raise CutError(
                f"a tensor of shape {tuple(node.meta['val'].shape)} ({node.name}) goes around an exit: samples, their "
                f"number is {self.batch}, cannot be told apart in it"
            )
        return found[0] if found else None

    def writes_into_shared_memory(self) -> bool:
        """Whether a stage writes into memory that two carried tensors share, which selecting rows would part."""
        base: dict[fx.Node, fx.Node] = {}
        written: dict[fx.Node, int] = {}
        for k, computed in enumerate(self.computed):
            for node in computed:
                for source, writes, returns in _aliases(node):
                    root = base.get(self.resolve(source), self.resolve(source))
                    if returns:
                        base[node] = root
                    if writes:
                        written[root] = k
        for k, carried in enumerate(self.carried):
            roots = [base.get(node, node) for node in carried]
            if any(roots.count(root) > 1 and written.get(root, -1) >= k for root in roots):
                return True
        return False

    def _read_inputs(self) -> None:
        placeholders = self.program.graph.find_nodes(op="placeholder")
        for node, spec in zip(placeholders, self.program.graph_signature.input_specs, strict=True):
            if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                self.sources[node] = str(spec.target)
            elif spec.kind == InputKind.CONSTANT_TENSOR:
                constant = self.program.constants[str(spec.target)]
                assert isinstance(constant, Tensor)
                self.sources[node] = constant
            elif spec.kind == InputKind.USER_INPUT and isinstance(spec.arg, ConstantArgument):
                self.constants[node] = spec.arg.value
            elif spec.kind == InputKind.USER_INPUT and isinstance(node.meta["val"], Tensor):
                self.inputs.append(node)
            else:
                raise CutError(f"a backbone that takes {spec.arg} ({spec.kind.name.lower()}) cannot be cut")

    def _assign(self, exits: Sequence[str]) -> None:
        found = []
        for node in self.program.graph.nodes:
            if node.op not in ("call_function", "call_module") or is_number(node):
                continue
            if node.target is torch.ops.lightning_eff.exit_mark.default:
                found.append(int(node.args[1]))
                self.same[node] = self.resolve(node.args[0])
                self.features.append(self.same[node])
                self.computed.append([])
            elif node.target in _DROPOUTS and node.args[2] is False:
                self.same[node] = self.resolve(node.args[0])
            elif node.target is not _aten._assert_tensor_metadata.default:
                parted = node.target is operator.getitem and self.resolve(node.args[0]) in self.born
                k = self.born[self.resolve(node.args[0])] if parted else len(self.features)
                self.computed[k].append(node)
                self.born[node] = k
        if found != list(range(len(exits))):
            raise CutError(
                f"expected the forward to pass the exits {', '.join(exits)} once and in this order, found "
                f"{', '.join(exits[i] for i in found) or 'none of them'}: what is missing does not run, or runs "
                "inside of a part that the trace keeps closed, under autocast for example"
            )

    def _reads(self, k: int) -> list[fx.Node]:
        results = self.outputs if k == len(self.features) else [self.features[k]]
        reads = [self.resolve(node) for computed in self.computed[k] for node in computed.all_input_nodes]
        return list(dict.fromkeys([*reads, *(value for value in results if isinstance(value, fx.Node))]))

    def _feature_dim(self, k: int) -> int:
        where = self.batch_dim(self.features[k])
        if where is None or where.factor != 1:
            shape = tuple(self.features[k].meta["val"].shape)
            raise CutError(f"the feature of exit {k} has shape {shape}, which is not one row a sample")
        return where.dim


class _Writer:
    """Write one stage.

    Args:
        cut: the whole.
        k: number of the stage.
    """

    def __init__(self, cut: GraphCut, k: int) -> None:
        self.cut, self.carried = cut, cut.carried[k]
        self.graph = fx.Graph()
        self.values: dict[fx.Node, Any] = dict(cut.constants)
        self.sources: list[str | Tensor] = []
        self._size: fx.Node | None = None
        for node in self.carried:
            self.values[node] = self.graph.placeholder(node.name)
        for node in cut.reads[k]:
            if node in cut.sources:
                self.values[node] = self.graph.placeholder(node.name)
                self.sources.append(cut.sources[node])

    def copy(self, node: fx.Node) -> fx.Node:
        """Write a node."""
        self.values[node] = copied = self.graph.node_copy(node, self._value)
        return copied

    def finish(self, results: Sequence[Any]) -> fx.GraphModule:
        """Return ``results`` from the stage."""
        self.graph.output(tuple(self._value(one) if isinstance(one, fx.Node) else one for one in results))
        for node in self.graph.nodes:
            node.meta.clear()  # sizes of the trace, which no copy or file should hold
            node.target = _BINDINGS.get(node.target, node.target)
        self.graph.lint()
        return fx.GraphModule(self.cut.program.graph_module, self.graph, "Stage")

    def _value(self, node: fx.Node) -> Any:
        node = self.cut.resolve(node)
        if node not in self.values:
            self.values[node] = self._number(node) if is_number(node) else self.graph.node_copy(node, self._value)
        return self.values[node]

    def _number(self, node: fx.Node) -> Any:
        number = node.meta["val"]
        if isinstance(number, torch.SymInt) and (factor := self.cut.multiple(number)):
            size = self._batch_size()
            return size if factor == 1 else self.graph.call_function(operator.mul, (size, factor))
        for source in map(self.cut.resolve, node.all_input_nodes):
            if source not in self.values and not is_number(source):
                raise CutError(f"{node.name}, a number read from the data, is used on both sides of an exit")
        return self.graph.node_copy(node, self._value)

    def _batch_size(self) -> fx.Node:
        if self._size is None:
            found = [(where.factor, where.dim, node) for node in self.carried if (where := self.cut.batch_dim(node))]
            if not found:
                raise CutError("no tensor with a batch dimension goes beyond an exit")
            factor, dim, node = min(found, key=operator.itemgetter(0))
            self._size = self.graph.call_function(_aten.sym_size.int, (self.values[node], dim))
            if factor > 1:
                self._size = self.graph.call_function(operator.floordiv, (self._size, factor))
        return self._size


def is_number(node: fx.Node) -> bool:
    """Whether a node is a number and no tensor."""
    return isinstance(node.meta.get("val"), int | float | torch.SymInt | torch.SymFloat | torch.SymBool)


def _aliases(node: fx.Node) -> list[tuple[fx.Node, bool, bool]]:
    """What a node shares memory with: ``(other node, writes into it, returns it or a view of it)``."""
    if node.target is operator.getitem:
        return [(node.all_input_nodes[0], False, True)]
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return []
    returns = any(one.alias_info is not None for one in schema.returns)
    given = [*zip(schema.arguments, node.args, strict=False)]
    given += [(one, node.kwargs[one.name]) for one in schema.arguments if one.name in node.kwargs]
    return [
        (value, one.alias_info.is_write, returns)
        for one, value in given
        if one.alias_info is not None and isinstance(value, fx.Node)
    ]


def brief(error: Exception) -> str:
    """What went wrong, and the line of the forward where torch tells it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line.split(" For more information")[0] for line in lines[:2]]
    if (heading := "The following call raised this error:") in lines:
        at = lines.index(heading)
        told = [told[0], *lines[at + 1 : at + 3]]
    return f"{type(error).__name__}: {' '.join(told)}"[:500]
