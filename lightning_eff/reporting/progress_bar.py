"""Progress of work whose cost is known before."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


class Progress:
    """How far work has come; :func:`progress` makes it, ``done`` counts the units."""

    def __init__(self, show: Callable[[int, str], None] = lambda done, note: None) -> None:
        self.done = 0
        self._show = show

    def advance(self, k: int = 1, note: str = "") -> None:
        """Count ``k`` more units as done; a note, e.g. the error so far, is shown beside the bar."""
        self.done += k
        self._show(self.done, note)


@contextmanager
def progress(
    description: str, total: int, *, enabled: bool = True, unit: str = "evaluations", console: Console | None = None
) -> Generator[Progress, None, None]:
    """Show a bar with elapsed and remaining time while the block runs and calls ``advance``; then the bar is gone.

    On a console that is no terminal it prints a line with the cost when it begins and one when it ends.

    Args:
        description: What is being done.
        total: How many units it takes, >= 0.
        enabled: Whether to show anything.
        unit: Word for what is counted, in the plural.
        console: Where; by default rich's global console, the one Lightning's progress bar uses too.

    Raises:
        ValueError: ``total`` is negative.
    """
    if total < 0:
        raise ValueError(f"expected total >= 0, got {total}")
    if not enabled:
        yield Progress()
        return
    from rich import get_console, progress
    from rich.markup import escape

    console = console or get_console()
    if console.is_interactive or console.is_jupyter:
        words = ("{task.description}", progress.BarColumn(), progress.MofNCompleteColumn(), escape(unit))
        times = (progress.TimeElapsedColumn(), "<", progress.TimeRemainingColumn(), "{task.fields[note]}")
        with progress.Progress(*words, *times, console=console, transient=True) as display:
            task = display.add_task(escape(description), total=total, note="")
            yield Progress(lambda done, note: display.update(task, completed=done, note=escape(note)))
        return
    counter, start, how = Progress(), time.monotonic(), "stopped after"
    console.print(f"{description}: {total:,} {unit}", markup=False, highlight=False, soft_wrap=True)
    try:
        yield counter
        how = "done,"
    finally:
        end = f"{description}: {how} {counter.done:,} {unit} in {time.monotonic() - start:.1f} s"
        console.print(end, markup=False, highlight=False, soft_wrap=True)
