import dataclasses
import itertools
import math
import time

import pytest
import torch
from shapley.table_games import CountingGame, WalkableTable, all_coalitions, random_game, three_and_one

from lightning_eff.shapley import (
    CachedGame,
    ExactShapley,
    LeaveOneOut,
    ShapleyWarning,
    StopRule,
    TableGame,
    as_game,
    shapley_values,
)
from lightning_eff.shapley.exact import shapley_of_table

# published or hand-computed games: kept players -> value
AIRPORT = {
    kept: max((1, 2, 4)[i] for i in kept) if kept else 0
    for r in range(4)
    for kept in itertools.combinations(range(3), r)
}
GLOVE = {kept: min(kept.count(0), len(set(kept) - {0})) for kept in AIRPORT}
MAJORITY = {
    kept: float(sum((4, 3, 2, 1)[i] for i in kept) >= 6)
    for r in range(5)
    for kept in itertools.combinations(range(4), r)
}
TEXTBOOK = {(): 0, (0,): 1, (1,): 2, (2,): 2, (0, 1): 2, (0, 2): 5, (1, 2): 5, (0, 1, 2): 6}
UNANIMITY = {kept: float({0, 2} <= set(kept)) for kept in MAJORITY}
SQUARE = {kept: len(kept) ** 2 for kept in MAJORITY}


@pytest.mark.parametrize(
    ("game", "expected"),
    [
        (AIRPORT, [1 / 3, 5 / 6, 17 / 6]),
        (GLOVE, [2 / 3, 1 / 6, 1 / 6]),
        (MAJORITY, [5 / 12, 1 / 4, 1 / 4, 1 / 12]),
        (TEXTBOOK, [7 / 6, 5 / 3, 19 / 6]),
        (UNANIMITY, [0.5, 0, 0.5, 0]),
        (SQUARE, [4, 4, 4, 4]),
    ],
    ids=["airport", "glove", "weighted majority", "textbook", "unanimity", "squared size"],
)
@pytest.mark.parametrize("direction", ["remove", "add"])
def test_known_games_have_their_known_values(game, expected, direction):
    values = ExactShapley(direction=direction).estimate(as_game(game)).values
    assert values.tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("depth", "expected"),
    [
        (1, [1, 1, 1, 0.5, 0]),
        (2, [0.75, 0.75, 0.75, 0.5, 0]),
        (3, [5 / 9, 5 / 9, 5 / 9, 0.5, 0]),
        (5, [1 / 3, 1 / 3, 1 / 3, 0.5, 0]),
    ],
)
def test_partial_values_of_the_five_player_game(depth, expected):
    result = ExactShapley(depth=depth).estimate(as_game(three_and_one, 5))
    assert result.values.tolist() == pytest.approx(expected, abs=1e-12)
    assert result.depth == depth


@pytest.mark.parametrize("direction", ["remove", "add"])
@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
def test_partial_value_is_the_mean_over_all_walks_of_that_depth(direction, depth):
    game = random_game(5)
    total = torch.zeros(5, dtype=torch.float64)
    for order in itertools.permutations(range(5)):
        kept = torch.full((1, 5), direction == "remove")
        before = game(kept)
        for player in order[:depth]:
            kept[0, player] = direction == "add"
            after = game(kept)
            total[player] += (after - before if direction == "add" else before - after)[0]
            before = after
    # each player takes each of the first `depth` places in (n-1)! orders
    expected = total / (math.factorial(4) * depth)
    values = ExactShapley(depth=depth, direction=direction).estimate(game).values
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", range(2, 11))
class TestAxioms:
    def test_efficiency(self, n):
        result = ExactShapley().estimate(random_game(n))
        assert abs(result.efficiency_gap) < 1e-12
        assert (result.v_empty, result.v_full) == (random_game(n).values[0], random_game(n).values[-1])

    def test_symmetry(self, n):
        kept = all_coalitions(n)
        both = kept[:, 0].long() + kept[:, 1]  # players 0 and 1 enter by their number only
        game = TableGame(random_game(n).values[(kept[:, 2:].long() << torch.arange(n - 2)).sum(1) * 4 + both])
        values = ExactShapley().estimate(game).values
        assert values[0].item() == pytest.approx(values[1].item(), abs=1e-12)

    def test_null_player(self, n):
        without_first = torch.arange(2**n) & ~1
        assert ExactShapley().estimate(TableGame(random_game(n).values[without_first])).values[0] == 0

    def test_additivity(self, n):
        v, w = random_game(n, seed=1), random_game(n, seed=2)
        phi_v, phi_w, phi = (ExactShapley().estimate(g).values for g in (v, w, TableGame(v.values + w.values)))
        torch.testing.assert_close(phi, phi_v + phi_w, rtol=0, atol=1e-12)

    def test_invariance_to_a_constant(self, n):
        game = random_game(n)
        shifted = ExactShapley().estimate(TableGame(game.values + 100)).values
        torch.testing.assert_close(shifted, ExactShapley().estimate(game).values, rtol=0, atol=1e-12)

    def test_duality(self, n):
        values = random_game(n).values
        drop = TableGame(values[-1] - values.flip(0))  # keyed by the removed players; flip = complement
        phi = ExactShapley().estimate(TableGame(values)).values
        torch.testing.assert_close(ExactShapley().estimate(drop).values, phi, rtol=0, atol=1e-12)

    def test_odd_part_alone_decides(self, n):
        values = random_game(n).values
        odd = TableGame((values - values.flip(0)) / 2)
        phi = ExactShapley().estimate(TableGame(values)).values
        torch.testing.assert_close(ExactShapley().estimate(odd).values, phi, rtol=0, atol=1e-12)

    def test_additive_game_gives_its_weights(self, n):
        weights = torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
        game = as_game(lambda coalitions: coalitions.double() @ weights, n)
        torch.testing.assert_close(ExactShapley().estimate(game).values, weights, rtol=0, atol=1e-12)

    def test_relabelling_permutes_the_values(self, n):
        game = random_game(n)
        names = torch.randperm(n, generator=torch.Generator().manual_seed(n))
        relabelled = as_game(lambda coalitions: game(coalitions[:, names]), n)
        phi, psi = ExactShapley().estimate(game).values, ExactShapley().estimate(relabelled).values
        torch.testing.assert_close(psi[names], phi, rtol=0, atol=1e-12)


