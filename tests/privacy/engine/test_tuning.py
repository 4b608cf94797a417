"""The choice among equivalent ways changes time and memory and nothing else."""

import pytest
import torch
from agreement import assert_agrees, draw_selections, run
from per_sample_reference import vmap_gradients
from torch import nn

from lightning_eff.privacy.engine import PerSampleEngine, tuning
from lightning_eff.privacy.engine.tuning import Plan, Tuner
from lightning_eff.privacy.engine.uses import cut
from lightning_eff.privacy.engine.weights import WeightUse


def plans(engine: PerSampleEngine) -> list[Plan]:
    return list(engine._tuner._plans.values())


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(32, 16)


def test_batches_of_about_the_same_size_are_timed_once(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[int] = []
    choose = tuning._timed_plan
    monkeypatch.setattr(tuning, "_timed_plan", lambda use, fits: timed.append(use.samples) or choose(use, fits))
    engine = PerSampleEngine(model)
    for n in (33, 63, 40, 64, 33):  # 33 to 63 have six bits, 64 has seven
        run(engine, torch.randn(n, 3, 32), n)
    assert timed == [33, 64]


def test_no_budget_stores_nothing_that_is_larger_than_what_it_was_made_of(model: nn.Module) -> None:
    for tune in (True, False):
        engine = PerSampleEngine(model, memory_budget_mb=0, tune=tune)
        run(engine, torch.randn(8, 5, 32), 8)
        assert [plan.store for plan in plans(engine)] == [False]
        engine = PerSampleEngine(model, memory_budget_mb=1, tune=False)
        run(engine, torch.randn(8, 40, 32), 8)  # Gram matrices of 40 positions cost more than the gradient
        assert [plan.store for plan in plans(engine)] == [True]


def test_budget_is_shared_by_the_layers_of_a_batch_and_free_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))  # 8 * 64 * 64 * 4 bytes = 1/8 MB a layer
    stored: list[bool] = []
    keep = WeightUse.run

    def watch(use: WeightUse, plan: Plan) -> object:
        stored.append(plan.store)
        return keep(use, plan)

    monkeypatch.setattr(WeightUse, "run", watch)
    engine = PerSampleEngine(model, memory_budget_mb=0.15, tune=False)
    for _ in range(2):
        stored.clear()
        run(engine, torch.randn(8, 50, 64), 8)  # output gradients of 0.1 MB go when gradients of 0.125 MB are stored
        assert stored == [True, True, True]
    engine = PerSampleEngine(model, memory_budget_mb=0.06, tune=False)
    for _ in range(2):
        stored.clear()
        run(engine, torch.randn(8, 50, 64), 8)
        assert stored == [True, True, False]


def test_without_timing_runs_repeat_bit_for_bit(model: nn.Module) -> None:
    x = torch.randn(16, 7, 32)
    first = run(PerSampleEngine(model, tune=False), x, 16)
    second = run(PerSampleEngine(model, tune=False), x, 16)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1]["weight"], second[1]["weight"])


def test_timed_and_counted_choices_agree() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.Flatten(2), nn.Linear(36, 5))
    x = torch.randn(40, 3, 10, 10)
    norms, sums = run(PerSampleEngine(model), x, 40)
    counted, counted_sums = run(PerSampleEngine(model, tune=False, memory_budget_mb=0), x, 40)
    torch.testing.assert_close(norms, counted, rtol=1e-5, atol=0)
    for name, value in sums.items():
        torch.testing.assert_close(value, counted_sums[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("store", [True, False])
@pytest.mark.parametrize("granularity", ["mask", "everything"])
@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Linear(8, 6), (4, 8)), (nn.Conv2d(3, 4, 3, padding=1), (3, 5, 5))], ids=["linear", "conv"]
)
def test_few_active_elements_can_be_made_alone(
    layer: nn.Module, shape: tuple[int, ...], granularity: str, store: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, inputs = layer.double(), torch.randn(5, *shape).double()
    monkeypatch.setattr(Tuner, "plan", lambda tuner, use: Plan("sampled", 5, store))
    for seed in range(3):
        selections = draw_selections(model, granularity, 0.85, seed)
        assert_agrees(model, inputs, vmap_gradients(model, inputs), selections)


@pytest.mark.filterwarnings("ignore:a per-sample gradient is not finite")
def test_what_is_stored_of_few_active_elements_can_be_zeroed_and_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(8, 6, bias=False), torch.randn(4, 3, 8)
    uses: list[WeightUse] = []
    keep = WeightUse.weight_norms
    monkeypatch.setattr(WeightUse, "weight_norms", lambda use: uses.append(use) or keep(use))
    monkeypatch.setattr(Tuner, "plan", lambda tuner, use: Plan("sampled", 4, True))
    engine = PerSampleEngine(model)
    engine.select(draw_selections(model, "mask", 0.85))
    norms, sums = run(engine, x, 4, max_norm=1e6)
    gradients = uses[0].per_sample("weight", slice(0, 4))
    torch.testing.assert_close(gradients.flatten(1).norm(dim=1), norms)
    torch.testing.assert_close(gradients.sum(0), sums["weight"])
    x[2] = torch.inf
    _, without = run(engine, x, 4, max_norm=1e6)
    torch.testing.assert_close(without["weight"], gradients[[0, 1, 3]].sum(0))


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_cut_is_index_select(dim: int) -> None:
    x, index = torch.randn(4, 4, 4, 4)[:, :, :, 1:].transpose(0, 1), torch.tensor([0, 2])
    assert torch.equal(cut(x, dim, index), x.index_select(dim, index))
