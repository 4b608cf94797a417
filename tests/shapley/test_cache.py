import numpy as np
import pytest
import torch
from shapley.table_games import CountingGame, WalkableTable, all_coalitions, grouped_saturating_game, random_game

from lightning_eff.shapley import CachedGame, ExactShapley, PermutationShapley, TableGame
from lightning_eff.shapley.games import evaluate_walks, toured_coalitions


def test_known_coalitions_are_not_evaluated_again():
    inner = CountingGame(random_game(4))
    game = CachedGame(inner)
    masks = all_coalitions(4)
    first = game(masks[:10])
    again = game(masks[5:])
    assert (inner.count, game.misses, game.hits) == (16, 16, 5)
    assert torch.equal(first, inner.game(masks[:10]))
    assert torch.equal(again, inner.game(masks[5:]))


def test_coalition_asked_twice_in_a_call_is_evaluated_once():
    inner = CountingGame(random_game(2))
    game = CachedGame(inner)
    assert len(game(torch.tensor([[True, False]] * 3))) == 3
    assert (inner.count, game.hits) == (1, 2)


def test_cached_estimate_equals_the_plain_one_and_counts_distinct_coalitions_as_misses():
    game = CachedGame(random_game(5))
    result = PermutationShapley(64).estimate(game, generator=1)
    assert torch.equal(result.values, PermutationShapley(64).estimate(random_game(5), generator=1).values)
    assert game.misses == result.n_unique == len(game)
    assert game.hits + game.misses == result.n_evals
    assert not hasattr(game, "walk")  # the table has none: asked for in chunks, not in whole walks


@pytest.mark.parametrize("start", ["full", "empty"])
def test_cached_game_walks_only_what_is_new(start):
    inner = WalkableTable(random_game(4).values)
    game = CachedGame(inner)
    orders = torch.tensor([[0, 1, 2], [3, 2, 1]])
    values = game.walk(orders, start=start)
    assert torch.equal(values, inner.walk(orders, start=start))
    inner.walks = 0
    assert torch.equal(game.walk(torch.tensor([[0, 1, 2], [3, 1, 2]]), start=start)[0], values[0])
    assert inner.walks == 1


def test_groups_are_remembered_by_themselves():
    inner = grouped_saturating_game(4, 3)
    game = CachedGame(inner)
    masks = all_coalitions(4)
    for _ in range(2):
        for group in range(3):
            assert torch.equal(game.call_group(group, masks), inner.tables[group](masks))
        game(masks)
    assert (inner.group_count, inner.whole_count) == (48, 16)


def test_unknown_group_is_refused():
    with pytest.raises(ValueError, match=r"0\.\.2"):
        CachedGame(grouped_saturating_game(3, 3)).call_group(3, all_coalitions(3))


@pytest.mark.parametrize("components", [None, 2])
def test_file_round_trip_leaves_nothing_to_evaluate(tmp_path, components):
    table = random_game(9, components=components)  # 9 players: the packed bits need two bytes
    game = CachedGame(table, "weights-1")
    expected = ExactShapley().estimate(game)
    game.save(tmp_path / "cache.npz")
    inner = CountingGame(table)
    again = CachedGame(inner, "weights-1")
    again.load(tmp_path / "cache.npz")
    assert torch.equal(ExactShapley().estimate(again).values, expected.values)
    assert inner.count == 0
    assert [path.name for path in tmp_path.iterdir()] == ["cache.npz"]


def test_file_holds_what_the_format_says(tmp_path):
    game = CachedGame(random_game(3), "abc")
    values = game(torch.tensor([[True, False, True]]))
    game.save(tmp_path / "cache.npz")
    with np.load(tmp_path / "cache.npz") as file:
        assert file["masks"].tolist() == [[0b10100000]]
        assert file["values"].tolist() == values.tolist()
        assert (file["group"].tolist(), int(file["n"]), str(file["fingerprint"])) == ([-1], 3, "abc")


def test_groups_survive_the_file(tmp_path):
    inner = grouped_saturating_game(4, 3)
    game = CachedGame(inner)
    result = PermutationShapley(8).estimate(game, generator=0)
    game.save(tmp_path / "cache.npz")
    again = CachedGame(inner)
    again.load(tmp_path / "cache.npz")
    assert torch.equal(PermutationShapley(8).estimate(again, generator=0).values, result.values)
    assert again.misses == 0


def test_file_with_another_fingerprint_is_refused(tmp_path):
    CachedGame(random_game(3), "old weights").save(tmp_path / "cache.npz")
    with pytest.raises(ValueError, match="'old weights', this game's 'new weights'"):
        CachedGame(random_game(3), "new weights").load(tmp_path / "cache.npz")


def test_file_for_another_number_of_players_is_refused(tmp_path):
    CachedGame(random_game(3)).save(tmp_path / "cache.npz")
    with pytest.raises(ValueError, match="for 3 players"):
        CachedGame(random_game(4)).load(tmp_path / "cache.npz")


@pytest.mark.parametrize("walkable", [False, True])
def test_values_evaluated_before_a_nan_stay(walkable):
    values = torch.arange(8.0)
    values[0b001] = torch.nan
    game = CachedGame(WalkableTable(values) if walkable else TableGame(values))
    with pytest.raises(ValueError, match=r"keeps players \(0,\)"):
        evaluate_walks(game, torch.tensor([[2, 1, 0]]))
    assert len(game) == 2 + walkable  # a walk tells the value of its start too
    assert game(torch.tensor([[True, True, True], [True, True, False], [False, False, False]])).tolist() == [7, 3, 0]
    assert game.misses == 4


class TourableTable(TableGame):
    """A table with a tour, which it counts."""

    tours = 0

    def tour(self, start, flips):
        self.tours += 1
        return self(toured_coalitions(start, flips))


def test_a_tour_is_made_once_and_then_remembered():
    game = TourableTable(random_game(8).values)
    cached = CachedGame(game)
    first = ExactShapley().estimate(cached)
    assert game.tours > 0
    made = game.tours
    again = ExactShapley().estimate(cached)
    assert game.tours == made
    assert torch.equal(first.values, again.values)
    assert torch.equal(first.values, ExactShapley().estimate(game).values)
    assert cached.misses == 2**8


def test_a_game_without_a_tour_seems_to_have_none():
    assert not hasattr(CachedGame(random_game(4)), "tour")
