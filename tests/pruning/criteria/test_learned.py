"""Shapley values and importance switches as criteria."""

from __future__ import annotations

import pytest
import torch
from channel_networks import network, samples
from criteria_networks import cross_entropy, only, sharpen
from torch import nn

from lightning_eff.pruning import ChannelGame, DirichletOptions, dirichlet_scores
from lightning_eff.pruning.criteria import DirichletCriterion, ShapleyCriterion, importance
from lightning_eff.pruning.dirichlet.options import Prior
from lightning_eff.shapley import ExactShapley, PermutationShapley, shapley_values
from lightning_eff.surgery import ChannelGraph


def test_shapley_scores_are_the_values_of_the_channel_game() -> None:
    model, graph, x, y = network("SmallCNN", count=12)
    graph = only(graph, "layers.conv1")
    game = ChannelGame(model, graph, "layers.conv1", samples(x, y, groups=1), value="neg_loss")
    exact = shapley_values(game, "exact").values
    scores = importance(model, graph, ShapleyCriterion(estimator=ExactShapley()), [(x[:7], y[:7]), (x[7:], y[7:])])
    assert torch.allclose(scores["layers.conv1"], exact, atol=1e-6)
    affordable = importance(model, graph, ShapleyCriterion(budget=256), [(x, y)])  # 2^8 coalitions: exact by itself
    assert torch.allclose(affordable["layers.conv1"], exact, atol=1e-6)


def test_few_evaluations_are_enough_for_an_estimate() -> None:
    model, graph, x, y = network("SmallCNN", count=12)
    graph = only(graph, "layers.conv1")
    exact = importance(model, graph, ShapleyCriterion(estimator=ExactShapley()), [(x, y)])["layers.conv1"]
    few = importance(model, graph, ShapleyCriterion(budget="10n"), [(x, y)])["layers.conv1"]
    assert torch.corrcoef(torch.stack([few, exact]))[0, 1] > 0.8


def test_settings_of_the_shapley_criterion_are_checked() -> None:
    with pytest.raises(ValueError, match='expected value "accuracy", "neg_loss" or a callable'):
        ShapleyCriterion(value="loss")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="budget must be an int"):
        ShapleyCriterion(budget="many")
    with pytest.raises(ValueError, match="estimator must be a ShapleyEstimator or \"auto\", got 'permutation'"):
        ShapleyCriterion(estimator="permutation")  # type: ignore[arg-type]
    assert ShapleyCriterion(estimator=PermutationShapley(4)) == ShapleyCriterion(estimator=PermutationShapley(4))


def test_dirichlet_scores_are_the_relative_switches_that_training_gives() -> None:
    model, graph, x, y = network("SmallCNN", count=12)
    sharpen(model)
    graph, options = only(graph, "layers.conv3"), DirichletOptions(epochs=2, lr=0.1, prior=Prior(weight=0))
    batches = [(x[:6], y[:6]), (x[6:], y[6:])]
    posterior = dirichlet_scores(model, graph, batches, cross_entropy, options=options, seed=2, progress=False)
    scores = importance(model, graph, DirichletCriterion(options), batches, cross_entropy, seed=2)["layers.conv3"]
    assert torch.allclose(scores, posterior["layers.conv3"].relative.double())
    assert scores.mean().item() == pytest.approx(1)


def test_channels_that_carry_the_classes_rank_first_by_switches() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(8))
        model[0].bias.zero_()
        model[2].weight.zero_()
        model[2].bias.zero_()
        model[2].weight[0, 2] = model[2].weight[1, 5] = 4
    y = torch.arange(64) % 2
    x = torch.rand(64, 8, generator=torch.Generator().manual_seed(0))
    x[y == 0, 2] += 3
    x[y == 1, 5] += 3
    graph = ChannelGraph.from_model(model, x[:2])
    batches = list(zip(x.split(8), y.split(8), strict=True))
    scores = importance(model, graph, "dirichlet", batches, cross_entropy)["0"]
    assert set(scores.topk(2).indices.tolist()) == {2, 5}
