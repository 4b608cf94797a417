"""The examples of early exits: their YAML, their scripts, and what they promise of real images."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from helpers import REPOSITORY, run_cli, run_python

from lightning_eff.data import FashionMNISTDataModule
from lightning_eff.early_exit.inference.leaving import select_from_all

EXAMPLES = REPOSITORY / "examples"
FASHION = Path("/usr/share/datasets/fashion-mnist")
needs_fashion = pytest.mark.skipif(not FASHION.is_dir(), reason="Fashion-MNIST is not at hand")


def script(path: str) -> ModuleType:
    """Import an example without running it."""
    spec = importlib.util.spec_from_file_location(Path(path).name, EXAMPLES / f"{path}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES / "benchmarks")  # where the scripts find their harness
    monkeypatch.delitem(sys.modules, "harness", raising=False)
    return script("benchmarks/early_exit")


def test_yaml_trains_calibrates_and_reports(tmp_path: Path) -> None:
    config = yaml.safe_load((EXAMPLES / "configs" / "early_exit.yaml").read_text())
    config["trainer"].update(max_epochs=2, limit_train_batches=5)
    (tmp_path / "fast.yaml").write_text(yaml.safe_dump(config))
    run_cli("fit", "--config", str(tmp_path / "fast.yaml"), cwd=tmp_path)
    folder = tmp_path / "runs" / "early_exit"
    assert {"curve.json", "thresholds.json", "history.png"} <= {path.name for path in (folder / "val").iterdir()}
    told = json.loads((folder / "val" / "thresholds.json").read_text())["thresholds"]
    held = torch.load(folder / "calibrated.ckpt", weights_only=True)["state_dict"]["network.score_thresholds"]
    assert [one if one is None else pytest.approx(one) for one in told] == [
        None if one == torch.inf else one for one in held.tolist()
    ]


def test_benchmark_can_be_imported(benchmark: ModuleType) -> None:
    assert sum(benchmark.SHARES) < 1


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # by what earlyon counts operations with
@pytest.mark.filterwarnings("ignore:backbone reuses module")  # and so it cannot count
def test_all_engines_of_the_benchmark_give_the_same_answers(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("earlyon", reason="earlyon, the peer of the benchmark, is not installed")
    monkeypatch.setattr(benchmark, "SAMPLES", 64)
    ours, peer, images = benchmark.networks(width=4)
    with torch.no_grad():
        expected = select_from_all(ours.rule, ours(images))
    assert (expected.exit_index.bincount(minlength=4)[:3] / 64).tolist() == pytest.approx(benchmark.SHARES, abs=0.02)
    contenders = benchmark.engines(ours, peer, images, batch=16)
    assert {"off", "hooks", "staged", "stream", "earlyon"} <= set(contenders)
    for run in contenders.values():
        benchmark.same_answers(run(), (expected.logits, expected.exit_index))
    for name, run in benchmark.engines(ours, peer, images[:8], batch=1).items():
        if name != "all exits disabled":
            benchmark.same_answers(run(), (expected.logits[:8], expected.exit_index[:8]))


@pytest.mark.slow
@needs_fashion
def test_fashion_example_runs_in_its_fast_variant(tmp_path: Path) -> None:
    run_python(EXAMPLES / "fashion_early_exit.py", "--fast", "--epochs", "2", "--dirpath", str(tmp_path), cwd=tmp_path)
    written = {path.name for path in tmp_path.iterdir()}
    assert {"outputs.md", "budgets.md", "calibration.md", "time.md", "curves.png"} <= written
    for regime in ("joint", "mixed", "disjoint"):
        assert regime in (tmp_path / "outputs.md").read_text()


@pytest.mark.slow
@needs_fashion
def test_joint_training_keeps_the_accuracy_at_three_fifths_of_the_cost() -> None:
    data = FashionMNISTDataModule(batch_size=128, val_size=5000)
    _, curve = script("fashion_early_exit").train("joint", data, epochs=4, seed=0)
    assert curve.head_accuracy[-1] >= 0.90
    assert curve.head_accuracy[0] >= 0.82
    cheap = [accuracy for accuracy, cost in zip(curve.accuracy, curve.cost, strict=True) if cost <= 0.6]
    assert max(cheap) >= curve.head_accuracy[-1] - 0.003
