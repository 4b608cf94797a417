"""Scripts in forks of a process that has imported torch and Lightning, for which a new interpreter takes four seconds.

That process knows nothing of this package or of the tests, has run nothing, and starts with the first script.
"""

from __future__ import annotations

import os
import random
import runpy
import signal
import sys
from collections.abc import Mapping
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import ModuleType
from typing import TextIO
from unittest.mock import patch

FORKS = get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "torch",
        "torch.distributed.fsdp",
        "lightning.pytorch.cli",
        "jsonargparse",
        "opacus",
        "scipy.optimize",
        "sklearn.datasets",
        "sklearn.model_selection",
        "torch_pruning",
    ]
)


def start(
    command: list[str], env: Mapping[str, str], cwd: str | Path | None, processes: int = 1
) -> tuple[ForkServerProcess, TextIO]:
    """Start what ``python COMMAND`` would, and return its process and what it prints.

    With several processes, they have the environment that Lightning's launcher gives those it starts; the process
    returned waits for them, and ends them all when one of them fails.
    """
    reader, writer = FORKS.Pipe(duplex=False)
    # the number of threads is read when torch is imported; and what started this process is not to be imported there
    with patch.dict(os.environ, OMP_NUM_THREADS="1"), patch.dict(sys.modules, __main__=ModuleType("__main__")):
        process = FORKS.Process(target=_run, args=(command, dict(env), str(cwd or Path.cwd()), writer, processes))
        process.start()
    writer.close()
    printed = os.fdopen(os.dup(reader.fileno()), errors="replace")
    reader.close()
    return process, printed


def _run(command: list[str], env: Mapping[str, str], cwd: str, output: Connection, processes: int) -> None:
    os.setsid()  # so that processes it starts can be ended with it
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    output.close()
    for printed in (sys.stdout, sys.stderr):
        printed.reconfigure(line_buffering=True, write_through=True)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    if processes > 1:
        _become_one_of(processes)
    _reseed()
    first, *args = command
    sys.argv = [first, *args]
    here = {"-c": "", "-m": cwd}.get(first, str(Path(first).parent))
    installed = [path for path in sys.path if path.startswith((sys.prefix, sys.base_prefix))]
    sys.path[:] = [here, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep)), *installed]
    if first == "-m":
        sys.argv = args
        runpy.run_module(args[0], run_name="__main__", alter_sys=True)
        return
    main = sys.modules["__main__"] = ModuleType("__main__")
    if first == "-c":
        code, file = args[0], "<string>"
        sys.argv = ["-c", *args[1:]]
    else:
        code, file = Path(first).read_text(), first
        main.__file__ = first
    exec(compile(code, file, "exec"), main.__dict__)


def _become_one_of(processes: int) -> None:
    """Return in so many new processes; this one waits for them and ends as they do."""
    os.environ.update(NODE_RANK="0", WORLD_SIZE=str(processes))
    running = set()
    for rank in range(processes):
        process = os.fork()
        if process == 0:
            os.environ["LOCAL_RANK"] = str(rank)
            return
        running.add(process)
    while running:
        process, status = os.wait()
        running.discard(process)
        if status:
            for other in running:
                os.kill(other, signal.SIGKILL)
            os._exit(1)
    os._exit(0)


def _reseed() -> None:
    """Forks have one state of the unseeded generators, new interpreters have not."""
    import numpy as np

    random.seed()
    np.random.seed()
