"""Criteria of weights alone: hand values, torch-pruning's norms, several producers."""

from __future__ import annotations

import pytest
import torch
import torch_pruning as tp
from channel_networks import network
from networks import build
from torch import Tensor, nn

from lightning_eff.pruning.criteria import L1, GeometricMedian, NormScale, Random, importance
from lightning_eff.pruning.criteria.reduction import reduced
from lightning_eff.surgery import ChannelGraph


def one_layer(rows: list[list[float]]) -> tuple[nn.Module, ChannelGraph]:
    """A linear layer with the given filters, read by another one."""
    weight = torch.tensor(rows, dtype=torch.float32)
    model = nn.Sequential(nn.Linear(weight.shape[1], len(rows)), nn.ReLU(), nn.Linear(len(rows), 2))
    model[0].weight.data = weight
    return model, ChannelGraph.from_model(model, torch.randn(2, weight.shape[1]))


def test_l1_and_l2_of_two_filters_by_hand() -> None:
    model, graph = one_layer([[1, -2], [3, 4]])
    assert importance(model, graph, "l1")["0"].tolist() == [3, 7]
    assert importance(model, graph, "l2")["0"].tolist() == pytest.approx([5**0.5, 5])


def test_bias_does_not_count() -> None:
    model, graph = one_layer([[1, -2], [3, 4]])
    model[0].bias.data = torch.tensor([100.0, -100.0])
    assert importance(model, graph, "l1")["0"].tolist() == [3, 7]


def test_distances_from_the_other_filters_by_hand() -> None:
    model, graph = one_layer([[0, 0], [3, 4], [0, 4], [6, 8]])
    scores = importance(model, graph, "gm")["0"]
    # 5 + 4 + 10, 5 + 3 + 5, 4 + 3 + sqrt(52), 10 + 5 + sqrt(52)
    assert scores.tolist() == pytest.approx([19, 13, 14.2111, 22.2111], abs=1e-4)


@pytest.mark.parametrize("name", ["SmallCNN", "ResNet-18", "LeNet"])
@pytest.mark.parametrize("p", [1, 2])
def test_norms_are_those_of_torch_pruning_for_the_first_producer(name: str, p: int) -> None:
    model, graph, x, _ = network(name, count=2)
    peer = tp.importance.GroupMagnitudeImportance(p=p, group_reduction="first", normalizer=None)
    dependency = tp.DependencyGraph().build_dependency(model, x)
    scores = importance(model, graph, {1: "l1", 2: "l2"}[p])
    single = [group for group in map(graph.resolve, graph.prunable) if len(group.producers) == 1]
    assert len(single) >= 4
    for group in single:
        layer = model.get_submodule(group.name)
        prune = tp.prune_linear_out_channels if isinstance(layer, nn.Linear) else tp.prune_conv_out_channels
        theirs = peer(dependency.get_pruning_group(layer, prune, list(range(group.size))))
        # with p = 2 torch-pruning leaves the sum of squares without its root
        assert torch.allclose(scores[group.name] ** p, theirs.detach().double(), rtol=1e-5)


def test_filters_of_a_transposed_convolution_lead_to_its_outputs() -> None:
    model, x = build("transposed")
    graph = ChannelGraph.from_model(model, x)
    by_hand = [model.up.weight[:, j].abs().sum().item() for j in range(6)]
    assert importance(model, graph, "l1")["up"].tolist() == pytest.approx(by_hand)


