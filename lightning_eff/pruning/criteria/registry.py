"""Criteria by name: what a rule for the importance of channels is, what it needs, and the one call that runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from lightning_eff.batch import LossFunction, SplitBatch
from lightning_eff.pruning.borrowing import borrowed
from lightning_eff.surgery import ChannelGraph

# (model, graph, batches, loss_fn) -> {group: scores [C], higher = keep}. Any: jsonargparse would look for classes.
Criterion = Callable[[Any, Any, Any, Any], Any]

C = TypeVar("C", bound=Callable[..., Any])


class Needs(NamedTuple):
    """What a criterion cannot do without."""

    data: bool = False
    loss: bool = False


CRITERIA: dict[str, Callable[..., Any]] = {}
"""Criteria by name: classes that are built without arguments, or functions that are criteria themselves."""


def register_criterion(name: str, *, needs: Needs | None = None) -> Callable[[C], C]:
    """Make a criterion known by a name: a decorator for classes with ``__call__`` and for functions.

    Args:
        name: what users write, ``criterion="name"``.
        needs: what it needs; None takes the attribute ``needs`` of the class, and nothing where there is none.

    Raises:
        ValueError: the name belongs to another criterion.
    """

    def register(criterion: C) -> C:
        known = CRITERIA.get(name)
        if known is not None and known.__qualname__ != criterion.__qualname__:
            raise ValueError(f"criterion {name!r} is {known.__qualname__} already: choose another name")
        if needs is not None:
            criterion.needs = needs  # type: ignore[attr-defined]
        CRITERIA[name] = criterion
        return criterion

    return register


def resolve_criterion(criterion: str | Criterion, *, split_batch: SplitBatch | None = None, seed: int = 0) -> Criterion:
    """Return the criterion behind a name; a criterion stays, with ``split_batch`` and ``seed`` where it has none.

    Raises:
        ValueError: no criterion has that name; the message lists the names.
    """
    found: Any = criterion
    if isinstance(criterion, str):
        if criterion not in CRITERIA:
            names = ", ".join(map(repr, sorted(CRITERIA)))
            raise ValueError(
                f"criterion must be one of {names} or a callable (model, graph, batches, loss_fn) -> scores of each "
                f"group (in YAML the class_path of a class with __call__), got {criterion!r}"
            )
        found = CRITERIA[criterion]
    if isinstance(found, type):
        found = found()
    if not callable(found):
        raise ValueError(f"a criterion must be a name or a callable, got {criterion!r}")
    given = {"split_batch": split_batch, "seed": seed}
    own = {field.name for field in fields(found)} if is_dataclass(found) else set()
    unset = {name: given[name] for name in given if name in own and getattr(found, name) is None}
    resolved: Criterion = replace(found, **unset) if unset else found
    return resolved


def needs(criterion: str | Criterion) -> Needs:
    """Return whether calibration data and a loss are needed, before any work; a plain callable needs nothing."""
    stated = getattr(resolve_criterion(criterion), "needs", Needs())
    return Needs(*stated)


def check_needs(criterion: str | Criterion, batches: Sequence[Any], loss_fn: LossFunction | None) -> None:
    """Raise ValueError where data or a loss is missing; the message names it."""
    data, loss = needs(criterion)
    missing = []
    if data and not len(batches):
        missing.append("calibration data: pass batches, a list of batches on the model's device")
    if loss and loss_fn is None:
        missing.append("a loss: pass loss_fn, a function (model, batch) -> loss")
    if missing:
        raise ValueError(f"criterion {describe(criterion)} needs {'; and '.join(missing)}")


def describe(criterion: str | Criterion) -> str:
    """Return the name that users know a criterion by."""
    if isinstance(criterion, str):
        return repr(criterion)
    for name, known in CRITERIA.items():
        if criterion is known or type(criterion) is known:
            return repr(name)
    return str(getattr(criterion, "__qualname__", type(criterion).__qualname__))


def importance(
    model: nn.Module,
    graph: ChannelGraph,
    criterion: str | Criterion,
    batches: Sequence[Any] = (),
    loss_fn: LossFunction | None = None,
    *,
    split_batch: SplitBatch | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Score every channel that may be pruned.

    Args:
        model: the network; it, its gradients and the global random generators are the same afterwards. A callable of
            your own sees it frozen, in evaluation mode, with gradients enabled, and may change what it likes of that.
        graph: its channel graph.
        criterion: a name in :data:`CRITERIA`, an object such as ``Taylor(granularity="batch")``, or any callable
            ``(model, graph, batches, loss_fn) -> {group or producer: scores [C]}``.
        batches: calibration batches on the model's device, where the criterion needs data.
        loss_fn: ``(model, batch) -> loss``, the mean over the batch, where the criterion needs a loss.
        split_batch: ``batch -> (inputs, target)``, for batches of another form.
        seed: of everything random.

    Returns:
        Scores float64 ``[C]`` on the CPU of each group in ``graph.prunable``, higher = keep.

    Raises:
        ValueError: an unknown name, data or a loss that is missing, scores of the wrong shape or not finite.

    Example:
        >>> import torch
        >>> from lightning_eff.surgery import ChannelGraph
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> graph = ChannelGraph.from_model(model, torch.randn(2, 2))
        >>> importance(model, graph, "l1")["0"].shape
        torch.Size([3])
    """
    resolved = resolve_criterion(criterion, split_batch=split_batch, seed=seed)
    check_needs(criterion, batches, loss_fn)
    with borrowed(model), _own_gradients(model):
        scores = resolved(model, graph, batches, loss_fn)
    return _checked(describe(criterion), graph, scores)


def _checked(criterion: str, graph: ChannelGraph, scores: Any) -> dict[str, Tensor]:
    found = {graph.resolve(path).name: torch.as_tensor(values) for path, values in dict(scores).items()}
    missing = [name for name in graph.prunable if name not in found]
    if missing:
        raise ValueError(f"criterion {criterion} gave no scores for {', '.join(missing)}")
    checked = {}
    for name in graph.prunable:
        values = found[name].detach().cpu().to(torch.float64)
        if values.shape != (graph.groups[name].size,):
            raise ValueError(
                f"criterion {criterion} gave scores of shape {list(values.shape)} for {name}, expected "
                f"[{graph.groups[name].size}]"
            )
        if not bool(values.isfinite().all()):
            bad = (~values.isfinite()).nonzero().flatten().tolist()
            raise ValueError(
                f"criterion {criterion} gave scores that are not finite for channels {bad[:20]} of {name}: look for "
                "NaN or infinite values in the weights and the calibration batches"
            )
        checked[name] = values
    return checked


@contextmanager
def _own_gradients(model: nn.Module) -> Iterator[None]:
    """Give every parameter the gradient back that it had."""
    before = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _ in before:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient
