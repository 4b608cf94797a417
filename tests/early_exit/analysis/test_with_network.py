"""Every analysis on the networks it is made for."""

from __future__ import annotations

import copy

import pytest
import torch
from exit_networks import CLASSES, SequenceFirst, chain
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_eff.early_exit.analysis import (
    gradient_dominance,
    layer_information,
    layer_ranks,
    linear_path,
    loss_plane,
)
from lightning_eff.early_exit.network import MultiExitNetwork


def batch(*shape: int, n: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, *shape, generator=generator), torch.randint(0, CLASSES, (n,), generator=generator)


def chain_with_exits() -> MultiExitNetwork:
    torch.manual_seed(0)
    return MultiExitNetwork(chain(), ["1", "3"], CLASSES, example_input=torch.zeros(2, 4))


def test_shares_are_those_of_backward_through_hooks_and_heads() -> None:
    network, (x, y) = chain_with_exits(), batch(4)
    result = gradient_dominance(network, x, y)
    assert result.groups == ("0", "2", "4", "6", "backbone")
    assert result.outputs == ("1", "3", "final")
    assert result.values[1, 0] == 0  # what comes behind an exit is not pulled by it
    assert result.values[2].tolist() == [0, 0, 1]
    weight = network.backbone[0].weight
    losses = [F.cross_entropy(output, y) for output in network(x)]
    gradients = [torch.autograd.grad(loss, weight, retain_graph=True)[0].flatten() for loss in losses]
    whole = torch.stack(gradients).sum(0)
    expected = torch.stack([gradient @ whole / (whole @ whole) for gradient in gradients])
    of_weight = gradient_dominance(network, x, y, groups={"weight": [weight]}).values[0]
    torch.testing.assert_close(of_weight, expected.double(), rtol=1e-4, atol=1e-6)  # float32 gradients


def test_layers_are_those_heads_read() -> None:
    network, (x, y) = chain_with_exits(), batch(4)
    ranks = layer_ranks(network, [(x[:10], y[:10]), (x[10:], y[10:])], 1e-12)
    assert list(ranks) == ["1", "3", "final"]
    assert ranks["final"] == CLASSES
    result = layer_information(network, [(x, y)])
    assert result.layers == ("1", "3", "final")
    assert all(0 < one.lower <= one.upper for one in result.features)


def test_features_whose_batch_is_not_first_inside_are_looked_at_sample_by_sample() -> None:
    torch.manual_seed(0)
    x, y = batch(3, 3)
    network = MultiExitNetwork(SequenceFirst(), ["layers.0", "layers.1"], CLASSES, example_input=x)
    result = layer_information(network, [(x, y)])
    assert result.samples == 24
    repeated = layer_information(network, [(x[:1].expand(24, 3, 3), y)], sigma=1.0)
    assert [one.upper for one in repeated.features] == pytest.approx([0, 0, 0], abs=1e-9)
    assert set(layer_ranks(network, [(x, y)])) == {"layers.0", "layers.1", "final"}


def test_paths_and_planes_leave_the_network_as_it_is() -> None:
    network, other = chain_with_exits(), chain_with_exits()
    nn.init.normal_(other.backbone[0].weight)
    network.set_thresholds([0.9, None])  # one of them is infinite
    loader = [batch(4)]
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    path = linear_path(network, other, loader, points=3)
    plane = loss_plane(network, loader, steps=3)
    assert path.loss.isfinite().all()
    torch.testing.assert_close(path.loss[0], plane.loss[1, 1])
    assert linear_path(network, copy.deepcopy(network), loader, points=3).barrier.tolist() == [0, 0, 0]
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    assert network.training
    assert torch.equal(network.predict(loader[0][0]).logits, copy.deepcopy(network).predict(loader[0][0]).logits)
