"""Run what a sweep still lacks, one process a run; what was killed goes on from its last checkpoint."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml  # type: ignore[import-untyped]

from lightning_eff.moe.scaling.runs import run_names
from lightning_eff.moe.sweep.points import RUNS_FILE, read_rows

_LOG = "log.txt"
_TAIL = 15  # lines of a failed run that are shown


def run_sweep(sweep: str | Path, most: int | None = None) -> list[str]:
    """Train every run that has no row in the sweep's ``runs.csv`` yet.

    Each is a process of its own, ``python -m lightning_eff fit --config RUN.yaml``, whose output goes to
    ``runs/RUN/log.txt``. Paths in the YAML are those of the folder this is called in. A run that was killed goes on
    from its last whole checkpoint. Several callers may work on one sweep: none starts a run that another is at, also
    not if the other caller was killed and its run goes on alone. Needs a POSIX system.

    Args:
        sweep: Folder that :func:`make_sweep` wrote.
        most: Start at most so many runs, >= 0; None is all.

    Returns:
        Names of the runs that are finished now, in the order of the sweep.

    Raises:
        FileNotFoundError: The folder holds no sweep, or not all of it.
        ValueError: The folder is not where the sweep was made.
        RuntimeError: Runs have failed; the others have been run. The message holds the end of their output.
    """
    folder = Path(sweep).resolve()
    names = [row["run_name"] for row in read_rows(folder)]
    _check(folder, names)
    done = run_names(folder / RUNS_FILE)
    failed: dict[str, str] = {}
    started, waiting = 0, [name for name in names if name not in done]
    print(f"{len(names)} runs, {len(names) - len(waiting)} finished before", flush=True)
    # runs that another caller is at are looked at again when nothing else is left
    for wait in (False, True):
        for name in list(waiting):
            if most is not None and started >= most:
                break
            with _lock(folder / "runs" / name, wait) as lock:
                if lock is None:
                    print(f"{name}: somebody else is at it", flush=True)
                    continue
                waiting.remove(name)
                if name in run_names(folder / RUNS_FILE):
                    continue
                started += 1
                print(f"{name} ...", flush=True)
                error = _train(folder, name, lock)
                if error:
                    failed[name] = error
    if failed:
        told = "\n".join(f"{name}: {error}" for name, error in failed.items())
        raise RuntimeError(f"{len(failed)} of {len(names)} runs failed; run the sweep again to try once more\n{told}")
    done = run_names(folder / RUNS_FILE)
    return [name for name in names if name in done]


def _check(folder: Path, names: list[str]) -> None:
    for name in names:
        config = folder / f"{name}.yaml"
        if not config.is_file():
            raise FileNotFoundError(f"the sweep lacks {config}")
        made_for = yaml.safe_load(config.read_text(encoding="utf-8"))["trainer"].get("default_root_dir")
        if made_for != str(folder / "runs" / name):
            raise ValueError(f"{config} was made for another folder than {folder}: make the sweep where it is run")


@contextmanager
def _lock(folder: Path, wait: bool) -> Iterator[int | None]:
    """Hold the right to train the run of a folder; None if another has it and nobody wants to wait.

    The lock belongs to the open file, not to a process: a run that has the file, too, holds it although who started
    the run was killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield file
    finally:
        os.close(file)


def _train(folder: Path, name: str, lock: int) -> str | None:
    """Train a run to its end; return what went wrong, if something did."""
    runs = folder / "runs" / name
    checkpoint = _last_checkpoint(runs)
    begun = time.monotonic()
    with (runs / _LOG).open("ab") as log:
        command = _command(folder / f"{name}.yaml", checkpoint)
        ended = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, pass_fds=(lock,))
    if ended.returncode == 0 and name in run_names(folder / RUNS_FILE):
        again = f", from {checkpoint.name}" if checkpoint else ""
        print(f"{name} finished in {time.monotonic() - begun:.0f} s{again}", flush=True)
        return None
    output = (runs / _LOG).read_text(encoding="utf-8", errors="replace").splitlines()
    what = f"ended with status {ended.returncode}" if ended.returncode else "ended, but left no row"
    print(f"{name} {what}", flush=True)
    return f"{what}; the end of {runs / _LOG}:\n" + "\n".join(output[-_TAIL:])


def _command(config: Path, checkpoint: Path | None) -> list[str]:
    command = [sys.executable, "-m", "lightning_eff", "fit", "--config", str(config)]
    return command if checkpoint is None else [*command, "--ckpt_path", str(checkpoint)]


def _last_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint that is whole, and remove those that were cut off by a kill."""
    for path in sorted(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime, reverse=True):
        # where weights are shared out it is a folder, in which this file is written last
        file = path / "meta.pt" if path.is_dir() else path
        if zipfile.is_zipfile(file):  # the directory of the archive stands at its end
            return path
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    return None
