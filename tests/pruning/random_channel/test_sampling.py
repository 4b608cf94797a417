"""Drawn configurations meet their budget, bounds and seed."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_eff.models import LeNet
from lightning_eff.pruning.allocation import Dense
from lightning_eff.pruning.random_channel import config_of, sample_configs, sampling
from lightning_eff.pruning.settings import Allocation
from lightning_eff.surgery import BudgetError, ChannelGraph, PruningPlan, apply_plan


def on_meta(name: str) -> tuple[nn.Module, Tensor]:
    with torch.device("meta"):
        return getattr(torchvision.models, name)(weights=None).eval(), torch.empty(2, 3, 64, 64)


@cache
def graph_of(name: str) -> ChannelGraph:
    if name == "lenet":
        return ChannelGraph.from_model(LeNet().eval(), torch.zeros(2, 1, 28, 28), check=False)
    return ChannelGraph.from_model(*on_meta(name), check=False)


def counted(model: nn.Module, x: Tensor) -> float:
    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops() / 2 / len(x)


def away(graph: ChannelGraph, configs: Tensor, amount: float, target: str = "macs") -> Tensor:
    cost = graph.macs if target == "macs" else graph.params
    return (cost(configs) / cost() - (1 - amount)).abs()


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2"])
def test_macs_of_drawn_configurations_equal_the_counter_on_the_cut_network(name: str) -> None:
    model, x = on_meta(name)
    graph = ChannelGraph.from_model(model, x, check=False)
    assert graph.macs().item() == counted(model, x)
    configs = sample_configs(graph, 3, 0.5)
    for row in configs:
        model, x = on_meta(name)
        config = config_of(graph, row)
        scores = {group: torch.arange(graph.groups[group].size) for group in config}
        plan = PruningPlan.from_scores(graph, scores, config)
        apply_plan(model, plan, x, graph=graph, verify=False)
        assert graph.macs(row[None]).item() == counted(model, x)
        assert graph.params(row[None]).item() == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kept", [0.3, 0.5, 0.7, 0.9])
def test_power_law_meets_the_budget_of_resnet50_in_all_of_a_thousand_draws(kept: float) -> None:
    graph = graph_of("resnet50")
    configs = sample_configs(graph, 1000, 1 - kept)
    assert configs.shape == (1000, len(graph.groups))
    assert configs.dtype == torch.int64
    assert away(graph, configs, 1 - kept).max() < 0.003
    assert len(set(map(tuple, configs.tolist()))) == 1000


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "lenet"])
@pytest.mark.parametrize("amount", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("target", ["macs", "params"])
def test_power_law_meets_the_budget_of_other_networks_in_macs_and_parameters(
    name: str, amount: float, target: str
) -> None:
    graph = graph_of(name)
    configs = sample_configs(graph, 40, amount, target=target, allocation=Allocation(max_ratio=0.97))
    assert len(configs) == 40
    assert away(graph, configs[1:], amount, target).max() <= 0.01


def test_exponent_equals_the_one_that_bisection_finds() -> None:
    graph = graph_of("resnet18")
    space = sampling._Space.of(graph, Dense.of(graph), "macs", Allocation())
    log_ratios = torch.empty(20, len(space.sizes), dtype=torch.float64).uniform_(
        0.1, 1, generator=torch.Generator().manual_seed(0)
    )
    log_ratios.log_()
    for kept in (0.15, 0.5, 0.95):
        low, high = torch.zeros(20, 1, dtype=torch.float64), torch.full((20, 1), 50.0, dtype=torch.float64)
        for _ in range(60):
            middle = (low + high) / 2
            counts = (space.sizes * (middle * log_ratios).exp()).maximum(space.floors)
            whole = torch.tensor([list(graph.sizes.values())], dtype=torch.float64).repeat(20, 1)
            whole[:, space.columns] = counts
            dear = graph.macs(whole)[:, None] > kept * graph.macs()
            low, high = torch.where(dear, middle, low), torch.where(dear, high, middle)
        found = sampling._powered(space, log_ratios, kept * float(graph.macs()))
        expected = (space.sizes * (high * log_ratios).exp()).maximum(space.floors)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_quadratic_form_equals_the_cost_model() -> None:
    graph = graph_of("mobilenet_v2")
    graph = graph.protect({graph.prunable[3]: "for the test", graph.prunable[7]: "for the test"})
    configs = torch.tensor([list(graph.sizes.values())]).repeat(50, 1)
    prunable = torch.tensor([name in graph.prunable for name in graph.groups])
    drawn = (torch.rand(50, len(graph.groups), generator=torch.Generator().manual_seed(0)) * configs).long() + 1
    configs = torch.where(prunable, drawn, configs)
    for target, cost in (("macs", graph.macs), ("params", graph.params)):
        space = sampling._Space.of(graph, Dense.of(graph), target, Allocation())
        found = space.cost(configs[:, space.columns].double())
        torch.testing.assert_close(found, cost(configs), rtol=1e-12, atol=0.5)


def test_rejection_keeps_uniform_ratios_that_meet_the_budget() -> None:
    graph = graph_of("resnet18")
    configs = sample_configs(graph, 200, 0.5, sampler="rejection")
    assert configs.shape == (200, len(graph.groups))
    assert away(graph, configs[1:], 0.5).max() <= 0.01
    sizes = torch.tensor(list(graph.sizes.values()))
    free = torch.tensor([name in graph.prunable for name in graph.groups])
    ratios = (configs / sizes)[1:, free]
    assert ratios.min() < 0.15
    assert ratios.max() == 1


def test_rejection_that_finds_nothing_tells_how_many_it_tried_and_what_to_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "MAX_DRAWS", 20_000)
    with pytest.raises(ValueError, match=r"none of 20,000 .*acceptance 0.*sampler=\"power\""):
        sample_configs(graph_of("resnet50"), 10, 0.1, sampler="rejection")


def test_rejection_that_finds_too_few_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "MAX_DRAWS", 2000)
    with pytest.warns(UserWarning, match=r"found \d+ different configurations .* 1000 were asked for"):
        configs = sample_configs(graph_of("resnet18"), 1000, 0.5, sampler="rejection")
    assert 1 < len(configs) < 1000


@pytest.mark.parametrize("sampler", ["power", "rejection"])
def test_same_seed_gives_the_same_list_and_leaves_the_global_generator_alone(sampler: str) -> None:
    graph, state = graph_of("resnet18"), torch.get_rng_state()
    first, again, other = (sample_configs(graph, 30, 0.5, sampler=sampler, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_row_zero_is_the_widest_uniform_configuration_within_the_budget() -> None:
    graph = graph_of("resnet18")
    (uniform,) = sample_configs(graph, 50, 0.5, sampler="uniform")
    for sampler in ("power", "rejection", [{"conv1": 3}]):
        assert torch.equal(sample_configs(graph, 50, 0.5, sampler=sampler)[0], uniform)
    sizes = torch.tensor(list(graph.sizes.values()))
    ratios = [int(kept) / int(size) for kept, size in zip(uniform, sizes, strict=True) if kept < size]
    assert max(ratios) - min(ratios) < 1 / 64  # one channel of the narrowest layer
    assert 0.49 < float(graph.macs(uniform[None]) / graph.macs()) <= 0.5


def test_counts_respect_fewest_channels_largest_ratio_and_multiples() -> None:
    graph = graph_of("resnet50")
    allocation = Allocation(min_keep=24, max_ratio=0.6, round_to=8)
    configs = sample_configs(graph, 100, 0.6, allocation=allocation)
    sizes = torch.tensor(list(graph.sizes.values()))
    assert (configs % 8 == 0)[:, sizes != 1000].all()
    assert (configs >= 0.4 * sizes).all()
    assert (configs >= sizes.clamp(max=24)).all()
    assert away(graph, configs[1:], 0.6).max() <= 0.01


def test_where_multiples_are_too_coarse_for_the_tolerance_the_nearest_are_taken() -> None:
    graph = graph_of("lenet")
    allocation = Allocation(round_to=64, max_ratio=1.0)  # only c5 has a choice: 64 or 100 channels
    with pytest.warns(UserWarning, match="found"):
        configs = sample_configs(graph, 5, 0.02, tolerance=1e-4, allocation=allocation)
    column = list(graph.groups).index("c5")
    assert configs[:, column].tolist() == [64]


def test_a_small_network_gives_no_configuration_twice() -> None:
    graph = ChannelGraph.from_model(LeNet(channels=(4, 5, 6, 5)).eval(), torch.zeros(2, 1, 28, 28), check=False)
    with pytest.warns(UserWarning, match="different configurations"):
        configs = sample_configs(graph, 500, 0.5, tolerance=0.05)
    assert len(set(map(tuple, configs.tolist()))) == len(configs) < 500
    assert away(graph, configs[1:], 0.5).max() <= 0.05


def test_protected_groups_stay_whole() -> None:
    graph = graph_of("resnet18").protect({"layer1.0.conv1": "for the test"})
    configs = sample_configs(graph, 20, 0.3)
    column = list(graph.groups).index("layer1.0.conv1")
    assert (configs[:, column] == 64).all()
    assert away(graph, configs[1:], 0.3).max() <= 0.01


def test_after_a_cut_the_amount_counts_from_the_network_before_it() -> None:
    model, x = on_meta("resnet18")
    graph = ChannelGraph.from_model(model, x, check=False)
    dense = Dense.of(graph)
    config = config_of(graph, sample_configs(graph, 1, 0.3)[0])
    plan = PruningPlan.from_scores(graph, {g: torch.arange(graph.groups[g].size) for g in config}, config)
    smaller = graph.after(plan)
    configs = sample_configs(smaller, 30, 0.5, dense=dense)
    assert ((smaller.macs(configs) / dense.macs - 0.5).abs()[1:] <= 0.01).all()
    assert (configs <= torch.tensor(list(smaller.sizes.values()))).all()
    with pytest.raises(BudgetError, match=r"reachable are .* \(amount 0\.30\d to 0\.9"):
        sample_configs(smaller, 30, 0.1, dense=dense)


def test_nothing_to_remove_gives_the_whole_network_only() -> None:
    graph = graph_of("resnet18")
    assert sample_configs(graph, 100, 0.0).tolist() == [list(graph.sizes.values())]


def test_unreachable_budget_names_what_can_be_reached() -> None:
    graph = graph_of("resnet18")
    allocation = Allocation(max_ratio=0.5)
    least = graph.macs({name: graph.groups[name].size // 2 for name in graph.prunable}).item()
    message = rf"reachable are {least:,.0f} to {graph.macs().item():,.0f} \(amount 0\.000 to 0\.\d+\).*max_ratio=0\.5"
    with pytest.raises(BudgetError, match=message):
        sample_configs(graph, 10, 0.9, allocation=allocation)


def test_listed_configurations_are_taken_as_they_are_once_and_by_any_producer() -> None:
    graph = graph_of("resnet18")
    stream = next(group for group in graph.groups.values() if len(group.producers) > 1)
    listed = [{"layer1.0.conv1": 5}, {stream.producers[-1]: 7}, {"layer1.0.conv1": 5}]
    configs = sample_configs(graph, 1, 0.5, sampler=listed)
    assert len(configs) == 3  # the uniform one and two
    assert config_of(graph, configs[1]) == {**config_of(graph, configs[1]), "layer1.0.conv1": 5}
    assert config_of(graph, configs[2])[stream.name] == 7


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"amount": 1.0}, ValueError, r"amount must lie in \[0, 1\)"),
        ({"amount": -0.1}, ValueError, r"amount must lie in \[0, 1\)"),
        ({"n": 0}, ValueError, "number of candidates must be a whole number >= 1, got 0"),
        ({"sampler": "powre"}, ValueError, "one of power, rejection, uniform, got 'powre'"),
        ({"sampler": []}, ValueError, "list of configurations is empty"),
        ({"sampler": [{"conv9": 1}]}, KeyError, "no channel group named 'conv9'"),
        ({"sampler": [{"layer1.0.conv1": 65}]}, ValueError, r"configuration 0: .*1\.\.64 channels, got 65"),
        ({"target": "flops"}, ValueError, "target must be one of macs, params, got 'flops'"),
        ({"min_ratio": 0.0}, ValueError, r"min_ratio must lie in \(0, 1\), got 0.0"),
        ({"tolerance": 0.0}, ValueError, "tolerance must be > 0, got 0.0"),
    ],
)
def test_bad_arguments_are_told(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sample_configs(graph_of("resnet18"), **{"n": 10, "amount": 0.5, **arguments})


def test_a_listed_configuration_must_leave_protected_groups_whole() -> None:
    graph = graph_of("resnet18").protect({"layer1.0.conv1": "excluded"})
    with pytest.raises(ValueError, match=r"configuration 0: layer1\.0\.conv1 cannot be pruned: excluded"):
        sample_configs(graph, 10, 0.5, sampler=[{"layer1.0.conv1": 3}])
