import math

import matplotlib.pyplot
import pytest
import torch
from helpers import run_python
from scipy import stats
from shapley.table_games import CountingGame, all_coalitions, grouped_saturating_game, random_game, saturating_game

from lightning_eff.reporting import KEPT, REMOVED, SERIES, save_figure
from lightning_eff.shapley import (
    ExactShapley,
    GreedyBackward,
    LeaveOneOut,
    PermutationShapley,
    RegressionShapley,
    ShapleyEstimator,
    ShapleyResult,
    ShapleyWarning,
    StopRule,
    TableGame,
    as_game,
)
from lightning_eff.shapley.diagnostics import convergence_curve, cost_benefit, rank_stability
from lightning_eff.shapley.figures import convergence_figure, histogram_figure, values_figure

GAME = saturating_game(6)


def result_of(values, stderr=None, **options):
    values = torch.tensor(values, dtype=torch.float64)
    stderr = torch.zeros_like(values) if stderr is None else torch.tensor(stderr, dtype=torch.float64)
    fields = {"n_evals": 1, "n_unique": 1, "v_empty": None, "v_full": None, "method": "permutation", "seconds": 0.0}
    return ShapleyResult(values, stderr, **{**fields, "depth": len(values), "converged": True, **options})


class Restarting(ShapleyEstimator):
    """Walks that cannot be resumed."""

    def __init__(self, walks=2):
        self.walks = PermutationShapley(walks)

    def run(self, game, request):
        assert request.resume is None
        result = self.walks.run(game, request)
        result.state = None
        return result

    def cost(self, n):
        return self.walks.cost(n)

    def with_budget(self, budget, n):
        return Restarting(self.walks.with_budget(budget, n).walks)


# Convergence.


def test_curve_passes_through_what_single_estimates_give_and_pays_once():
    counting = CountingGame(GAME)
    curve = convergence_curve(counting, PermutationShapley(walks=1), [200, 50, 100], generator=3)
    assert counting.count == curve.evaluations[-1] == 192
    for row, budget in enumerate((50, 100, 200)):
        single = PermutationShapley(999).estimate(GAME, generator=3, stop=StopRule(max_evals=budget))
        assert curve.evaluations[row] == single.n_evals <= budget
        assert torch.equal(curve.values[row], single.values)
        assert torch.equal(curve.stderr[row], single.stderr)


def test_estimator_that_cannot_resume_starts_again_for_every_budget():
    curve = convergence_curve(GAME, Restarting(), [60, 120], generator=3)
    resumed = convergence_curve(GAME, PermutationShapley(), [60, 120], generator=3)
    assert torch.equal(curve.values, resumed.values)


def test_budgets_that_are_too_small_or_add_nothing_are_left_out():
    assert convergence_curve(GAME, PermutationShapley(), [3, 12, 13, 60]).evaluations.tolist() == [12, 52]
    assert convergence_curve(GAME, ExactShapley(), [63, 64, 1000]).evaluations.tolist() == [64]
    assert convergence_curve(GAME, GreedyBackward(), [63, 64, 1000]).evaluations.tolist() == [22]
    with pytest.raises(ValueError, match=r"budgets \[2, 3\] suffices: 6 players .* at least 12 evaluations"):
        convergence_curve(GAME, PermutationShapley(), [2, 3])


def test_curve_of_vector_values_is_refused():
    with pytest.raises(ValueError, match="scalar values, the game returns vectors of 2"):
        convergence_curve(random_game(4, components=2), PermutationShapley(), [60])


def test_errors_of_the_game_itself_are_not_taken_for_a_small_budget():
    broken = TableGame([0.0, math.nan, 1.0, 1.0])
    with pytest.raises(ValueError, match="returned nan"):
        convergence_curve(broken, PermutationShapley(), [60])
    with pytest.raises(ValueError, match="returned nan"):
        cost_benefit(broken, {"walks": PermutationShapley()}, [60], 1, exact=torch.ones(2))


