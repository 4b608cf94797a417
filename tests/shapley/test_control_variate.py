import json

import pytest
import torch
from shapley.table_games import (
    CountingGame,
    GroupedTable,
    WalkableTable,
    all_coalitions,
    grouped_saturating_game,
    random_game,
    saturating_game,
)

from lightning_eff.shapley import (
    ExactShapley,
    GreedyBackward,
    GroupedGame,
    LeaveOneOut,
    PermutationShapley,
    RegressionShapley,
    ShapleyResult,
    StopRule,
    TableGame,
    TopKShapley,
    WalkableGame,
    evaluate_walks,
)
from lightning_eff.shapley.control_variate import ControlVariate

GAME = random_game(6)
NEAR = TableGame(GAME.values + 0.1 * random_game(6, seed=1).values)


def exact(game, **options):
    return ExactShapley(**options).estimate(game)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, "fit"])
def test_enumerated_difference_plus_proxy_gives_the_values_of_the_game(beta):
    found, expected = ControlVariate(GAME, NEAR, beta=beta).estimate(ExactShapley()), exact(GAME)
    for name in ("values", "v_empty", "v_full"):
        assert torch.allclose(getattr(found, name), getattr(expected, name), rtol=0, atol=1e-12)
    assert abs(found.efficiency_gap) < 1e-12


@pytest.mark.parametrize("beta", [1.0, "fit"])
def test_estimate_is_unbiased_whatever_the_proxy(beta):
    variate = ControlVariate(GAME, random_game(6, seed=9), beta=beta)
    estimator = PermutationShapley(4)
    samples = torch.stack([variate.estimate(estimator, generator=seed).values for seed in range(400)])
    error = samples.std(0) / 20
    assert ((samples.mean(0) - exact(GAME).values).abs() <= 4 * error).all()


def test_error_falls_with_a_proxy_that_is_near():
    plain, helped = (
        [source(seed) for seed in range(40)]
        for source in (
            lambda seed: PermutationShapley(4).estimate(GAME, generator=seed),
            lambda seed: ControlVariate(GAME, NEAR).estimate(PermutationShapley(4), generator=seed),
        )
    )
    truth = exact(GAME).values
    squared = [sum(((r.values - truth) ** 2).sum() for r in results) for results in (plain, helped)]
    assert squared[1] < squared[0] / 30  # the difference varies a tenth as much, its square a hundredth
    assert sum(r.stderr.mean() for r in helped) < sum(r.stderr.mean() for r in plain) / 5


def test_perfect_proxy_leaves_no_error():
    result = ControlVariate(GAME, TableGame(GAME.values)).estimate(PermutationShapley(4), generator=0)
    assert torch.allclose(result.values, exact(GAME).values, rtol=0, atol=1e-12)
    assert not result.stderr.any()


def test_fitted_slope_finds_a_proxy_of_another_scale():
    variate = ControlVariate(GAME, TableGame(7 - 4 * GAME.values), beta="fit")
    result = variate.estimate(PermutationShapley(4), generator=0)
    assert variate.beta == pytest.approx(-0.25)
    assert result.stderr.max() < 1e-12


def test_fitted_slope_of_vectors_is_that_of_all_components():
    vectors = random_game(5, components=3)
    offsets = torch.tensor([5.0, 0.0, -9.0], dtype=torch.float64)
    variate = ControlVariate(vectors, TableGame(2 * vectors.values + offsets), beta="fit")
    assert variate.beta == pytest.approx(0.5)
    found = variate.estimate(PermutationShapley(4), generator=0).values
    assert torch.allclose(found, exact(vectors).values, rtol=0, atol=1e-12)


def test_proxy_that_does_not_vary_is_not_used():
    assert ControlVariate(GAME, TableGame(torch.ones(64)), beta="fit").beta == 0


@pytest.mark.parametrize("beta", [0.7, "fit"])
def test_evaluations_are_those_of_the_game_pilots_included(beta):
    counting, proxy = CountingGame(GAME), CountingGame(NEAR)
    variate = ControlVariate(counting, proxy, beta=beta)
    result = variate.estimate(PermutationShapley(4), generator=0)
    assert result.n_evals == counting.count == PermutationShapley(4).cost(6) + (12 if beta == "fit" else 0)


def test_budget_holds_with_pilots():
    counting = CountingGame(GAME)
    variate = ControlVariate(counting, NEAR, beta="fit")
    result = variate.estimate(PermutationShapley(99), generator=0, stop=StopRule(max_evals=50))
    assert result.n_evals == counting.count <= 50
    with pytest.raises(ValueError, match="fitting beta takes 12 evaluations, the budget is 12"):
        variate.estimate(PermutationShapley(99), stop=StopRule(max_evals=12))


@pytest.mark.parametrize(
    "estimator", [LeaveOneOut(), LeaveOneOut("add"), ExactShapley(depth=3), ExactShapley(depth=3, direction="add")]
)
def test_partial_values_take_the_partial_values_of_the_proxy(estimator):
    found = ControlVariate(GAME, NEAR).estimate(estimator).values
    assert torch.allclose(found, estimator.estimate(GAME).values, rtol=0, atol=1e-12)


def test_known_values_of_the_proxy_spare_its_enumeration():
    proxy = CountingGame(NEAR)
    variate = ControlVariate(GAME, proxy, proxy_values=exact(NEAR).values)
    with_known = variate.estimate(PermutationShapley(4), generator=3)
    assert proxy.count == PermutationShapley(4).cost(6) + 2
    enumerated = ControlVariate(GAME, NEAR).estimate(PermutationShapley(4), generator=3)
    assert torch.equal(with_known.values, enumerated.values)


