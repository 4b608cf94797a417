"""Top-k sampling stops when the best players are clear, and is right when it says so."""

import pytest
import torch
from shapley.table_games import CountingGame, random_game, saturating_game

from lightning_eff.shapley import ExactShapley, ShapleyResult, StopRule, TableGame, TopKShapley, as_game


def best(game, k):
    return set(ExactShapley().estimate(game).values.argsort(descending=True)[:k].tolist())


def gapped_game(n, k):
    """Additive with a gap behind the k-th player, plus noise that makes marginal contributions differ."""
    weights = torch.arange(n, 0, -1, dtype=torch.float64) / n
    weights[:k] += 0.5
    kept = (torch.arange(2**n)[:, None] >> torch.arange(n) & 1).double()
    return TableGame(kept @ weights + 0.3 * random_game(n).values)


@pytest.mark.parametrize("bounds", ["difference", "bernstein"])
def test_converged_answers_are_right_at_least_as_often_as_the_level_says(bounds):
    game = gapped_game(8, 3)
    results = [
        TopKShapley(3, budget="8000n", bounds=bounds, value_range=3.0).estimate(game, generator=s) for s in range(40)
    ]
    right = [set(r.top(3).tolist()) == best(game, 3) for r in results if r.converged]
    assert len(right) == 40
    assert sum(right) >= 38


def test_it_stops_as_soon_as_the_answer_is_clear():
    easy, hard = (TopKShapley(3, budget="5000n").estimate(gapped_game(8, k), generator=0) for k in (3, 5))
    assert easy.converged
    assert easy.n_evals < hard.n_evals / 2  # the third and the fourth of the second game differ by an eighth


def test_an_unclear_answer_is_not_called_converged():
    result = TopKShapley(1, budget=400).estimate(random_game(6), generator=0)
    assert not result.converged


def test_the_bandit_asks_less_about_players_that_are_clear():
    weights = torch.tensor([0.50, 0.48, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    kept = (torch.arange(2**8)[:, None] >> torch.arange(8) & 1).double()
    game = CountingGame(TableGame(kept @ weights + 0.02 * random_game(8).values))
    result = TopKShapley(1, bounds="bernstein", value_range=1.0, budget=20_000).estimate(game, generator=0)
    units = len(result.state["groups"][0])
    assert result.n_evals == game.count < 0.6 * units * 9
    assert result.values[:2].tolist() == pytest.approx([0.5, 0.48], abs=0.02)


def test_a_bandit_goes_on_with_the_players_that_were_open():
    game = gapped_game(8, 3)
    estimator = TopKShapley(3, bounds="bernstein", value_range=3.0, budget=500)
    first = estimator.estimate(game, generator=0)
    resumed = estimator.estimate(game, resume=ShapleyResult.from_dict(first.to_dict()))
    whole = estimator.with_budget(first.n_evals + 500, 8).estimate(game, generator=0)
    assert not first.converged
    assert torch.equal(resumed.values, whole.values)
    assert resumed.n_evals == whole.n_evals


def test_means_over_coalitions_with_all_neighbours_are_shapley_values():
    n, game = 4, random_game(4)
    truth = ExactShapley().estimate(game).values
    total = torch.zeros(n, dtype=torch.float64)
    codes = torch.arange(2**n)
    for i in range(n):  # size uniform on 0..n, then the coalition: the claim the estimator rests on
        sizes = (codes[:, None] >> torch.arange(n) & 1).sum(1)
        chance = 1 / (n + 1) / torch.tensor([float((sizes == s).sum()) for s in sizes], dtype=torch.float64)
        total[i] = (chance * (game.values[codes | 1 << i] - game.values[codes & ~(1 << i)])).sum()
    assert total.tolist() == pytest.approx(truth.tolist(), abs=1e-12)


def test_with_a_range_a_rare_large_contribution_is_not_ruled_out():
    game = as_game(lambda kept: 0.01 * kept[:, 0] + (kept[:, 1] & (kept.sum(1) == 1)).double(), 30)
    for seed in range(3):
        result = TopKShapley(1, bounds="bernstein", value_range=2.0, budget="60n").estimate(game, generator=seed)
        assert not result.converged


def test_no_more_distinct_coalitions_are_counted_than_there_are():
    assert TopKShapley(1, budget=100).estimate(random_game(3), generator=0).n_unique <= 2**3 + 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k must be a whole number >= 1"),
        ({"k": 1, "level": 1.0}, "level must lie in"),
        ({"k": 1, "bounds": "normal"}, "bounds must be one of difference, bernstein, got 'normal'"),
        ({"k": 1, "value_range": 0.0}, "value_range must be positive"),
        ({"k": 1, "budget": "n20"}, "budget must be"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        TopKShapley(**options)


def test_more_players_than_there_are_cannot_be_wanted():
    with pytest.raises(ValueError, match=r"k must lie in 1\.\.4 for 5 players, got 5"):
        TopKShapley(5).estimate(random_game(5))


def test_a_stop_rule_of_the_caller_holds_beside_the_budget():
    result = TopKShapley(1, budget=10**6).estimate(saturating_game(6), generator=0, stop=StopRule(max_evals=100))
    assert result.n_evals <= 100