def test_convergence_is_told_by_a_table_and_drawn_with_the_names():
    game = saturating_game(10)
    game.names = [f"c{player}" for player in range(10)]
    curve = convergence_curve(game, PermutationShapley(), [20, 100, 400])
    rows = curve.table().rows
    assert rows[-1][3] == 1
    assert rows[0][1] == math.inf
    assert rows[-1][1] == curve.stderr[-1].max().item()
    axis = convergence_figure(curve, players=[3, 1]).axes[0]
    assert [line.get_label() for line in axis.lines] == ["c3", "c1"]
    assert axis.lines[0].get_ydata().tolist() == curve.values[:, 3].tolist()
    best = curve.values[-1].argsort(descending=True)[:8]
    assert [line.get_label() for line in convergence_figure(curve).axes[0].lines] == [f"c{player}" for player in best]
    with pytest.raises(ValueError, match=r"players must lie in 0\.\.9, got \[10\]"):
        convergence_figure(curve, [10])


# Stability of the ranking.


def test_stability_of_several_results_is_their_mean_pairwise_agreement():
    values = [[4.0, 3, 2, 1], [3.0, 4, 2, 1], [4.0, 3, 1, 2]]
    stability = rank_stability([result_of(row) for row in values])
    pairs = [(0, 1), (0, 2), (1, 2)]
    expected = sum(stats.kendalltau(values[a], values[b]).statistic for a, b in pairs) / 3
    assert stability.kendall == pytest.approx(expected)
    assert stability.top.tolist() == pytest.approx([1 / 3, 1, 1 / 3])


def test_stability_of_two_players_is_the_normal_probability_of_their_order():
    stability = rank_stability(result_of([1.0, 0.0], [0.6, 0.8]), draws=4000)
    expected = stats.norm.cdf(1.0)  # the difference has mean 1 and standard error 1
    assert stability.top.item() == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 4000))
    assert stability.kendall == pytest.approx(2 * stability.top.item() - 1)


def test_stability_of_one_result_grows_with_its_budget():
    few, many = (PermutationShapley(walks).estimate(GAME, generator=0) for walks in (4, 400))
    assert rank_stability(few).kendall < rank_stability(many).kendall <= 1
    assert (rank_stability(ExactShapley().estimate(GAME)).top == 1).all()


@pytest.mark.parametrize(
    ("results", "complaint"),
    [
        ([], "at least two, got 0"),
        ([result_of([1.0, 2.0])], "at least two, got 1"),
        ([result_of([1.0, 2.0]), result_of([1.0, 2.0, 3.0])], "one game with at least two players"),
        (result_of([1.0]), "at least two players"),
        (result_of([1.0, 2.0], [0.1, math.inf]), "no error bar"),
        (result_of([1.0, math.nan], [0.1, math.inf]), "no value yet"),
        (result_of([[1.0, 2.0]]), "vectors of 2 components"),
    ],
)
def test_what_has_no_stability_is_refused(results, complaint):
    with pytest.raises(ValueError, match=complaint):
        rank_stability(results)


# Cost and benefit.


def test_error_and_correlation_are_those_of_the_single_estimates():
    compared = cost_benefit(GAME, {"walks": PermutationShapley()}, [60, 30], seeds=[4, 7, 9])
    exact = ExactShapley().estimate(GAME).values
    assert torch.equal(compared.exact, exact)
    assert [cell.budget for cell in compared.cells] == [30, 60]
    for cell in compared.cells:
        for place, seed in enumerate((4, 7, 9)):
            values = PermutationShapley().with_budget(cell.budget, 6).estimate(GAME, generator=seed).values
            error = sum((values - exact).tolist()[i] ** 2 for i in range(6)) / sum(x**2 for x in exact.tolist())
            assert cell.error[place].item() == pytest.approx(error, rel=1e-9)
            assert cell.spearman[place] == pytest.approx(stats.spearmanr(values, exact).statistic)


def test_no_budget_is_exceeded():
    for budget in (15, 33, 64):
        counting = CountingGame(GAME)
        methods = {"walks": PermutationShapley(), "single": PermutationShapley(antithetic=False)}
        known, told = torch.ones(6, dtype=torch.float64), []
        compared = cost_benefit(counting, methods, [budget], seeds=3, exact=known, progress=told.append)
        assert counting.count == sum(told) == sum(int(cell.evaluations.sum()) for cell in compared.cells)
        assert all((cell.evaluations <= budget).all() for cell in compared.cells)
        assert len(compared.cells) == 2


