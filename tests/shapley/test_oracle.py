from itertools import combinations

import pytest
import torch
from shapley.table_games import CountingGame, GroupedTable, all_coalitions, random_game, saturating_game, three_and_one

from lightning_eff.shapley import ExactShapley, TableGame, as_game
from lightning_eff.shapley.greedy import greedy_backward_order
from lightning_eff.shapley.oracle import compare_ranks, oracle_rank, oracle_sets

WEIGHTS = torch.tensor([0.3, 0.1, 0.7, 0.5, 0.2], dtype=torch.float64)
BEST_FIRST = torch.tensor([2, 3, 0, 4, 1])


def additive_game():
    return as_game(lambda kept: kept.double() @ WEIGHTS, 5)


def one_good_pair():
    """Player 0 is the best alone, but 1 and 2 together beat every pair and triple has everything: not nested."""
    return as_game({(): 0, (0,): 2, (1,): 1, (2,): 1, (0, 1): 2, (0, 2): 2, (1, 2): 5, (0, 1, 2): 6})


def value_of(game, players):
    mask = torch.zeros(1, game.n_players, dtype=torch.bool)
    mask[0, list(players)] = True
    return game(mask).item()


@pytest.mark.parametrize("n", [2, 3, 6])
def test_oracle_sets_are_those_of_brute_force(n):
    game = random_game(n, seed=n)
    oracle = oracle_sets(game)
    assert oracle.sizes.tolist() == list(range(1, n))
    for k in range(1, n):
        best = max(combinations(range(n), k), key=lambda players: value_of(game, players))
        assert oracle.keep(k) == best
        assert oracle.values[k - 1] == value_of(game, best)
        assert set(oracle.remove(n - k)) == set(range(n)) - set(best)
    assert not oracle.ties.any()


def test_equally_good_sets_are_counted_and_the_lexicographically_smallest_is_taken():
    votes = as_game(lambda kept: (kept[:, 3].long() + kept.sum(1) >= 3).double(), 4)
    oracle = oracle_sets(votes)
    assert [oracle.keep(k) for k in (1, 2, 3)] == [(0,), (0, 3), (0, 1, 2)]
    assert oracle.ties.tolist() == [3, 2, 3]


def test_sums_that_differ_by_rounding_are_ties():
    oracle = oracle_sets(as_game(lambda kept: torch.stack([sum(row.double() * 0.1) for row in kept]), 4))
    assert oracle.ties.tolist() == [3, 5, 3]
    table = torch.tensor([0.0, 0.3, 0.1 + 0.2, 1.0], dtype=torch.float64)
    assert table[1] < table[2]
    assert oracle_sets(TableGame(table)).keep(1) == (0,)


def test_nestedness_is_reported_not_assumed():
    oracle = oracle_sets(one_good_pair())
    assert [oracle.keep(k) for k in (1, 2)] == [(0,), (1, 2)]
    assert oracle.nested.tolist() == [False]
    assert oracle_sets(additive_game()).nested.tolist() == [True, True, True]


def test_chosen_sizes_may_include_the_ends():
    oracle = oracle_sets(additive_game(), sizes=[5, 0, 2])
    assert (oracle.keep(0), oracle.keep(2), oracle.keep(5)) == ((), (2, 3), (0, 1, 2, 3, 4))
    assert oracle.remove(3) == (0, 1, 4)
    with pytest.raises(ValueError, match=r"no oracle set of size 3.*\[0, 2, 5\]"):
        oracle.keep(3)


def test_five_best_sets_of_a_size_are_those_of_brute_force():
    game = random_game(5, seed=3)
    ranked = sorted(combinations(range(5), 2), key=lambda players: -value_of(game, players))
    assert oracle_sets(game).best(2) == [(players, value_of(game, players)) for players in ranked[:5]]


def test_enumeration_of_more_than_20_players_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r'2\*\*21 = 2,097,152 .*method="greedy"'):
        oracle_sets(as_game(lambda kept: kept.sum(1), 21))


def test_every_coalition_is_evaluated_once():
    counting = CountingGame(random_game(6))
    told = []
    compare_ranks({"by index": torch.arange(6)}, oracle_sets(counting, progress=told.append))
    assert counting.count == sum(told) == 64


def test_vector_values_are_refused():
    vectors = random_game(3, components=2)
    for function in (oracle_sets, oracle_rank, lambda game: oracle_rank(game, "greedy")):
        with pytest.raises(ValueError, match="scalar values, the game returns vectors of 2"):
            function(vectors)