def test_grouped_transposed_convolution_takes_rows_block_by_block() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 6, 2, groups=2), nn.ReLU(), nn.Conv2d(6, 2, 1)
    )
    graph = ChannelGraph.from_model(model, torch.randn(2, 1, 6, 6))
    size, weight = graph.groups["2"].size, model[2].weight.detach()  # [4, 3, 2, 2]: outputs 0-2 of inputs 0-1
    rows = [weight[2 * (o // 3) : 2 * (o // 3) + 2, o % 3].abs().sum().item() for o in range(6)]
    member = next(m for m in graph.groups["2"].members if m.path == "2" and m.axis == "out")
    expected = [sum(rows[i] for i, r in zip(member.index, member.root, strict=True) if r == j) for j in range(size)]
    assert importance(model, graph, "l1")["2"].tolist() == pytest.approx(expected)


def test_filter_of_a_channel_in_a_grouped_layer_is_all_of_its_rows() -> None:
    model, graph, _, _ = network("grouped", count=2)
    group = graph.groups["a"]
    member = next(m for m in group.members if m.path == "a" and m.axis == "out")
    assert group.size < len(member.index)
    rows = model.a.weight.detach().double().flatten(1)
    whole = [torch.cat([rows[i] for i in member.index[member.root == j]]) for j in range(group.size)]
    assert importance(model, graph, "l2")["a"].tolist() == pytest.approx([float(w.norm()) for w in whole])
    by_hand = [sum(float((w - v).norm()) for v in whole) for w in whole]
    assert importance(model, graph, "gm")["a"].tolist() == pytest.approx(by_hand, rel=1e-6)


def residual() -> tuple[nn.Module, ChannelGraph]:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x).relu()
            return self.c(x + self.b(x).relu())

    model = Residual()
    model.a.weight.data = torch.tensor([[1.0, 0], [0, 2], [3, 0]])
    model.b.weight.data = torch.tensor([[10.0, 20, 30], [60, 0, 0], [0, 0, 0]])
    return model, ChannelGraph.from_model(model, torch.randn(2, 2))


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        # norms (1, 2, 3) and (60, 60, 0) have means 2 and 40; halves of (.5 + 1.5), (1 + 1.5), (1.5 + 0), times 21
        ("mean", [21.0, 26.25, 15.75]),
        ("sum", [61.0, 62.0, 3.0]),
        ("max", [60.0, 60.0, 3.0]),
        ("first", [1.0, 2.0, 3.0]),
    ],
)
def test_two_producers_of_a_residual_stream_by_hand(reduction: str, expected: list[float]) -> None:
    model, graph = residual()
    assert graph.groups["a"].producers == ("a", "b")
    assert importance(model, graph, L1(reduction=reduction))["a"].tolist() == pytest.approx(expected)


def test_mean_over_producers_does_not_depend_on_the_size_of_one_of_them() -> None:
    model, graph = residual()
    order = importance(model, graph, "l1")["a"].argsort().tolist()
    model.b.weight.data *= 1000
    assert importance(model, graph, "l1")["a"].argsort().tolist() == order


def test_producer_without_weights_left_does_not_divide_by_zero() -> None:
    model, graph = residual()
    model.b.weight.data.zero_()
    assert importance(model, graph, "l1")["a"].tolist() == [0.25, 0.5, 0.75]  # halves of (.5, 1, 1.5), times 1


def test_layers_that_have_only_some_of_the_channels_count_for_those() -> None:
    scores = [(torch.tensor([0, 1]), torch.tensor([1.0, 3.0])), (torch.tensor([1, 2]), torch.tensor([5.0, 5.0]))]
    assert reduced(scores, 3, "sum").tolist() == [1, 8, 5]
    assert reduced(scores, 3, "max").tolist() == [1, 5, 5]
    assert reduced(scores, 3, "first").tolist() == [1, 3, 5]
    assert reduced(scores, 3, "mean").tolist() == [0.5 * 3.5, 1.25 * 3.5, 3.5]


def test_scale_of_the_norm_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 1))
    model[1].weight.data = torch.tensor([0.5, -2.0, 0.0])
    graph = ChannelGraph.from_model(model, torch.randn(2, 1, 3, 3))
    assert importance(model, graph, "bn_scale")["0"].tolist() == [0.5, 2.0, 0.0]


def test_scale_of_a_depthwise_layers_norms_counts_with_the_others() -> None:
    model, graph, _, _ = network("MobileNetV2", count=2)
    name = "features.2.conv.0.0"
    norms = [model.features[2].conv[0][1], model.features[2].conv[1][1]]
    scales = torch.stack([norm.weight.detach().double().abs() for norm in norms])
    expected = (scales / scales.mean(1, keepdim=True)).mean(0) * scales.mean()
    assert torch.allclose(importance(model, graph, "bn_scale")[name], expected)


def test_layers_without_norm_are_named() -> None:
    model, graph = one_layer([[1, -2], [3, 4]])
    with pytest.raises(ValueError, match=r"needs a norm with weights on all channels, which 0 do not pass: exclude"):
        importance(model, graph, "bn_scale")


def test_random_scores_follow_the_seed_and_lie_between_zero_and_one() -> None:
    model, graph, _, _ = network("SmallCNN", count=2)
    first, again, other = (importance(model, graph, "random", seed=seed) for seed in (1, 1, 2))
    for name in graph.prunable:
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])
        assert ((first[name] >= 0) & (first[name] < 1)).all()
    own = importance(model, graph, Random(seed=1), seed=2)
    assert all(torch.equal(own[name], first[name]) for name in own)  # a seed of its own wins


@pytest.mark.parametrize("kind", [L1, GeometricMedian, NormScale])
def test_unknown_reduction_is_refused_with_the_choices(kind: type) -> None:
    with pytest.raises(ValueError, match="reduction must be one of mean, sum, max, first, got 'median'"):
        kind(reduction="median")
