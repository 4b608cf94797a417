"""The regression against closed forms, numpy, and brute force; the coalitions it draws."""

import itertools
import math

import numpy as np
import pytest
import torch
from helpers import run_python
from shapley.table_games import CountingGame, all_coalitions, random_game, saturating_game, three_and_one

from lightning_eff.shapley import ExactShapley, RegressionShapley, ShapleyWarning, TableGame, as_game
from lightning_eff.shapley.coalition_run import Sampled
from lightning_eff.shapley.coalitions import LeverageSequence, SizeSequence, subsets_of
from lightning_eff.shapley.regression import kernel_sizes, uniform_sizes


def codes_of(rows):
    return {int(code) for code in (rows.long() << torch.arange(rows.shape[1])).sum(1)}


def kernel(n, size):
    return (n - 1) / (math.comb(n, size) * size * (n - size))


def sampled(game, rows, paired):
    """What a run hands to `fit`."""
    coalitions = torch.stack([rows, ~rows], 1).flatten(0, 1) if paired else rows
    values = game(coalitions).double().reshape(len(rows), -1, 1)
    ends = game(torch.tensor([[False], [True]]).expand(2, rows.shape[1])).double()[:, None]
    return Sampled(1.0, np.packbits(rows.numpy(), axis=1), values, ends, rows.shape[1])


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("n", range(2, 10))
def test_all_coalitions_give_the_exact_value_without_error(n, paired):
    game = CountingGame(random_game(n))
    result = RegressionShapley(2**n + 5, paired=paired).estimate(game, generator=0)
    assert torch.allclose(result.values, ExactShapley().estimate(game.game).values, rtol=0, atol=1e-9)
    assert result.stderr.max() < 1e-9
    assert result.n_evals == result.n_unique == 2**n
    assert result.converged


def test_the_official_estimator_converges_to_what_the_notes_say_not_to_the_shapley_value():
    game = as_game(three_and_one, 5)
    wrong = RegressionShapley(200_000, sampling="official").estimate(game, generator=0)
    assert wrong.values.tolist() == pytest.approx([0.25, 0.25, 0.25, 0.45, -0.05], abs=0.005)
    right = RegressionShapley(200_000, sampling="kernel").estimate(game, generator=0)
    assert right.values.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1 / 2, 0], abs=0.005)


def test_kernel_weights_with_a_free_intercept_are_not_enough():
    # every size 1..4 of the five-player game as often as the kernel has it: multiples of 1 / (s (5 - s))
    game = as_game(three_and_one, 5)
    rows = all_coalitions(5)
    weights = {s: kernel(5, s) for s in range(1, 5)}
    unit = min(weights.values())
    counts = [round(weights[int(s)] / unit) if 0 < s < 5 else 0 for s in rows.sum(1)]
    many = rows.repeat_interleave(torch.tensor(counts), 0)
    values, _ = RegressionShapley(10, sampling="official").fit([sampled(game, many, paired=False)])
    assert values.flatten().tolist() == pytest.approx([0.2644, 0.2644, 0.2644, 0.4310, -0.0690], abs=1e-4)


def lagrange(game, rows, weights, n, terms=0):
    """The constrained problem by numpy, one row a coalition, with all rows of the pairs written out."""
    z = rows.double().numpy()
    ends = game(torch.tensor([[False], [True]]).expand(2, n)).double()
    y = (game(rows).double() - ends[0]).numpy()
    t = 2 * z.sum(1) / n - 1
    x = np.concatenate([z, *[(t ** (2 * k + 1) * (1 - t**2))[:, None] for k in range(terms)]], axis=1)
    constraint = np.concatenate([np.ones(n), np.zeros(terms)])
    gram, moment = x.T @ (weights[:, None] * x), x.T @ (weights * y)
    system = np.block([[gram, constraint[:, None]], [constraint[None], np.zeros((1, 1))]])
    total = float(ends[1] - ends[0])
    return np.linalg.lstsq(system, np.concatenate([moment, [total]]), rcond=None)[0][:n]


@pytest.mark.parametrize("terms", [0, 2])
@pytest.mark.parametrize("n", [6, 9])
def test_pairs_as_single_rows_solve_the_problem_with_both_rows(n, terms):
    game = saturating_game(n)
    rows = LeverageSequence(n, True, 3, 0).take(25 if n == 9 else 20)
    there = torch.bincount(rows.sum(1), minlength=n + 1).double()
    weights = [
        kernel(n, int(s)) * math.comb(n, int(s)) / float(there[s]) / (2 if 2 * int(s) == n else 1) for s in rows.sum(1)
    ]
    both = torch.cat([rows, ~rows])
    expected = lagrange(game, both, np.array(weights * 2), n, terms)
    values, _ = RegressionShapley(size_terms=terms).fit([sampled(game, rows, paired=True)])
    assert values.flatten().tolist() == pytest.approx(expected.tolist(), abs=1e-9)


def test_the_closed_form_of_the_jackknife_is_that_of_leaving_rows_out():
    n, game = 6, random_game(6)
    rows = SizeSequence(kernel_sizes(n), 1, 0).take(40)
    estimator = RegressionShapley(sampling="kernel")
    values, stderr = estimator.fit([sampled(game, rows, paired=True)])
    left = torch.stack([estimator.fit([sampled(game, rows[torch.arange(40) != i], paired=True)])[0] for i in range(40)])
    assert torch.allclose(stderr, (left - values).square().sum(0).sqrt(), rtol=1e-6)


