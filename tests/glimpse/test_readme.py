"""What the README of the room shows, works."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from helpers import REPOSITORY

from lightning_eff import glimpse
from lightning_eff.glimpse.policies import POLICY_NAMES
from lightning_eff.surgery.state import untouched_generators

README = (REPOSITORY / "lightning_eff/glimpse/README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_run_of_the_readme_trains_tests_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quick = BLOCKS[0]
    for slow, fast in {
        "canvas=96)": "canvas=96, train_size=128, val_size=0, test_size=64)",
        "pretrain_epochs=40, rl_only_epochs=7": "pretrain_epochs=1, rl_only_epochs=1",
        "random_steps=20": "random_steps=2",
        "max_epochs=64": "max_epochs=3, limit_val_batches=0, logger=False, enable_progress_bar=False",
    }.items():
        assert slow in quick
        quick = quick.replace(slow, fast)
    with untouched_generators():
        exec(quick, names := {})
    assert (tmp_path / "explore.png").stat().st_size > 10_000
    assert names["seen"].views.shape == (64, 3, 3)
    assert {"policy", "random"} == set(names["model"].results["test"])


def test_the_run_of_the_readme_teaches_a_backbone_that_knows_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default learning rate is for trained backbones: with it this run ends where it began."""
    monkeypatch.chdir(tmp_path)
    with untouched_generators():
        exec(BLOCKS[0].split("trainer = ")[0], names := {})
        optimizer = names["model"].configure_optimizers()[-1]
    assert optimizer.param_groups[0]["lr"] >= 1e-3


def test_worlds_and_policies_of_the_readme_need_no_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with untouched_generators():
        exec(BLOCKS[1], names := {})
    assert len([json.loads(line) for line in (tmp_path / "trajectories.jsonl").read_text().splitlines()]) == 2
    assert bool((names["grid"].scores[:, -1] > names["grid"].scores[:, 0]).all())
    assert torch.equal(names["still"].actions.unique(), torch.tensor([0.5]))


def test_the_readme_knows_every_policy_and_names_nothing_that_is_not_there() -> None:
    table = README.split("Policies to compare with")[1].split("`evaluate_policies")[0]
    named = set(re.findall(r"`([a-z_]+)`", table)) - {"make_policy", "baselines"}
    assert named == set(POLICY_NAMES)
    for name in re.findall(r"`([A-Z][A-Za-z]+)[`(.]", README):
        known = hasattr(glimpse, name) or name in (
            "ImageDecoder",
            "SegmentationHead",
            "GlimpseReport",
            "StemTransformer",
        )
        assert known, name