def test_vector_game_gives_the_values_of_its_components():
    vector = ExactShapley().estimate(random_game(6, components=3)).values
    assert vector.shape == (6, 3)
    for d in range(3):
        component = ExactShapley().estimate(TableGame(random_game(6, components=3).values[:, d])).values
        torch.testing.assert_close(vector[:, d], component, rtol=0, atol=1e-14)


@pytest.mark.parametrize("depth", ["full", 1, 3])
@pytest.mark.parametrize("chunk_size", [1, 7, 4096])
def test_chunk_size_changes_no_bit_and_cost_is_what_is_evaluated(depth, chunk_size):
    game, done = CountingGame(random_game(6)), []
    estimator = ExactShapley(depth=depth, chunk_size=chunk_size)
    result = estimator.estimate(game, progress=done.append)
    assert torch.equal(result.values, ExactShapley(depth=depth).estimate(random_game(6)).values)
    assert game.count == result.n_evals == result.n_unique == sum(done) == estimator.cost(6)


class Touring(TableGame):
    """A table that can be toured, and notes the coalitions it passes."""

    def __init__(self, values):
        super().__init__(values)
        self.passed = []

    def __call__(self, coalitions):
        raise AssertionError("a game with a tour is toured")

    def tour(self, start, flips):
        code = int((start.long() << torch.arange(self.n_players)).sum())
        codes = [code]
        for player in flips.tolist():
            codes.append(codes[-1] ^ 1 << player)
        self.passed.append(codes)
        return self.values[codes]


@pytest.mark.parametrize("components", [None, 2])
@pytest.mark.parametrize("n", [1, 2, 5, 13])
def test_tour_passes_every_coalition_once_and_gives_the_same_values(n, components):
    game, done = Touring(random_game(n, components=components).values), []
    result = ExactShapley().estimate(game, progress=done.append)
    assert sorted(code for part in game.passed for code in part) == list(range(2**n))
    assert max(map(len, game.passed)) <= 4096
    assert torch.equal(result.values, ExactShapley().estimate(random_game(n, components=components)).values)
    assert result.n_evals == sum(done) == 2**n
    torch.testing.assert_close(result.efficiency_gap, torch.zeros_like(result.efficiency_gap), rtol=0, atol=1e-12)


def test_not_finite_value_on_a_tour_names_the_coalition():
    values = random_game(4).values
    values[0b1010] = float("nan")
    with pytest.raises(ValueError, match=r"keeps players \(1, 3\)"):
        ExactShapley().estimate(Touring(values))


def test_game_that_offers_no_tour_after_all_is_listed():
    class Hesitant(Touring):
        __call__ = TableGame.__call__

        @property
        def tour(self):
            raise AttributeError

    assert torch.equal(
        ExactShapley().estimate(Hesitant(random_game(4).values)).values, ExactShapley().estimate(random_game(4)).values
    )