def test_a_function_of_the_size_costs_a_regression_with_size_terms_nothing():
    n = 12
    size = all_coalitions(n).sum(1).double() / n
    bend = TableGame(random_game(n).values * 0.01 + size + 2 * size**2 * (1 - size))
    truth = ExactShapley().estimate(bend).values
    error = {
        terms: np.mean(
            [
                float((RegressionShapley(120, size_terms=terms).estimate(bend, generator=s).values - truth).norm())
                for s in range(10)
            ]
        )
        for terms in (0, 2)
    }
    assert error[2] < error[0] / 3


def test_a_strong_ridge_shares_out_equally():
    game = random_game(6)
    result = RegressionShapley(40, ridge=1e9).estimate(game, generator=0)
    share = (result.v_full - result.v_empty) / 6
    assert torch.allclose(result.values, share.expand(6), atol=1e-6)


def test_coalitions_that_leave_players_untold_apart_are_owned_up_to():
    twins = torch.tensor([[True, True, False, False, False]] * 6 + [[True, True, True, False, False]] * 6)
    with pytest.warns(ShapleyWarning, match="do not tell all players apart"):
        values, stderr = RegressionShapley(sampling="kernel", size_terms=0).fit(
            [sampled(random_game(5), twins, paired=True)]
        )
    assert stderr.isinf().all()
    assert values.sum().item() == pytest.approx(float(random_game(5).values[-1] - random_game(5).values[0]), abs=1e-6)


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("n", range(2, 9))
def test_leverage_coalitions_come_once_each_until_none_is_left(n, paired):
    sequence = LeverageSequence(n, paired, 0, 0)
    rows = sequence.take(10**6)
    both = torch.cat([rows, ~rows]) if paired else rows
    assert len(rows) == sequence.length
    assert codes_of(both) == set(range(1, 2**n - 1))
    assert len(both) == 2**n - 2


@pytest.mark.parametrize("n", [11, 12, 40])
def test_leverage_coalitions_have_every_size_equally_often_while_it_lasts(n):
    rows = LeverageSequence(n, True, 0, 0).take(6 * n)
    sizes = torch.bincount(torch.cat([rows, ~rows]).sum(1), minlength=n + 1)[1:n]
    unused = sizes[[s for s in range(n - 1) if sizes[s] < math.comb(n, s + 1)]]
    assert unused.max() - unused.min() <= 2
    assert len(codes_of(rows)) == len(rows) if n < 60 else True


def test_leverage_coalitions_are_uniform_among_those_of_their_size():
    counts = torch.zeros(6, 6)
    for seed in range(600):
        rows = LeverageSequence(6, False, seed, 0).take(10)
        for size in range(1, 6):
            counts[size] += rows[rows.sum(1) == size].sum(0)
    share = counts[1:] / counts[1:].sum(1, keepdim=True)
    assert (share - 1 / 6).abs().max() < 0.02


@pytest.mark.parametrize("n", [7, 30])
def test_how_many_are_taken_at_a_time_changes_no_sequence(n):
    for make in (
        lambda: LeverageSequence(n, True, 5, 2),
        lambda: SizeSequence(uniform_sizes(n), 5, 2),
    ):
        whole, pieces = make(), make()
        assert torch.equal(whole.take(60), torch.cat([pieces.take(k) for k in (1, 7, 2, 50)])[:60])


def test_sizes_are_drawn_with_the_kernels_probabilities():
    sizes = SizeSequence(kernel_sizes(6), 0, 0).take(20_000).sum(1)
    expected = torch.tensor([1 / (s * (6 - s)) for s in range(1, 6)])
    share = torch.bincount(sizes, minlength=7)[1:6] / 20_000
    assert torch.allclose(share, expected / expected.sum(), atol=0.015)


@pytest.mark.parametrize(("n", "size"), [(6, 2), (6, 3), (7, 5), (5, 5), (5, 1)])
def test_subsets_by_number_are_all_subsets(n, size):
    rows = subsets_of(torch.arange(math.comb(n, size)), n, size)
    found = {tuple(row.nonzero().flatten().tolist()) for row in rows}
    assert found == set(itertools.combinations(range(n), size))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "20m"}, "budget must be"),
        ({"budget": 0}, "budget must be"),
        ({"sampling": "shapley"}, "sampling must be one of leverage, kernel, official, got 'shapley'"),
        ({"ridge": -1.0}, "ridge must be"),
        ({"size_terms": -1}, "size_terms must be"),
        ({"chunk_size": 1}, "chunk_size must be"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        RegressionShapley(**options)


def test_a_budget_below_the_number_of_unknowns_names_the_alternatives():
    with pytest.raises(ValueError, match=r"20 players needs at least 44 evaluations.*LeaveOneOut needs 21"):
        RegressionShapley(21).estimate(as_game(lambda c: c.sum(1), 20), generator=0)


@pytest.mark.slow
def test_2048_players_with_40960_coalitions_stay_under_one_gigabyte():
    peak = run_python(
        """
import resource
import torch
from lightning_eff.shapley import RegressionShapley, as_game
torch.set_num_threads(1)
weights = torch.rand(2048, generator=torch.Generator().manual_seed(0)).double()
game = as_game(lambda kept: (kept.double() @ weights / 1024).tanh(), 2048)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
result = RegressionShapley(40_960, chunk_size=512).estimate(game, generator=0)
assert result.n_evals > 40_000
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
""",
        fresh=True,
    ).stdout.split()[-1]
    assert float(peak) < 1000  # MB, the interpreter and torch included