def test_methods_of_fixed_cost_appear_once_and_budgets_that_are_too_small_not_at_all():
    methods = {"exact": ExactShapley(), "loo": LeaveOneOut(), "walks": PermutationShapley()}
    compared = cost_benefit(GAME, methods, [5, 10, 20, 100], seeds=2)
    assert [(cell.estimator, cell.budget, len(cell.error)) for cell in compared.cells] == [
        ("exact", 64, 1),
        ("loo", 7, 1),
        ("walks", 20, 2),
        ("walks", 100, 2),
    ]
    assert compared.cells[0].error.item() == 0
    with pytest.warns(ShapleyWarning, match="exact is left out, no budget suffices: 6 players need 64 evaluations"):
        assert [cell.estimator for cell in cost_benefit(GAME, methods, [63], 1).cells] == ["loo", "walks"]
    with pytest.warns(ShapleyWarning, match='mine is left out.*depth="matched" stands for'):
        cost_benefit(GAME, {"mine": PermutationShapley(depth="matched")}, [63], 1)


def test_more_evaluations_err_less():
    cells = cost_benefit(GAME, {"walks": PermutationShapley()}, [22, 202, 2002], seeds=20).cells
    medians = [cell.error.median().item() for cell in cells]
    assert medians[0] > 3 * medians[1] > 9 * medians[2]  # ten times the work: a tenth of the squared error


def test_known_values_spare_the_enumeration():
    counting = CountingGame(GAME)
    exact = ExactShapley().estimate(GAME).values
    cost_benefit(counting, {"loo": LeaveOneOut()}, [7], 1, exact=exact)
    assert counting.count == 7