def test_partial_depth_does_not_tour():
    game = Touring(random_game(4).values)
    with pytest.raises(AssertionError, match="is toured"):
        ExactShapley(depth=2).estimate(game)


@pytest.mark.parametrize("n", [2, 5, 8])
def test_table_of_all_values_gives_the_mean_over_all_orders(n):
    values = random_game(n).values
    expected = torch.zeros(n, dtype=torch.float64)
    for player in range(n):
        others = [other for other in range(n) if other != player]
        for size in range(n):
            for kept in itertools.combinations(others, size):
                code = sum(1 << other for other in kept)
                share = math.factorial(size) * math.factorial(n - size - 1) / math.factorial(n)
                expected[player] += share * (values[code | 1 << player] - values[code])
    torch.testing.assert_close(shapley_of_table(values), expected, rtol=0, atol=1e-13)


def test_weights_of_many_players_are_exact():
    codes = torch.arange(2**18)
    members = codes[:, None].bitwise_and(1 << torch.arange(18)).ne(0).sum(1).double()
    torch.testing.assert_close(shapley_of_table(members**2), torch.full((18,), 18.0).double(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("depth", ["full", 2])
def test_cached_game_evaluates_every_coalition_once(depth):
    game = CountingGame(random_game(6))
    cached = CachedGame(game)
    first, again = (ExactShapley(depth=depth).estimate(cached) for _ in range(2))
    assert torch.equal(first.values, again.values)
    assert game.count == ExactShapley(depth=depth).cost(6)


def test_leave_one_out_is_the_drop_of_each_player_for_n_plus_one_evaluations():
    game = CountingGame(random_game(5))
    result = LeaveOneOut().estimate(game)
    expected = [random_game(5).values[31] - random_game(5).values[31 - 2**i] for i in range(5)]
    assert result.values.tolist() == expected
    assert game.count == result.n_evals == LeaveOneOut().cost(5) == 6
    assert (result.depth, result.v_empty) == (1, None)
    assert torch.equal(result.values, ExactShapley(depth=1).estimate(random_game(5)).values)


def test_leave_one_out_lets_a_walkable_game_walk():
    game = WalkableTable(random_game(5).values)
    assert torch.equal(LeaveOneOut().estimate(game).values, LeaveOneOut().estimate(random_game(5)).values)
    assert game.walks == 5


def test_adding_one_player_alone():
    values = LeaveOneOut(direction="add").estimate(random_game(3)).values
    assert values.tolist() == [random_game(3).values[2**i] - random_game(3).values[0] for i in range(3)]


@pytest.mark.parametrize("estimator", [ExactShapley(), LeaveOneOut()])
def test_single_player_gets_everything_for_two_evaluations(estimator):
    result = estimator.estimate(TableGame([1.0, 4.0]))
    assert (result.values.tolist(), result.n_evals, result.efficiency_gap) == ([3.0], 2, 0)


@pytest.mark.parametrize("estimator", [ExactShapley(), LeaveOneOut()])
def test_game_without_players_is_refused(estimator):
    with pytest.raises(ValueError, match="at least one player"):
        estimator.estimate(as_game(lambda coalitions: coalitions.sum(1), 0))


def test_too_many_players_are_refused_with_the_count_and_the_alternatives():
    with pytest.raises(ValueError, match=r"2\*\*21 = 2,097,152 evaluations.*PermutationShapley.*LeaveOneOut \(22\)"):
        ExactShapley().estimate(as_game(lambda coalitions: coalitions.sum(1), 21))


def test_refusal_tells_how_long_it_would_take():
    asked = []

    def slow(coalitions):
        asked.extend(coalitions.tolist())
        time.sleep(0.02)
        return coalitions.sum(1)

    with pytest.raises(ValueError, match=r"about (1[0-9]|2[0-9]) hours; max_players=20"):  # 2**21 x 0.02 s = 11.7 h
        ExactShapley().estimate(as_game(slow, 21))
    assert asked == [[True] * 21, [False] * 21]


def test_game_that_fails_when_it_is_timed_says_so_itself():
    def broken(coalitions):
        raise OSError("disk on fire")

    with pytest.raises(OSError, match="disk on fire"):
        ExactShapley().estimate(as_game(broken, 30))


def test_partial_depth_is_limited_by_its_own_cost():
    game = as_game(lambda coalitions: coalitions.double().sum(1) ** 2, 40)
    assert ExactShapley(depth=2).estimate(game).n_evals == 1 + 40 + 780
    with pytest.raises(ValueError, match="at depth 9 need"):
        ExactShapley(depth=9).estimate(game)


def test_matched_depth_must_be_replaced_by_the_caller():
    estimator = ExactShapley(depth="matched")
    with pytest.raises(ValueError, match=r"dataclasses\.replace"):
        estimator.estimate(random_game(3))
    assert dataclasses.replace(estimator, depth=2).estimate(random_game(3)).depth == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 0}, "depth must be"),
        ({"depth": "half"}, "depth must be"),
        ({"direction": "up"}, "direction must be one of remove, add, got 'up'"),
        ({"max_players": 0}, "max_players must be a whole number >= 1"),
        ({"chunk_size": 0}, "chunk_size must be a whole number >= 1"),
    ],
)
def test_arguments_out_of_range_are_refused_before_any_game(arguments, message):
    with pytest.raises(ValueError, match=message):
        ExactShapley(**arguments)


