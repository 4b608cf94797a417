"""What the README and the docstrings print is what comes out."""

import doctest
import re
from importlib import import_module

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


@pytest.mark.parametrize("module", ["fitting", "laws", "plan", "planner", "sizes"])
def test_examples_of_docstrings_hold(module: str) -> None:
    result = doctest.testmod(import_module(f"lightning_eff.moe.scaling.{module}"))
    assert result.attempted > 0
    assert result.failed == 0


def test_laws_and_plans_need_no_torch() -> None:
    heavy = ("torch", "lightning", "matplotlib", "pandas")
    code = f"import sys; import lightning_eff.moe; print([name for name in {heavy} if name in sys.modules])"
    assert run_python(code).stdout.strip() == "[]"
