"""Tensors that are made of parameters and constants alone, on their way to the samples.

A table that is looked up and reshaped before it is added, a weight that is standardised on every call, a projection
that is cut into three: no sample takes part yet, so autograd keeps the graph as always. Where such a tensor meets the
samples it is treated as if it were a parameter itself, and each sample's gradient is taken back through its graph to
the parameters behind it: exact, because the way back is linear.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from lightning_eff.privacy.engine.recording import GUARDS, Recorder
from lightning_eff.privacy.engine.tuning import Tuner
from lightning_eff.privacy.engine.uses import CHUNK_ELEMENTS, LayerUse, Part, block, slices, square_norm, wide
from lightning_eff.privacy.selection.selected import Selection


class Origin(NamedTuple):
    """Where a derived tensor comes from."""

    tensor: Tensor
    roots: dict[str, Tensor]


class DerivingRecorder(Recorder):
    """A recorder that follows what is made of parameters until it meets the samples.

    Args:
        names: as in :class:`Recorder`, like the arguments after it.
        selections: likewise.
        samples: likewise.
        tuner: likewise.
        on_gradient: likewise.
        constants: tensors that hold nothing of the batch: buffers, frozen parameters. What the step makes of them, or
            out of nothing (`torch.arange`), is constant as well.
    """

    def __init__(
        self,
        names: Mapping[int, str],
        selections: Mapping[str, Selection],
        samples: int,
        tuner: Tuner,
        on_gradient: Callable[[LayerUse], None],
        constants: Iterable[Tensor] = (),
    ) -> None:
        self._names: dict[int, str]
        super().__init__(dict(names), selections, samples, tuner, on_gradient)
        self._parameter_names = frozenset(names.values())
        # by id; the tensor is held so that no other one gets its id, and its version tells whether anyone wrote to it
        self._constants = {id(tensor): (tensor, _version(tensor)) for tensor in constants}
        self._origins: dict[str, Origin] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run what no sample takes part in as it is, and remember its result; else record."""
        kwargs = kwargs or {}
        guard = GUARDS.get(func)
        if guard is not None:
            guard(*args, **kwargs)
        tensors = _tensors((*args, *kwargs.values()) if kwargs else args)
        trained, given = [], False
        for tensor in tensors:
            if id(tensor) in self._names:
                trained.append(tensor)
            elif not given:
                given = not self.is_constant(tensor)
        if given:
            return super().__torch_function__(func, types, args, kwargs) if trained else func(*args, **kwargs)
        expand = EXPANSIONS.get(func)
        if expand is not None and trained and torch.is_grad_enabled():
            output = expand(self, *args, **kwargs)
            if output is not NotImplemented:
                return output
        output = func(*args, **kwargs)
        if not any(isinstance(argument, np.ndarray) for argument in args):  # who brings an array brings data
            for tensor in _tensors((output, *tensors)):
                self._remember(tensor, trained)
        return output

    def __exit__(self, *exception: Any) -> None:
        """Let go of what was followed: whoever needs a way back has it."""
        super().__exit__(*exception)
        self._constants.clear()
        self._origins.clear()
        self._names = {key: name for key, name in self._names.items() if name in self._parameter_names}

    def is_constant(self, tensor: Tensor) -> bool:
        """Whether nothing of the batch has gone into a tensor."""
        known = self._constants.get(id(tensor))
        return known is not None and known[1] == _version(tensor)

    def part(self, tensor: Any) -> Part | None:
        """Return name and selection of a parameter, or of a derived tensor behind which something is active."""
        origin = self._origins.get(self.name_of(tensor) or "")
        if origin is None:
            return super().part(tensor)
        active = [super(DerivingRecorder, self).part(root) for root in origin.roots.values()]
        return None if active == [None] * len(active) else Part(self.name_of(tensor) or "", Selection.all(tensor.shape))

    def tap(self, output: Tensor, use: LayerUse) -> Tensor:
        """Let ``use`` receive the gradient of ``output``; what it tells of derived tensors goes to their parameters."""
        origins = {name: self._origins[name] for name in use.selections if name in self._origins}
        return super().tap(output, DerivedUse(self, use, origins) if origins else use)

    def _remember(self, tensor: Tensor, trained: list[Tensor]) -> None:
        if id(tensor) in self._names and self._names[id(tensor)] in self._parameter_names:
            return
        if not tensor.requires_grad:
            self._constants[id(tensor)] = (tensor, _version(tensor))
            return
        roots: dict[str, Tensor] = {}
        for parent in trained:
            name = self._names[id(parent)]
            roots.update(self._origins[name].roots if name in self._origins else {name: parent})
        if roots:
            name = self._names.setdefault(id(tensor), f"derived tensor {len(self._origins)}")
            before = self._origins[name].roots if name in self._origins else {}
            self._origins[name] = Origin(tensor, {**before, **roots})


