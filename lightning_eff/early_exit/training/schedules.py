"""Learning rate schedules whose length is that of a phase, not of the whole training.

A schedule is written as a class and its arguments, or is a callable. From YAML both a class and a Lightning scheduler
configuration arrive as plain dicts, because jsonargparse would refuse a length that is still open (``T_max: null``).
"""

from __future__ import annotations

import functools
import inspect
import pydoc
from collections.abc import Callable, Mapping
from typing import Any

from torch.optim import Optimizer, lr_scheduler

# dict and Any without more: a jsonargparse that knew of schedulers here would build them, and ask for every argument
Schedule = dict | Callable[[Optimizer], Any]  # type: ignore[type-arg]
"""How the learning rate moves, one of

* ``{"class_path": "torch.optim.lr_scheduler.CosineAnnealingLR", "init_args": {"T_max": None}}``,
* a callable ``optimizer -> scheduler``, for example ``partial(CosineAnnealingLR, T_max=None)``,
* a Lightning configuration ``{"scheduler": one of these, "interval": "step", ...}``, or a callable that returns one.

In Python the last name of a ``class_path`` in ``torch.optim.lr_scheduler`` is enough, YAML needs all of it.
``T_max``, ``total_iters`` and ``total_steps`` that are None become the length of the phase.
"""

_LENGTHS = {"T_max": "epoch", "total_iters": "epoch", "total_steps": "step"}  # and the interval each one suggests
_OPTIONS = {"interval", "frequency", "monitor", "strict", "name", "reduce_on_plateau"}


def check_schedule(schedule: Schedule | None) -> None:
    """Raise before any work where a schedule cannot be built.

    Raises:
        ValueError: unknown keys, an unknown class, or arguments that it does not take.
    """
    if schedule is None:
        return
    make, arguments, options = _parts(schedule)
    if inspect.isclass(make):
        try:
            inspect.signature(make).bind(None, **arguments)
        except TypeError as error:
            raise ValueError(f"{make.__name__} cannot be built from {arguments}: {error}") from None
    if options.get("interval", "epoch") not in ("epoch", "step"):
        raise ValueError(f"expected the interval of a schedule to be 'epoch' or 'step', got {options['interval']!r}")


def build_schedule(schedule: Schedule, optimizer: Optimizer, length: Callable[[str], int | None]) -> dict[str, Any]:
    """Return a Lightning scheduler configuration.

    Args:
        schedule: see :data:`Schedule`.
        optimizer: whose learning rate moves.
        length: of the phase, in ``"epoch"`` or ``"step"``; None if nobody knows.

    Raises:
        ValueError: a length is open and nobody knows how long the phase lasts.
    """
    make, arguments, options = _parts(schedule)
    open_lengths = [name for name in _LENGTHS if name in arguments and arguments[name] is None]
    if open_lengths:
        interval = options.setdefault("interval", _LENGTHS[open_lengths[0]])
        known = length(interval)
        if known is None:
            raise ValueError(
                f"{open_lengths[0]} is to be the length of the phase, which is open: give the phase epochs, "
                "or a number here"
            )
        arguments = {**arguments, **dict.fromkeys(open_lengths, known)}
    built = make(optimizer, **arguments)
    if isinstance(built, Mapping):
        return {**built, **options}
    if "monitor" not in options and hasattr(built, "monitor"):  # lightning.pytorch.cli.ReduceLROnPlateau
        options["monitor"] = built.monitor
    return {"scheduler": built, **options}


def _parts(schedule: Schedule) -> tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]:
    """What builds it, with what arguments, and Lightning's options."""
    options: dict[str, Any] = {}
    if isinstance(schedule, Mapping) and "scheduler" in schedule:
        options = {name: value for name, value in schedule.items() if name != "scheduler"}
        schedule = schedule["scheduler"]
    if unknown := set(options) - _OPTIONS:
        raise ValueError(f"a schedule has no {sorted(unknown)}: next to 'scheduler' there may be {sorted(_OPTIONS)}")
    if isinstance(schedule, functools.partial):
        return functools.partial(schedule.func, *schedule.args), dict(schedule.keywords), options
    if callable(schedule):
        return schedule, {}, options
    if not isinstance(schedule, Mapping) or set(schedule) - {"class_path", "init_args"} or "class_path" not in schedule:
        raise ValueError(
            "expected a schedule to be a callable, a dict of class_path and init_args, or of scheduler and "
            f"{sorted(_OPTIONS)}, got {schedule}"
        )
    path = schedule["class_path"]
    found = getattr(lr_scheduler, path, None) or pydoc.locate(path)
    if not callable(found):
        raise ValueError(f"there is no schedule {path!r}: name a class, torch.optim.lr_scheduler.StepLR for example")
    return found, dict(schedule.get("init_args") or {}), options
