"""A real game: players are the 8 pixel columns of scikit-learn's digits, the value is the accuracy they allow."""

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from lightning_eff.shapley import CachedGame, ExactShapley, LeaveOneOut, PermutationShapley, as_game


@pytest.fixture(scope="module")
def digits():
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8) / 16
    train, test = slice(0, 300), slice(300, 900)

    def accuracy(coalition):
        if not coalition.any():
            return 0.1
        columns = images[:, :, coalition.numpy()].reshape(len(images), -1)
        model = LogisticRegression(max_iter=500, tol=1e-2).fit(columns[train], labels[train])
        return model.score(columns[test], labels[test])

    game = CachedGame(as_game(lambda coalitions: torch.tensor([accuracy(row) for row in coalitions]), 8))
    return game, ExactShapley().estimate(game)


def test_exact_values_share_out_the_accuracy(digits):
    _, exact = digits
    assert abs(exact.efficiency_gap) < 1e-12
    assert exact.v_full > 0.75  # 300 training images
    assert 0 in exact.bottom(2)  # the outermost columns are almost empty
    assert 7 in exact.bottom(2)


def test_walks_come_within_four_standard_errors_of_the_exact_values(digits):
    game, exact = digits
    sampled = PermutationShapley(64).estimate(game, generator=0)
    assert ((sampled.values - exact.values).abs() <= 4 * sampled.stderr).all()
    assert game.misses == 256


def test_partial_walks_come_within_four_standard_errors_of_the_exact_partial_values(digits):
    game, _ = digits
    exact = ExactShapley(depth=4).estimate(game)
    sampled = PermutationShapley(64, depth=4).estimate(game, generator=0)
    assert ((sampled.values - exact.values).abs() <= 4 * sampled.stderr).all()


def test_leave_one_out_sees_less_than_half_of_what_the_columns_are_worth(digits):
    game, exact = digits  # neighbouring columns stand in for each other
    assert LeaveOneOut().estimate(game).values.sum() < 0.5 * exact.values.sum()
