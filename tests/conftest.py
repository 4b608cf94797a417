"""What tests of every room share."""

from pathlib import Path

import pytest


@pytest.fixture
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """For the command line in this process: an empty folder, no arguments of pytest's, and seeds that go with it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lightning-eff"])
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # the command line puts its seed there
        monkeypatch.setenv(name, "0")
    return tmp_path
