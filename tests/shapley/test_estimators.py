"""What holds for every sampled estimator: budgets, seeds, chunks, resume, groups, vectors, bias, rate, error bars."""

import dataclasses
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from helpers import run_python
from shapley.table_games import CountingGame, GroupedTable, grouped_saturating_game, random_game, saturating_game

from lightning_eff.shapley import (
    ExactShapley,
    PermutationShapley,
    RegressionShapley,
    ShapleyResult,
    ShapleyWarning,
    StopRule,
    StratifiedShapley,
    TableGame,
    TopKShapley,
    UnbiasedKernelShapley,
)

SAMPLED = {
    "permutation": PermutationShapley(),
    "regression": RegressionShapley(),
    "regression, single coalitions": RegressionShapley(paired=False),
    "regression, kernel": RegressionShapley(sampling="kernel"),
    "stratified": StratifiedShapley(),
    "unbiased kernel": UnbiasedKernelShapley(),
    "top k": TopKShapley(2),
    "top k, bandit": TopKShapley(2, bounds="bernstein", value_range=4.0),
}
NOT_OF_SHAPLEY = {"regression, official": RegressionShapley(sampling="official")}
BY_NAME = {**SAMPLED, **NOT_OF_SHAPLEY}
everyone = pytest.mark.parametrize("name", BY_NAME)
UNBIASED = {"unbiased kernel": 60, "top k": 200}  # a regression has a bias of order 1 / budget


def at(name, budget, n):
    return BY_NAME[name].with_budget(budget, n)


def skewed_game(n, kind):
    """Contributions that are nearly always zero: a weighted majority, or the largest weight there is."""
    weights = torch.arange(1, n + 1, dtype=torch.float64)
    kept = (torch.arange(2**n)[:, None] >> torch.arange(n) & 1).double()
    if kind == "maximum":
        return TableGame((kept * weights).amax(1))
    return TableGame((kept @ weights > 0.5 * weights.sum()).double())


def exact(game):
    return ExactShapley().estimate(getattr(game, "mean", game)).values


@everyone
@pytest.mark.parametrize("budget", [37, 50, 77])
def test_no_more_than_the_budget_is_evaluated_and_it_is_counted_right(name, budget):
    game = CountingGame(random_game(8))
    result = at(name, budget, 8).estimate(game, generator=0)
    assert result.n_evals == game.count <= budget
    assert result.n_unique <= result.n_evals


@everyone
def test_a_stop_rule_ends_within_its_evaluations(name):
    game = CountingGame(random_game(8))
    result = at(name, 400, 8).estimate(game, generator=0, stop=StopRule(max_evals=55))
    assert result.n_evals == game.count <= 55
    assert not result.converged


@everyone
def test_a_precision_rule_ends_before_the_budget(name):
    result = at(name, 5000, 8).estimate(saturating_game(8), generator=0, stop=StopRule(rel_stderr=0.2))
    assert result.converged
    assert result.n_evals < 5000
    assert result.stderr.max() <= 0.2 * (result.values.max() - result.values.min()) or "top k" in name


@everyone
def test_the_same_seed_gives_the_same_bits_for_any_chunk_size(name):
    game = random_game(9)
    estimators = [dataclasses.replace(at(name, 150, 9), chunk_size=size) for size in (2, 7, 1000)]
    first, *others = (estimator.estimate(game, generator=3) for estimator in estimators)
    for other in others:
        assert torch.equal(first.values, other.values)
        assert torch.equal(first.stderr, other.stderr)
    assert not torch.equal(first.values, estimators[0].estimate(game, generator=4).values)


