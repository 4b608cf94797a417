"""Costs of outputs, counted and measured."""

import pytest
import torch
import torchvision
from torch import nn

from lightning_eff.early_exit.attaching.costs import ExitCosts, exit_costs
from lightning_eff.early_exit.network import MultiExitNetwork


def chain() -> MultiExitNetwork:
    backbone = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    return MultiExitNetwork(backbone, ["1", "3"], 3, example_input=torch.randn(5, 4))


def test_linear_layers_cost_two_operations_a_weight():
    costs = chain().costs
    assert costs.backbone == (64.0, 192.0, 240.0)
    assert costs.heads == (48.0, 48.0)
    assert costs.totals() == [112.0, 288.0, 336.0]
    assert costs.base == 240.0
    assert costs.fractions() == pytest.approx([112 / 240, 288 / 240, 336 / 240])


def test_disabled_exits_cost_nothing():
    costs = chain().costs
    assert costs.totals([False, True]) == [64.0, 240.0, 288.0]
    assert costs.totals([False, False]) == [64.0, 192.0, 240.0]


def test_costs_stay_where_layers_get_other_parameters_but_no_channel_goes():
    fresh = chain()
    backbone = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    loaded = MultiExitNetwork(backbone, ["1", "3"], 3).build_from(fresh.structure())
    for network in (fresh, loaded):
        before = network.costs
        nn.utils.parametrizations.weight_norm(network.backbone[2])
        assert network.costs == before
        network.backbone[4] = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 3))
        assert network.costs == before


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_attention_is_counted_in_every_context(context):
    # per layer 2 * 4 d d L + 2 * 2 L L d + 2 * 2 L d m for width d, tokens L, inner width m
    d, tokens, m = 64, 50, 128

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers = [nn.TransformerEncoderLayer(d, 4, m, batch_first=True) for _ in range(2)]
            self.layers, self.out = nn.Sequential(*layers), nn.Linear(d, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.layers(x).mean(1))

    network = MultiExitNetwork(Encoder().eval(), ["layers.0"], 3, example_input=torch.randn(2, tokens, d))
    with context():
        costs = exit_costs(network, torch.randn(2, tokens, d))
    assert costs.backbone == (3_916_800.0, 2 * 3_916_800.0 + 2 * 3 * d)


def test_measured_time_has_the_same_form_and_leaves_the_network_alone():
    network = chain().train()
    costs = network.measure_costs(torch.randn(16, 4), "latency")
    assert costs.unit == "s"
    assert len(costs.backbone) == 3
    assert len(costs.heads) == 2
    assert all(b > 0 for b in (*costs.backbone, *costs.heads))
    assert list(costs.backbone) == sorted(costs.backbone)
    assert network.training
    assert network.costs is costs


def test_costs_survive_a_round_trip():
    costs = chain().costs
    assert ExitCosts.from_dict(costs.to_dict()) == costs


def test_unknown_kind_and_wrong_lengths_are_told():
    network = chain()
    with pytest.raises(ValueError, match="'flops' or 'latency', got 'joules'"):
        exit_costs(network, torch.randn(2, 4), "joules")
    with pytest.raises(ValueError, match="expected costs of 2 heads"):
        network.costs = ExitCosts((1.0, 2.0), (0.1,))
    network.costs = ExitCosts(
        (1.0, 2.0, 4.0),
        (
            0.0,
            0.0,
        )[:2],
        "mJ",
    )
    assert network.costs.fractions() == [0.25, 0.5, 1.0]


def test_a_backbone_without_countable_operations_warns_and_works():
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.ReLU(), nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x) - 1)

    with pytest.warns(UserWarning, match="no floating point operations were counted"):
        network = MultiExitNetwork(Sum(), ["a"], 3, example_input=torch.randn(2, 3))
    with pytest.raises(ValueError, match="no costs are known"):
        _ = network.costs
    assert network.predict(torch.randn(4, 3)).logits.shape == (4, 3)


def test_costs_of_resnet_follow_the_published_multiply_adds():
    network = MultiExitNetwork(
        torchvision.models.resnet18(weights=None), ["layer2"], 1000, example_input=torch.randn(1, 3, 224, 224)
    )
    assert network.costs.base == 2 * 1_814_073_344