def test_oracle_rank_counts_the_sets_a_player_is_in():
    game = random_game(5, seed=1)
    oracle = oracle_sets(game)
    counts = [sum(player in oracle.keep(k) for k in range(1, 5)) for player in range(5)]
    shapley = ExactShapley().estimate(game).values
    expected = sorted(range(5), key=lambda player: (-counts[player], -shapley[player].item(), player))
    assert oracle_rank(game).tolist() == oracle_rank(oracle).tolist() == expected


def test_equal_counts_are_ranked_by_shapley_value_then_by_index():
    # O_1 = {0}, O_2 = {1, 2}: all are in one set; 1 and 2 are alike and worth more than 0
    assert oracle_rank(one_good_pair()).tolist() == [1, 2, 0]


def test_oracle_rank_of_an_additive_game_sorts_the_weights():
    assert oracle_rank(additive_game()).tolist() == oracle_rank(additive_game(), "greedy").tolist()
    assert oracle_rank(additive_game()).tolist() == BEST_FIRST.tolist()


def test_game_without_signal_ranks_by_index():
    flat = TableGame(torch.ones(8))
    assert oracle_rank(flat).tolist() == oracle_rank(flat, "greedy").tolist() == [0, 1, 2]
    assert oracle_sets(flat).ties.tolist() == [2, 2]


def test_unknown_method_is_refused():
    with pytest.raises(ValueError, match='"count" or "greedy", got \'best\''):
        oracle_rank(additive_game(), "best")


def test_greedy_removal_is_that_of_brute_force_and_costs_what_it_says():
    counting = CountingGame(saturating_game(6))
    order, path = greedy_backward_order(counting, chunk_size=4)
    assert counting.count == 1 + 6 * 7 // 2
    left = set(range(6))
    for step, player in enumerate(order.tolist()):
        assert path[step] == value_of(counting.game, left)
        best = max(value_of(counting.game, left - {other}) for other in left)
        left.remove(player)
        assert value_of(counting.game, left) == best
    assert path[6] == value_of(counting.game, ())


def test_greedy_removal_takes_the_highest_index_of_equals_first():
    # 4 does nothing; 0, 1 and 2 are worth the same, and 3 alone keeps its half
    assert greedy_backward_order(as_game(three_and_one, 5))[0].tolist() == [4, 3, 2, 1, 0]


def test_greedy_removal_sees_the_whole_of_a_grouped_game():
    game = GroupedTable([random_game(4, 0), random_game(4, 1)], [0.25, 0.75])
    assert torch.equal(greedy_backward_order(game)[0], greedy_backward_order(game.mean)[0])


def test_ranking_that_meets_nested_oracle_sets_is_perfect():
    report = compare_ranks({"weights": BEST_FIRST, "reversed": BEST_FIRST.flip(0)}, additive_game(), kmax=3)
    best, worst = report.rankings["weights"], report.rankings["reversed"]
    assert (best.acc_add, best.acc_rem, best.overlap, best.displacement) == (1, 1, 1, 0)
    assert abs(best.regret) < 1e-15
    assert best.spearman == pytest.approx(1)
    assert best.kendall == pytest.approx(1)
    assert (worst.spearman, worst.kendall) == (pytest.approx(-1), pytest.approx(-1))
    assert worst.displacement == (4 + 2 + 0 + 2 + 4) / 5


def test_report_of_a_small_game_is_that_of_pencil_and_paper():
    # O_1 = {0}, O_2 = {1, 2}, to remove: O-_1 = {0}, O-_2 = {1, 2}; Oracle rank 1, 2, 0
    quality = compare_ranks({"r": torch.tensor([0, 1, 2])}, one_good_pair()).rankings["r"]
    assert quality.hits.tolist() == [1, 1]
    assert quality.acc_add == quality.overlap == 2 / 3
    assert quality.acc_rem == 2 / 3  # the last one is not 0, the last two are 1 and 2
    assert quality.values.tolist() == [2, 2]
    assert (quality.regret, quality.auc) == (1.5, 2)
    assert quality.spearman == pytest.approx(-0.5)
    assert quality.kendall == pytest.approx(-1 / 3)
    assert quality.displacement == 4 / 3


