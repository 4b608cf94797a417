"""Compute once what does not depend on a gate, for any Python ``forward``.

Scoring a deep layer evaluates the network many times with other gates on the same batch. Every module call before
the gate gives the same result each time. Such calls are found by following the gate's values through every operation,
differentiable or not, and comparing with other gate values bit for bit (for paths outside of torch). The outermost of
these calls are then answered from a tape; of their results only those that something outside reads are stored.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_eff.surgery.gates import Gates

Run = Callable[[], Any]
Call = tuple[nn.Module, int]  # a module and the number of its call; calls inside of a free one are not counted
Tape = dict[Call, Any]


class PrefixCache:
    """Answer the calls that gates do not reach from a tape.

    Args:
        model: the network, in evaluation mode while the cache is used.
        run: one forward pass on a small batch, used to find the free calls.
        gates: open gates; the values of ``name`` are changed here, set yours afterwards.
        name: the gated group.
        size: its number of channels.
        device: where the model is.
        other: one forward pass on other inputs, used to find networks that hand results on in attributes or hooks.

    Use :meth:`record` once per batch, then :meth:`replay` its tape as often as wanted with other gate values.
    ``active`` is False, after a warning, where the network does not allow it: then nothing is stored and replaying is
    an ordinary run.
    """

    def __init__(
        self,
        model: nn.Module,
        run: Run,
        gates: Gates,
        name: str,
        size: int,
        *,
        device: torch.device | None = None,
        other: Run | None = None,
    ) -> None:
        self._free: set[Call] = set()
        self._live: set[Call] = set()
        self._mutated: set[Call] = set()
        generator = torch.Generator().manual_seed(0)
        values = torch.rand(size, generator=generator).to(device)
        half = (torch.rand(size, generator=generator) < 0.5).to(values)
        with torch.inference_mode(False), torch.no_grad():
            problem = self._find(model, run, gates, name, values.clone(), half)
            if not problem and self._free:
                problem = self._try(run, other or run, gates, name, 1 - half)
        self.active = not problem
        if problem:
            warnings.warn(
                f"{type(model).__name__} {problem} when calls before {name} are answered from memory; it is run in "
                "full for every evaluation, which is slower",
                stacklevel=2,
            )
            self._free = set()

    def _find(self, model: nn.Module, run: Run, gates: Gates, name: str, values: Tensor, half: Tensor) -> str:
        """Find the free calls, and which of their results are read; say why they cannot be trusted, else ``""``."""
        gates.set(name, values)
        reach = _Reach(values)
        with reach:
            first = _trace(model, run, reach)
        if reach.decides:
            return "decides by gated values what to compute, so it cannot be trusted"
        gates.set(name, half)
        self._free = _outermost_free(first, _trace(model, run, None))
        del first
        watch = _Watch()
        self._record(run, watch)
        self._live, self._mutated = watch.read, watch.written
        return ""

    def _try(self, run: Run, other: Run, gates: Gates, name: str, values: Tensor) -> str:
        """Answer from a tape that other gate values recorded, after another pass; compare with an ordinary run."""
        tape = self.record(run)
        gates.set(name, values)
        other()
        try:
            got = pytree.tree_leaves(self.replay(tape, run))
        except Exception as error:  # an ordinary run passes: this one alone is the reason
            return f"fails ({type(error).__name__}: {error})"
        expected = pytree.tree_leaves(run())
        pairs = [(a, b) for a, b in zip(got, expected, strict=False) if isinstance(a, Tensor)]
        same = len(got) == len(expected) and all(_close(a, b) for a, b in pairs)
        return "" if same else "does not give the same outputs"

    def record(self, run: Run) -> Tape:
        """Run once and keep what the free calls return."""
        return self._record(run, None) if self._free else {}

    def _record(self, run: Run, watch: _Watch | None) -> Tape:
        tape: Tape = {}
        depth = 0

        def call(key: Call, forward: Run) -> Any:
            nonlocal depth
            depth += 1
            try:
                result = forward()
            finally:
                depth -= 1
            if watch is not None:
                watch.own(key, result)
            else:
                self._keep(tape, key, result)
            return result

        if watch is not None:
            watch.outside = lambda: depth == 0
        with self._intercepted(call, visible=lambda: depth == 0), watch or nullcontext():
            outputs = run()
        if watch is not None:
            watch.use(outputs)
        return tape

    def _keep(self, tape: Tape, key: Call, result: Any) -> None:
        if key in self._mutated:
            tape[key] = _map_tensors(torch.clone, result)
        else:
            tape[key] = result if key in self._live else _map_tensors(_hollow, result)

    def replay(self, tape: Tape, run: Run) -> Any:
        """Run with the free calls answered from ``tape``."""
        if not self._free:
            return run()

        def call(key: Call, forward: Run) -> Any:
            return _map_tensors(torch.clone, tape[key]) if key in self._mutated else tape[key]

        with self._intercepted(call, visible=lambda: True):
            return run()

    @contextmanager
    def _intercepted(self, call: Callable[[Call, Run], Any], visible: Callable[[], bool]) -> Iterator[None]:
        """Route the free calls of one run through ``call``."""
        counts = {module: 0 for module, _ in self._free}

        def wrap(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                if not visible():
                    return forward(*args, **kwargs)
                key = (module, counts[module])
                counts[module] += 1
                if key in self._free:
                    return call(key, lambda: forward(*args, **kwargs))
                return forward(*args, **kwargs)

            return wrapper

        with _wrapped_forwards(counts, wrap):
            yield


def record_together(caches: Sequence[PrefixCache], run: Run) -> list[Tape]:
    """Run once and keep for every cache what its :meth:`PrefixCache.record` keeps.

    One pass then serves the gates of several groups, one after the other; a tensor on several tapes is stored once.
    No gate may be open while it runs.
    """
    tapes: list[Tape] = [{} for _ in caches]
    counts = [{module: 0 for module, _ in cache._free} for cache in caches]
    inside = [0] * len(caches)  # free calls that are open, of each cache

    def wrap(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        users = [i for i, modules in enumerate(counts) if module in modules]

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            free: list[tuple[int, Call]] = []
            for i in users:
                if not inside[i]:
                    key = (module, counts[i][module])
                    counts[i][module] += 1
                    if key in caches[i]._free:
                        free.append((i, key))
            for i, _ in free:
                inside[i] += 1
            try:
                result = forward(*args, **kwargs)
            finally:
                for i, _ in free:
                    inside[i] -= 1
            for i, key in free:
                caches[i]._keep(tapes[i], key, result)
            return result

        return wrapper

    with _wrapped_forwards({module for modules in counts for module in modules}, wrap):
        run()
    return tapes


def _close(a: Tensor, b: Any) -> bool:
    if not isinstance(b, Tensor) or a.shape != b.shape:
        return False
    if a.is_floating_point() or a.is_complex():
        return torch.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True)
    return torch.equal(a, b)


def tape_bytes(tape: Tape) -> int:
    """Memory that the stored tensors hold."""
    leaves = (leaf for result in tape.values() for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor))
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in leaves}.values())


def _map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    return pytree.tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def _hollow(tensor: Tensor) -> Tensor:
    """A tensor of the same shape that nobody reads: one element, expanded."""
    return tensor.new_zeros(()).expand(tensor.shape)


@contextmanager
def _wrapped_forwards(
    modules: Any, wrap: Callable[[nn.Module, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Replace ``forward`` on the instances; what was there comes back, also after an exception."""
    before = {module: module.__dict__.get("forward") for module in modules}
    try:
        for module in before:
            module.__dict__["forward"] = wrap(module, module.forward)
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward


