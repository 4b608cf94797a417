import numpy as np
import pytest
import torch
from shapley.table_games import WalkableTable, random_game

from lightning_eff.shapley import (
    ExactShapley,
    Game,
    GroupedGame,
    TableGame,
    WalkableGame,
    as_game,
    evaluate,
    evaluate_walks,
)
from lightning_eff.shapley.games import TourableGame, evaluate_tour, group_weights, nested_coalitions


def test_bit_i_of_a_table_index_is_player_i():
    game = TableGame(torch.arange(8))
    assert game(torch.tensor([[True, False, False], [False, False, True], [True, True, True]])).tolist() == [1, 4, 7]


@pytest.mark.parametrize("size", [0, 1, 3, 6])
def test_table_of_a_size_that_is_no_power_of_two_is_refused(size):
    with pytest.raises(ValueError, match=f"got {size}"):
        TableGame([0.0] * size)


def test_protocols_tell_what_a_game_can_do():
    table, walkable = random_game(3), WalkableTable([0.0, 1.0])
    assert isinstance(table, Game)
    assert isinstance(walkable, WalkableGame)
    assert not isinstance(table, WalkableGame | GroupedGame)


def test_as_game_takes_a_dict_of_kept_players():
    game = as_game({(): 0.0, (0,): 1.0, (1,): 2.0, (1, 0): 5.0})
    assert game(torch.tensor([[False, True], [True, True]])).tolist() == [2, 5]


def test_as_game_takes_a_numpy_function_of_masks():
    game = as_game(lambda masks: np.asarray(masks).sum(1), n_players=4)
    assert evaluate(game, torch.ones(2, 4, dtype=torch.bool)).tolist() == [4, 4]


def test_as_game_takes_an_array_and_returns_a_game_as_it_is():
    game = as_game(np.arange(4.0))
    assert game.n_players == 2
    assert as_game(game) is game


def test_dict_with_a_missing_coalition_names_it():
    with pytest.raises(ValueError, match=r"1 have no value, the first is \(0, 1\)"):
        as_game({(): 0.0, (0,): 1.0, (1,): 2.0})


@pytest.mark.parametrize("kept", [(2,), (-1,), (0, 0)])
def test_dict_with_an_unknown_coalition_is_refused(kept):
    with pytest.raises(ValueError, match=r"distinct players in 0\.\.1"):
        as_game({(): 0.0, (0,): 1.0, (1,): 2.0, (0, 1): 3.0, kept: 1.0}, n_players=2)


def test_callable_without_player_count_is_refused():
    with pytest.raises(ValueError, match="pass n_players"):
        as_game(lambda masks: masks.sum(1))


def test_contradicting_player_count_is_refused():
    with pytest.raises(ValueError, match="3 players, n_players says 4"):
        as_game(random_game(3), n_players=4)


def test_what_is_no_game_is_refused():
    with pytest.raises(TypeError, match="got int"):
        as_game(7)


@pytest.mark.parametrize(
    "coalitions",
    [torch.ones(2, 4, dtype=torch.bool), torch.ones(2, 3), torch.ones(3, dtype=torch.bool), torch.full((1, 3), 2)],
)
def test_coalitions_of_wrong_width_or_type_are_refused(coalitions):
    with pytest.raises(ValueError, match=r"bool \[M, 3\].*got " + str(coalitions.dtype).removeprefix("torch.")):
        evaluate(random_game(3), coalitions)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_value_that_is_not_finite_is_an_error_naming_the_coalition(bad):
    values = torch.arange(8.0)
    values[0b101] = bad
    with pytest.raises(ValueError, match=r"keeps players \(0, 2\)"):
        evaluate(TableGame(values), torch.tensor([[True, True, True], [True, False, True]]))


def test_game_that_returns_another_number_of_values_is_refused():
    game = as_game(lambda masks: torch.zeros(3), n_players=2)
    with pytest.raises(ValueError, match=r"must return \[2\] or \[2, 'D'\] values, got \[3\]"):
        evaluate(game, torch.ones(2, 2, dtype=torch.bool))


