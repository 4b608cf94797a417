import dataclasses
import json

import pytest
import torch
from shapley.table_games import (
    CountingGame,
    WalkableTable,
    grouped_saturating_game,
    random_game,
    saturating_game,
    three_and_one,
)

from lightning_eff.shapley import (
    LeaveOneOut,
    PermutationShapley,
    ShapleyResult,
    ShapleyWarning,
    StopRule,
    TableGame,
    as_game,
)
from lightning_eff.shapley.accumulator import UnitOrders, Units

ALL_SHAPES = [{"depth": "full"}, {"depth": "full", "antithetic": False}, {"depth": 3}, {"depth": 4, "direction": "add"}]


@pytest.mark.parametrize("walks", [1, 2, 7])
@pytest.mark.parametrize("shape", ALL_SHAPES)
def test_additive_game_is_exact_for_any_number_of_walks(walks, shape):
    weights = torch.tensor([1.0, -2.0, 4.0, 0.5, 8.0, 0.0, 0.25])  # dyadic, so that sums carry no rounding
    game = as_game(lambda coalitions: coalitions.double() @ weights.double(), 7)
    with pytest.warns(ShapleyWarning):
        result = PermutationShapley(walks, **shape).estimate(game, generator=walks)
    assert result.values.tolist() == weights.tolist()


@pytest.mark.parametrize("direction", ["remove", "add"])
@pytest.mark.parametrize("components", [None, 2])
def test_efficiency_holds_after_any_number_of_walks(direction, components):
    result = PermutationShapley(4, direction=direction).estimate(random_game(9, components=components), generator=3)
    assert result.efficiency_gap.abs().max() < 1e-14


def test_efficiency_holds_with_independent_groups():
    result = PermutationShapley(4).estimate(grouped_saturating_game(6, 3), generator=0)
    assert abs(result.efficiency_gap) < 1e-14


def test_vector_game_gives_the_values_of_its_components():
    table = random_game(6, components=2)
    for shape in ALL_SHAPES:
        vector = PermutationShapley(8, **shape).estimate(table, generator=5)
        for d in range(2):
            scalar = PermutationShapley(8, **shape).estimate(TableGame(table.values[:, d]), generator=5)
            assert torch.equal(vector.values[:, d], scalar.values)
            assert torch.equal(vector.stderr[:, d], scalar.stderr)


def test_null_player_gets_zero_with_certainty():
    result = PermutationShapley(16).estimate(as_game(three_and_one, 5), generator=0)
    assert (result.values[4].item(), result.stderr[4].item()) == (0, 0)


@pytest.mark.parametrize("shape", ALL_SHAPES)
def test_walkable_game_is_walked_and_gives_the_same_bits(shape):
    game = WalkableTable(random_game(7).values)
    result = PermutationShapley(8, **shape).estimate(game, generator=2)
    assert torch.equal(result.values, PermutationShapley(8, **shape).estimate(random_game(7), generator=2).values)
    assert game.walks > 0


@pytest.mark.parametrize("shape", ALL_SHAPES)
@pytest.mark.parametrize("grouped", [False, True])
def test_same_seed_gives_the_same_bits_for_any_chunk_size(shape, grouped):
    game = grouped_saturating_game(7, 3) if grouped else random_game(7)
    results = [
        PermutationShapley(12, chunk_size=size, **shape).estimate(game, generator=11).to_dict()
        for size in (1, 50, 10**6)
    ]
    for result in results:
        result.pop("seconds")
    assert results[0] == results[1] == results[2]


def test_generator_of_the_same_seed_gives_the_same_bits_and_other_seeds_others():
    game = random_game(7)
    values = [
        PermutationShapley(4).estimate(game, generator=torch.Generator().manual_seed(seed)).values for seed in (1, 1, 2)
    ]
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])


def test_global_random_state_is_left_alone_and_the_drawn_seed_repeats_the_run():
    before = torch.get_rng_state()
    first = PermutationShapley(8).estimate(random_game(7))
    assert torch.equal(torch.get_rng_state(), before)
    again = PermutationShapley(8).estimate(random_game(7), generator=first.state["seed"])
    assert torch.equal(first.values, again.values)


def test_negative_seed_is_refused():
    with pytest.raises(ValueError, match="got -1"):
        PermutationShapley().estimate(random_game(3), generator=-1)