@pytest.mark.parametrize(
    ("game", "options", "complaint"),
    [
        (TableGame(torch.ones(8)), {}, "all exact values are 0"),
        (random_game(3, components=2), {}, r"must be \[3\], one number a player, got \[3, 2\]"),
        (GAME, {"exact": torch.ones(5)}, r"must be \[6\].*got \[5\]"),
        (GAME, {"seeds": 0}, "at least one seed and one budget"),
        (GAME, {"budgets": []}, "at least one seed and one budget"),
        (as_game(lambda kept: kept.sum(1), 21), {}, r"2\*\*21"),
    ],
)
def test_comparison_without_a_yardstick_is_refused(game, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        cost_benefit(game, {"walks": PermutationShapley()}, **{"budgets": [100], **options})


def test_grouped_game_is_charged_in_whole_evaluations():
    game = grouped_saturating_game(5, 4)
    (cell,) = cost_benefit(game, {"walks": PermutationShapley()}, [50], 2, exact=torch.ones(5).double()).cells
    assert (cell.evaluations <= 50).all()
    assert game.group_count == 4 * int(cell.evaluations.sum())


def test_comparison_has_a_row_and_a_line_for_each_estimator():
    methods = {f"method {number}": PermutationShapley() for number in range(9)}
    compared = cost_benefit(GAME, methods, [30, 60], seeds=4)
    table = compared.table()
    assert len(table.rows) == 18
    assert table.rows[0][3] == torch.quantile(compared.cells[0].error, 0.5).item()
    figure = compared.figures()["cost_benefit"]
    error, spearman = figure.axes
    assert error.get_xscale() == error.get_yscale() == spearman.get_xscale() == "log"
    looks = {(line.get_color(), line.get_marker()) for line in error.lines}
    assert len(looks) == 9  # eight colours: the markers differ
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(methods)


def test_neither_rounding_errors_nor_other_scores_stretch_the_axis_of_errors(tmp_path):
    methods = {"exact": ExactShapley(), "regression": RegressionShapley(), "greedy": GreedyBackward()}
    compared = cost_benefit(GAME, {**methods, "walks": PermutationShapley()}, [64], 3)
    figure = compared.figures()["cost_benefit"]
    save_figure(figure, tmp_path / "f.png")
    assert (tmp_path / "f.png").stat().st_size > 1000
    error = {cell.estimator: cell.error.median().item() for cell in compared.cells}
    assert error["regression"] < 1e-20  # of all 64 coalitions
    assert error["greedy"] > 10  # places in a ranking, no values
    low, high = figure.axes[0].get_ylim()
    assert error["walks"] / 10 < low < error["walks"] < high <= 10


# Figures of values.


def test_bars_are_sorted_named_and_coloured_by_what_stays():
    result = result_of([0.1, 0.4, -0.2], [0.01, 0.02, 0.0], names=["a", "b", "c"])
    axis = values_figure(result, kept=[1, 0]).axes[0]
    bars = axis.patches[:3]
    assert [bar.get_height() for bar in bars] == [0.4, 0.1, -0.2]
    assert [bar.get_facecolor() for bar in bars] == [matplotlib.colors.to_rgba(c) for c in (KEPT, KEPT, REMOVED)]
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["b", "a", "c"]
    upper = axis.containers[-1].lines[2][0].get_segments()
    assert [segment[1][1] for segment in upper] == pytest.approx([0.4 + 1.96 * 0.02, 0.1 + 1.96 * 0.01, -0.2], abs=1e-4)


def test_mask_of_kept_players_is_as_good_as_their_indices():
    for kept in (torch.tensor([True, False]), [0]):
        axis = values_figure(result_of([1.0, 2.0]), kept=kept).axes[0]
        assert [bar.get_facecolor() for bar in axis.patches[-2:]] == [
            matplotlib.colors.to_rgba(colour) for colour in (REMOVED, KEPT)
        ]


@pytest.mark.parametrize("kept", [[3], [-1], [0.5], [True], torch.tensor([True, False])])
def test_players_that_do_not_exist_are_refused(kept):
    with pytest.raises(ValueError, match=r"kept must be bool \[3\] or indices in 0\.\.2"):
        values_figure(result_of([1.0, 2.0, 3.0]), kept=kept)


def test_nothing_kept_is_all_removed():
    colours = {bar.get_facecolor() for bar in values_figure(result_of([1.0, 2.0]), kept=[]).axes[0].patches}
    assert colours == {matplotlib.colors.to_rgba(REMOVED)}


def test_many_players_stand_without_labels():
    axis = values_figure(result_of(torch.arange(100.0).tolist())).axes[0]
    assert axis.get_xlabel() == "place among 100 players"
    assert len(axis.get_xticks()) < 20


def test_partial_values_are_called_so():
    assert values_figure(result_of([1.0, 2.0], depth=1)).axes[0].get_ylabel() == "partial value, depth 1"


def test_histograms_share_their_scale_and_count_every_player():
    games = {f"layer {number}": saturating_game(5, number) for number in range(5)}
    results = {name: PermutationShapley(4).estimate(game, generator=1) for name, game in games.items()}
    axes = [axis for axis in histogram_figure(results, columns=3).axes if axis.get_visible()]
    assert [axis.get_title() for axis in axes] == [f"layer {number} (5)" for number in range(5)]
    for axis in axes:
        assert sum(bar.get_height() for bar in axis.patches) == 5
    assert len({axis.patches[0].get_x() for axis in axes}) == 1
    with pytest.raises(ValueError, match="at least one result"):
        histogram_figure({})


def test_drawing_opens_no_window_and_changes_no_setting():
    before = dict(matplotlib.rcParams)
    values_figure(result_of([1.0, 2.0]))
    cost_benefit(GAME, {"walks": PermutationShapley()}, [60], 2).figures()
    assert matplotlib.pyplot.get_fignums() == []
    assert dict(matplotlib.rcParams) == before
    assert len(SERIES) == 8


def test_import_brings_neither_lightning_nor_what_figures_and_tables_need():
    modules = ("oracle", "diagnostics", "figures", "interaction", "control_variate", "greedy")
    names = ", ".join(f"lightning_eff.shapley.{module}" for module in modules)
    loaded = run_python(f"import sys, lightning_eff.shapley, {names}; print(*sys.modules)", fresh=True).stdout.split()
    assert "lightning_eff.shapley.figures" in loaded
    assert not {"lightning", "matplotlib", "rich", "scipy"} & set(loaded)


def test_all_coalitions_of_the_tests_are_those_of_the_table():
    from lightning_eff.shapley.table import coalitions_of, sizes_of, value_table

    assert torch.equal(coalitions_of(torch.arange(32), 5), all_coalitions(5))
    assert torch.equal(sizes_of(torch.arange(32), 5), all_coalitions(5).sum(1))
    assert torch.equal(value_table(random_game(5), "", chunk_size=7), random_game(5).values)
