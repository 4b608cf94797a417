"""Corrected weights in cases whose answer is known, and against least squares on the rows themselves."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_eff.pruning.repair import Moments, Repair, repair
from lightning_eff.surgery import ChannelGraph, PruningPlan
from lightning_eff.surgery.trial import Trial

pytestmark = pytest.mark.filterwarnings("ignore:fewer calibration rows")


def two_layers(x: Tensor, weight: Tensor) -> tuple[nn.Sequential, ChannelGraph]:
    """A layer that hands its inputs on, and one of ``weight`` that reads them."""
    first, second = nn.Linear(x.shape[1], x.shape[1], bias=False), nn.Linear(*weight.shape[::-1], bias=False)
    first.weight.data, second.weight.data = torch.eye(x.shape[1]), weight
    model = nn.Sequential(first, second).double()
    return model, ChannelGraph.from_model(model, x)


def kept(size: int, channels: Sequence[int]) -> Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    mask[list(channels)] = True
    return mask


def with_gram(gram: list[list[float]]) -> Tensor:
    """Rows whose second moments are ``gram``."""
    lower = torch.linalg.cholesky(torch.tensor(gram, dtype=torch.float64))
    return lower.T * len(gram) ** 0.5


def test_weights_of_a_removed_duplicate_are_added_to_its_twin() -> None:
    x = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[:, 2] = x[:, 0]
    model, graph = two_layers(x, torch.tensor([[1.0, 2.0, 3.0], [0.0, -1.0, 0.5]]))
    found = Moments.collect(model, graph, [(x, None)]).solve("1", kept(3, [0, 1]), ridge=0)
    assert torch.allclose(found.weight, torch.tensor([[4.0, 2.0], [0.5, -1.0]], dtype=torch.float64), atol=1e-9)
    assert found.relative_error < 1e-9


def test_weights_of_orthogonal_channels_stay() -> None:
    x = torch.tensor([[1.0, 0, 0], [0, 2, 0], [0, 0, 3]], dtype=torch.float64)
    weight = torch.tensor([[1.0, 2.0, 3.0], [0.0, -1.0, 0.5]])
    model, graph = two_layers(x, weight)
    found = Moments.collect(model, graph, [(x, None)]).solve("1", kept(3, [0, 1]), ridge=0)
    assert torch.allclose(found.weight, weight[:, :2].double(), atol=1e-12)


def test_hand_example_of_two_correlated_channels() -> None:
    x = with_gram([[1.0, 0.5], [0.5, 1.0]])
    model, graph = two_layers(x, torch.tensor([[2.0, 4.0]]))
    found = Moments.collect(model, graph, [(x, None)]).solve("1", kept(2, [0]), ridge=0)
    assert found.weight.item() == pytest.approx(4, abs=1e-12)
    assert found.relative_error == pytest.approx(12 / 28, abs=1e-12)  # W Gram W^T = 28


def test_hand_example_with_a_ridge() -> None:
    x = with_gram([[1.0, 0.5], [0.5, 1.0]])
    model, graph = two_layers(x, torch.tensor([[2.0, 4.0]]))
    found = Moments.collect(model, graph, [(x, None)]).solve("1", kept(2, [0]), ridge=0.25)
    assert found.weight.item() == pytest.approx(4 / 1.25, abs=1e-12)
    # E (W x - v x0)^2 = 28 - 2 v 4 + v^2
    assert found.relative_error == pytest.approx((28 - 8 * 3.2 + 3.2**2) / 28, abs=1e-12)


def least_squares(rows: Tensor, wanted: Tensor) -> Tensor:
    return torch.linalg.lstsq(rows, wanted).solution.T


def test_convolution_is_fitted_as_by_least_squares_on_its_patches() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 1), nn.ReLU(), nn.Conv2d(6, 5, 3, 2, 1, bias=False), nn.Conv2d(5, 2, 1))
    model = model.double()
    x = torch.randn(40, 2, 7, 7, dtype=torch.float64)
    graph = ChannelGraph.from_model(model, x)
    moments = Moments.collect(model, graph, [(x[:15], None), (x[15:], None)], positions=10**6)
    keep_in, keep_out = kept(6, [0, 2, 3]), kept(5, [1, 4])
    found = moments.solve("2", keep_in, keep_out, ridge=0)
    with torch.no_grad():
        seen = model[:2](x)
        rows = F.unfold(seen[:, keep_in], 3, stride=2, padding=1).transpose(1, 2).flatten(0, 1)
        wanted = model[2](seen)[:, keep_out].flatten(2).transpose(1, 2).flatten(0, 1)
    expected = least_squares(rows, wanted)
    assert torch.allclose(found.weight.flatten(1), expected, atol=1e-8)
    left = (rows @ expected.T - wanted).square().sum() / wanted.square().sum()
    assert found.relative_error == pytest.approx(float(left), abs=1e-9)


def test_bias_is_fitted_as_a_weight_of_a_constant() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    x = torch.randn(60, 4, dtype=torch.float64)
    graph = ChannelGraph.from_model(model, x)
    moments = Moments.collect(model, graph, [(x, None)])
    with torch.no_grad():
        seen, wanted = model[:2](x), model(x)
    rows = torch.cat([seen[:, [1, 2, 4]], torch.ones(60, 1)], 1)
    expected = least_squares(rows, wanted)
    found = moments.solve("2", kept(6, [1, 2, 4]), ridge=0)
    assert torch.allclose(found.weight, expected[:, :3], atol=1e-9)
    assert torch.allclose(found.bias, expected[:, 3], atol=1e-9)
    left = (rows @ expected.T - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()
    assert found.relative_error == pytest.approx(float(left), abs=1e-9)
    plain = moments.solve("2", kept(6, [1, 2, 4]), ridge=0, fit_bias=False)
    assert plain.bias is None
    expected = least_squares(seen[:, [1, 2, 4]], wanted - model[2].bias.detach())
    assert torch.allclose(plain.weight, expected, atol=1e-9)


def test_grouped_convolution_is_fitted_block_by_block() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 1), nn.ReLU(), nn.Conv2d(8, 6, 2, groups=2, bias=False), nn.Conv2d(6, 2, 1))
    model = model.double()
    x = torch.randn(30, 2, 5, 5, dtype=torch.float64)
    graph = ChannelGraph.from_model(model, x)
    keep_in = kept(8, [0, 2, 3, 4, 6, 7])
    found = Moments.collect(model, graph, [(x, None)]).solve("2", keep_in, ridge=0)
    with torch.no_grad():
        seen = model[:2](x)
        wanted = model[2](seen).flatten(2).transpose(1, 2).flatten(0, 1)
    for block, channels in enumerate(([0, 2, 3], [4, 6, 7])):
        rows = F.unfold(seen[:, channels], 2).transpose(1, 2).flatten(0, 1)
        outputs = slice(3 * block, 3 * block + 3)
        expected = least_squares(rows, wanted[:, outputs])
        assert torch.allclose(found.weight[outputs].flatten(1), expected, atol=1e-8)


def test_linear_layer_after_flatten_is_fitted_to_the_features_of_kept_channels() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 7, 1), nn.ReLU(), nn.Flatten(), nn.Linear(28, 5, bias=False)).double()
    x = torch.randn(60, 2, 2, 2, dtype=torch.float64)
    graph = ChannelGraph.from_model(model, x)
    trial = Trial(model, graph, PruningPlan({"0": [0, 2, 5]}))
    errors = repair(trial, [(x, None)], Repair("gram", ridge=0, bn_samples=0))
    with torch.no_grad():
        expected = least_squares(model[:2](x)[:, [0, 2, 5]].flatten(1), model(x))
    assert torch.allclose(trial.tensor("3", "weight"), expected, atol=1e-8)
    assert list(errors) == ["3"]


class Concatenated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 4, 1), nn.Conv2d(7, 5, 2, bias=False)

    def features(self, x: Tensor) -> Tensor:
        return torch.cat([F.relu(self.a(x)), F.relu(self.b(x))], 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


@pytest.mark.parametrize("update", ["gram", "sequential"])
def test_layer_that_reads_two_groups_is_fitted_to_both_together(update: str) -> None:
    torch.manual_seed(0)
    model, x = Concatenated().double(), torch.randn(60, 2, 3, 3, dtype=torch.float64)
    graph = ChannelGraph.from_model(model, x)
    trial = Trial(model, graph, PruningPlan({"a": [0, 2], "b": [1, 3]}))
    repair(trial, [(x, None)], Repair(update, ridge=0, bn_samples=0))
    with torch.no_grad():
        rows = F.unfold(model.features(x)[:, [0, 2, 4, 6]], 2).transpose(1, 2).flatten(0, 1)
        expected = least_squares(rows, model(x).flatten(2).transpose(1, 2).flatten(0, 1))
    assert torch.allclose(trial.tensor("head", "weight").flatten(1), expected, atol=1e-8)


def test_gram_and_sequential_agree_on_a_net_with_one_hidden_layer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 9, 5)).double()
    x = torch.randn(200, 2, 5, 5, dtype=torch.float64)
    graph = ChannelGraph.from_model(model, x)
    trials = {}
    for update in ("gram", "sequential"):
        trials[update] = Trial(model, graph, PruningPlan({"0": [0, 1, 4]}))
        repair(trials[update], [(x, None)], Repair(update, ridge=0))
    for name in ("weight", "bias"):
        assert torch.allclose(trials["gram"].tensor("3", name), trials["sequential"].tensor("3", name), atol=1e-9)


def test_sequential_fits_each_layer_to_what_the_layers_before_it_give_now() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    x = torch.randn(100, 4, dtype=torch.float64)
    graph = ChannelGraph.from_model(model, x)
    trial = Trial(model, graph, PruningPlan({"0": [0, 1, 5], "2": [0, 2, 3]}))
    errors = repair(trial, [(x, None)], Repair("sequential", ridge=0))
    ones = torch.ones(100, 1, dtype=torch.float64)
    with torch.no_grad():
        hidden = torch.cat([model[:2](x)[:, [0, 1, 5]], ones], 1)
        first = least_squares(hidden, model[:3](x)[:, [0, 2, 3]])
        now = torch.cat([F.relu(hidden @ first.T), ones], 1)
        second = least_squares(now, model(x))
    for path, expected in (("2", first), ("4", second)):
        assert torch.allclose(trial.tensor(path, "weight"), expected[:, :-1], atol=1e-8)
        assert torch.allclose(trial.tensor(path, "bias"), expected[:, -1], atol=1e-8)
    assert list(errors) == ["2", "4"]


@pytest.mark.parametrize("update", ["gram", "channel", "sequential"])
def test_correction_is_never_worse_than_removal_on_its_own_rows(update: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.Tanh(), nn.Conv2d(8, 5, 1, bias=False)).double()
    x = torch.randn(20, 2, 6, 6, dtype=torch.float64)
    graph = ChannelGraph.from_model(model, x)
    dense = model(x).detach()
    generator = torch.Generator().manual_seed(1)
    for count in range(1, 8):
        plan = PruningPlan({"0": torch.randperm(8, generator=generator)[:count].tolist()})
        trial = Trial(model, graph, plan)
        with trial, torch.no_grad():
            removed = (model(x) - dense).square().sum()
        error = repair(trial, [(x, None)], Repair(update, ridge=0))["2"]
        with trial, torch.no_grad():
            corrected = (model(x) - dense).square().sum()
        assert corrected < removed
        assert error == pytest.approx(float(corrected / dense.square().sum()), abs=1e-9)
