"""How far sampled values are from exact ones: bias, rate, coverage of the error bars, and which sampling errs less."""

import pytest
import torch
from shapley.table_games import grouped_saturating_game, random_game, saturating_game

from lightning_eff.shapley import ExactShapley, PermutationShapley
from lightning_eff.shapley.games import evaluate_walks


def estimates(estimator, game, seeds):
    return [estimator.estimate(game, generator=seed) for seed in range(seeds)]


def exact(estimator, game):
    whole = getattr(game, "mean", game)
    return ExactShapley(depth=estimator.depth, direction=estimator.direction).estimate(whole).values


def mean_squared_error(estimator, game, seeds=60):
    truth = exact(estimator, game)
    return torch.stack([(r.values - truth).square().sum() for r in estimates(estimator, game, seeds)]).mean().item()


KINDS = {
    "pairs": (PermutationShapley(2), random_game(5)),
    "single walks": (PermutationShapley(2, antithetic=False), random_game(5)),
    "insertion walks": (PermutationShapley(2, direction="add"), random_game(5)),
    "rounds of two walks and a left-over player": (PermutationShapley(2, depth=3), random_game(7)),
    "rounds of one walk": (PermutationShapley(2, depth=4), random_game(7)),
    "insertion rounds": (PermutationShapley(2, depth=2, direction="add"), random_game(7)),
    "groups": (PermutationShapley(2), grouped_saturating_game(5, 3)),
    "groups at a partial depth": (PermutationShapley(2, depth=2), grouped_saturating_game(5, 3)),
}


@pytest.mark.filterwarnings("ignore:.*fewer than two samples", "ignore:zero variance")  # two walks tell little
@pytest.mark.parametrize("kind", KINDS)
def test_mean_over_seeds_is_within_four_standard_errors_of_the_exact_value(kind):
    estimator, game = KINDS[kind]
    values = torch.stack([result.values for result in estimates(estimator, game, 400)])
    error = (values.mean(0) - exact(estimator, game)).abs()
    assert (error <= 4 * values.std(0) / 400**0.5).all()


@pytest.mark.parametrize("shape", [{}, {"depth": 3}])
def test_error_falls_with_the_square_root_of_the_walks(shape):
    game = random_game(6)
    few, many = (mean_squared_error(PermutationShapley(walks, **shape), game) for walks in (6, 96))
    assert 2.5 < (few / many) ** 0.5 < 6.5  # 16 times the walks: 4 times the accuracy


@pytest.mark.parametrize(
    ("estimator", "game"),
    [
        (PermutationShapley(64), random_game(6)),
        (PermutationShapley(32, antithetic=False), random_game(6)),
        (PermutationShapley(64, depth=3), random_game(7)),
        (PermutationShapley(64, depth=5), random_game(7)),
        (PermutationShapley(16), grouped_saturating_game(6, 4)),
        (PermutationShapley(48, depth=2), grouped_saturating_game(6, 4)),
    ],
    ids=["pairs", "single walks", "rounds", "rounds of one walk", "groups", "groups at a partial depth"],
)
def test_ninety_five_percent_intervals_cover_ninety_to_ninety_nine_percent(estimator, game):
    truth = exact(estimator, game)
    covered = []
    for result in estimates(estimator, game, 200):
        low, high = result.interval(0.95)
        covered.append((low <= truth) & (truth <= high))
    assert 0.90 <= torch.stack(covered).double().mean() <= 0.99


def test_groups_of_one_pair_each_have_an_error_bar_on_the_safe_side():
    game, estimator = grouped_saturating_game(6, 8), PermutationShapley(2)
    truth = exact(estimator, game)
    results = estimates(estimator, game, 200)
    covered = torch.stack([(r.values - truth).abs() <= 1.96 * r.stderr for r in results]).double().mean()
    assert covered >= 0.93


def test_antithetic_pairs_err_less_than_as_many_single_walks():
    game = saturating_game(8)
    paired = mean_squared_error(PermutationShapley(16), game)
    single = mean_squared_error(PermutationShapley(16, antithetic=False), game)
    assert paired < 0.63 * single  # 1.6 times less is the low end of what was seen on real games


def test_independent_groups_err_less_than_shared_coalitions_at_equal_evaluations():
    game = grouped_saturating_game(8, 8)
    independent = mean_squared_error(PermutationShapley(8), game)
    shared = mean_squared_error(PermutationShapley(8, share_coalitions=True), game)
    assert independent < 0.5 * shared


def test_rounds_err_less_than_latin_squares_of_cyclic_shifts():
    game, n, depth, walks = saturating_game(8), 8, 4, 16
    estimator = PermutationShapley(walks, depth=depth)
    truth = exact(estimator, game)
    errors = []
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        squares = [torch.randperm(n, generator=generator) for _ in range(walks // n)]
        orders = torch.stack([base.roll(-shift)[:depth] for base in squares for shift in range(n)])
        path = torch.cat([game.values[-1:].expand(walks, 1), evaluate_walks(game, orders)], dim=1)
        values = torch.zeros(n, dtype=torch.float64).index_add_(
            0, orders.flatten(), (path[:, :-1] - path[:, 1:]).flatten()
        )
        errors.append((values / (len(squares) * depth) - truth).square().sum())
    assert mean_squared_error(estimator, game, 200) < 0.8 * torch.stack(errors).mean()