_PLAIN = (Tensor, int, float, complex, str, bytes, torch.dtype, torch.device, type(None))


class _Event(NamedTuple):
    """One module call: which module, inside of which other call (-1: none), and what it returned."""

    module: nn.Module
    parent: int
    depends: bool  # on the gate, or unknown: no tensors that could tell
    result: list[Tensor]


def _trace(model: nn.Module, run: Run, reach: _Reach | None) -> list[_Event]:
    events: list[_Event | None] = []
    stack = [-1]

    def wrap(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            number = len(events)
            events.append(None)
            stack.append(number)
            try:
                result = forward(*args, **kwargs)
            finally:
                stack.pop()
            leaves = pytree.tree_leaves(result)
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            unknown = not tensors or not all(isinstance(leaf, _PLAIN) for leaf in leaves)
            depends = unknown or (reach is not None and reach.reached(tensors))
            kept = [] if depends else [tensor.detach().clone() for tensor in tensors]
            events[number] = _Event(module, stack[-1], depends, kept)
            return result

        return wrapper

    inner = [m for m in model.modules() if m is not model and not isinstance(m, torch.jit.ScriptModule)]
    with _wrapped_forwards(inner, wrap):
        run()
    return [event for event in events if event is not None]


def _outermost_free(first: Sequence[_Event], second: Sequence[_Event]) -> set[Call]:
    """Return the calls that no gate reaches and that no other such call contains."""
    if [(e.module, e.parent) for e in first] != [(e.module, e.parent) for e in second]:
        return set()  # the order of calls depends on the gates
    hidden: list[bool] = []
    counts: dict[nn.Module, int] = {}
    found: set[Call] = set()
    for a, b in zip(first, second, strict=True):
        free = not a.depends and _equal(a.result, b.result)
        inside = a.parent >= 0 and hidden[a.parent]
        if not inside:
            number = counts.get(a.module, 0)
            counts[a.module] = number + 1
            if free:
                found.add((a.module, number))
        hidden.append(inside or free)
    return found


def _equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))