@pytest.mark.parametrize("kmax", [1, 3, 5])
def test_accuracies_are_those_of_their_formula(kmax):
    game, rank = random_game(6, seed=5), [4, 0, 2, 5, 1, 3]
    oracle = oracle_sets(game)
    quality = compare_ranks({"r": torch.tensor(rank)}, oracle, kmax).rankings["r"]
    whole = sum(range(1, kmax + 1))
    adding = sum(len(set(oracle.keep(k)) & set(rank[:k])) for k in range(1, kmax + 1))
    removing = sum(len(set(oracle.remove(r)) & set(rank[-r:])) for r in range(1, kmax + 1))
    assert (quality.acc_add, quality.acc_rem) == (adding / whole, removing / whole)


def test_regret_is_never_negative_and_the_mean_value_its_complement():
    game = saturating_game(7)
    ranks = {str(seed): torch.randperm(7, generator=torch.Generator().manual_seed(seed)) for seed in range(10)}
    report = compare_ranks({**ranks, "oracle": oracle_rank(game)}, game)
    for quality in report.rankings.values():
        assert quality.regret >= 0
        assert quality.auc + quality.regret == pytest.approx(report.oracle.values.mean().item())
    assert report.rankings["oracle"].displacement == 0
    assert report.kmax == 5


def test_oracle_sets_of_some_sizes_are_completed_from_their_table():
    counting = CountingGame(random_game(5))
    counting.names = list("abcde")
    some = oracle_sets(counting, sizes=[2])
    report = compare_ranks({"r": torch.arange(5)}, some)
    assert report.rankings["r"].auc == compare_ranks({"r": torch.arange(5)}, counting.game).rankings["r"].auc
    assert counting.count == 32
    assert report.oracle.names == list("abcde")


@pytest.mark.parametrize("rank", [[0, 1, 1, 3, 4], [0, 1, 2, 3], [1, 2, 3, 4, 5], [[0, 1, 2, 3, 4]]])
def test_ranking_that_is_no_permutation_is_refused_by_name(rank):
    with pytest.raises(ValueError, match=r"'mine' must hold each of the players 0\.\.4 once"):
        compare_ranks({"mine": torch.tensor(rank)}, additive_game())


def test_scores_in_place_of_a_ranking_are_refused():
    with pytest.raises(ValueError, match=r"result\.rank\(\) does"):
        compare_ranks({"scores": WEIGHTS}, additive_game())


@pytest.mark.parametrize("kmax", [0, 5])
def test_kmax_outside_its_range_is_refused(kmax):
    with pytest.raises(ValueError, match=rf"kmax must lie in 1\.\.4 .*got {kmax}"):
        compare_ranks({"r": BEST_FIRST}, additive_game(), kmax)


def test_single_player_has_an_oracle_rank_but_nothing_to_compare():
    game = TableGame([0.0, 1.0])
    assert oracle_rank(game).tolist() == [0]
    with pytest.raises(ValueError, match="at least 2 players"):
        compare_ranks({"r": torch.tensor([0])}, game)


def test_tables_say_what_was_found():
    game = one_good_pair()
    game.names = ["left", "mid", "right"]
    sets = oracle_sets(game).table()
    assert sets.rows == ((1, "left", 2.0, 0, "no"), (2, "mid right", 5.0, 0, None))
    table = compare_ranks({"a": torch.tensor([0, 1, 2]), "b": torch.tensor([1, 2, 0])}, game).table()
    assert [row[0] for row in table.rows] == ["oracle sets", "b", "a"]
    assert table.rows[1][1:3] == (3.0, 0.5)
    assert "0 of 1 oracle sets are part of the next" in table.caption


def test_figure_draws_every_ranking_below_the_oracle_curve():
    game = saturating_game(6)
    report = compare_ranks({"index": torch.arange(6), "reverse": torch.arange(6).flip(0)}, game)
    value, overlap = report.figures()["ranks"].axes
    lines = {line.get_label(): torch.tensor(line.get_ydata()) for line in value.lines}
    assert set(lines) == {"oracle sets", "index", "reverse"}
    assert (lines["index"] <= lines["oracle sets"] + 1e-12).all()
    assert lines["reverse"][-1] == game(all_coalitions(6)[-1:]).item()
    assert len(overlap.lines) == 4
    assert overlap.lines[-1].get_label() == "expected by chance"


def test_sizes_of_sets_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match=r"sizes must lie in 0\.\.5, got \[2, 6\]"):
        oracle_sets(random_game(5), sizes=[2, 6])
