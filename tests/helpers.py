"""Run scripts in new processes, alone, on two, by the command line or killed half-way; or in this process."""

import importlib.util
import logging
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import ModuleType
from typing import IO, Self
from unittest.mock import patch

import forks

REPOSITORY = Path(__file__).resolve().parent.parent
EXAMPLES = REPOSITORY / "examples"


def import_script(path: Path) -> ModuleType:
    """Import a script without running it."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses and pickles look classes up by their module
    spec.loader.exec_module(module)
    return module


def run_here(path: Path, *args: str) -> None:
    """Run a script in this process, which costs no imports; what it sets up for itself ends with it."""
    with own_setup(str(path), *args), patch.object(sys, "path", [str(path.parent), *sys.path]):
        runpy.run_path(str(path), run_name="__main__")


@contextmanager
def own_setup(*argv: str) -> Iterator[None]:
    """Command line, environment, generators, levels of logs, filters of warnings and threads until the block ends."""
    import torch

    from lightning_eff.surgery.state import untouched_generators

    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels, threads = [one.level for one in loggers], torch.get_num_threads()
    with patch.object(sys, "argv", list(argv)), patch.dict(os.environ), warnings.catch_warnings():
        try:
            with untouched_generators():
                yield
        finally:
            torch.set_num_threads(threads)
            for one, level in zip(loggers, levels, strict=True):
                one.setLevel(level)


def run_python(
    code_or_file: str | Path,
    *args: str,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    timeout: float = 300,
    fresh: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run code (``str``) or a file (``Path``) in a new process; AssertionError with the end of its output if it
    fails or takes longer than ``timeout`` seconds. Processes it started end with it.

    ``fresh``: in a new interpreter, where it matters what is imported, how strings are hashed or what memory it takes;
    else in a fork of one that has imported torch and Lightning.
    """
    command = [str(code_or_file)] if isinstance(code_or_file, Path) else ["-c", code_or_file]
    return _run([*command, *args], env, cwd, timeout, fresh)


def run_cli(
    *args: str, cwd: str | Path, env: Mapping[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run ``python -m lightning_eff ARGS``."""
    return _run(["-m", "lightning_eff", *args], env, cwd, timeout)


# A process that ends first would take the others along, and Gloo's threads may outlive an interpreter and abort it
# (pytorch/pytorch#190489): all wait for each other, close their group and leave without the interpreter's own end.
END_TOGETHER = """
import os, sys, torch.distributed
if torch.distributed.is_initialized():
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
"""


def run_ddp(
    source: str,
    tmp_path: Path,
    *args: str,
    processes: int = 2,
    env: Mapping[str, str] | None = None,
    timeout: float = 300,
    fresh: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run a script that builds ``Trainer(accelerator="cpu", devices=DEVICES, strategy="ddp")``, on gloo.

    The processes find each other by the environment that Lightning's launcher sets; with ``fresh``, Lightning itself
    starts the others, in new interpreters. The number of processes is in the environment variable ``DEVICES`` as well;
    the script runs in ``tmp_path``.
    """
    script = tmp_path / "ddp_script.py"
    script.write_text(source + END_TOGETHER)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ddp = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DEVICES": str(processes)}
    return _run([str(script), *args], {**ddp, **(env or {})}, tmp_path, timeout, fresh, processes)


def run_and_kill(
    script: str | Path,
    marker: str,
    *args: str,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    timeout: float = 300,
) -> str:
    """Start a script (source or file), kill it (SIGKILL) when it prints a line that holds ``marker``, and return what
    it printed; AssertionError if it ends by itself or does not print the marker in time."""
    command = [str(script)] if isinstance(script, Path) else ["-c", script]
    lines = []
    with _Running([*command, *args], env, cwd, timeout) as running:
        for line in running.printed:
            lines.append(line)
            if marker in line:
                return "".join(lines)
    raise AssertionError(f"the script ended or was late before it printed {marker!r}:\n{_tail(''.join(lines))}")


def _run(
    command: list[str],
    env: Mapping[str, str] | None,
    cwd: str | Path | None,
    timeout: float,
    fresh: bool = False,
    processes: int = 1,
) -> subprocess.CompletedProcess[str]:
    with _Running(command, env, cwd, timeout, fresh, processes) as running:
        output = running.printed.read()
        code = running.wait()
    if running.late:
        raise AssertionError(f"expected an end within {timeout} s:\n{_tail(output)}")
    if code != 0:
        raise AssertionError(f"the process ended with {code}:\n{_tail(output)}")
    return subprocess.CompletedProcess(command, code, output)


class _Running:
    """A process that is killed when its time is over or the block ends, with those it started."""

    def __init__(
        self,
        command: list[str],
        env: Mapping[str, str] | None,
        cwd: str | Path | None,
        timeout: float,
        fresh: bool = False,
        processes: int = 1,
    ) -> None:
        # what a surrounding run may have set must not reach the new process
        launcher = ("LOCAL_RANK", "NODE_RANK", "RANK", "WORLD_SIZE", "GROUP_RANK", "PL_GLOBAL_SEED", "PL_SEED_WORKERS")
        inherited = {name: value for name, value in os.environ.items() if name not in launcher}
        given = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **(env or {})}
        # what a test puts beside it comes on top: a fork finds the package by this alone
        paths = [given.get("PYTHONPATH"), str(REPOSITORY), str(REPOSITORY / "tests"), inherited.get("PYTHONPATH")]
        environment = {**inherited, **given, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        self._process: subprocess.Popen[str] | ForkServerProcess
        self.printed: IO[str]
        if fresh:
            self._process = subprocess.Popen(
                [sys.executable, *command],
                env=environment,
                cwd=cwd,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,  # so that processes it starts can be ended with it
            )
            assert self._process.stdout is not None
            self.printed = self._process.stdout
        else:
            self._process, self.printed = forks.start(command, environment, cwd, processes)
        self.late = False
        self._timer = threading.Timer(timeout, self._end)
        self._timer.start()

    def wait(self) -> int:
        """Exit status, once it has ended."""
        if isinstance(self._process, subprocess.Popen):
            return self._process.wait()
        self._process.join()
        assert self._process.exitcode is not None
        return self._process.exitcode

    def kill(self) -> None:
        """End the process and those it started that are still there; gone ones are fine."""
        assert self._process.pid is not None
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()  # a fork that has just begun has no group yet

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        self.kill()
        self.wait()
        self.printed.close()

    def _end(self) -> None:
        self.late = True
        self.kill()


def _tail(output: str, lines: int = 40) -> str:
    return "\n".join(output.splitlines()[-lines:])
