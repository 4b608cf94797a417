"""Agreement with captum and shapiq, where the extra `bench` is installed."""

import numpy as np
import pytest
import torch
from shapley.table_games import random_game

from lightning_eff.shapley import ExactShapley, RegressionShapley


@pytest.mark.parametrize("n", [3, 6])
def test_exact_values_are_those_of_captum(n):
    attr = pytest.importorskip("captum.attr")
    game = random_game(n)
    explainer = attr.ShapleyValues(lambda mask: game(mask > 0.5).float())
    theirs = explainer.attribute(torch.ones(1, n), baselines=torch.zeros(1, n))[0]
    assert torch.allclose(ExactShapley().estimate(game).values, theirs.double(), atol=1e-5)  # captum adds in float32


@pytest.mark.parametrize("n", [4, 7, 10])
def test_exact_values_are_those_of_shapiq(n):
    shapiq = pytest.importorskip("shapiq")
    game = random_game(n)
    powers = 1 << np.arange(n)
    computer = shapiq.ExactComputer(n_players=n, game=lambda z: game.values.numpy()[np.asarray(z, np.int64) @ powers])
    found = computer("SV", order=1)
    theirs = torch.tensor([float(found[(i,)]) for i in range(n)], dtype=torch.float64)
    assert torch.allclose(ExactShapley().estimate(game).values, theirs, rtol=0, atol=1e-12)
    assert torch.allclose(RegressionShapley(2**n).estimate(game).values, theirs, rtol=0, atol=1e-9)