@pytest.mark.parametrize("shape", [*ALL_SHAPES, {"depth": "full", "tolerance": 0.3}])
@pytest.mark.parametrize("grouped", [False, True])
def test_resumed_estimate_equals_one_long_estimate_to_the_bit(shape, grouped, tmp_path):
    game = CountingGame(saturating_game(7)) if not grouped else grouped_saturating_game(7, 3)
    whole = PermutationShapley(20, **shape).estimate(game, generator=4).to_dict()
    first = PermutationShapley(8, **shape).estimate(game, generator=4)
    first.save(tmp_path / "first.json")
    new = []
    second = PermutationShapley(12, **shape).estimate(
        game, resume=ShapleyResult.load(tmp_path / "first.json"), progress=new.append
    )
    assert sum(new) == second.n_evals - first.n_evals
    resumed = second.to_dict()
    assert resumed.pop("seconds") > first.seconds
    whole.pop("seconds")
    assert json.dumps(resumed) == json.dumps(whole)


def test_resume_refuses_another_estimator_game_or_seed():
    first = PermutationShapley(4).estimate(random_game(5), generator=4)
    with pytest.raises(ValueError, match="does not fit"):
        PermutationShapley(4, antithetic=False).estimate(random_game(5), resume=first)
    with pytest.raises(ValueError, match="does not fit"):
        PermutationShapley(4).estimate(random_game(6), resume=first)
    with pytest.raises(ValueError, match="its own seed 4"):
        PermutationShapley(4).estimate(random_game(5), resume=first, generator=5)
    PermutationShapley(4).estimate(random_game(5), resume=first, generator=4)


@pytest.mark.parametrize("shape", ALL_SHAPES)
def test_cost_is_what_is_evaluated_and_reported(shape):
    game, done = CountingGame(random_game(7)), []
    estimator = PermutationShapley(12, **shape)
    result = estimator.estimate(game, generator=0, progress=done.append)
    assert game.count == result.n_evals == sum(done) == estimator.cost(7)


def test_full_walk_costs_one_evaluation_less_than_players():
    assert PermutationShapley(10).cost(8) == 2 + 10 * 7


@pytest.mark.parametrize("budget", [26, 31, 50, 1000])
@pytest.mark.parametrize("shape", ALL_SHAPES)
def test_budget_is_never_exceeded(budget, shape):
    game = CountingGame(random_game(7))
    result = PermutationShapley(100, **shape).estimate(game, generator=0, stop=StopRule(max_evals=budget))
    assert game.count == result.n_evals <= budget
    assert result.converged == (result.n_evals == PermutationShapley(100, **shape).cost(7))


def test_evaluations_of_groups_are_counted_as_forwards_over_all_samples():
    game = grouped_saturating_game(7, 4)
    estimator = PermutationShapley(8)
    result = estimator.estimate(game, generator=0, stop=StopRule(max_evals=30))
    assert result.n_evals == game.group_count / 4 == 2 + 2 * 2 * 6
    assert game.whole_count == 0


def test_shared_coalitions_evaluate_the_whole_game():
    game = grouped_saturating_game(7, 4)
    result = PermutationShapley(8, share_coalitions=True).estimate(game, generator=0)
    assert (game.group_count, game.whole_count) == (0, result.n_evals)
    assert torch.equal(result.values, PermutationShapley(8).estimate(game.mean, generator=0).values)


def test_distinct_coalitions_are_counted():
    seen = set()

    def remember(coalitions):
        seen.update(tuple(row) for row in coalitions.tolist())
        return coalitions.double() @ torch.arange(5).double() * (coalitions.sum(1) > 2)

    result = PermutationShapley(16).estimate(as_game(remember, 5), generator=0)
    assert result.n_unique == len(seen) < result.n_evals


def test_budget_too_small_for_one_pair_is_refused_before_any_evaluation():
    game = CountingGame(random_game(7))
    with pytest.raises(ValueError, match="needs 14 evaluations, the budget is 13; LeaveOneOut needs 8"):
        PermutationShapley().estimate(game, stop=StopRule(max_evals=13))
    assert game.count == 0


