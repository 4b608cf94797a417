"""Bounds of mutual information where it is known, and information of predictions from their confusion matrix."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lightning_eff.early_exit.analysis import layer_information, mutual_information, prediction_information


class Net(nn.Module):
    exits = ("a",)

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def features(self, x: Tensor) -> list[Tensor]:
        x = self.dropout(x)
        return [x[:, :, None, None] + torch.tensor([[-1.0, 1.0]]), torch.zeros(len(x), 3)]

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x, torch.zeros(len(x), 3)]


def test_equal_rows_know_nothing() -> None:
    rows = torch.rand(1, 300, generator=torch.Generator().manual_seed(0)).repeat(50, 1)
    assert mutual_information(rows) == (0, 0, 0)
    assert mutual_information(rows, sigma=0.5) == (0, 0, 0.5)


def test_samples_far_apart_are_known_one_by_one() -> None:
    lower, upper, _ = mutual_information(1e4 * torch.eye(50), sigma=1.0)
    assert lower == pytest.approx(math.log(50), abs=1e-12)
    assert upper == pytest.approx(math.log(50), abs=1e-12)


def test_two_far_groups_of_equal_size_are_one_bit() -> None:
    rows = torch.tensor([[0.0, 0.0], [100.0, 50.0]]).repeat(20, 1)
    lower, upper, _ = mutual_information(rows, sigma=1.0)
    assert lower == pytest.approx(math.log(2), abs=1e-12)
    assert upper == pytest.approx(math.log(2), abs=1e-12)


def test_bounds_of_two_points_are_their_closed_form() -> None:
    lower, upper, _ = mutual_information(torch.tensor([[0.0], [3.0]]), sigma=1.5)
    assert lower == pytest.approx(-math.log((1 + math.exp(-9 / (8 * 2.25))) / 2))
    assert upper == pytest.approx(-math.log((1 + math.exp(-9 / (2 * 2.25))) / 2))


@pytest.mark.parametrize("sigma", [1e-3, 0.1, 1.0, 3.0, 1e3])
def test_bounds_are_ordered_and_hold_the_information_of_a_gaussian_channel(sigma: float) -> None:
    rows = torch.randn(400, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lower, upper, _ = mutual_information(rows, sigma)
    assert 0 <= lower <= upper <= math.log(400)
    channel = 0.5 * math.log(1 + float(rows.var(correction=0)) / sigma**2)
    if channel < 2:  # while 400 samples stand for a Gaussian
        assert lower - 0.02 <= channel <= upper + 0.02


def test_block_size_does_not_matter() -> None:
    rows = torch.randn(101, 7, generator=torch.Generator().manual_seed(0))
    results = [mutual_information(rows, 1.0, block) for block in (1, 10, 101, 1000)]
    for result in results[1:]:
        assert result == pytest.approx(results[0], abs=1e-12)


def test_an_offset_far_from_zero_does_not_matter() -> None:
    rows = torch.randn(50, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert mutual_information(rows + 1e6, 1.0) == pytest.approx(mutual_information(rows, 1.0), abs=1e-6)


def test_default_noise_is_a_tenth_of_the_spread_of_a_feature() -> None:
    rows = torch.tensor([[0.0, 0.0], [2.0, 4.0]])  # variances 1 and 4
    assert mutual_information(rows).sigma == pytest.approx(0.1 * math.sqrt(2.5))
    assert mutual_information(rows, "total").sigma == pytest.approx(0.1 * math.sqrt(5))


def test_total_noise_makes_layers_of_different_width_comparable() -> None:
    rows = torch.randn(100, 1, generator=torch.Generator().manual_seed(0))
    copies = rows.repeat(1, 200)  # knows what rows know
    assert mutual_information(copies, "total")[:2] == pytest.approx(mutual_information(rows, "total")[:2])
    assert mutual_information(copies).lower > mutual_information(rows).lower + 0.5


def test_channels_that_are_last_are_not_averaged() -> None:
    class Last(Net):
        def features(self, x: Tensor) -> list[Tensor]:
            return [x[:, None, None] + torch.tensor([-1.0, 1.0])[:, None], torch.zeros(len(x), 3)]

        def structure(self) -> dict[str, object]:
            return {"exits": [{"channels": "last"}]}

    target = torch.arange(3).repeat(20)
    result = layer_information(Last(), [(100.0 * nn.functional.one_hot(target, 3), target)], sigma=1.0)
    assert result.features[0].lower == pytest.approx(math.log(3))


def test_information_of_predictions_is_that_of_the_confusion_matrix() -> None:
    # counts: both 0 three times, both 1 twice, prediction 1 of label 0 once
    predictions, target = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 0, 0, 1, 1, 0])
    joint = {(0, 0): 3 / 6, (1, 1): 2 / 6, (1, 0): 1 / 6}
    of_prediction, of_target = {0: 1 / 2, 1: 1 / 2}, {0: 4 / 6, 1: 2 / 6}
    expected = sum(p * math.log(p / (of_prediction[a] * of_target[b])) for (a, b), p in joint.items())
    assert prediction_information(predictions, target) == pytest.approx(expected)


def test_perfect_predictions_know_the_label_and_constant_ones_nothing() -> None:
    target = torch.arange(10).repeat(5)
    assert prediction_information(target, target) == pytest.approx(math.log(10))
    assert prediction_information((target + 3) % 10, target) == pytest.approx(math.log(10))  # wrong, but as telling
    assert prediction_information(torch.zeros_like(target), target) == 0


def test_layers_of_a_network_are_pooled_in_evaluation_mode() -> None:
    network = Net().train()
    target = torch.arange(3).repeat(20)
    x = 100.0 * nn.functional.one_hot(target, 3)
    result = layer_information(network, [(x[:40], target[:40]), (x[40:], target[40:])], sigma=1.0)
    assert result.layers == ("a", "final")
    assert result.features[0][:2] == pytest.approx((math.log(3), math.log(3)))
    assert result.features[1][:2] == (0, 0)
    assert result.predictions == pytest.approx((math.log(3), 0))
    assert result.samples == 60
    assert network.training
    assert [row[0] for row in result.table().rows] == ["a", "final"]


def test_no_more_samples_are_taken_than_asked_for() -> None:
    loader = [(torch.rand(40, 3), torch.arange(40) % 3)] * 2
    assert layer_information(Net(), loader, n_max=50).samples == 50
    assert layer_information(Net(), loader, n_max=30).samples == 30


def test_pooling_may_be_another() -> None:
    loader = [(torch.rand(8, 3), torch.arange(8) % 3)]
    seen = []

    def pool(feature: Tensor) -> Tensor:
        seen.append(feature.shape)
        return feature.flatten(1)[:, :1] * 0

    result = layer_information(Net(), loader, pool=pool)
    assert seen == [(8, 3, 1, 2), (8, 3)]
    assert result.features[0].upper == 0


@pytest.mark.parametrize(
    "arguments", [{"block": 0}, {"sigma": 0.0}, {"sigma": -1.0}, {"sigma": math.inf}, {"sigma": "all"}]
)
def test_bad_arguments_are_refused(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="expected block >= 1 and sigma > 0"):
        mutual_information(torch.rand(4, 3), **arguments)
    with pytest.raises(ValueError, match="expected block >= 1 and sigma > 0"):
        layer_information(Net(), [], **arguments)


def test_features_and_labels_that_cannot_be_used_are_refused() -> None:
    with pytest.raises(ValueError, match="expected finite features"):
        mutual_information(torch.tensor([[1.0], [math.inf]]))
    with pytest.raises(ValueError, match=r"at least one sample, got shape \[0, 3\]"):
        mutual_information(torch.zeros(0, 3))
    with pytest.raises(ValueError, match=r"got predictions of shape \[2\].* beside 3 labels"):
        prediction_information(torch.tensor([0, 1]), torch.tensor([0, 1, 1]))
    with pytest.raises(ValueError, match=r"got predictions of shape.*float32"):
        prediction_information(torch.tensor([0.5, 1]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="expected n_max >= 1, got 0"):
        layer_information(Net(), [], n_max=0)
