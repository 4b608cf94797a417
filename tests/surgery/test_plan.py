"""A plan is checked whole before anything is cut, and survives a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from networks import build

from lightning_eff.surgery import ChannelGraph, PruningGraphError, PruningPlan, apply_plan


@pytest.fixture
def graph() -> ChannelGraph:
    model, x = build("ResNet-18")
    return ChannelGraph.from_model(model, x)


def test_plan_survives_a_file_and_gives_the_same_network(tmp_path: Path) -> None:
    first, x = build("SmallCNN")
    second, _ = build("SmallCNN")
    graph = ChannelGraph.from_model(first, x)
    plan = PruningPlan.from_scores(
        graph, {name: torch.rand(graph.groups[name].size) for name in graph.prunable}, dict.fromkeys(graph.prunable, 3)
    )
    plan.save(tmp_path / "deep" / "plan.json")
    apply_plan(first, plan, x)
    apply_plan(second, PruningPlan.load(tmp_path / "deep" / "plan.json"), x)
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_any_producer_names_the_group(graph: ChannelGraph) -> None:
    stream = graph.resolve("layer2.0.downsample.0")
    assert stream.name == "layer2.0.conv2"
    assert graph.resolve("layer2.1.conv2") is stream
    assert PruningPlan({"layer2.1.conv2": [0, 1]}).config(graph)["layer2.0.conv2"] == 2


def test_alias_channels_are_translated_through_the_concat() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Conv2d(3, 6, 1), torch.nn.Conv2d(3, 4, 1)
            self.gate, self.out = torch.nn.Conv2d(10, 10, 1), torch.nn.Conv2d(10, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.cat([self.a(x), self.b(x)], 1)
            return self.out(x * self.gate(x).sigmoid())

    graph = ChannelGraph.from_model(Net(), torch.randn(2, 3, 4, 4))
    assert graph.resolve("b").name == "a"
    assert graph.resolve("b").size == 10
    assert graph.resolve("b").alias_channels("b", [2]) == [8]


@pytest.mark.parametrize(
    ("keep", "error", "message"),
    [
        ({"layer1.0.conv9": [0]}, KeyError, "layer1.0.conv1"),
        ({"layer1.0.conv1": []}, ValueError, "at least one"),
        ({"layer1.0.conv1": [1, 1]}, ValueError, "twice"),
        ({"layer1.0.conv1": [0, 64]}, ValueError, r"0\.\.63"),
        ({"layer1.0.conv1": [-1, 3]}, ValueError, r"0\.\.63"),
        ({"layer1.0.conv1": [0.5, 3]}, ValueError, r"expected the numbers of the channels .* got \[0\.5, 3\]"),
        ({"fc": [0]}, ValueError, "feeds only the network's output"),
        ({"layer2.0.conv2": [0], "layer2.1.conv2": [1]}, ValueError, "different channels"),
    ],
)
def test_bad_plans_are_refused_before_anything_is_cut(keep: dict[str, list[int]], error: type, message: str) -> None:
    model, x = build("ResNet-18")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(error, match=message):
        apply_plan(model, PruningPlan({"layer4.0.conv1": [0, 1], **keep}), x)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_plan_of_another_architecture_is_refused(graph: ChannelGraph) -> None:
    with pytest.raises(ValueError, match="made for 32 channels, the model has 64"):
        PruningPlan({"layer1.0.conv1": [0]}, {"layer1.0.conv1": 32}).validate(graph)


def test_plan_of_another_version_is_refused() -> None:
    with pytest.raises(ValueError, match="version 1"):
        PruningPlan.from_dict({"version": 7, "keep": {}})


def test_empty_and_full_plans_change_nothing(graph: ChannelGraph) -> None:
    model, x = build("ResNet-18")
    for plan in (PruningPlan({}), PruningPlan({"layer1.0.conv1": list(range(64))})):
        cut = apply_plan(model, plan, x, graph=graph)
        assert cut.macs[0] == cut.macs[1]
        assert cut.params[0] == cut.params[1] == sum(p.numel() for p in model.parameters())


def test_equal_scores_keep_the_lowest_channels(graph: ChannelGraph) -> None:
    plan = PruningPlan.from_scores(graph, {"layer1.0.conv1": torch.zeros(64)}, {"layer1.0.conv1": 3})
    assert plan.keep == {"layer1.0.conv1": [0, 1, 2]}


@pytest.mark.parametrize(
    ("scores", "count", "message"),
    [
        (torch.full((64,), torch.nan), 3, "not numbers"),
        (torch.zeros(63), 3, "expected 64 scores"),
        (torch.zeros(64), 0, r"1\.\.64"),
        (torch.zeros(64), 65, r"1\.\.64"),
    ],
)
def test_bad_scores_are_refused(graph: ChannelGraph, scores: torch.Tensor, count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PruningPlan.from_scores(graph, {"layer1.0.conv1": scores}, {"layer1.0.conv1": count})


def test_include_and_exclude_take_globs_and_refuse_what_matches_nothing() -> None:
    model, x = build("ResNet-18")
    graph = ChannelGraph.from_model(model, x, include=["layer3.*"], exclude=["layer3.1.*"])
    assert set(graph.prunable) == {"layer3.0.conv1"}  # the stream of layer3 is produced in layer3.1 as well
    with pytest.raises(KeyError, match="close names"):
        ChannelGraph.from_model(model, x, exclude=["layre3"])


def test_graph_written_by_hand_serves_a_model_that_cannot_be_traced() -> None:
    class Untraceable(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Linear(4, 6), torch.nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.relu(self.a(x))).detach()  # no gradient to trace

    model, x = Untraceable(), torch.randn(3, 4)
    with pytest.raises(PruningGraphError, match="from_dict"):
        ChannelGraph.from_model(model, x)
    data = {
        "groups": [
            {
                "name": "a",
                "size": 6,
                "members": [
                    {"path": "a", "axis": "out", "index": list(range(6))},
                    {"path": "b", "axis": "in", "index": list(range(6))},
                ],
            }
        ]
    }
    graph = ChannelGraph.from_dict(data, model, x)
    apply_plan(model, PruningPlan({"a": [1, 4]}), x, graph=graph)
    assert model.b.weight.shape == (2, 2)
    assert ChannelGraph.from_dict(graph.to_dict(), Untraceable(), x).groups["a"].size == 6


def test_untraceable_model_keeps_its_modes_and_flags() -> None:
    import torchvision

    model = torchvision.models.shufflenet_v2_x0_5(weights=None)
    model.conv1[0].weight.requires_grad_(False)
    model.stage2.eval()
    modes = [module.training for module in model.modules()]
    with pytest.raises(PruningGraphError, match="ShuffleNetV2 cannot be traced"):
        ChannelGraph.from_model(model, torch.randn(1, 3, 64, 64))
    assert [module.training for module in model.modules()] == modes
    assert not model.conv1[0].weight.requires_grad


def test_lazy_model_is_refused_with_the_way_out() -> None:
    with pytest.raises(PruningGraphError, match="run one forward pass first"):
        ChannelGraph.from_model(torch.nn.Sequential(torch.nn.LazyLinear(3)), torch.randn(2, 4))


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (None, "example_inputs must be what the model is called with, .*got None"),
        (torch.zeros(0, 4), "at least one sample"),
    ],
)
def test_a_graph_needs_an_example_with_a_sample(example: torch.Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChannelGraph.from_model(torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)), example)


def test_channels_are_not_removed_without_scores(graph: ChannelGraph) -> None:
    with pytest.raises(ValueError, match=r"layer1\.0\.conv1: channels are to be removed but it has no scores"):
        PruningPlan.from_scores(graph, {}, {"layer1.0.conv1": 3})