def test_budget_that_reaches_no_player_twice_gives_no_error_bar_and_says_so():
    with pytest.warns(ShapleyWarning, match="7 of 7 players have fewer than two samples"):
        result = PermutationShapley(depth=4).estimate(random_game(7), generator=0, stop=StopRule(max_evals=5))
    assert result.values.isnan().sum() == 3
    assert result.stderr.isinf().all()
    with pytest.raises(ValueError, match="have no value yet"):
        result.rank()


@pytest.mark.parametrize(("n", "depth"), [(7, 3), (7, 4), (9, 2), (9, 8), (6, 3)])
def test_partial_walks_are_added_until_each_player_went_twice_and_none_much_oftener(n, depth):
    result = PermutationShapley(1, depth=depth).estimate(random_game(n), generator=0)
    counts = result.state["groups"][0]["count"]
    assert min(counts) >= 2
    assert max(counts) - min(counts) <= 1
    assert result.stderr.isfinite().all()


@pytest.mark.parametrize(("n", "depth"), [(7, 2), (8, 4), (9, 5)])
def test_partial_rounds_send_players_to_all_depths_alike(n, depth):
    units = Units(n, depth, n // depth)
    orders = UnitOrders(units, seed=0, group=0).draw(3000).flatten(0, 1)
    counts = torch.stack([torch.bincount(orders[:, place], minlength=n) for place in range(depth)]).double()
    expected = len(orders) / n
    assert ((counts - expected).abs() < 4.5 * expected**0.5).all()  # 4.5 standard deviations of a count


def test_antithetic_walks_are_reversals():
    pairs = UnitOrders(Units(6, 6, 2), seed=0, group=0).draw(5)
    assert torch.equal(pairs[:, 0], pairs[:, 1].flip(1))


def test_groups_walk_different_orders():
    units = Units(12, 12, 2)
    assert not torch.equal(UnitOrders(units, 0, group=0).draw(1), UnitOrders(units, 0, group=1).draw(1))


@pytest.mark.parametrize("direction", ["remove", "add"])
def test_depth_one_is_leave_one_out(direction):
    result = PermutationShapley(depth=1, direction=direction).estimate(random_game(5))
    assert torch.equal(result.values, LeaveOneOut(direction).estimate(random_game(5)).values)
    assert result.n_evals == PermutationShapley(depth=1).cost(5) == 6


def test_matched_depth_must_be_replaced_by_the_caller():
    estimator = PermutationShapley(depth="matched")
    with pytest.raises(ValueError, match=r"dataclasses\.replace"):
        estimator.estimate(random_game(5))
    with pytest.raises(ValueError, match=r"dataclasses\.replace"):
        estimator.cost(5)
    assert dataclasses.replace(estimator, depth=3).estimate(random_game(5), generator=0).depth == 3


def test_single_player_gets_everything_for_two_evaluations():
    result = PermutationShapley().estimate(TableGame([1.0, 4.0]))
    assert (result.values.tolist(), result.stderr.tolist(), result.n_evals) == ([3.0], [0.0], 2)


def test_game_without_players_is_refused():
    with pytest.raises(ValueError, match="at least one player"):
        PermutationShapley().estimate(as_game(lambda coalitions: coalitions.sum(1), 0))


def test_dead_game_has_zero_values_and_a_warning():
    with pytest.warns(ShapleyWarning, match="no signal"):
        result = PermutationShapley(4).estimate(TableGame([0.1] * 16), generator=0)
    assert result.values.tolist() == result.stderr.tolist() == [0, 0, 0, 0]


def test_equal_ends_do_not_hide_players_of_opposite_worth():
    game = as_game(lambda coalitions: coalitions[:, 0].double() - coalitions[:, 1].double(), 3)
    with pytest.warns(ShapleyWarning, match="zero variance"):
        result = PermutationShapley(4).estimate(game, generator=0)
    assert result.values.tolist() == [1, -1, 0]


def test_values_without_variance_advise_a_finer_value():
    game = as_game(lambda coalitions: coalitions.double().sum(1), 5)
    with pytest.warns(ShapleyWarning, match='zero variance.*value="neg_loss"'):
        result = PermutationShapley(4).estimate(game, generator=0)
    assert result.stderr.tolist() == [0] * 5


def test_partial_walks_that_change_nothing_advise_a_finer_value():
    game = as_game(lambda coalitions: (coalitions.sum(1) >= 2).double(), 6)
    with pytest.warns(ShapleyWarning, match='up to depth 3 changed.*value="neg_loss"'):
        PermutationShapley(4, depth=3).estimate(game, generator=0)


def test_value_that_is_not_finite_is_an_error_naming_the_coalition():
    values = random_game(4).values.clone()
    values[0b0110] = float("nan")
    with pytest.raises(ValueError, match=r"keeps players \(1, 2\)"):
        PermutationShapley(32).estimate(TableGame(values), generator=0)


def test_nothing_is_truncated_by_default():
    assert PermutationShapley(8).estimate(saturating_game(8), generator=0).truncated == 0


@pytest.mark.parametrize("direction", ["remove", "add"])
def test_truncation_saves_evaluations_and_reports_the_fraction_it_left_out(direction):
    game = CountingGame(TableGame(torch.arange(256) % 2))  # player 0 alone decides: nothing moves after it went
    estimator = PermutationShapley(64, tolerance=0.1, direction=direction)
    with pytest.warns(ShapleyWarning, match="zero variance"):
        result = estimator.estimate(game, generator=0)
    assert game.count == result.n_evals < estimator.cost(8)
    # a walk that stops after `steps` < 7 evaluations leaves 8 - steps marginal contributions out
    steps = torch.tensor(result.state["groups"][0]["steps"])
    assert result.truncated == (8 - steps[steps < 7]).sum().item() / (64 * 8)
    assert result.truncated > 0.1
    assert result.values.tolist() == [1, 0, 0, 0, 0, 0, 0, 0]  # left-out players were paid 0, and counted
    assert result.state["groups"][0]["count"] == [32] * 8


def test_truncation_is_biased_where_the_game_recovers():
    recovers = as_game(lambda coalitions: (coalitions.sum(1) % 4 == 0).double() * coalitions[:, 0], 8)
    exact, cut = (
        PermutationShapley(512, tolerance=tolerance).estimate(recovers, generator=0) for tolerance in (0.0, 0.1)
    )
    assert cut.truncated > 0.2
    assert abs(exact.efficiency_gap) < 1e-12


def test_precision_rule_ends_early_at_the_same_place_for_any_chunk_size():
    stop = StopRule(rel_stderr=0.2)
    results = [
        PermutationShapley(4000, chunk_size=size).estimate(saturating_game(6), generator=0, stop=stop)
        for size in (1, 10**6)
    ]
    assert results[0].converged
    assert results[0].n_evals == results[1].n_evals < PermutationShapley(4000).cost(6)
    spread = results[0].values.max() - results[0].values.min()
    assert results[0].stderr.max() <= 0.2 * spread


def test_rank_stability_rule_ends_early():
    game = as_game(lambda coalitions: coalitions.double() @ torch.arange(6).double() ** 2 + coalitions[:, 0], 6)
    with pytest.warns(ShapleyWarning, match="zero variance"):
        result = PermutationShapley(4000).estimate(game, generator=0, stop=StopRule(rank_stability=1.0))
    assert result.converged
    assert result.n_evals == 2 + 8 * 2 * 5  # two looks, four pairs apart


def test_precision_that_is_not_reached_is_not_called_converged():
    result = PermutationShapley(8).estimate(random_game(6), generator=0, stop=StopRule(rel_stderr=1e-6))
    assert not result.converged


def test_time_limit_ends_early_with_what_there_is():
    result = PermutationShapley(1000, chunk_size=1).estimate(
        random_game(6), generator=0, stop=StopRule(max_seconds=0.02)
    )
    assert not result.converged
    assert 0.02 < result.seconds < 1
    assert result.values.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"walks": 0}, "walks must be a whole number >= 1, got 0"),
        ({"patience": 0}, "patience must be a whole number >= 1"),
        ({"chunk_size": 0}, "chunk_size must be a whole number >= 1"),
        ({"tolerance": 1.0}, r"tolerance must lie in \[0, 1\), got 1.0"),
        ({"depth": -1}, "depth must be"),
        ({"direction": "both"}, "direction must be"),
    ],
)
def test_arguments_out_of_range_are_refused_before_any_game(arguments, message):
    with pytest.raises(ValueError, match=message):
        PermutationShapley(**arguments)


@pytest.mark.parametrize(
    "arguments", [{"max_evals": 0}, {"max_seconds": -1.0}, {"rel_stderr": 0.0}, {"rank_stability": 1.5}]
)
def test_impossible_stop_rules_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        StopRule(**arguments)
