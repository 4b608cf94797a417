"""All benchmarks, one after the other, and one table of what they found.

Every script of this folder that names its ``TECHNIQUE`` runs in a fresh process on one thread, so that a crash or a
peer that is not installed loses one row and no more. Results are kept per script: run it again and it goes on where it
was broken off, unless machine, versions, script or mode have changed.

    python -m pip install -e ".[bench]"
    python examples/benchmarks/run_all.py                   what the headlines need and no more
    python examples/benchmarks/run_all.py --full            all cases and repeats of every benchmark
    python examples/benchmarks/run_all.py --only surgery dirichlet --out /tmp/some.md
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from harness import UNAVAILABLE, Headline, processor

from lightning_eff.reporting import Column, Table

FOLDER = Path(__file__).resolve().parent
# Files that measure nothing by themselves, and what they are.
NO_BENCHMARKS = {
    "run_all": "runs the others",
    "harness": "timing, headlines and command line of all",
    "cifar_networks": "networks for several of them",
    "glimpse_torchrl": "torchrl as a peer of glimpse_agent.py",
}
VERSIONS = ("torch", "torchvision", "lightning", "lightning-eff")
PEERS = (
    "backpack-for-pytorch", "captum", "chinchilla", "earlyon", "opacus", "scipy", "shapiq", "stable-baselines3",
    "torch-pruning", "torchrl", "transformers",
)  # fmt: skip
SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
Entry = dict[str, Any]  # what is kept of one benchmark


@dataclass(frozen=True)
class Benchmark:
    """A script that names its technique."""

    path: Path
    technique: str

    @property
    def name(self) -> str:
        """Of the script, without suffix."""
        return self.path.stem


def discover(folder: Path) -> list[Benchmark]:
    """Find the scripts that name their ``TECHNIQUE``, by technique, then by name; nothing is imported."""
    found = []
    for path in folder.glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["TECHNIQUE"]:
                found.append(Benchmark(path, ast.literal_eval(node.value)))
    return sorted(found, key=lambda benchmark: (benchmark.technique, benchmark.name))


def environment() -> dict[str, str]:
    """What a figure depends on: machine, system and versions of this package, of what it stands on and of peers."""
    found = {
        "processor": processor(),
        "cores": str(os.cpu_count()),
        "system": platform.platform(),
        "python": platform.python_version(),
    }
    for name in (*VERSIONS, *PEERS):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def measure(benchmark: Benchmark, full: bool) -> Entry:
    """Run one benchmark in a process of its own.

    Returns:
        ``status`` ("ok", "unavailable" or "failed"), ``reason``, ``tables``, ``headlines``, CPU and elapsed seconds,
        load average before and after, and when.
    """
    before, start, load = _cpu(), time.monotonic(), _load()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, str(benchmark.path), "--json", str(out), *([] if full else ["--short"])]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        written = json.loads(out.read_text()) if done.returncode == 0 else {"tables": [], "headlines": []}
    status = {0: "ok", UNAVAILABLE: "unavailable"}.get(done.returncode, "failed")
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    if lines[-1].startswith("ModuleNotFoundError"):
        status, lines = "unavailable", [f"{lines[-1].split(chr(39))[1]} is not installed"]
    if status == "failed":
        print(done.stderr, file=sys.stderr)
    return {
        "status": status,
        "reason": "" if status == "ok" else lines[-1],
        **written,
        "cpu_seconds": round(_cpu() - before, 1),
        "seconds": round(time.monotonic() - start, 1),
        "load": [load, _load()],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def run(
    benchmarks: Iterable[Benchmark], out: Path, *, full: bool = False, again: bool = False, keep: Sequence[str] = ()
) -> dict[str, Entry]:
    """Run benchmarks whose results are not there yet, and write all results after each.

    Args:
        benchmarks: In this order.
        out: ``.md`` file of the tables; results are kept in the ``.json`` file beside it.
        full: All cases, not only those of the headlines.
        again: Also what is there already.
        keep: Names of other benchmarks whose results stay in the tables.

    Returns:
        Result by name of the benchmark.
    """
    here, file = environment(), out.with_suffix(".json")
    kept = json.loads(file.read_text()) if file.exists() else {}
    old: dict[str, Entry] = kept["benchmarks"] if kept.get("environment") == here else {}
    found = {name: old[name] for name in keep if name in old}
    for benchmark in benchmarks:
        made_by = {"script": hashlib.sha256(benchmark.path.read_bytes()).hexdigest()[:16], "full": full}
        earlier = old.get(benchmark.name, {})
        if not again and earlier.get("status") == "ok" and made_by.items() <= earlier.items():
            print(f"{benchmark.name}: measured {earlier['date']}", flush=True)
            found[benchmark.name] = earlier
            continue
        print(f"{benchmark.name}: ", end="", flush=True)
        entry = {"technique": benchmark.technique, **made_by, **measure(benchmark, full)}
        print(f"{entry['reason'] or 'done'}, {entry['cpu_seconds']} CPU seconds", flush=True)
        found[benchmark.name] = entry
        rest = {name: entry for name, entry in old.items() if name not in found}  # not lost if broken off here
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"environment": here, "benchmarks": found | rest}, indent=1) + "\n")
    file.write_text(json.dumps({"environment": here, "benchmarks": found}, indent=1) + "\n")
    missing = [name for name in keep if name not in found]
    out.write_text(markdown(here, found, missing), encoding="utf-8")
    return found


def markdown(where: dict[str, str], found: dict[str, Entry], missing: Sequence[str] = ()) -> str:
    """Everything as it is to stand in a README: the machine, the headlines, further cases, how busy the machine was."""
    versions = ", ".join(f"{name} {where[name]}" for name in (*VERSIONS, *PEERS) if where[name] != "not installed")
    place = f"{where['processor']}, {where['cores']} cores, {where['system']}, Python {where['python']}"
    tables = headline_table(found, missing), further_table(found), run_table(found)
    return "\n".join([f"{place}; {versions}.\n", *(table.to_markdown() for table in tables if table.rows)])


def headline_table(found: dict[str, Entry], missing: Sequence[str] = ()) -> Table:
    """One row a headline; benchmarks that could not run say why, those that did not run stand in the caption."""
    lines = [Headline(**fields) for entry in found.values() for fields in entry["headlines"]]
    here = [line for line in lines if not line.aside]
    aims = [f"{sum(verdicts)} of {len(verdicts)}" for verdicts in (_verdicts(here), _verdicts(lines))]
    short = not all(entry["full"] for entry in found.values())
    caption = (
        "The same work on one thread, CPU time, results compared before anything is timed. `better by` is peer / ours, "
        "or ours / peer where more is better: above 1x ours is better. Aims met (before rounding): "
        f"{aims[0]}, with all further cases {aims[1]}. "
        f"`python examples/benchmarks/run_all.py{'' if short else ' --full'}` makes this table, "
        f"`python examples/benchmarks/SCRIPT{' --short' if short else ''}` measures its rows."
    )
    if missing:
        caption += f" Not measured: {', '.join(f'`{name}.py`' for name in missing)}."
    return _table("Benchmarks", found, False, caption)


def further_table(found: dict[str, Entry]) -> Table:
    """Headlines that stand behind the others."""
    return _table("Further cases", found, True, "")


def _table(title: str, found: dict[str, Entry], aside: bool, caption: str) -> Table:
    rows: list[list[Any]] = []
    for name, entry in sorted(found.items(), key=lambda item: (item[1]["technique"], item[0])):
        script, technique = f"`{name}.py`", entry["technique"]
        if entry["status"] != "ok" and not aside:
            rows.append([technique, entry["reason"], *[None] * 6, script])
        for line in (Headline(**fields) for fields in entry["headlines"]):
            if line.aside == aside:
                verdict = {True: "yes", False: "no", None: None}[met(line)]
                ours, peer = (_amount(value, line.unit) for value in (line.ours, line.peer))
                rows.append(
                    [technique, line.work, ours, peer, line.peer_name, _times(ratio(line)), _aim(line), verdict, script]
                )
    last = None
    for row in rows:  # the name once for all rows of a technique
        row[0], last = "" if row[0] == last else row[0], row[0]
    columns = [
        "technique", "work", Column("ours", align="right"), Column("peer", align="right"), "which peer",
        Column("better by", align="right"), Column("aim", align="right"), "met", "script",
    ]  # fmt: skip
    return Table(title, columns, rows, caption)


def run_table(found: dict[str, Entry]) -> Table:
    """What each benchmark took, and how busy the machine was."""
    rows = [
        [f"`{name}.py`", entry["status"], entry["cpu_seconds"], entry["seconds"], *entry["load"], entry["date"][:10]]
        for name, entry in sorted(found.items())
    ]
    columns = ["script", "status", Column("CPU [s]", ".0f"), Column("elapsed [s]", ".0f")]
    columns += [Column(f"load {when}", ".1f") for when in ("before", "after")]
    caption = "Load is that of the last minute; above the number of cores other work took its share of the machine."
    return Table("How they ran", [*columns, "date"], rows, caption)


def ratio(line: Headline) -> float | None:
    """How many times better than the peer."""
    if line.ours is None or line.peer is None:
        return None
    over, under = (line.ours, line.peer) if line.more_is_better else (line.peer, line.ours)
    return over / under if under else None


def met(line: Headline) -> bool | None:
    """Whether what was aimed at is reached; ``None`` where nothing was, or nothing was measured."""
    verdicts = []
    if line.target is not None:
        better = ratio(line)
        if better is None:
            return None
        verdicts.append(better >= line.target)
    if line.limit is not None:
        if line.ours is None:
            return None
        verdicts.append(line.ours >= line.limit if line.more_is_better else line.ours <= line.limit)
    return all(verdicts) if verdicts else None


def _verdicts(lines: Iterable[Headline]) -> list[bool]:
    return [verdict for verdict in map(met, lines) if verdict is not None]


def _aim(line: Headline) -> str | None:
    parts = [] if line.target is None else [f"≥ {_times(line.target)}"]
    if line.limit is not None:
        parts.append(f"{'≥' if line.more_is_better else '≤'} {_amount(line.limit, line.unit)}")
    return ", ".join(parts) or None


def _times(value: float | None) -> str | None:
    return None if value is None else f"{value:,.0f}x" if value >= 100 else f"{value:.3g}x"


def _amount(value: float | None, unit: str) -> str | None:
    if value is None:
        return None
    if unit in SECONDS:
        value *= SECONDS[unit]
        unit = next((unit for unit, size in SECONDS.items() if value >= size), "us")
        value /= SECONDS[unit]
    digits = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{digits} {unit}".strip()


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _load() -> float:
    return round(os.getloadavg()[0], 1)


def main(args: list[str] | None = None, folder: Path = FOLDER) -> int:
    """Run from the command line; the exit status is 1 if a benchmark failed."""
    benchmarks = discover(folder)
    names = [benchmark.name for benchmark in benchmarks]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--skip", nargs="+", choices=names, default=[], metavar="NAME")
    parser.add_argument("--full", action="store_true", help="all cases and repeats, not only what the headlines need")
    parser.add_argument("--again", action="store_true", help="measure anew what is there already")
    parser.add_argument("--out", type=Path, default=folder / "results.md", metavar="FILE.md")
    options = parser.parse_args(args)
    if options.out.suffix != ".md":
        parser.error(f"--out: expected a file name that ends in .md, got {options.out.name!r}")
    chosen = [b for b in benchmarks if b.name in (options.only or names) and b.name not in options.skip]
    others = [name for name in names if name not in {b.name for b in chosen}]
    found = run(chosen, options.out, full=options.full, again=options.again, keep=others)
    headline_table(found).print()
    return int(any(found[benchmark.name]["status"] == "failed" for benchmark in chosen))


if __name__ == "__main__":
    raise SystemExit(main())
