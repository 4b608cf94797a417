"""The KL criterion against masked networks one by one, and closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from channel_networks import network
from criteria_networks import cross_entropy, kill, only, wake
from torch import Tensor, nn

from lightning_eff.pruning.criteria import CRITERIA, KL, importance
from lightning_eff.surgery import ChannelGraph, Gates


def brute_force(model: nn.Module, graph: ChannelGraph, name: str, x: Tensor, channels: list[int]) -> Tensor:
    """Whole passes with one gate closed, and torch's own divergence."""
    size, scores = graph.groups[name].size, []
    with torch.no_grad():
        dense = model(x).double().log_softmax(1)
        for j in channels:
            gate = torch.ones(size)
            gate[j] = 0
            with Gates(graph.groups, model, {name: gate}):
                masked = model(x).double().log_softmax(1)
            scores.append(nn.functional.kl_div(masked, dense, reduction="batchmean", log_target=True))
    return torch.stack(scores)


def ready(net: str, name: str, count: int) -> tuple[nn.Module, ChannelGraph, Tensor, Tensor]:
    """A network with one prunable group, whose outputs depend on it by more than rounding."""
    model, graph, x, y = network(net, count=8)
    if net == "MobileNetV2":
        wake(model, x)
    x = x[..., :16, :16] if net == "ResNet-18" else x  # as good for a test, and quicker
    return model, only(graph, name), x[:count], y[:count]


@pytest.mark.parametrize(
    ("net", "name"),
    [
        ("LeNet", "c3.0"),
        ("ResNet-18", "conv1"),  # a residual stream: several producers and readers
        ("MobileNetV2", "features.2.conv.0.0"),
        ("ViT", "encoder.layers.encoder_layer_1.mlp.0"),
        ("grouped", "a"),
        ("squeeze-excite", "conv"),
    ],
)
def test_scores_are_divergences_of_networks_masked_one_channel_at_a_time(net: str, name: str) -> None:
    model, graph, x, y = ready(net, name, 3)
    some = list(range(0, graph.groups[name].size, 8))
    expected = brute_force(model, graph, name, x, some)
    scores = importance(model, graph, "kl", [(x[:2], y[:2]), (x[2:], y[2:])])[name][some]
    assert expected.max() > 1e-9  # far above rounding
    assert torch.allclose(scores, expected, rtol=1e-2, atol=1e-4 * float(expected.max()))


def test_divergence_of_two_classes_by_hand() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False))
    model[0].weight.data = torch.eye(2)
    model[2].weight.data = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    graph = ChannelGraph.from_model(model, torch.rand(2, 2))
    p = 1 / (1 + math.exp(1))  # logits (1, 2); without channel 0 (0, 2), without channel 1 (1, 0)
    expected = []
    for q in (1 / (1 + math.exp(2)), 1 / (1 + math.exp(-1))):
        expected.append(p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))
    assert importance(model, graph, "kl", [(torch.ones(1, 2), None)])["0"].tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("criterion", ["kl", "kl_fisher", "taylor", "es"])
@pytest.mark.parametrize(
    ("net", "name"),
    [
        ("ResNet-18", "layer2.0.conv2"),
        ("MobileNetV2", "features.2.conv.0.0"),
        ("ViT", "encoder.layers.encoder_layer_0.mlp.0"),
        ("concat-flatten", "a"),
        ("concat-flatten", "c"),
        ("grouped", "a"),
    ],
)
def test_channel_that_nobody_reads_scores_zero_and_the_others_do_not(criterion: str, net: str, name: str) -> None:
    model, graph, x, y = ready(net, name, 2)
    kill(model, graph, name, 1)
    scores = importance(model, graph, criterion, [(x, y)], cross_entropy)[name]
    assert scores[1] == 0
    assert scores.max() > 1e-12


def test_gaussian_output_is_the_mean_squared_difference() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1))
    x = torch.randn(5, 1, 6, 6)
    graph = ChannelGraph.from_model(model, x)
    expected = []
    for j in range(4):
        gate = torch.ones(4)
        gate[j] = 0
        with torch.no_grad():
            with Gates(graph.groups, model, {"0": gate}):
                masked = model(x)
            expected.append(float((masked - model(x)).square().mean()))
    scores = importance(model, graph, KL(output="gaussian"), [(x[:3], None), (x[3:], None)])["0"]
    assert scores.tolist() == pytest.approx(expected, rel=1e-4)


def test_pixels_count_as_the_mean_of_their_divergences() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1))
    x = torch.randn(2, 1, 4, 4)
    graph = ChannelGraph.from_model(model, x)
    pixels = x.permute(0, 2, 3, 1).reshape(-1, 1, 1, 1)  # kernels of size one: every pixel is a picture of its own
    together, singly = (importance(model, graph, "kl", [(batch, None)])["0"] for batch in (x, pixels))
    assert torch.allclose(together, singly, rtol=1e-5)


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"logits": self.b(self.a(x).relu()), "note": "a dict, as many models return"}


@pytest.mark.parametrize("criterion", ["kl", "kl_fisher"])
def test_outputs_in_a_dict_are_taken_by_key(criterion: str) -> None:
    model, x = Wrapped(), torch.randn(6, 3)
    graph = ChannelGraph.from_model(model, x)
    with pytest.raises(
        ValueError, match=r"expected the model to return a tensor, got a dict with \['logits', 'note'\]"
    ):
        importance(model, graph, criterion, [(x, None)])
    assert importance(model, graph, CRITERIA[criterion](key="logits"), [(x, None)])["a"].any()


@pytest.mark.parametrize("criterion", ["kl", "kl_fisher"])
def test_softmax_of_a_single_output_is_refused(criterion: str) -> None:
    model, x = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 1)), torch.randn(6, 3)
    graph = ChannelGraph.from_model(model, x)
    with pytest.raises(ValueError, match=r'expected logits \[B, K, ...\].*got \[6, 1\]: use output="gaussian"'):
        importance(model, graph, criterion, [(x, None)])


def test_classes_that_are_ruled_out_do_not_make_the_divergence_undefined() -> None:
    class RuledOut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).relu()).masked_fill(torch.arange(4) == 2, -torch.inf)

    model, x = RuledOut(), torch.randn(6, 3)
    graph = ChannelGraph.from_model(model, x, check=False)
    for criterion in ("kl", "kl_fisher"):
        scores = importance(model, graph, criterion, [(x, None)])["a"]
        assert bool(scores.isfinite().all())
        assert scores.max() > 0
