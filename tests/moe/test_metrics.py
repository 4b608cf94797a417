"""Balance of experts in numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_eff.moe import DecoderLM, ExpertLoad, FineGrainedMoE
from lightning_eff.moe.metrics import expert_loads, load_measures


def measured(*updates, **sizes) -> dict[str, float]:
    metric = ExpertLoad(**sizes)
    for update in updates:
        metric.update(*map(torch.tensor, update))
    return {name: value.item() for name, value in metric.compute().items()}


def test_equal_loads_are_perfect_balance() -> None:
    found = measured(([[3, 3, 3, 3]],), n_layers=1, n_experts=4)
    assert found == pytest.approx(
        {"max_over_mean": 1, "cv": 0, "entropy": 1, "dead_fraction": 0, "dropped_fraction": 0}, abs=1e-6
    )


def test_one_expert_with_all_tokens_is_the_worst() -> None:
    found = measured(([[12, 0, 0, 0]],), n_layers=1, n_experts=4)
    expected = {"max_over_mean": 4, "cv": math.sqrt(3), "entropy": 0, "dead_fraction": 0.75, "dropped_fraction": 0}
    assert found == pytest.approx(expected, abs=1e-6)


def test_measures_are_those_of_the_summed_loads_averaged_over_layers() -> None:
    found = measured(([[8, 0], [1, 3]],), ([[0, 8], [2, 2]],), n_layers=2, n_experts=2)
    assert found["max_over_mean"] == pytest.approx((1 + 1.25) / 2)  # 8 8, and 3 5
    assert found["cv"] == pytest.approx((0 + 0.25) / 2)
    entropy = -(3 / 8 * math.log(3 / 8) + 5 / 8 * math.log(5 / 8)) / math.log(2)
    assert found["entropy"] == pytest.approx((1 + entropy) / 2)
    assert found["dead_fraction"] == 0


def test_dropped_choices_are_a_share_of_all() -> None:
    found = measured(([[6, 2]], [[3, 2]]), ([[1, 1]],), n_layers=1, n_experts=2)
    assert found["dropped_fraction"] == pytest.approx(3 / 10)


def test_nothing_measured_is_no_number() -> None:
    assert all(map(math.isnan, measured(([[0] * 4] * 2,), n_layers=2, n_experts=4).values()))
    assert all(map(math.isnan, measured(([[0]],), n_layers=1, n_experts=1).values()))
    assert measured(([[5]],), n_layers=1, n_experts=1)["entropy"] == 1


def test_forward_passes_of_a_model_are_measured() -> None:
    model = DecoderLM(d_model=16, n_layers=2, n_heads=2, moe={"expansion_rate": 4, "granularity": 2})
    metric = ExpertLoad(n_layers=2, n_experts=8)
    for _ in range(2):
        model(torch.randint(256, (4, 8)))
        metric.update(model)
    assert metric.load.sum(1).tolist() == [2 * 4 * 8 * 2] * 2
    assert 1 <= metric.compute()["max_over_mean"] <= 8
    metric.reset()
    assert metric.load.sum() == 0


def test_what_a_capacity_drops_is_seen_in_the_model() -> None:
    layer = FineGrainedMoE(8, 32, expansion_rate=4, granularity=1, routing={"capacity_factor": 0.5})
    metric = ExpertLoad(1, 4)
    layer(torch.randn(64, 8))
    metric.update(layer)
    assert 0.5 <= metric.compute()["dropped_fraction"] < 1  # each expert computes at most 8 of 64


def test_loads_of_processes_add_up_to_one_metric() -> None:
    loads = torch.tensor([[[5, 1, 0]], [[1, 0, 2]]])
    both, parts = ExpertLoad(1, 3), [ExpertLoad(1, 3), ExpertLoad(1, 3)]
    for load, part in zip(loads, parts, strict=True):
        both.update(load)
        part.update(load)
    for name, reduction in ExpertLoad(1, 3)._reductions.items():  # what torchmetrics does between processes
        assert torch.equal(reduction(torch.stack([getattr(part, name) for part in parts])), getattr(both, name))
    summed = both.load
    for name, value in load_measures(summed, summed).items():
        assert value.mean() == both.compute()[name]


def test_loads_of_another_shape_are_refused() -> None:
    metric = ExpertLoad(2, 4)
    with pytest.raises(ValueError, match=r"expected load of shape \[2, 4\], got \[4\]"):
        metric.update(torch.ones(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"expected computed of shape \[2, 4\], got \[2, 3\]"):
        metric.update(torch.ones(2, 4, dtype=torch.int64), torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="n_experts must be a whole number >= 1, got 0"):
        ExpertLoad(1, 0)


def test_models_without_loads_are_refused() -> None:
    layer, other = FineGrainedMoE(8, granularity=1), FineGrainedMoE(8, granularity=2)
    with pytest.raises(ValueError, match="got 0, of which 0 have"):
        expert_loads(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="got 1, of which 0 have"):
        expert_loads(layer)
    for one in (layer, other):
        one(torch.randn(4, 8))
    with pytest.raises(ValueError, match=r"same number of experts in all layers, got \[8, 16\]; use a metric for each"):
        expert_loads(nn.ModuleList([layer, other]))
