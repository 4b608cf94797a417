from collections.abc import Iterable

import pytest
import torch

from lightning_eff.lidar.gap import GapGame
from lightning_eff.lidar.lines import LidarWarning
from lightning_eff.lidar.selection import (
    as_coalitions,
    best_selection,
    greedy_lines,
    most_points,
    random_lines,
    select_lines,
    selections,
    spread_ablation,
    swap_lines,
    uniform_lines,
    uniform_sensor_lines,
)
from lightning_eff.shapley import as_game, evaluate

VALUES = torch.tensor([5.0, 1, 4, 4, 0, 9, 2, 2])
RULES = ["none", "region", "separation", "mmr", "facility"]


def random_values(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check_sets(sets: Iterable[list[int]], n: int, k: int) -> None:
    for lines in sets:
        assert lines == sorted(set(lines))
        assert len(lines) == k
        assert all(0 <= line < n for line in lines)


def smooth_gap_game() -> GapGame:
    """46 lines where what costs lies around 8, 24 and 40: a gap costs the square of the demand that it hides."""
    line = torch.arange(46.0, dtype=torch.float64)
    demand = sum(torch.exp(-(((line - peak) / 2) ** 2)) for peak in (8, 24, 40))
    before = torch.cat([torch.zeros(1), demand.cumsum(0)])
    costs = torch.zeros(48, 48, dtype=torch.float64)
    costs[:47, 1:] = (before[None, :] - before[:, None]).clamp(min=0) ** 2
    return GapGame(costs)


def test_region_takes_the_best_of_every_region() -> None:
    assert select_lines(VALUES, 3) == [0, 5, 6]


def test_separation_leaves_a_gap_between_lines() -> None:
    assert select_lines(VALUES, 3, "separation", gap=1) == [0, 2, 5]


@pytest.mark.parametrize("backfill", ["relax", "value"])
def test_separation_fills_up_where_the_published_code_returns_too_few(backfill: str) -> None:
    # 5, 0, 2, 7 are apart, then 3 is the most valuable one left
    assert select_lines(VALUES, 5, "separation", gap=1, backfill=backfill) == [0, 2, 3, 5, 7]


def test_separation_relaxes_step_by_step_before_it_takes_neighbours() -> None:
    values = torch.tensor([9.0, 8, 7, 6, 5, 4, 3])
    # gap 3 finds 0 and 4; gap 2 none; gap 1 finds 2
    assert select_lines(values, 3, "separation", gap=3) == [0, 2, 4]
    assert select_lines(values, 3, "separation", gap=3, backfill="value") == [0, 1, 4]


def test_automatic_separation_takes_the_largest_gap_that_gives_enough_lines() -> None:
    values = torch.tensor([9.0, 8, 7, 6, 5, 4, 3])
    assert select_lines(values, 3, "separation", gap="auto") == [0, 3, 6]
    # from line 3 the largest gap leaves room on one side only for gap 2
    assert select_lines(torch.tensor([0.0, 1, 2, 9, 2, 1, 0]), 3, "separation", gap="auto") == [0, 3, 6]


def test_mmr_is_top_k_without_and_spreads_with_weight_on_distance() -> None:
    assert select_lines(VALUES, 3, "mmr", balance=0.0) == select_lines(VALUES, 3, "none") == [0, 2, 5]
    # first 5; then 0 is farthest; then 2 and 3 are as far as counts, 2 from both
    assert select_lines(VALUES, 3, "mmr", balance=1.0) == [0, 2, 5]
    # a distance of n / k = 4 counts in full: 7 is as far as 4 to 6 and worth more
    assert select_lines(torch.tensor([9.0, 8, 7, 0, 0, 0, 0, 1]), 2, "mmr", balance=0.9) == [0, 7]
    assert select_lines(torch.tensor([9.0, 8, 7, 0, 0, 0, 0, 1]), 2, "mmr", balance=0.5) == [0, 2]


def test_facility_places_lines_where_the_demand_is() -> None:
    values = torch.zeros(30)
    values[5], values[6], values[25] = 10.0, 9.0, 8.0
    assert select_lines(values, 2, "facility", width=0.5) == [5, 25]


def test_regions_of_equal_angle_differ_from_regions_of_equally_many_lines() -> None:
    values, angles = torch.tensor([1.0, 5, 4, 0]), torch.tensor([0.0, -1, -2, -10])
    assert select_lines(values, 2, "region") == [1, 2]
    # in angle lines 0 to 2 share the upper half, line 3 has the lower one
    assert select_lines(values, 2, "region", angles=angles) == [1, 3]


def test_a_region_without_lines_yields_to_the_most_valuable_line_left() -> None:
    values, angles = torch.tensor([1.0, 5, 4, 0]), torch.tensor([0.0, -1, -2, -10])
    assert select_lines(values, 3, "region", angles=angles) == [1, 2, 3]


def test_equal_values_take_the_lower_line() -> None:
    assert select_lines(torch.ones(6), 2, "none") == [0, 1]
    assert select_lines(torch.ones(6), 2, "region") == [0, 3]


@pytest.mark.parametrize("n", [1, 2, 7, 46, 64])
def test_every_rule_returns_exactly_k_distinct_sorted_lines(n: int) -> None:
    values = random_values(n)
    for k in range(n + 1):
        sets = [
            *selections(values, k).values(),
            select_lines(values, k, "separation", gap="auto"),
            select_lines(values, k, "separation", gap=3, backfill="value"),
            *random_lines(n, k, draws=2),
            most_points(values.abs(), k),
        ]
        check_sets(sets, n, k)


@pytest.mark.parametrize("n", [1, 2, 7, 20])
def test_every_rule_returns_exactly_k_lines_by_angle_and_where_all_values_are_equal(n: int) -> None:
    angles = torch.linspace(2, -25, n) - 0.1 * torch.arange(n).float() ** 1.5
    for k in range(n + 1):
        check_sets(selections(random_values(n), k, angles=angles).values(), n, k)
        check_sets(selections(torch.zeros(n), k).values(), n, k)
        check_sets([select_lines(torch.zeros(n), k, "separation", gap="auto", angles=angles)], n, k)


def test_more_lines_than_there_are_means_all_of_them_and_says_so() -> None:
    with pytest.warns(LidarWarning, match="k = 9 lines are wanted, there are 8: all of them are kept"):
        assert select_lines(VALUES, 9) == list(range(8))


@pytest.mark.parametrize("k", [-1, 1.0, True, "3"])
def test_a_count_that_is_none_is_refused(k: object) -> None:
    with pytest.raises(ValueError, match="k must be a whole number >= 0"):
        select_lines(VALUES, k)


@pytest.mark.parametrize("values", [torch.tensor([1.0, torch.nan]), torch.ones(2, 2), torch.ones(0)])
def test_values_that_rank_nothing_are_refused(values: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="values must be"):
        select_lines(values, 1)


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        ("best", {}, "rule must be one of"),
        ("region", {"gap": 1}, "does not take these options"),
        ("separation", {"gap": -1}, "gap must be"),
        ("separation", {"backfill": "none"}, "backfill must be"),
        ("mmr", {"balance": 1.5}, "balance must lie in"),
        ("facility", {"width": 0.0}, "width must be positive"),
    ],
)
def test_wrong_rules_and_options_are_refused(rule: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_lines(VALUES, 2, rule, **options)


def test_angles_must_fall() -> None:
    with pytest.raises(ValueError, match="angles must be 8 falling elevations"):
        select_lines(VALUES, 2, angles=torch.arange(8.0))


def test_uniform_lines_reach_from_the_first_to_the_last() -> None:
    assert uniform_lines(46, 4) == [0, 15, 30, 45]
    assert uniform_lines(46, 1) == [22]
    assert uniform_lines(46, 0) == []


@pytest.mark.parametrize(("k", "official"), [(16, 16), (24, 32), (40, 64)])
def test_the_published_spacing_keeps_more_lines_than_asked_for(k: int, official: int) -> None:
    assert len(uniform_sensor_lines(64, k, official=True)) == official
    assert len(uniform_sensor_lines(64, k)) == k


def test_random_sets_repeat_with_their_seed_and_differ_from_each_other() -> None:
    sets = random_lines(46, 8, draws=10, seed=1)
    assert sets == random_lines(46, 8, draws=10, seed=1)
    assert len({tuple(lines) for lines in sets}) == 10


def test_most_points_counts_pixels() -> None:
    assert most_points(torch.tensor([10, 40, 30, 40]), 2) == [1, 3]


def test_the_ablation_begins_with_the_top_and_gives_up_value_for_spread() -> None:
    values = random_values(46)
    sets = spread_ablation(values, k=16)
    assert len(sets) == 24
    assert sets[0] == select_lines(values, 16, "none")
    order = values.argsort(descending=True)
    for extra, lines in enumerate(sets):
        assert len(set(lines)) == 16
        assert set(lines) <= set(order[: 16 + extra].tolist())


def test_the_best_rule_is_never_worse_than_evenly_spread_lines() -> None:
    game = smooth_gap_game()
    for k in (2, 3, 5, 9):
        best = best_selection(game.shapley(), k, game)
        assert best.score == max(best.scores.values())
        assert best.score >= best.scores["uniform"]
        assert best.score == pytest.approx(float(evaluate(game, as_coalitions([best.lines], 46))))
        assert best.lines == selections(game.shapley(), k)[best.rule]


def test_searches_find_the_three_lines_that_are_best() -> None:
    game = smooth_gap_game()
    assert game.best(3) == [8, 24, 40]
    assert swap_lines(game, uniform_lines(46, 3)) == [8, 24, 40]


def test_swaps_stop_when_they_are_told_to() -> None:
    game, start = smooth_gap_game(), [0, 1, 2]
    once = swap_lines(game, start, max_swaps=1)
    assert len(set(once) - set(start)) == 1
    assert swap_lines(game, start, max_swaps=0) == start


def test_swapping_all_lines_or_none_leaves_them() -> None:
    game = smooth_gap_game()
    assert swap_lines(game, []) == []
    assert swap_lines(game, range(46)) == list(range(46))


def test_greedy_adds_the_line_that_gains_most() -> None:
    # 0 and 1 are worth 3 together with each other only; 2 alone 2; 3 alone 1
    def value(kept: torch.Tensor) -> torch.Tensor:
        return 3.0 * (kept[:, 0] & kept[:, 1]) + 2.0 * kept[:, 2] + 1.0 * kept[:, 3]

    game = as_game(value, 4)
    assert greedy_lines(game, 2) == [2, 3]
    assert greedy_lines(game, 4) == [2, 3, 0, 1]
