"""Fair timing on one CPU thread: the same work, checked to give the same result, in interleaved rounds.

Import it from a benchmark script beside it::

    TECHNIQUE = "Shapley values"

    def tables():
        return [compare({"peer": ..., "ours": ...}, reference="peer", title="LeNet, layer 1")]

    def headlines(tables):
        ours, peer = (entry(tables, "LeNet", name, "median [s]") for name in ("ours", "peer"))
        return [Headline("LeNet, layer 1", ours, peer, "peer 1.0", target=6)]

    if __name__ == "__main__":
        main(tables, headlines)

``run_all.py`` runs every script that names its ``TECHNIQUE`` and makes one table of their headlines.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from lightning_eff.reporting import Column, Table

UNAVAILABLE = 77  # exit status of a benchmark that this machine cannot run, as in automake


@dataclass(frozen=True)
class Headline:
    """What a benchmark has to say: the same work by this package and by its strongest peer.

    Args:
        work: What is done, so that a reader can judge it.
        ours: Seconds, megabytes or whatever ``unit`` says; ``None`` if it was not measured.
        peer: The same of the peer; ``None`` if it was not measured.
        peer_name: Who that is.
        unit: Of both.
        target: Least ratio that was aimed at, > 0; ``None`` without one.
        limit: Most that ``ours`` was to be, or least where more is better; ``None`` without one.
        more_is_better: Whether ``ours`` is good when it is large, as an accuracy is.
        aside: Whether it stands behind the others: a further case of what another line says.
    """

    work: str
    ours: float | None
    peer: float | None
    peer_name: str
    unit: str = "s"
    target: float | None = None
    limit: float | None = None
    more_is_better: bool = False
    aside: bool = False


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
    return f"{processor()}, torch {torch.__version__}, {torch.get_num_threads()} thread(s)"


def processor() -> str:
    """Name the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread, and as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def entry(tables: Sequence[Table], title: str, row: Any, column: str) -> float:
    """Look a number up in the first table whose title begins with ``title``.

    Args:
        tables: Where to look.
        title: Beginning of a title.
        row: First value of the row, or a tuple of its first values.
        column: Name of the column.

    Raises:
        LookupError: There is no such table, row or column.
    """
    table = next((table for table in tables if table.title.startswith(title)), None)
    if table is None:
        raise LookupError(f"expected a table whose title begins with {title!r}, got {[t.title for t in tables]}")
    key = row if isinstance(row, tuple) else (row,)
    found = next((values for values in table.rows if values[: len(key)] == key), None)
    names = [column.name for column in table.columns]
    if found is None or column not in names:
        raise LookupError(f"{table.title}: expected a row {key} and a column {column!r}, got the columns {names}")
    return found[names.index(column)]


def best(
    tables: Sequence[Table], title: str, rows: Sequence[Any], column: str, *, most: bool = False
) -> tuple[float, str]:
    """Return the least number (with ``most`` the largest) of some rows, and the name of its row."""
    return (max if most else min)((entry(tables, title, row, column), str(row)) for row in rows)


def unavailable(reason: str) -> NoReturn:
    """Leave, because this machine cannot run the benchmark; ``run_all.py`` tells the reason in its table."""
    print(reason, file=sys.stderr)
    raise SystemExit(UNAVAILABLE)


def main(
    tables: Callable[[], list[Table]],
    headlines: Callable[[list[Table]], list[Headline]] = lambda tables: [],
    short: Callable[[], list[Table]] | None = None,
    args: list[str] | None = None,
) -> None:
    """Print what ``tables`` measures.

    Args:
        tables: Measures.
        headlines: Picks headlines out of what was measured.
        short: Measures what the headlines need and no more; by default there is no shorter way.
        args: ``--short`` takes the shorter way, ``--json FILE`` writes all to one file as well; by default those of
            the command line.
    """
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = parser.parse_args(args)
    print(machine())
    measured = (short or tables)() if options.short else tables()
    for table in measured:
        table.print()
    if options.json is not None:
        write(options.json, measured, headlines(measured))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that every benchmark takes."""
    parser.add_argument("--short", action="store_true", help="measure what the headlines need and no more")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write tables and headlines to this file")


def write(path: Path, tables: Sequence[Table], headlines: Sequence[Headline]) -> None:
    """Write ``{"tables": [{"title", "caption", "records"}], "headlines": [...]}``; the folder is made."""
    documents = [{"title": t.title, "caption": t.caption, "records": json.loads(t.to_json())} for t in tables]
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {"tables": documents, "headlines": [asdict(headline) for headline in headlines]}
    path.write_text(json.dumps(found, indent=2) + "\n")


def _check(check: Callable[[Any, Any], None], name: str, actual: Any, reference: str, expected: Any) -> None:
    try:
        check(actual, expected)
    except AssertionError as error:
        raise AssertionError(f"{name!r} does not give the result of {reference!r}: {error}") from error
