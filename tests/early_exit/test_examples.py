"""The examples of early exits: their YAML, their scripts, and what they promise of real images."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import EXAMPLES, import_script

from lightning_eff.data import FashionMNISTDataModule
from lightning_eff.early_exit.inference.leaving import select_from_all

FASHION = Path("/usr/share/datasets/fashion-mnist")
needs_fashion = pytest.mark.skipif(not FASHION.is_dir(), reason="Fashion-MNIST is not at hand")


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES / "benchmarks")  # where the scripts find their harness
    monkeypatch.delitem(sys.modules, "harness", raising=False)
    return import_script(EXAMPLES / "benchmarks/early_exit.py")


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
def test_joint_training_keeps_the_accuracy_at_three_fifths_of_the_cost() -> None:
    data = FashionMNISTDataModule(batch_size=128, val_size=5000)
    _, curve = import_script(EXAMPLES / "fashion_early_exit.py").train("joint", data, epochs=4, seed=0)
    assert curve.head_accuracy[-1] >= 0.90
    assert curve.head_accuracy[0] >= 0.82
    cheap = [accuracy for accuracy, cost in zip(curve.accuracy, curve.cost, strict=True) if cost <= 0.6]
    assert max(cheap) >= curve.head_accuracy[-1] - 0.003
