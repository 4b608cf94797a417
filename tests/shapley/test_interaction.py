import math
from itertools import combinations

import pytest
import torch
from shapley.table_games import all_coalitions, random_game, three_and_one

from lightning_eff.shapley import ExactShapley, TableGame, as_game
from lightning_eff.shapley.interaction import shapley_interaction, shapley_interactions


def brute_force(game, i, j):
    n, others = game.n_players, [player for player in range(game.n_players) if player not in (i, j)]

    def value(players):
        mask = torch.zeros(1, n, dtype=torch.bool)
        mask[0, list(players)] = True
        return game(mask)[0]

    total = 0
    for size in range(n - 1):
        weight = math.factorial(size) * math.factorial(n - size - 2) / math.factorial(n - 1)
        for s in combinations(others, size):
            total += weight * (value((*s, i, j)) - value((*s, i)) - value((*s, j)) + value(s))
    return total


@pytest.mark.parametrize("components", [None, 3])
@pytest.mark.parametrize("n", [2, 3, 6])
def test_interactions_of_all_pairs_are_those_of_brute_force(n, components):
    game = random_game(n, components=components)
    pairs = shapley_interactions(game)
    assert pairs.shape == ((n, n) if components is None else (n, n, components))
    for i, j in combinations(range(n), 2):
        assert torch.allclose(pairs[i, j], brute_force(game, i, j), rtol=0, atol=1e-12)
        assert torch.equal(pairs[i, j], shapley_interaction(game, j, i))
    assert torch.equal(pairs, pairs.transpose(0, 1))
    assert not pairs[range(n), range(n)].any()


@pytest.mark.parametrize("n", [3, 8])
def test_interactions_agree_with_shapiq(n):
    shapiq = pytest.importorskip("shapiq")
    from shapiq.game_theory.exact import ExactComputer

    game = random_game(n, seed=n)
    peer = ExactComputer(lambda masks: game(torch.from_numpy(masks)).numpy(), n, evaluate_game=True)
    assert isinstance(peer("SII", 2), shapiq.InteractionValues)
    expected, pairs = peer("SII", 2), shapley_interactions(game)
    for i, j in combinations(range(n), 2):
        assert pairs[i, j].item() == pytest.approx(expected[(i, j)], abs=1e-12)


def test_additive_game_has_no_interactions():
    weights = torch.tensor([1.0, -2.0, 4.0, 0.5], dtype=torch.float64)
    assert not shapley_interactions(as_game(lambda kept: kept.double() @ weights, 4)).any()


def test_null_player_interacts_with_nobody():
    pairs = shapley_interactions(as_game(three_and_one, 5))
    assert not pairs[4].any()
    assert not pairs[3].any()  # 3 is worth 0.5 whoever else is there


@pytest.mark.parametrize("size", [2, 3, 4])
def test_unanimity_game_shares_its_interaction_among_its_members(size):
    pairs = shapley_interactions(as_game(lambda kept: kept[:, :size].all(1).double(), 5))
    expected = torch.zeros(5, 5, dtype=torch.float64)
    expected[:size, :size] = 1 / (size - 1)
    expected.fill_diagonal_(0)
    assert torch.allclose(pairs, expected, rtol=0, atol=1e-15)


def test_interaction_is_what_one_player_adds_to_the_shapley_value_of_another():
    # I_ij = phi_i where j is always there - phi_i where j is never there
    game, masks = random_game(5, seed=2), all_coalitions(5)
    without = ExactShapley().estimate(TableGame(game.values[~masks[:, 4]])).values
    beside = ExactShapley().estimate(TableGame(game.values[masks[:, 4]])).values
    assert torch.allclose(shapley_interactions(game)[:4, 4], beside - without, rtol=0, atol=1e-12)


def test_single_player_has_no_pairs():
    assert shapley_interactions(TableGame([0.0, 1.0])).tolist() == [[0.0]]


@pytest.mark.parametrize(("i", "j"), [(1, 1), (-1, 0), (0, 3)])
def test_pair_that_is_no_pair_of_players_is_refused(i, j):
    with pytest.raises(ValueError, match=rf"two different players in 0\.\.2, got {i} and {j}"):
        shapley_interaction(random_game(3), i, j)


def test_enumeration_of_more_than_20_players_is_refused():
    with pytest.raises(ValueError, match=r"2\*\*21"):
        shapley_interactions(as_game(lambda kept: kept.sum(1), 21))
