"""Hooks on the layers of a backbone: they do nothing unless a run of the network they belong to is under way.

The hooks stay for good, so that threads do not add and remove them under each other's feet; which run is under way is a
context variable, one a thread. Inside of ``torch.compile``, which knows no context variables, it is an attribute.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, Protocol

from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from lightning_eff.early_exit.attaching.features import (
    BatchDim,
    Layout,
    feature_index,
    feature_of,
    replace_feature,
    select,
    select_all,
)
from lightning_eff.early_exit.inference.leaving import Leaving


class Run(Protocol):
    """One forward pass and what is done at its exits."""

    tape: Tape
    outer: Run | None

    def at_exit(self, hook: ExitHook, output: Any) -> Any:
        """Return what the layer shall return instead, or None."""

    def before(self, hook: ArgumentHook, args: Any, kwargs: Any) -> Any:
        """Return ``(args, kwargs)`` the layer shall get instead, or None."""


_CURRENT: ContextVar[Run | None] = ContextVar("early_exit_run", default=None)


class Tape:
    """What joins the hooks of one network; copied along with it.

    Args:
        heads: of the network, by exit.
    """

    def __init__(self, heads: nn.ModuleList | None = None) -> None:
        self.run: Run | None = None  # while compiling
        self.heads = heads


class running:
    """Let the hooks of the run's network act while the block runs; a class, because a generator costs twice as much."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def __enter__(self) -> None:
        """Make it the current run of this thread."""
        self._run.outer = _CURRENT.get()
        self._token = _CURRENT.set(self._run)

    def __exit__(self, *_: object) -> None:
        """Make the run before it the current one."""
        _CURRENT.reset(self._token)


def _current(tape: Tape) -> Run | None:
    if is_compiling():
        return tape.run
    run = _CURRENT.get()
    while run is not None and run.tape is not tape:  # a network in a network
        run = run.outer
    return run


class ExitHook:
    """Stands on the layer of an exit.

    Args:
        tape: of the network.
        index: of the exit.
        call: the call of the layer that is the exit, from 1; 0 if there is only one.
        output: batch dimensions of what the layer returns.
    """

    def __init__(self, tape: Tape, index: int, call: int, output: Layout) -> None:
        self.tape, self.index, self.call, self.output = tape, index, call, output

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Forward hook."""
        run = _current(self.tape)
        return None if run is None else run.at_exit(self, output)

    @property
    def readers(self) -> tuple[nn.Module, ...]:
        """What reads the layer besides the layers behind it; whoever removes channels asks hooks for it."""
        heads = self.tape.heads
        return () if heads is None else (heads[self.index],)

    def feature(self, output: Any) -> Tensor:
        """Feature of the layer with the batch first."""
        where = self.output[0 if isinstance(output, Tensor) else feature_index(output)]
        assert where is not None
        feature = feature_of(output)
        return feature if where.dim == 0 else feature.movedim(where.dim, 0)


class ArgumentHook:
    """Stands before a layer that gets more than one tensor of the batch, an attention mask for example.

    Args:
        tape: of the network.
        inputs: batch dimensions of the leaves of ``(args, kwargs)``.
    """

    def __init__(self, tape: Tape, inputs: Layout) -> None:
        self.tape, self.inputs = tape, inputs

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Forward pre-hook."""
        run = _current(self.tape)
        return None if run is None else run.before(self, args, kwargs)


def place(backbone: nn.Module, hooks: dict[str, list[ExitHook | ArgumentHook]]) -> list[RemovableHandle]:
    """Register hooks on layers by path."""
    handles = []
    for layer, placed in hooks.items():
        module = backbone.get_submodule(layer)
        for hook in placed:
            if isinstance(hook, ExitHook):
                handles.append(module.register_forward_hook(hook))
            else:
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    return handles


class _Counting:
    """Tell the call of a reused layer that is the exit from its other calls."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        self.outer: Run | None = None
        self._calls: dict[int, int] = {}

    def _is_it(self, hook: ExitHook) -> bool:
        if not hook.call:
            return True
        self._calls[hook.index] = self._calls.get(hook.index, 0) + 1
        return self._calls[hook.index] == hook.call

    def before(self, hook: ArgumentHook, args: Any, kwargs: Any) -> Any:
        return None


class LastExit(Exception):
    """Nobody needs what comes behind the last exit."""


class Collect(_Counting):
    """Take the features of all exits along in one forward pass, and hand each to a function at once.

    Args:
        tape: of the network.
        visit: ``(exit index, feature with the batch first) -> result``; called inside of the pass, before anything can
            write into the feature.
        clone: exits whose features are copied first, because something does.
        branch: ``(exit index, feature) -> (feature for visit, feature that goes on)``; None leaves both.
        stop: end the pass at this exit with :class:`LastExit`.
    """

    def __init__(self, tape: Tape, visit: Any, clone: set[int], branch: Any = None, stop: int | None = None) -> None:
        super().__init__(tape)
        self._visit, self._clone, self._branch, self._stop = visit, clone, branch, stop
        self.results: dict[int, Any] = {}
        self._seen: list[tuple[int, Tensor, int]] = []

    def at_exit(self, hook: ExitHook, output: Any) -> Any:
        """Visit the exit."""
        if not self._is_it(hook):
            return None
        k, goes_on = hook.index, None
        feature = feature_of(output)
        if k not in self._clone and not is_compiling() and not feature.is_inference():
            self._seen.append((k, feature, feature._version))
        if self._branch is not None:
            feature, goes_on = self._branch(k, feature)
            output = replace_feature(output, feature)
        if k in self._clone:
            output = replace_feature(output, feature.clone())
        self.results[k] = self._visit(k, hook.feature(output))
        if k == self._stop:
            raise LastExit
        return None if goes_on is None else replace_feature(output, goes_on)

    def overwritten(self) -> set[int]:
        """Exits whose features were written into after they were visited."""
        return {k for k, feature, version in self._seen if feature._version != version}


class Compact(_Counting):
    """Take samples that leave out of the batch: what a layer returns is cut down to the rows that go on.

    Args:
        tape: of the network.
        leaving: the batch.
    """

    def __init__(self, tape: Tape, leaving: Leaving) -> None:
        super().__init__(tape)
        self.leaving = leaving
        self.visited: set[int] = set()
        self._live = leaving.batch
        # number of rows before a cut -> which of them are still there; numbers only fall, so each names one moment
        self._since: dict[int, Tensor] = {}

    def at_exit(self, hook: ExitHook, output: Any) -> Any:
        """Let rows leave."""
        if not self.leaving.rule.enabled(hook.index) or not self._is_it(hook):
            return None
        self.visited.add(hook.index)
        stay = self.leaving.at(hook.index, hook.feature(output))
        if stay is None:
            return None
        self._since = {size: rows[stay] for size, rows in self._since.items()}
        self._since[self._live] = stay
        self._live = len(stay)
        return select_all(output, hook.output, stay)

    def before(self, hook: ArgumentHook, args: Any, kwargs: Any) -> Any:
        """Cut down tensors that went around the exits."""
        if not self._since:
            return None
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if len(leaves) != len(hook.inputs):
            return None
        cut = [
            self._cut(leaf, at) if at is not None and isinstance(leaf, Tensor) else leaf  # optional ones may be absent
            for leaf, at in zip(leaves, hook.inputs, strict=True)
        ]
        return pytree.tree_unflatten(cut, spec)

    def _cut(self, tensor: Tensor, where: BatchDim) -> Tensor:
        rows = self._since.get(tensor.size(where.dim) // where.factor)
        return tensor if rows is None else select(tensor, where, rows)
