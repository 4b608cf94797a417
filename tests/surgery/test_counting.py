"""Costs in closed form equal what torch counts, for any configuration."""

from __future__ import annotations

import pytest
import torch
import torchvision
from networks import build
from test_cut import half_plan
from torch.utils.flop_counter import FlopCounterMode

from lightning_eff.surgery import ChannelGraph, apply_plan, profile


def counted(model: torch.nn.Module, x: torch.Tensor) -> float:
    with FlopCounterMode(display=False) as counter:
        model.eval()(x)
    return counter.get_total_flops() / 2 / len(x)


COUNTED = ["ResNet-18", "bottlenecks", "MobileNetV2", "DenseNet", "grouped", "ViT", "transposed"]


@pytest.mark.parametrize("name", COUNTED)
def test_macs_and_params_equal_the_counter_dense_and_cut(name: str) -> None:
    for seed in range(3):
        model, x = build(name)
        graph = ChannelGraph.from_model(model, x)
        assert graph.macs().item() == counted(model, x)
        plan = half_plan(graph, seed)
        predicted = graph.macs(plan.config(graph)).item(), graph.params(plan.config(graph)).item()
        cut = apply_plan(model, plan, x, graph=graph)
        assert predicted == (counted(model, x), sum(p.numel() for p in model.parameters()))
        assert cut.macs[1] == predicted[0]
        assert cut.params[1] == predicted[1]


# Known sizes at 224 x 224: multiply-adds and parameters of torchvision's models.
@pytest.mark.parametrize(
    ("name", "gmacs", "mparams"),
    [
        ("resnet18", 1.814, 11.69),
        ("resnet50", 4.089, 25.56),
        ("mobilenet_v2", 0.301, 3.50),
        ("vit_b_16", 17.564, 86.57),
    ],
)
def test_published_sizes(name: str, gmacs: float, mparams: float) -> None:
    with torch.device("meta"):
        model, x = getattr(torchvision.models, name)(weights=None), torch.empty(1, 3, 224, 224)
    found = profile(model, x)
    assert found.macs / 1e9 == pytest.approx(gmacs, abs=5e-4)
    assert found.params / 1e6 == pytest.approx(mparams, abs=5e-3)


def test_ten_thousand_configurations_at_once_equal_one_by_one() -> None:
    model, x = build("MobileNetV2")
    graph = ChannelGraph.from_model(model, x)
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor(list(graph.sizes.values()))
    config = (torch.rand(10_000, len(sizes), generator=generator) * sizes).floor() + 1
    many = graph.macs(config)
    names = list(graph.sizes)
    for row in (0, 4_999, 9_999):
        one = {name: int(count) for name, count in zip(names, config[row], strict=True)}
        assert many[row].item() == graph.macs(one).item()


def test_configuration_of_wrong_width_is_refused() -> None:
    model, x = build("SmallCNN")
    with pytest.raises(ValueError, match=r"\[N, 6\]"):
        ChannelGraph.from_model(model, x).macs(torch.ones(2, 3))


def test_profile_measures_latency_and_restores_threads() -> None:
    model, x = build("SmallCNN")
    threads = torch.get_num_threads()
    found = profile(model, x, latency=True, repeats=5)
    assert found.latency is not None
    assert 0 < found.latency.low <= found.latency.median <= found.latency.high
    assert found.bytes >= 4 * found.params
    assert torch.get_num_threads() == threads