def _same(a: Tensor, b: Tensor) -> bool:
    """Compare bit for bit; not-a-number equals itself."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor):
            yield leaf.untyped_storage()


def _written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """Arguments that an operation writes to."""
    values = {**{a.name: v for a, v in zip(func._schema.arguments, args, strict=False)}, **kwargs}
    return [
        values[a.name]
        for a in func._schema.arguments
        if a.alias_info is not None and a.alias_info.is_write and a.name in values
    ]


class _Reach(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follow a tensor's values through every operation; ``decides`` when Python reads one of them."""

    def __init__(self, source: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.decides = False
        self._storages: dict[int, torch.UntypedStorage] = {}  # kept, or their addresses would be used again
        self._mark(source)

    def reached(self, tree: Any) -> bool:
        return any(storage._cdata in self._storages for storage in _storages(tree))

    def _mark(self, tree: Any) -> None:
        self._storages.update({storage._cdata: storage for storage in _storages(tree)})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self.reached((args, kwargs)):
            self.decides |= isinstance(result, bool | int | float | complex)
            self._mark((result, _written(func, args, kwargs)))
        return result


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Note which results of free calls are read, and which are written to, by operations outside of such calls.

    A free call that writes to the result of another one counts where that result was read before.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.outside: Callable[[], bool] = lambda: True
        self.read: set[Call] = set()
        self.written: set[Call] = set()
        self._owners: dict[int, list[Call]] = {}
        self._alive: list[Any] = []  # storages must not be freed, or their addresses would be used again

    def own(self, key: Call, result: Any) -> None:
        self._alive.append(result)
        for storage in _storages(result):
            self._owners.setdefault(storage._cdata, []).append(key)

    def use(self, tree: Any) -> None:
        self.read.update(self._owned(tree))

    def _owned(self, tree: Any) -> set[Call]:
        return {key for storage in _storages(tree) for key in self._owners.get(storage._cdata, ())}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        owned = self._owned(_written(func, args, kwargs))
        if self.outside():
            self.use((args, kwargs))
            self.written |= owned
        else:
            self.written |= owned & self.read
        return func(*args, **kwargs)
