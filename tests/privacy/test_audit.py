"""The attack on the private step succeeds exactly as often as theory says, and notices a step that is broken."""

from pathlib import Path

import pytest
from helpers import REPOSITORY, run_python

AUDIT = REPOSITORY / "examples" / "digits_private_audit.py"


@pytest.mark.slow
def test_private_step_withstands_the_attack_as_theory_says(tmp_path: Path) -> None:
    output = run_python(AUDIT, "--trials", "300", "--seed", "1", cwd=tmp_path).stdout
    assert "NO" not in output
    assert (tmp_path / "runs/digits_private_audit/scores.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["little-noise", "loose-clipping", "always-drawn"])
def test_a_broken_step_is_found_out(fault: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="does not give what theory promises"):
        run_python(AUDIT, "--trials", "150", "--seed", "1", "--fault", fault, cwd=tmp_path)