@everyone
@pytest.mark.parametrize("game", [random_game(8), grouped_saturating_game(8, 3)], ids=["whole", "groups"])
def test_going_on_equals_one_estimate_with_both_budgets(name, game):
    unit = {"regression, single coalitions": 1, "permutation": 14}.get(name, 9 if "top k" in name else 2)
    estimator = BY_NAME[name]
    first = estimator.with_budget(2 + 126 * unit // unit, 8).estimate(game, generator=5)
    more = first.n_evals - 2
    resumed = ShapleyResult.from_dict(first.to_dict())  # as from a file
    both = estimator.with_budget(2 + more, 8) if name == "permutation" else estimator.with_budget(more, 8)
    both = both.estimate(game, resume=resumed)
    whole = estimator.with_budget(2 + 2 * more, 8).estimate(game, generator=5)
    assert both.n_evals == whole.n_evals
    assert torch.equal(both.values, whole.values)
    assert torch.equal(both.stderr, whole.stderr)


@everyone
def test_a_result_of_another_estimator_cannot_be_resumed(name):
    game = random_game(8)
    other = "stratified" if name != "stratified" else "unbiased kernel"
    with pytest.raises(ValueError, match="resume does not fit"):
        at(name, 100, 8).estimate(game, resume=at(other, 100, 8).estimate(game, generator=0))


@everyone
def test_too_small_a_budget_says_how_much_is_needed(name):
    with pytest.raises(ValueError, match=r"\d+.*evaluations"):
        at(name, 3, 8)


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("name", [name for name in SAMPLED if "top k" not in name])
def test_few_players_are_no_special_case(name, n):
    game = random_game(n)
    silent = "zero variance" if name == "permutation" and n == 2 else None  # both orders pay the mean of two
    with pytest.warns(ShapleyWarning, match=silent) if silent else nullcontext():
        result = at(name, 600, n).estimate(game, generator=0)
    assert ((result.values - exact(game)).abs() <= 4 * result.stderr + 1e-12).all()


@pytest.mark.parametrize("name", [name for name in BY_NAME if "top k" not in name])
def test_a_single_player_has_all_without_sampling(name):
    result = BY_NAME[name].estimate(TableGame([1.0, 4.0]))
    assert result.values.tolist() == [3.0]
    assert result.n_evals == 2


@pytest.mark.parametrize("name", ["permutation", "regression", "regression, single coalitions", "top k"])
def test_additive_games_are_exact_at_any_budget(name):
    weights = torch.tensor([0.5, -1.0, 2.0, 0.0, 3.0, 0.25, 1.5], dtype=torch.float64)
    codes = torch.arange(2**7)[:, None] >> torch.arange(7) & 1
    with pytest.warns(ShapleyWarning, match="zero variance") if name == "permutation" else nullcontext():
        result = at(name, 30, 7).estimate(TableGame(codes.double() @ weights + 1), generator=0)
    assert result.values.tolist() == pytest.approx(weights.tolist(), abs=1e-9)


@pytest.mark.parametrize("name", [name for name in BY_NAME if "top k" not in name])
def test_components_of_a_vector_are_estimated_as_if_alone(name):
    game = random_game(8, components=3)
    result = at(name, 120, 8).estimate(game, generator=1)
    for d in range(3):
        alone = at(name, 120, 8).estimate(TableGame(game.values[:, d]), generator=1)
        assert torch.allclose(result.values[:, d], alone.values, rtol=0, atol=1e-12)
        assert torch.allclose(result.stderr[:, d], alone.stderr, rtol=1e-9, atol=1e-12)


def test_the_best_players_of_a_vector_are_refused():
    with pytest.raises(ValueError, match="one component"):
        TopKShapley(2).estimate(random_game(5, components=2), generator=0)


@pytest.mark.parametrize("name", SAMPLED)
def test_groups_draw_their_own_coalitions_and_are_weighted(name):
    game = grouped_saturating_game(8, 4)
    result = at(name, 200, 8).estimate(game, generator=0)
    assert game.group_count == pytest.approx(4 * result.n_evals, abs=4)
    assert ((result.values - exact(game)).abs() <= 4.5 * result.stderr).all()


@pytest.mark.parametrize("name", [name for name in SAMPLED if name not in ("top k", "top k, bandit")])
def test_independent_groups_err_less_than_shared_coalitions(name):
    base = saturating_game(10).values + 0.1 * random_game(10).values
    tables = [TableGame(base + 0.01 * random_game(10, s).values) for s in range(8)]
    game = GroupedTable(tables, [1 / 8] * 8)
    truth = exact(game)
    errors = {}
    for share in (False, True):
        estimator = dataclasses.replace(at(name, 120, 10), share_coalitions=share)
        values = torch.stack([estimator.estimate(game, generator=seed).values for seed in range(40)])
        errors[share] = (values - truth).square().sum(1).mean()
    assert errors[False] < 0.6 * errors[True]


def test_group_weights_that_differ_are_heeded():
    tables = [random_game(6, seed) for seed in range(2)]
    game = GroupedTable(tables, [0.9, 0.1])
    for name in ("regression", "stratified", "unbiased kernel", "top k"):
        result = at(name, 3000, 6).estimate(game, generator=0)
        assert ((result.values - exact(game)).abs() <= 4.5 * result.stderr + 1e-9).all()


@pytest.mark.parametrize("name", UNBIASED)
def test_mean_over_seeds_is_within_four_standard_errors_of_the_exact_value(name):
    game, seeds = random_game(6), 400
    values = torch.stack([at(name, UNBIASED[name], 6).estimate(game, generator=s).values for s in range(seeds)])
    error = (values.mean(0) - exact(game)).abs()
    assert (error <= 4 * values.std(0) / seeds**0.5).all()


@pytest.mark.filterwarnings("ignore:.*fewer than two samples")  # at the smaller budget
@pytest.mark.parametrize("name", [name for name in SAMPLED if "bandit" not in name])
def test_error_falls_with_the_square_root_of_the_budget(name):
    game = random_game(10)  # 1024 coalitions, none of which is exhausted at the smaller budgets
    truth = exact(game)
    few, many = (
        torch.stack(
            [(at(name, m, 10).estimate(game, generator=s).values - truth).square().sum() for s in range(30)]
        ).mean()
        for m in (56, 896)
    )
    ratio = float((few / many) ** 0.5)
    if name.startswith("regression") and "kernel" not in name:  # without replacement: better than the rate
        assert ratio > 2.5
    else:
        assert 2.5 < ratio < 6.5


@pytest.mark.parametrize(
    ("name", "budget", "game"),
    [
        ("regression", 80, saturating_game(8)),
        ("regression", 60, random_game(8)),
        ("regression", 60, grouped_saturating_game(8, 4)),
        ("regression", 100, skewed_game(10, "majority")),
        ("regression", 100, skewed_game(10, "maximum")),
        ("regression, single coalitions", 100, saturating_game(8)),
        ("regression, kernel", 120, random_game(8)),
        ("stratified", 200, saturating_game(8)),
        ("stratified", 160, random_game(7)),
        ("unbiased kernel", 200, random_game(7)),
        ("unbiased kernel", 60, grouped_saturating_game(8, 4)),
        ("top k", 400, random_game(6)),
    ],
)
def test_ninety_five_percent_intervals_cover_ninety_to_ninety_nine_percent(name, budget, game):
    truth = exact(game)
    covered = []
    for seed in range(200):
        low, high = at(name, budget, game.n_players).estimate(game, generator=seed).interval(0.95)
        covered.append((low <= truth) & (truth <= high))
    assert 0.90 <= torch.stack(covered).double().mean() <= 0.99


def test_a_function_of_64_players_runs_through_all_estimators_without_lightning():
    printed = run_python(
        """
import sys
import torch
from lightning_eff.shapley import *

def value(kept):
    return kept.double().mean(1).sqrt() + 0.1 * kept[:, 0] * kept[:, 1]

game = as_game(value, 64)
for estimator in (LeaveOneOut(), ExactShapley(depth=2), PermutationShapley(8), PermutationShapley(8, depth=20),
                  RegressionShapley("5n"), StratifiedShapley("5n"), UnbiasedKernelShapley("200n"), TopKShapley(2),
                  GreedyBackward()):
    result = estimator.estimate(game, generator=0)
    assert set(result.top(2).tolist()) == {0, 1}, estimator
    print(result.method)
assert not any(name.split(".")[0] in ("lightning", "pytorch_lightning", "torchvision") for name in sys.modules)
""",
        fresh=True,
    ).stdout.split()
    assert printed == ["leave_one_out", "exact", "permutation", "permutation", "regression", "stratified",
                       "unbiased_kernel", "top_k", "greedy_backward"]  # fmt: skip


@pytest.mark.parametrize(
    "estimator",
    [PermutationShapley(depth=3), PermutationShapley(depth=19, direction="add"), PermutationShapley(tolerance=0.1)],
)
@pytest.mark.parametrize("budget", [19, 56, 200])
def test_walks_of_any_depth_keep_to_their_budget_or_say_what_they_need(estimator, budget):
    least = dataclasses.replace(estimator, walks=1).cost(20)
    if budget < least:
        with pytest.raises(ValueError, match=f"need at least {least}"):
            estimator.with_budget(budget, 20)
    else:
        assert budget - 60 < estimator.with_budget(budget, 20).cost(20) <= budget


@pytest.mark.filterwarnings("ignore:.*fewer than two samples")
@pytest.mark.parametrize("name", [name for name in SAMPLED if "top k" not in name])
def test_groups_that_weigh_nothing_are_neither_evaluated_nor_in_the_error(name):
    two = [random_game(6, seed) for seed in range(2)]
    with_nothing = GroupedTable([*two, random_game(6, 9)], [0.5, 0.5, 0.0])
    without = GroupedTable(two, [0.5, 0.5])
    results = [at(name, 40, 6).estimate(game, generator=0) for game in (with_nothing, without)]
    assert torch.equal(results[0].values, results[1].values)
    assert torch.equal(results[0].stderr, results[1].stderr)
    assert with_nothing.group_count == without.group_count


@pytest.mark.parametrize("name", SAMPLED)
def test_progress_adds_up_to_the_evaluations(name):
    for game in (random_game(6), grouped_saturating_game(6, 3)):
        reported: list[int] = []
        result = at(name, 90, 6).estimate(game, generator=0, progress=reported.append)
        assert sum(reported) == result.n_evals
        assert min(reported) >= 0


def test_progress_adds_up_where_groups_are_truncated_unequally():
    reported: list[int] = []
    estimator = PermutationShapley(8, tolerance=0.6, patience=1)
    result = estimator.estimate(grouped_saturating_game(6, 3), generator=0, progress=reported.append)
    assert sum(reported) == result.n_evals


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PermutationShapley(3.5), "walks must be a whole number >= 1, got 3.5"),
        (lambda: PermutationShapley("3"), "walks must be a whole number"),
        (lambda: PermutationShapley(depth=True), "depth must be"),
        (lambda: TopKShapley(2.5), "k must be a whole number"),
        (lambda: RegressionShapley(size_terms=1.5), "size_terms must be a whole number"),
        (lambda: RegressionShapley("infn"), "budget must be"),
        (lambda: TopKShapley(2, bounds="bernstein"), "needs value_range"),
    ],
)
def test_numbers_of_another_kind_are_refused_at_once(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_plain_function_and_a_seed_that_is_none_are_told_apart_from_games_and_seeds():
    with pytest.raises(TypeError, match="as_game"):
        RegressionShapley().estimate(lambda kept: kept.sum(1))
    with pytest.raises(TypeError, match="generator must be a seed"):
        RegressionShapley().estimate(random_game(6), generator="a")
    number = np.int64(3)
    same = (RegressionShapley(30).estimate(random_game(6), generator=seed).values for seed in (3, number))
    assert torch.equal(*same)