class DerivedUse(LayerUse):
    """The use of a derived tensor, told in terms of the parameters behind it.

    Args:
        recorder: knows what of the parameters is active.
        inner: the use, of derived tensors and perhaps of parameters too.
        origins: of each derived tensor.
    """

    def __init__(self, recorder: Recorder, inner: LayerUse, origins: Mapping[str, Origin]) -> None:
        direct = [Part(name, chosen) for name, chosen in inner.selections.items() if name not in origins]
        roots = {name: root for origin in origins.values() for name, root in origin.roots.items()}
        behind = [recorder.part(root) for name, root in roots.items() if name not in inner.selections]
        super().__init__([*direct, *behind], inner.samples)
        self._inner = inner
        self._ways = {
            name: (
                # the graph as it is now: somebody may write to the tensor later
                get_gradient_edge(origin.tensor),
                {root: tensor for root, tensor in origin.roots.items() if root in self.selections},
                origin.tensor.dtype,
            )
            for name, origin in origins.items()
        }

    def receive(self, gradient: Tensor) -> None:
        """Hand it on."""
        self._inner.receive(gradient)

    def zero_samples(self, index: Tensor) -> None:
        """Hand it on."""
        self._inner.zero_samples(index)

    def per_sample(self, name: str, samples: slice) -> Tensor:
        """Add what comes directly and through each derived tensor, ``[m, *block]``."""
        found = [self._inner.per_sample(name, samples)] if name in self._inner.selections else []
        for derived, (edge, roots, dtype) in self._ways.items():
            if name in roots:
                gradients = self._inner.per_sample(derived, samples).to(dtype)
                found.append(block(wide(_way_back(edge, roots[name], gradients)), self.selections[name]))
        total = found[0]
        for more in found[1:]:
            total = total + more
        return total

    def square_norms(self, names: Collection[str]) -> dict[str, Tensor]:
        """Ask the use itself for what comes directly only."""
        through = {name for _, roots, _ in self._ways.values() for name in roots}
        direct = [name for name in names if name not in through]
        squares = self._inner.square_norms(direct) if direct else {}
        for name in names:
            if name in through:
                parts = [square_norm(self.per_sample(name, part)) for part in self.chunks(name)]
                squares[name] = torch.cat(parts)
        return squares

    def clipped_sums(self, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Go back once with the sum where all parameters behind a tensor have the same factors."""
        of_derived = {}
        for derived, (_, roots, _) in self._ways.items():
            first, *others = (factors[root] for root in roots)
            if not all(other is first for other in others):
                return super().clipped_sums(factors)
            of_derived[derived] = first
        direct = {name: factors[name] for name in self._inner.selections if name not in self._ways}
        sums = self._inner.clipped_sums({**direct, **of_derived})
        for derived, (edge, roots, dtype) in self._ways.items():
            summed = sums.pop(derived).to(dtype)
            for name, root in roots.items():
                added = self.selections[name].compact(wide(_way_back(edge, root, summed.unsqueeze(0))[0]))
                sums[name] = sums[name] + added if name in sums else added
        return sums

    def chunks(self, name: str) -> Iterator[slice]:
        """Keep the gradients of derived tensors small, too."""
        sizes = [math.prod(self._inner.selections[derived].block_shape) for derived in self._ways]
        sizes.extend(root.numel() for _, roots, _ in self._ways.values() for root in roots.values())
        return slices(self.samples, CHUNK_ELEMENTS // max(1, *sizes))


def constants_of(module: nn.Module) -> list[Tensor]:
    """Buffers, frozen parameters and plain tensor attributes of a module and what is in it."""
    held = []
    for part in module.modules():
        for values in (part._parameters.values(), part._buffers.values(), vars(part).values()):
            held.extend([value for value in values if isinstance(value, Tensor) and not value.requires_grad])
    return held


# (recorder, *args of the function) -> output or NotImplemented, for functions that spread a tensor over the samples
EXPANSIONS: dict[Callable[..., Any], Callable[..., Any]] = {}


def _way_back(edge: GradientEdge, root: Tensor, gradients: Tensor) -> Tensor:
    """Take gradients ``[m, *shape of the derived tensor]`` back to a parameter, ``[m, *shape]``."""

    def back(gradient: Tensor, batched: bool) -> Tensor:
        results: Sequence[Tensor | None] = torch.autograd.grad(
            [edge], [root], [gradient], retain_graph=True, is_grads_batched=batched, allow_unused=True
        )
        found = results[0]
        if found is None:
            return root.new_zeros((len(gradient), *root.shape) if batched else root.shape)
        return found

    if len(gradients) == 1:
        return back(gradients[0], False).unsqueeze(0)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop")
            return back(gradients, True)
    except RuntimeError:  # an operation on the way back that cannot be batched
        return torch.stack([back(gradient, False) for gradient in gradients])


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """Tensors among values and in the lists, tuples and dicts of them."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found.extend(_tensors(value))
        elif isinstance(value, dict):
            found.extend(_tensors(value.values()))
    return found


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
