"""A real game, that of the example: the value is the accuracy that some of the digits' 8 pixel columns allow."""

import pytest
import torch
from helpers import EXAMPLES, import_script

from lightning_eff.shapley import ExactShapley, LeaveOneOut, PermutationShapley
from lightning_eff.shapley.oracle import compare_ranks, oracle_rank, oracle_sets


@pytest.fixture(scope="module")
def example():
    return import_script(EXAMPLES / "digits_column_values.py")


@pytest.fixture(scope="module")
def digits(example):
    game = example.column_accuracy()
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


def test_every_estimator_of_the_example_comes_near_the_exact_values(digits, example):
    game, exact = digits
    for name, estimator in example.ESTIMATORS.items():
        if name != "leave-one-out":
            values = estimator.with_budget(2000, 8).estimate(game, generator=0).values
            assert ((values - exact.values) ** 2).sum() < 0.05 * (exact.values**2).sum(), name


def test_leave_one_out_sees_less_than_half_of_what_the_columns_are_worth(digits):
    game, exact = digits  # neighbouring columns stand in for each other
    assert LeaveOneOut().estimate(game).values.sum() < 0.5 * exact.values.sum()


def test_shapley_ranking_is_nearer_to_the_oracle_than_leave_one_out_and_chance(digits):
    game, exact = digits
    oracle = oracle_sets(game)
    generator = torch.Generator().manual_seed(0)
    ranks = {f"chance {number}": torch.randperm(8, generator=generator) for number in range(20)}
    ranks |= {"oracle": oracle_rank(oracle), "shapley": exact.rank(), "loo": LeaveOneOut().estimate(game).rank()}
    regret = {name: quality.regret for name, quality in compare_ranks(ranks, oracle).rankings.items()}
    chance = sum(regret[f"chance {number}"] for number in range(20)) / 20
    assert regret["oracle"] <= regret["shapley"] < regret["loo"] < chance
