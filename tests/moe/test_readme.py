"""What the README and the docstrings print is what comes out."""

import doctest
import re
from importlib import import_module
from typing import Any

import pytest
from helpers import REPOSITORY, run_python

README = (REPOSITORY / "lightning_eff" / "moe" / "README.md").read_text()


def test_first_block_prints_what_the_readme_says() -> None:
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    told = re.findall(r"```text\n(.*?)```", README, re.DOTALL)[0]
    printed = run_python(code).stdout
    *lines, savings = printed.splitlines()
    *expected, expected_savings = told.splitlines()
    assert lines == expected
    assert float(savings) == pytest.approx(float(expected_savings), rel=1e-9)


def test_block_of_the_language_model_trains(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lightning_eff").symlink_to(REPOSITORY / "lightning_eff")
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "DecoderConfig.of" in block)
    names: dict[str, Any] = {}
    short = {"max_steps=300": "max_steps=1, limit_val_batches=1, enable_progress_bar=False, enable_model_summary=False"}
    for told, here in short.items():
        assert told in code
        code = code.replace(told, here)
    exec(code, names)
    assert names["trainer"].global_step == 1
    assert names["twin"].decoder.shape.n_active == names["config"].shape.n_active


@pytest.mark.parametrize("module", ["decoder", "layer", "metrics", "model"])
def test_examples_of_docstrings_of_the_network_hold(module: str) -> None:
    result = doctest.testmod(import_module(f"lightning_eff.moe.{module}"))
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("module", ["fitting", "laws", "plan", "planner", "sizes"])
def test_examples_of_docstrings_hold(module: str) -> None:
    result = doctest.testmod(import_module(f"lightning_eff.moe.scaling.{module}"))
    assert result.attempted > 0
    assert result.failed == 0


def test_laws_and_plans_need_no_torch() -> None:
    heavy = ("torch", "lightning", "matplotlib", "pandas")
    code = f"import sys; import lightning_eff.moe; print([name for name in {heavy} if name in sys.modules])"
    assert run_python(code, fresh=True).stdout.strip() == "[]"