def test_groups_and_walks_are_those_of_the_game():
    plain, walking = ControlVariate(GAME, NEAR), ControlVariate(WalkableTable(GAME.values), NEAR)
    grouped = ControlVariate(grouped_saturating_game(6, 3), NEAR)
    assert [isinstance(game, WalkableGame) for game in (plain, walking, grouped)] == [False, True, False]
    assert [isinstance(game, GroupedGame) for game in (plain, walking, grouped)] == [False, False, True]


@pytest.mark.parametrize("start", ["full", "empty"])
@pytest.mark.parametrize("components", [None, 2])
def test_walks_give_the_difference(start, components):
    values = random_game(5, components=components).values
    proxy = random_game(5, seed=1, components=components)
    walking, plain = (ControlVariate(kind(values), proxy, beta=0.5) for kind in (WalkableTable, TableGame))
    orders = torch.tensor([[0, 3, 2], [4, 1, 0]])
    assert torch.equal(evaluate_walks(walking, orders, start=start), evaluate_walks(plain, orders, start=start))
    assert walking.game.walks == 2
    start_value = plain(torch.full((1, 5), start == "full"))[0]
    assert torch.equal(walking.walk(orders, start=start)[:, 0], start_value.expand(2, *start_value.shape))


def test_walkable_game_gives_the_estimate_of_a_plain_one():
    walking, plain = (ControlVariate(kind(GAME.values), NEAR) for kind in (WalkableTable, TableGame))
    found = walking.estimate(PermutationShapley(8), generator=0).values
    assert torch.allclose(found, plain.estimate(PermutationShapley(8), generator=0).values, rtol=0, atol=1e-12)


class WalkingGroups(GroupedTable):
    def walk_group(self, group, orders, *, start="full"):
        return WalkableTable(self.tables[group].values).walk(orders, start=start)


@pytest.mark.parametrize("proxy", ["whole", "groups"])
@pytest.mark.parametrize("kind", [GroupedTable, WalkingGroups])
def test_grouped_game_keeps_its_groups(kind, proxy):
    tables = [saturating_game(6, seed) for seed in range(3)]
    game = kind(tables, [0.5, 0.3, 0.2])
    split = GroupedTable([TableGame(0.9 * table.values) for table in tables], [0.5, 0.3, 0.2])
    variate = ControlVariate(game, split if proxy == "groups" else split.mean)
    results = [variate.estimate(PermutationShapley(4), generator=seed) for seed in range(100)]
    samples = torch.stack([result.values for result in results])
    assert ((samples.mean(0) - exact(game.mean).values).abs() <= 4 * samples.std(0) / 10).all()
    assert all(abs(result.efficiency_gap) < 1e-12 for result in results)
    if proxy == "groups":
        assert split.group_count > 0
        plain = PermutationShapley(4).estimate(game, generator=0)
        assert results[0].stderr.mean() < 0.2 * plain.stderr.mean()  # a tenth of each group is left to sample


def test_resumed_estimate_is_that_of_one_run_also_through_a_file(tmp_path):
    def variate():
        return ControlVariate(GAME, NEAR, beta="fit")

    once = variate().estimate(PermutationShapley(16), generator=5)
    variate().estimate(PermutationShapley(8), generator=5).save(tmp_path / "half.json")
    half = ShapleyResult.from_dict(json.loads((tmp_path / "half.json").read_text()))
    resumed = variate().estimate(PermutationShapley(8), resume=half)
    assert torch.equal(resumed.values, once.values)
    assert torch.equal(resumed.stderr, once.stderr)
    assert resumed.n_evals == once.n_evals
    with pytest.raises(ValueError, match=r"made with beta .*, this one is 0.5"):
        ControlVariate(GAME, NEAR, beta=0.5).estimate(PermutationShapley(8), resume=half)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"proxy": random_game(5)}, "as many players, got 6 and 5"),
        ({"proxy": NEAR, "beta": float("nan")}, 'finite number or "fit", got nan'),
        ({"proxy": NEAR, "proxy_values": torch.zeros(5)}, r"each of 6 players, got \[5\]"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(options, complaint):
    counting = CountingGame(GAME)
    with pytest.raises(ValueError, match=complaint):
        ControlVariate(counting, **options)
    assert counting.count == 0


def test_proxy_with_other_components_is_refused():
    with pytest.raises(ValueError, match=r"must return values alike, got \[1\] and \[1, 2\]"):
        ControlVariate(GAME, random_game(6, components=2))(all_coalitions(6)[:1])
    with pytest.raises(ValueError, match=r"shaped like the values, \[6\], got \[6, 2\]"):
        ControlVariate(GAME, NEAR, torch.zeros(6, 2)).estimate(LeaveOneOut())


@pytest.mark.parametrize(
    ("estimator", "stop"),
    [(TopKShapley(2), None), (GreedyBackward(), None), (PermutationShapley(), StopRule(rel_stderr=0.1))],
)
def test_what_would_judge_the_difference_instead_of_the_game_is_refused(estimator, stop):
    with pytest.raises(ValueError, match="would judge the difference"):
        ControlVariate(random_game(5), random_game(5, 1)).estimate(estimator, stop=stop)


def test_a_result_of_a_difference_is_not_taken_for_one_of_the_game():
    game, proxy = random_game(5), random_game(5, 1)
    result = ControlVariate(game, proxy).estimate(RegressionShapley(20), generator=0)
    with pytest.raises(ValueError, match="resume does not fit"):
        RegressionShapley(20).estimate(game, resume=result)


def test_pilots_are_reported_and_counted():
    reported = []
    control = ControlVariate(random_game(6), random_game(6, 1), beta="fit")
    result = control.estimate(RegressionShapley(30), generator=0, progress=reported.append)
    assert sum(reported) == result.n_evals == 42
