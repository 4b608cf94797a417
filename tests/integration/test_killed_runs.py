"""Runs that are killed at any moment: what is on disk is whole, and whoever goes on ends where nobody was killed."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from mutations import same
from small_runs import RUNS

from lightning_eff.accounting import PrivacyLedger

# columns and entries that tell of time
TIMES = {"seconds", "latency ms"}


class Killed(BaseException):
    """What stands for SIGKILL in this process; nothing catches it."""


class Writes:
    """Watches what is written below a folder; dies at one of the writes, which it leaves half done."""

    folder: str | None = None
    count = 0
    dies_at: int | None = None
    _installed = False

    @classmethod
    @contextmanager
    def watched(cls, folder: Path, dies_at: int | None = None) -> Iterator[type[Writes]]:
        """Count writes; die at number ``dies_at``, from 1."""
        if not cls._installed:  # there is no way to take one off again
            sys.addaudithook(cls._hook)
            cls._installed = True
        cls.folder, cls.count, cls.dies_at = str(folder.resolve()), 0, dies_at
        try:
            yield cls
        finally:
            cls.folder = None

    @classmethod
    def _hook(cls, event: str, args: tuple[Any, ...]) -> None:
        if cls.folder is None or event not in ("open", "os.rename", "os.remove"):
            return
        path = args[1] if event == "os.rename" else args[0]
        if not isinstance(path, str | Path) or not str(path).startswith(cls.folder):
            return
        if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR):
            return
        cls.count += 1
        if cls.count == cls.dies_at:
            cls.folder = None
            if event == "open":  # as far as it came
                with open(path, "ab" if args[2] & os.O_APPEND else "wb") as file:
                    file.write(b'{"half')
            raise Killed


def told(path: Path) -> Any:
    """What a file says, without times; None for pictures and for what is the same only in its answers."""
    if path.suffix == ".json":
        return _timeless(json.loads(path.read_text()))
    if path.suffix == ".jsonl":
        return sorted(path.read_text().splitlines())
    if path.suffix == ".csv":
        return [_timeless(row) for row in csv.DictReader(path.read_text().splitlines())]
    return None


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(entry) for key, entry in value.items() if key not in TIMES}
    return [_timeless(entry) for entry in value] if isinstance(value, list) else value


def left_by(folder: Path) -> dict[str, Any]:
    """Files of a run and what they say; checkpoints and journals are looked at elsewhere."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.parent.name != "checkpoints"]
    return {str(path.relative_to(folder)): told(path) for path in files if path.suffix not in (".part", ".lock")}


@cache
def undisturbed(name: str) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Weights of a run nobody disturbs, what its files say, and its number of writes."""
    with TemporaryDirectory() as folder, Writes.watched(Path(folder)) as writes:
        module, _ = RUNS[name].fit(Path(folder))
        return dict(module.state_dict()), left_by(Path(folder)), writes.count


def assert_checkpoints_are_whole(folder: Path) -> None:
    """Every checkpoint loads; none tells of fewer private steps than made its weights."""
    for path in (folder / "checkpoints").glob("*.ckpt"):
        checkpoint = torch.load(path, weights_only=True)
        if "lightning_eff.privacy" in checkpoint:
            ledger = PrivacyLedger()
            ledger.load_state_dict(checkpoint["lightning_eff.privacy"]["ledger"])
            assert ledger.steps >= checkpoint["global_step"]


def go_on(name: str, folder: Path) -> None:
    """Resume, and compare the end with that of the run nobody disturbed."""
    weights, files, _ = undisturbed(name)
    assert_checkpoints_are_whole(folder)
    module, _ = RUNS[name].fit(folder)
    assert same(dict(module.state_dict()), weights)
    now = left_by(folder)
    assert now.keys() == files.keys()
    for path, says in files.items():
        assert same(now[path], says), path


def die(name: str, folder: Path, at: int) -> None:
    """Break a run off in the middle of one of its writes."""
    with pytest.raises(Killed), Writes.watched(folder, at):
        RUNS[name].fit(folder)


class DiesAt(Callback):
    """Breaks a run off before a step, counted from 0."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_train_batch_start(self, trainer: Any, *others: Any) -> None:
        if trainer.global_step == self._step:
            raise Killed


def test_module_that_asks_for_the_number_of_steps_goes_on_where_it_was_in_the_epoch(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        RUNS["MoEScalingModule"].fit(tmp_path, DiesAt(6))
    go_on("MoEScalingModule", tmp_path)


# one moment of each, early or late: at the end of an epoch, or before reports are written
EARLY = {"ShapleyPruningCallback", "RandomChannelPruningCallback", "EarlyExitModule mixed", "AdaGlimpseModule"}


@pytest.mark.parametrize("name", RUNS)
def test_run_broken_off_in_the_middle_of_a_write_goes_on_to_the_same_end(name: str, tmp_path: Path) -> None:
    part = 0.3 if name in EARLY else 0.95
    die(name, tmp_path, max(1, round(part * undisturbed(name)[2])))
    go_on(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_run_broken_off_at_any_write_goes_on_to_the_same_end(name: str, tmp_path: Path) -> None:
    for at in range(1, undisturbed(name)[2] + 1):
        (folder := tmp_path / str(at)).mkdir()
        die(name, folder, at)
        go_on(name, folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_run_killed_three_times_goes_on_to_the_same_end(name: str, tmp_path: Path) -> None:
    """SIGKILL to a process of its own at moments drawn from a seed, from its first file on."""
    moments = random.Random(name)
    script = Path(__file__).with_name("small_runs.py")
    for kill in range(3):
        before = _names(tmp_path)
        process = subprocess.Popen(
            [sys.executable, str(script), str(tmp_path), name], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        try:
            began = time.monotonic()
            while _names(tmp_path) == before and process.poll() is None and time.monotonic() - began < 120:
                time.sleep(0.01)
            time.sleep(moments.uniform(0, 0.6))
        finally:
            process.send_signal(signal.SIGKILL)
            output = process.communicate()[0].decode()
        assert process.returncode in (-signal.SIGKILL, 0), f"kill {kill}: {output}"
        assert_checkpoints_are_whole(tmp_path)
    go_on(name, tmp_path)


def _names(folder: Path) -> set[str]:
    """Files below a folder in which another process writes and deletes."""
    return {str(Path(where) / name) for where, _, names in os.walk(folder) for name in names}