def test_depth_beyond_the_players_is_refused():
    with pytest.raises(ValueError, match=r"1\.\.3"):
        ExactShapley(depth=4).estimate(random_game(3))


def test_dead_game_has_zero_values_and_a_warning():
    with pytest.warns(ShapleyWarning, match="no signal"):
        result = ExactShapley().estimate(TableGame([0.7] * 8))
    assert result.values.tolist() == [0, 0, 0]


def test_leave_one_out_that_changes_nothing_advises_a_finer_value():
    with pytest.warns(ShapleyWarning, match='value="neg_loss"'):
        LeaveOneOut().estimate(TableGame([0, 0, 0, 1, 0, 1, 1, 1]))


def test_budget_below_the_cost_is_refused_before_any_evaluation():
    game = CountingGame(random_game(4))
    with pytest.raises(ValueError, match="needs 16 evaluations, the budget is 15"):
        ExactShapley().estimate(game, stop=StopRule(max_evals=15))
    assert game.count == 0


def test_time_limit_ends_an_enumeration_with_an_error():
    with pytest.raises(TimeoutError, match="1 of 16 evaluations"):
        ExactShapley(chunk_size=1).estimate(random_game(4), stop=StopRule(max_seconds=1e-9))


def test_complete_result_cannot_be_resumed():
    with pytest.raises(ValueError, match="nothing is left to resume"):
        ExactShapley().estimate(random_game(3), resume=ExactShapley().estimate(random_game(3)))


def test_names_of_the_game_are_carried_into_the_result():
    game = random_game(2)
    game.names = ["line 3", "line 5"]
    assert ExactShapley().estimate(game).names == ["line 3", "line 5"]


def test_one_call_chooses_enumeration_for_few_players_and_samples_for_many():
    assert shapley_values(TEXTBOOK).values.tolist() == pytest.approx([7 / 6, 5 / 3, 19 / 6], abs=1e-12)
    assert shapley_values(random_game(12)).method == "exact"
    assert shapley_values(random_game(13), generator=0).method != "exact"
    assert shapley_values(random_game(4), "permutation", walks=4, generator=0).n_evals == 2 + 4 * 3
    assert shapley_values(random_game(4), LeaveOneOut()).method == "leave_one_out"


def test_one_call_refuses_unknown_methods_and_options_without_a_named_method():
    with pytest.raises(ValueError, match="got 'magic'"):
        shapley_values(random_game(3), "magic")
    for method in ("auto", ExactShapley()):
        with pytest.raises(ValueError, match="'walks'"):
            shapley_values(random_game(3), method, walks=3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("n", [3, 6, 10])
def test_shapiq_agrees(n):
    shapiq = pytest.importorskip("shapiq")
    game = random_game(n)
    theirs = shapiq.ExactComputer(lambda z: game(torch.as_tensor(z).bool()).numpy(), n_players=n)("SV")
    ours = ExactShapley().estimate(game).values.tolist()
    assert [float(theirs[(i,)]) for i in range(n)] == pytest.approx(ours, abs=1e-12)


@pytest.mark.filterwarnings("ignore")
def test_captum_agrees():
    attr = pytest.importorskip("captum.attr")
    game = TableGame(random_game(5).values.float())  # captum computes in float32
    shapley = attr.ShapleyValues(lambda z: game(z.bool()).float())
    theirs = shapley.attribute(torch.ones(1, 5), baselines=torch.zeros(1, 5))[0]
    torch.testing.assert_close(ExactShapley().estimate(game).values.float(), theirs, rtol=0, atol=1e-5)


def test_a_game_of_two_thousand_players_is_refused_in_words():
    with pytest.raises(ValueError, match=r"2000 players at depth full need 2\*\*2000 evaluations, about .* years"):
        ExactShapley().estimate(as_game(lambda kept: kept.sum(1), 2000))
