from itertools import combinations, pairwise

import pytest
import torch

from lightning_eff.lidar.gap import GapGame, gap_costs, line_table, mean_gap_game
from lightning_eff.shapley import ExactShapley, evaluate
from lightning_eff.shapley.table import coalitions_of


def random_costs(n: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n + 2, n + 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 10


def spec_example() -> GapGame:
    costs = torch.zeros(5, 5)
    for (i, j), cost in {(0, 4): 12.0, (0, 2): 2.0, (0, 3): 6.0, (1, 3): 3.0, (1, 4): 4.0, (2, 4): 1.0}.items():
        costs[i, j] = cost
    return GapGame(costs)


def cost_by_hand(costs: torch.Tensor, kept: tuple[int, ...]) -> float:
    ends = [0, *(line + 1 for line in kept), len(costs) - 1]
    return sum(float(costs[i, j]) for i, j in pairwise(ends))


def test_three_lines_have_the_values_worked_out_by_hand() -> None:
    values = spec_example().shapley()
    torch.testing.assert_close(values, torch.tensor([25 / 6, 31 / 6, 8 / 3], dtype=torch.float64))
    assert float(values.sum()) == pytest.approx(12)


def test_a_coalition_costs_the_gaps_that_it_leaves() -> None:
    costs = random_costs(6)
    kept = coalitions_of(torch.arange(64), 6)
    expected = [-cost_by_hand(costs, tuple(row.nonzero().flatten().tolist())) for row in kept]
    torch.testing.assert_close(evaluate(GapGame(costs), kept), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("n", [1, 2, *range(3, 11)])
def test_closed_form_equals_enumeration_of_all_coalitions(n: int) -> None:
    game = GapGame(random_costs(n, seed=n))
    torch.testing.assert_close(game.shapley(), ExactShapley().estimate(game).values, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 5, 10])
def test_closed_form_equals_enumeration_where_gaps_weigh_differently_by_the_number_of_lines_kept(n: int) -> None:
    offset, scale = torch.rand(2, n + 1, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    game = GapGame(random_costs(n, seed=n), offset, scale)
    torch.testing.assert_close(game.shapley(), ExactShapley().estimate(game).values, rtol=0, atol=1e-12)


def test_sixty_four_lines_share_out_everything() -> None:
    game = GapGame(random_costs(64))
    ends = evaluate(game, torch.tensor([[False], [True]]).expand(2, 64))
    assert float(game.shapley().sum()) == pytest.approx(float(ends[1] - ends[0]), abs=1e-10)


def test_lines_whose_costs_add_up_are_worth_just_their_own() -> None:
    own = torch.rand(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = torch.cat([torch.zeros(1), own.cumsum(0)])  # a gap (i, j) hides the lines i + 1 .. j - 1
    costs = torch.zeros(66, 66, dtype=torch.float64)
    costs[:65, 1:] = before[None, :] - before[:, None]
    torch.testing.assert_close(GapGame(costs).shapley(), own, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [3, 6, 9])
def test_best_lines_of_every_number_cost_as_little_as_any(n: int) -> None:
    costs = random_costs(n, seed=n)
    game = GapGame(costs)
    for k in range(n + 1):
        chosen = game.best(k)
        assert chosen == sorted(set(chosen))
        assert len(chosen) == k
        least = min(cost_by_hand(costs, kept) for kept in combinations(range(n), k))
        assert cost_by_hand(costs, tuple(chosen)) == pytest.approx(least, abs=1e-12)


def test_best_refuses_more_lines_than_there_are() -> None:
    with pytest.raises(ValueError, match=r"k must lie in 0..3, got 4"):
        spec_example().best(4)


def test_mean_total_is_the_mean_over_all_coalitions_of_a_size() -> None:
    game = GapGame(random_costs(7))
    kept = coalitions_of(torch.arange(128), 7)
    totals = game.total(kept)
    by_size = torch.stack([totals[kept.sum(1) == size].mean() for size in range(8)])
    torch.testing.assert_close(game.mean_total(), by_size)


def test_root_game_has_the_root_at_both_ends_and_near_it_between() -> None:
    costs = torch.zeros(8, 8, dtype=torch.float64)
    for i in range(8):
        for j in range(i + 1, 8):
            costs[i, j] = float(j - i - 1) ** 2
    game = GapGame(costs)
    kept = coalitions_of(torch.arange(64), 6)
    root = -1000 * game.total(kept).sqrt()
    values = evaluate(game.as_rmse(), kept)
    ends = [0, 63]
    torch.testing.assert_close(values[ends], root[ends])
    inner = slice(1, 63)
    assert float(torch.corrcoef(torch.stack([values[inner], root[inner]]))[0, 1]) > 0.97


def test_costs_between_lines_of_a_plane_are_zero() -> None:
    # inverse depth of a plane is affine in row and column of the image
    row, column = torch.arange(10.0)[:, None] * 7 + 100, torch.arange(30.0)[None, :]
    depth = 1 / (0.001 * row + 0.0002 * column)
    costs = gap_costs(depth, row.expand(10, 30))
    assert float(costs[1:-1, 1:-1].abs().max()) < 1e-12  # m^2: the rounding of float32 depth
    assert float(costs[0, 3]) > 0.01  # beyond the first line nothing is interpolated


def test_costs_are_the_squared_errors_of_the_returns_inside_the_gap() -> None:
    depth = torch.tensor([[10.0], [0.0], [30.0], [20.0]])  # the second line has no return here
    height = torch.tensor([0.0, 1.0, 2.0, 4.0])
    costs = gap_costs(depth, height)
    at_two = 1 / (0.1 + (0.05 - 0.1) * 2 / 4)
    assert float(costs[1, 4]) == pytest.approx((at_two - 30) ** 2 / 3)
    assert float(costs[0, 4]) == pytest.approx(((20 - 10) ** 2 + (20 - 30) ** 2) / 3)
    assert float(costs[0, 5]) == pytest.approx((10**2 + 10**2 + 0) / 3)  # the mean depth is 20
    assert float(costs[1, 3]) == 0  # only the line without a return is missing


def test_a_hole_takes_what_its_line_shows_in_the_nearest_column() -> None:
    depth = torch.tensor([[10.0, 0.0, 0.0, 20.0], [5.0, 5.0, 5.0, 5.0]])
    costs = gap_costs(depth, torch.tensor([0.0, 1.0]))
    # the second line is missing, the first shows 10, 10, 20, 20
    assert float(costs[1, 3]) == pytest.approx((2 * 5**2 + 2 * 15**2) / 6)


def test_a_table_holds_the_nearest_return_of_every_line_and_column_with_its_row() -> None:
    sparse, line_idx = torch.zeros(6, 8), torch.full((6, 8), 255, dtype=torch.uint8)
    for row, column, depth, line in [(1, 0, 9.0, 4), (2, 1, 7.0, 4), (3, 6, 5.0, 4), (4, 7, 8.0, 9), (5, 7, 1.0, 200)]:
        sparse[row, column], line_idx[row, column] = depth, line
    depths, rows = line_table(sparse, line_idx, [4, 9], columns=4)
    torch.testing.assert_close(depths, torch.tensor([[7.0, 0, 0, 5], [0, 0, 0, 8]], dtype=torch.float64))
    assert rows.tolist() == [[2, 0, 0, 3], [0, 0, 0, 4]]


def test_the_mean_game_has_the_mean_values() -> None:
    games = [GapGame(random_costs(5, seed)) for seed in range(3)]
    mean = torch.stack([game.shapley() for game in games]).mean(0)
    torch.testing.assert_close(mean_gap_game(games).shapley(), mean)


@pytest.mark.parametrize("costs", [torch.zeros(4, 5), torch.zeros(2, 2), torch.full((4, 4), torch.nan)])
def test_costs_that_are_none_are_refused(costs: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="costs must be"):
        GapGame(costs)
