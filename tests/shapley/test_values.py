"""The front door: methods by name, what "auto" chooses, greedy removal."""

import pytest
import torch
from shapley.table_games import CountingGame, random_game, saturating_game

from lightning_eff.shapley import (
    ExactShapley,
    GreedyBackward,
    PermutationShapley,
    RegressionShapley,
    StopRule,
    as_game,
    choose_estimator,
    shapley_values,
)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("exact", {}),
        ("permutation", {"walks": 400}),
        ("regression", {"budget": 120}),
        ("stratified", {"budget": 4000}),
        ("unbiased_kernel", {"budget": 20_000}),
        ("top_k", {"k": 2, "budget": 20_000, "level": 0.999999}),
    ],
)
def test_every_method_is_reached_by_its_name(method, options):
    game = saturating_game(7)
    result = shapley_values(game, method, generator=0, **options)
    assert result.method == method
    assert torch.allclose(result.values, shapley_values(game).values, atol=0.07)
    if method != "top_k":
        assert abs(result.efficiency_gap) < 1e-9


def test_auto_is_exact_where_all_coalitions_are_affordable_and_regression_beyond():
    assert choose_estimator(12) == ExactShapley()
    assert choose_estimator(13) == choose_estimator(13, "auto") == RegressionShapley(260)
    assert choose_estimator(7, "20n") == ExactShapley()
    assert choose_estimator(12, "20n") == RegressionShapley(240)
    assert choose_estimator(100, 300) == PermutationShapley(2)
    assert choose_estimator(64, "20n", depth="matched") == PermutationShapley(20, depth="matched")
    assert choose_estimator(20, 400, depth=2) == ExactShapley(depth=2)
    assert 380 <= choose_estimator(20, 400, depth=5).cost(20) <= 400


@pytest.mark.filterwarnings("ignore:.*fewer than two samples")  # a single pair of walks
@pytest.mark.parametrize("n", [13, 40, 200])
@pytest.mark.parametrize("budget", ["3n", "4n", "20n"])
def test_auto_keeps_to_the_budget(n, budget):
    game = as_game(lambda kept: kept.double().mean(1).sqrt() + 0.1 * kept[:, 0] * kept[:, 1], n)
    estimator = choose_estimator(n, budget)
    assert estimator.cost(n) <= int(budget[:-1]) * n + 1
    assert estimator.estimate(game, generator=0).n_evals == estimator.cost(n)


def test_a_bar_tells_the_cost_before_it_is_paid(capsys):
    shapley_values(lambda kept: kept.sum(1), "exact", n_players=5, progress=True)
    printed = capsys.readouterr().out
    assert printed.splitlines()[0] == "Shapley values of 5 players: 32 evaluations"
    assert "done, 32 evaluations" in printed


def test_a_bar_is_asked_for_at_the_estimator_too(capsys):
    RegressionShapley(20).estimate(random_game(5), generator=0, progress=True)
    assert "Shapley values of 5 players: 20 evaluations" in capsys.readouterr().out


@pytest.mark.parametrize("n", [0, -2])
def test_a_game_without_players_is_named(n):
    with pytest.raises(ValueError, match="at least one player"):
        shapley_values(lambda kept: kept.sum(1), n_players=n)


def test_an_unknown_method_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'regression'.*'stratified'.*got 'best'"):
        shapley_values(random_game(3), "best")


def test_greedy_ranks_in_reverse_order_of_removal_at_its_announced_cost():
    game = CountingGame(random_game(7))
    result = GreedyBackward(chunk_size=3).estimate(game)
    kept, path = list(range(7)), [float(game.game.values[-1])]
    while kept:  # brute force
        left = {i: float(game.game.values[sum(1 << j for j in kept if j != i)]) for i in kept}
        worst = max(left, key=lambda i: (left[i], i))
        kept.remove(worst)
        path.append(left[worst])
        assert worst == result.rank()[len(kept)]
    assert result.state["path"] == pytest.approx(path)
    assert result.n_evals == game.count == GreedyBackward().cost(7) == 29


def test_places_in_an_order_share_out_nothing():
    with pytest.raises(ValueError, match="do not share out"):
        _ = GreedyBackward().estimate(random_game(4)).efficiency_gap


def test_greedy_does_not_begin_what_the_budget_cannot_finish():
    game = CountingGame(random_game(6))
    with pytest.raises(ValueError, match="needs 22 evaluations, the budget is 21"):
        GreedyBackward().estimate(game, stop=StopRule(max_evals=21))
    assert game.count == 0
