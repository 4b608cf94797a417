"""Fair timing on one CPU thread: the same work, checked to give the same result, in interleaved rounds.

Import it from a benchmark script beside it::

    def tables():
        return [compare({"peer": ..., "ours": ...}, reference="peer", title="LeNet, layer 1")]

    if __name__ == "__main__":
        main(tables)
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lightning_eff.reporting import Column, Table


def compare(
    contenders: dict[str, Callable[[], Any]],
    *,
    reference: str,
    repeats: int = 5,
    check: Callable[[Any, Any], None] | None = torch.testing.assert_close,
    warmup: int = 1,
    title: str = "CPU time",
) -> Table:
    """Time functions that do the same work.

    Args:
        contenders: Function without arguments by name.
        reference: Name of the contender the others are measured against.
        repeats: Rounds that count, >= 1; every contender runs once a round, so that a slow minute hits all alike.
        check: Called as ``check(actual, expected)`` with the result of each contender and of the reference, before
            anything is timed; it raises where they differ. ``None`` checks nothing.
        warmup: Rounds before those that count, >= 0.
        title: Heading of the table.

    Returns:
        Table with seconds of process time (median, least, most) and ``ratio``: median of the reference divided by
        this median, so that 2 means twice as fast.
    """
    if reference not in contenders:
        raise ValueError(f"expected reference to be one of {list(contenders)}, got {reference!r}")
    if repeats < 1 or warmup < 0:
        raise ValueError(f"expected repeats >= 1 and warmup >= 0, got {repeats} and {warmup}")
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    with one_thread():
        if check is not None:
            expected = contenders[reference]()
            for name in contenders.keys() - {reference}:
                _check(check, name, contenders[name](), reference, expected)
        for round_ in range(warmup + repeats):
            for name, run in contenders.items():
                start = time.process_time()
                run()
                elapsed = time.process_time() - start
                if round_ >= warmup:
                    seconds[name].append(elapsed)
        caption = f"{machine()}; CPU seconds, {repeats} rounds"
    median = {name: statistics.median(times) for name, times in seconds.items()}
    rows = [
        # a median below the clock's resolution gives no ratio
        [name, median[name], min(times), max(times), median[reference] / median[name] if median[name] else None]
        for name, times in seconds.items()
    ]
    columns = ["contender", "median [s]", "min [s]", "max [s]", Column(f"faster than {reference} [x]", ".2f")]
    return Table(title, columns, rows, caption)


def machine() -> str:
    """Name processor, torch and the number of threads in use."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.processor() or platform.machine()
    return f"{processor}, torch {torch.__version__}, {torch.get_num_threads()} thread(s)"


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread, and as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def main(tables: Callable[[], list[Table]], args: list[str] | None = None) -> None:
    """Print what ``tables`` measures; ``--json FILE`` writes all of it to one file as well."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the tables to this file")
    out: Path | None = parser.parse_args(args).json
    print(machine())
    measured = tables()
    for table in measured:
        table.print()
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        documents = [{"title": t.title, "caption": t.caption, "records": json.loads(t.to_json())} for t in measured]
        out.write_text(json.dumps(documents, indent=2) + "\n")


def _check(check: Callable[[Any, Any], None], name: str, actual: Any, reference: str, expected: Any) -> None:
    try:
        check(actual, expected)
    except AssertionError as error:
        raise AssertionError(f"{name!r} does not give the result of {reference!r}: {error}") from error
