"""The helpers that run scripts in new processes."""

import os
import time
from pathlib import Path

import pytest
from helpers import run_and_kill, run_ddp, run_python


def test_code_runs_in_a_new_process_with_one_thread():
    output = run_python("import os; print(os.getpid(), os.environ['OMP_NUM_THREADS'])").stdout
    process, threads = output.split()
    assert int(process) != os.getpid()
    assert threads == "1"


def test_new_process_knows_torch_and_nothing_of_this_package():
    code = "import sys; print(*('torch' in sys.modules, 'lightning_eff' in sys.modules, __name__))"
    assert run_python(code).stdout.split() == ["True", "False", "__main__"]


def test_fresh_interpreter_has_imported_nothing():
    assert run_python("import sys; print('torch' in sys.modules)", fresh=True).stdout.split() == ["False"]


def test_unseeded_numbers_of_two_processes_differ():
    code = "import random, numpy; print(random.random(), numpy.random.rand())"
    first, second = (run_python(code).stdout.split() for _ in range(2))
    assert first[0] != second[0]
    assert first[1] != second[1]


def test_file_runs_with_its_arguments_in_the_folder_given(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import os, sys; print(os.getcwd(), sys.argv[1], os.environ['COLOUR'])")
    assert run_python(script, "a", env={"COLOUR": "blue"}, cwd=tmp_path).stdout.split() == [str(tmp_path), "a", "blue"]


def test_rank_of_a_surrounding_run_does_not_leak_in(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert run_python("import os; print(os.environ.get('LOCAL_RANK'))").stdout.strip() == "None"


def test_failure_shows_the_end_of_the_output():
    with pytest.raises(AssertionError, match=r"ended with 1:\n(?s:.*)ValueError: seven"):
        run_python("raise ValueError('seven')")


def test_process_that_takes_too_long_is_ended():
    start = time.monotonic()
    with pytest.raises(AssertionError, match=r"within 1 s:\nhello"):
        run_python("import time; print('hello'); time.sleep(60)", timeout=1)
    assert time.monotonic() - start < 30


def alive(process: int) -> bool:
    # a killed process whose parent has not asked for its end is a zombie: dead, but still listed
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc to see whether a process lives")
def test_killed_script_takes_its_children_along():
    script = "import subprocess, time; print(subprocess.Popen(['sleep', '60']).pid); print('ready'); time.sleep(60)"
    output = run_and_kill(script, "ready")
    child = int(output.split()[0])
    for _ in range(50):
        if not alive(child):
            break
        time.sleep(0.1)
    assert not alive(child)


def test_script_is_killed_at_the_marker():
    output = run_and_kill("import time\nfor i in range(600): print('step', i); time.sleep(.1)", "step 2")
    assert output.splitlines() == ["step 0", "step 1", "step 2"]


def test_script_that_never_prints_the_marker_fails():
    with pytest.raises(AssertionError, match="before it printed 'ready'"):
        run_and_kill("print('hello')", "ready")


@pytest.mark.parametrize("fresh", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_processes_talk_to_each_other(fresh, tmp_path):
    run_ddp(
        """
import os
import torch
from pathlib import Path
from lightning.fabric import Fabric

fabric = Fabric(accelerator="cpu", devices=int(os.environ["DEVICES"]), strategy="ddp")
fabric.launch()
total = fabric.all_reduce(torch.tensor(fabric.global_rank + 1.0), reduce_op="sum")
Path(f"rank{fabric.global_rank}").write_text(str(total.item()))
""",
        tmp_path,
        fresh=fresh,
    )
    assert [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)] == ["3.0", "3.0"]


def test_failure_in_a_run_of_two_processes_is_reported(tmp_path):
    with pytest.raises(AssertionError, match="seven"):
        run_ddp("raise ValueError('seven')", tmp_path)


def test_process_that_fails_takes_the_others_along(tmp_path):
    start = time.monotonic()
    with pytest.raises(AssertionError, match="seven"):
        run_ddp(
            "import os, time\nif os.environ['LOCAL_RANK'] == '1': raise ValueError('seven')\ntime.sleep(60)", tmp_path
        )
    assert time.monotonic() - start < 30