def test_walks_pass_through_nested_coalitions():
    orders = torch.tensor([[2, 0]])
    assert nested_coalitions(orders, 3, "full").tolist() == [[[True, True, False], [False, True, False]]]
    assert nested_coalitions(orders, 3, "empty").tolist() == [[[False, False, True], [True, False, True]]]


@pytest.mark.parametrize("start", ["full", "empty"])
@pytest.mark.parametrize("components", [None, 2])
def test_walks_of_the_game_and_the_fallback_agree(start, components):
    table = random_game(5, components=components)
    orders = torch.stack([torch.randperm(5, generator=torch.Generator().manual_seed(seed))[:3] for seed in range(7)])
    walkable = WalkableTable(table.values)
    own, fallback = (evaluate_walks(game, orders, start=start, chunk_size=4) for game in (walkable, table))
    assert walkable.walks == 7
    torch.testing.assert_close(own, fallback, rtol=0, atol=0)


def test_not_finite_value_on_a_walk_names_the_coalition():
    game = WalkableTable([0.0, 1.0, float("nan"), 3.0])
    with pytest.raises(ValueError, match=r"keeps players \(1,\)"):
        evaluate_walks(game, torch.tensor([[0]]))


def test_group_weights_that_do_not_sum_to_one_are_refused():
    class Lopsided(TableGame):
        n_groups, group_weights = 2, torch.tensor([0.5, 0.6])

        def call_group(self, group, coalitions):
            return self(coalitions)

    with pytest.raises(ValueError, match="sum to 1"):
        group_weights(Lopsided([0.0, 1.0]))


class Touring(TableGame):
    """A table that can be toured, and returns one value too few when told to."""

    missing = 0

    def tour(self, start, flips):
        kept = [start]
        for player in flips.tolist():
            kept.append(kept[-1].clone())
            kept[-1][player] = not kept[-1][player]
        return self(torch.stack(kept))[self.missing :]


def test_tour_tells_the_values_after_each_change_of_sides():
    game = Touring(torch.arange(8.0))
    assert isinstance(game, TourableGame)
    values = evaluate_tour(game, torch.tensor([True, False, False]), torch.tensor([2, 0, 0, 2]))
    assert values.tolist() == [0b001, 0b101, 0b100, 0b101, 0b001]


def test_not_finite_value_on_a_tour_names_the_coalition():
    game = Touring([0.0, 1.0, float("inf"), 3.0])
    with pytest.raises(ValueError, match=r"keeps players \(1,\)"):
        evaluate_tour(game, torch.tensor([True, True]), torch.tensor([1, 1, 0]))


def test_tour_of_another_length_and_start_of_another_width_are_refused():
    game = Touring(torch.arange(8.0))
    with pytest.raises(ValueError, match=r"bool \[M, 3\]"):
        evaluate_tour(game, torch.tensor([True, False]), torch.tensor([0]))
    game.missing = 1
    with pytest.raises(ValueError, match=r"must return \[2\]"):
        evaluate_tour(game, torch.tensor([True, False, True]), torch.tensor([0]))


def test_names_are_carried_into_the_result():
    game = as_game({(): 0, (0,): 1, (1,): 2, (0, 1): 4}, names=["left", "right"])
    assert ExactShapley().estimate(game).names == ["left", "right"]


@pytest.mark.parametrize(
    ("given", "message"),
    [(lambda: [0.0, 1.0, 2.0, 4.0], "one name for each of 2"), (lambda: TableGame([0.0, 1.0]), "names its players")],
)
def test_names_that_do_not_fit_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        as_game(given(), names=["a", "b", "c"])


def test_dict_with_a_coalition_twice_is_refused():
    with pytest.raises(ValueError, match=r"coalition \(1, 0\) is there twice, with its players in another order"):
        as_game({(): 0.0, (0,): 1.0, (1,): 2.0, (0, 1): 5.0, (1, 0): 6.0})
