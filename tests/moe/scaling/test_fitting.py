"""Fits against laws that are known, against brute force, and on runs others trained."""

import os
from pathlib import Path

import numpy as np
import pytest
from paper_runs import paper_runs
from scipy.optimize import minimize

from lightning_eff.moe.scaling import (
    ChinchillaLaw,
    ComputePlanner,
    FineGrainedMoELaw,
    FitResult,
    Objective,
    fit_scaling_law,
    load_law,
    read_runs,
)
from lightning_eff.moe.scaling.objective import Problem

OVERTRAIN = Path(os.environ.get("LIGHTNING_EFF_DATA", "none")) / "moe_scaling" / "overtrain_runs.csv"
HELD = {"c": 0.472}


def overtrain(dataset: str):
    if not OVERTRAIN.exists():
        pytest.skip(f"{OVERTRAIN} is not there: set LIGHTNING_EFF_DATA")
    return read_runs(OVERTRAIN, columns={"n_total": "n_params", "loss": "loss_c4_val"}, where={"dataset": dataset})


def objective(runs, law: str, theta: np.ndarray, delta: float = 1e-3) -> float:
    """Sum of Huber losses of log residuals, written out; theta: log a, log b, log c (log g), alpha, beta (gamma)."""
    n, d = np.log(runs.n_total), np.log(runs.n_tokens)
    if law == "chinchilla":
        a, b, c, alpha, beta = theta
        terms = [a - alpha * n, b - beta * d, c + 0 * n]
    else:
        a, b, g, c, alpha, beta, gamma = theta
        terms = [a - alpha * n, b - beta * d, g - gamma * np.log(runs.granularity) - alpha * n, c + 0 * n]
    residual = np.abs(np.logaddexp.reduce(terms, axis=0) - np.log(runs.loss))
    return float(np.where(residual <= delta, residual**2 / 2, delta * (residual - delta / 2)).sum())


# Optima that another implementation found; runs of mlfoundations/scaling
@pytest.mark.parametrize(
    ("dataset", "count", "value", "expected"),
    [
        ("rpj", 35, 4.2651083e-4, {"a": 106.09, "b": 297.98, "c": 1.7202, "alpha": 0.24308, "beta": 0.27301}),
        ("rw_original", 35, 4.7572589e-4, {"c": 1.70134, "alpha": 0.22259, "beta": 0.28977}),
        ("c4_original", 34, 5.2995363e-4, {"c": 1.62003, "alpha": 0.25257, "beta": 0.26223}),
    ],
)
def test_real_runs_have_their_known_optimum(dataset: str, count: int, value: float, expected: dict[str, float]) -> None:
    runs = overtrain(dataset)
    fit = fit_scaling_law(runs, "chinchilla", bootstrap=0)
    assert fit.law.fitted_flops is not None
    assert len(runs) == count
    assert fit.value == pytest.approx(value, abs=1e-9)
    assert fit.converged
    assert fit.spread < 1e-9
    for name, known in expected.items():
        assert fit.params[name] == pytest.approx(known, rel=5e-3)


def test_noise_free_runs_give_back_all_seven_coefficients() -> None:
    law = FineGrainedMoELaw.paper()
    fit = fit_scaling_law(paper_runs(), bootstrap=0)
    for name, value in law.coefficients.items():
        assert fit.params[name] == pytest.approx(value, rel=1e-3)
    assert fit.law.expansion_rate == 64
    assert fit.law.fitted_flops == pytest.approx(law.fitted_flops, rel=2e-3)
    assert fit.rmse < 1e-8
    assert fit.r2 == pytest.approx(1)


def test_noisy_runs_give_its_predictions_back() -> None:
    truth = FineGrainedMoELaw.paper()
    clean = paper_runs()
    fit = fit_scaling_law(paper_runs(noise=3e-3), objective=Objective(delta=0.1), fixed=HELD, bootstrap=0)
    error = fit.law(clean["n_total"], clean["n_tokens"], clean["granularity"]) / clean["loss"] - 1
    assert np.sqrt((error**2).mean()) < 2e-3
    plan = ComputePlanner(fit.law).optimal(1e20)
    assert plan.loss == pytest.approx(ComputePlanner(truth).optimal(1e20).loss, abs=0.03)
    assert plan.granularity == 16
    assert fit.params["c"] == 0.472


@pytest.mark.slow
def test_no_start_of_a_grid_ends_below_the_fit_of_the_fine_grained_law() -> None:
    runs = read_runs(paper_runs(noise=3e-3))
    fit = fit_scaling_law(runs, bootstrap=0, holdout=0)
    problem = Problem(runs, "fine_grained", Objective(), {})
    random = np.random.default_rng(0)
    best = np.inf
    for _ in range(100):
        start = random.uniform([1, 1, -1, -1, 0.05, 0.05, 0.2], [5, 6, 2, 1, 0.4, 0.4, 1.2])
        z = np.linalg.solve(problem.to_theta, start - problem.theta_offset)

        def value(z: np.ndarray) -> tuple[float, np.ndarray]:
            values, gradient, _ = problem.evaluate(z[None], problem.weights[None], 1e-3)
            return values[0], gradient[0]

        found = minimize(
            value, z, jac=True, method="L-BFGS-B", options={"maxiter": 2000, "maxfun": 4000, "ftol": 1e-15}
        )
        best = min(best, found.fun * 1e-3)
    assert fit.value <= best + 1e-9


def test_no_quasi_newton_search_ends_below_the_fit_of_real_runs() -> None:
    runs = overtrain("rpj")
    fit = fit_scaling_law(runs, "chinchilla", bootstrap=0)
    random = np.random.default_rng(0)
    best = np.inf
    for _ in range(12):
        start = random.uniform([3, 3, 0, 0.1, 0.1], [7, 7, 1, 0.5, 0.5])
        found = minimize(lambda theta: objective(runs, "chinchilla", theta) / 1e-3, start, method="BFGS")
        best = min(best, found.fun * 1e-3)
    assert fit.value <= best + 1e-9
    assert best < 1.05 * fit.value  # the search was one


def test_objective_is_the_sum_it_says() -> None:
    runs = read_runs(paper_runs(noise=3e-3))
    fit = fit_scaling_law(runs, bootstrap=0, holdout=0)
    p = fit.params
    theta = np.array([*np.log([p["a"], p["b"], p["g"], p["c"]]), p["alpha"], p["beta"], p["gamma"]])
    assert fit.value == pytest.approx(objective(runs, "fine_grained", theta), rel=1e-9)


@pytest.mark.parametrize("target", ["log_loss", "loss"])
@pytest.mark.parametrize("fixed", [{}, {"c": 0.472}, {"a": 18.0, "beta": 0.15}])
def test_derivatives_are_those_of_the_objective(target, fixed: dict[str, float]) -> None:
    runs = read_runs(paper_runs(noise=3e-3))
    # delta beyond all residuals: the curvature is exact
    problem = Problem(runs, "fine_grained", Objective(delta=10.0, target=target, penalty=1e-2), fixed)
    law = FineGrainedMoELaw.paper().coefficients
    theta = np.array([np.log(law[name]) if name in problem.terms else law[name] for name in problem.free])
    z = np.linalg.solve(problem.to_theta, theta - problem.theta_offset)
    ones = problem.weights[None]
    _, gradient, hessian = problem.evaluate(z[None], ones, 10.0)
    for i in range(len(z)):
        step = np.zeros(len(z))
        step[i] = 1e-5
        (up, up_gradient, _), (down, down_gradient, _) = (
            problem.evaluate((z + sign * step)[None], ones, 10.0) for sign in (1, -1)
        )
        assert gradient[0, i] == pytest.approx((up[0] - down[0]) / 2e-5, rel=1e-5, abs=1e-9)
        np.testing.assert_allclose(hessian[0, i], (up_gradient[0] - down_gradient[0]) / 2e-5, rtol=1e-5, atol=1e-8)
    assert problem.parameters(z[None]).keys() == law.keys()
    for name, value in problem.parameters(z[None]).items():
        assert value[0] == pytest.approx(fixed.get(name, law[name]), rel=1e-12)


def test_outliers_move_a_small_delta_little() -> None:
    runs = paper_runs()
    runs["loss"][::20] *= 1.05
    truth = FineGrainedMoELaw.paper()(1e9, 2e10, 4)
    robust = fit_scaling_law(runs, fixed=HELD, bootstrap=0).law(1e9, 2e10, 4)
    squares = fit_scaling_law(runs, objective=Objective(delta=10), fixed=HELD, bootstrap=0).law(1e9, 2e10, 4)
    assert abs(robust - truth) < 1e-3 < abs(squares - truth)


def test_weights_count_a_run_as_often() -> None:
    runs = paper_runs(noise=3e-3)
    weight = np.where(np.arange(78) % 3 == 0, 2.0, 1.0)
    weighted = fit_scaling_law({**runs, "weight": weight}, fixed=HELD, bootstrap=0, holdout=0)
    twice = {name: np.repeat(column, weight.astype(int)) for name, column in runs.items()}
    repeated = fit_scaling_law(twice, fixed=HELD, bootstrap=0, holdout=0)
    assert weighted.value == pytest.approx(repeated.value, rel=1e-9)
    assert repeated.runs.duplicates == 26
    assert "26 again at the place of another" in str(repeated)
    assert weighted.law(1e9, 2e10, 4) == pytest.approx(repeated.law(1e9, 2e10, 4), rel=1e-7)


def test_paper_objective_pulls_coefficients_together() -> None:
    fit = fit_scaling_law(paper_runs(), objective=Objective.paper(), fixed=HELD, bootstrap=0)
    assert fit.rmse < 0.02
    assert fit.params["alpha"] != pytest.approx(0.115, rel=1e-3)  # the penalty biases
    strong = fit_scaling_law(paper_runs(), objective=Objective(0.1, "loss", 5e-2), fixed=HELD, bootstrap=0)
    theta = [np.log(fit.params["a"]), np.log(strong.params["a"])]
    assert theta[1] < theta[0]


def test_a_law_without_irreducible_loss_can_be_asked_for() -> None:
    truth = ChinchillaLaw(a=20, alpha=0.15, b=40, beta=0.2, c=0)
    n, d = (grid.ravel() for grid in np.meshgrid(np.geomspace(1e7, 1e9, 5), np.geomspace(1e9, 1e11, 5)))
    runs = {"n_total": n, "n_tokens": d, "loss": truth(n, d)}
    fit = fit_scaling_law(runs, "chinchilla", fixed={"c": 0}, bootstrap=0)
    assert fit.params["alpha"] == pytest.approx(0.15, rel=1e-6)
    assert fit.identifiable


def test_free_c_that_runs_do_not_tell_is_warned_about() -> None:
    with pytest.warns(UserWarning, match="c cannot be told from zero"):
        fit = fit_scaling_law(paper_runs(noise=3e-3), bootstrap=60)
    assert not fit.identifiable
    assert "Mind: c cannot" in str(fit)
    low, high = fit.predict(1e9, 2e10, 4)[1:]
    assert high - low < 0.03  # predictions are told well nonetheless


def test_loss_that_grows_with_size_is_warned_about() -> None:
    random = np.random.default_rng(0)
    n, d = (grid.ravel() for grid in np.meshgrid(np.geomspace(1e7, 1e9, 4), np.geomspace(1e9, 1e11, 4)))
    loss = 2 + 30 / d**0.2 + 1e-3 * n**0.3 + 1e-3 * random.random(16)
    with pytest.warns(UserWarning, match="alpha = -.* is not positive"):
        fit = fit_scaling_law({"n_total": n, "n_tokens": d, "loss": loss}, "chinchilla", bootstrap=0)
    assert not fit.identifiable


@pytest.mark.parametrize("law", ["fine_grained", "chinchilla"])
def test_runs_that_tell_nothing_give_a_warning_and_numbers(law) -> None:
    random = np.random.default_rng(11)
    runs = {
        "n_total": 10 ** random.uniform(5, 11, 20),
        "n_tokens": 10 ** random.uniform(6, 13, 20),
        "granularity": 2.0 ** random.integers(0, 6, 20),
        "loss": np.exp(random.normal(1, 1, 20)),
    }
    with pytest.warns(UserWarning, match=r"."):
        fit = fit_scaling_law(runs, law, bootstrap=30)
    assert not fit.identifiable
    assert all(np.isfinite(list(fit.params.values())))
    assert np.isfinite(fit.predict([1e6, 1e10], 1e9, 4)).all()


def test_exponent_whose_interval_holds_zero_is_warned_about() -> None:
    random = np.random.default_rng(0)
    n, d = (grid.ravel() for grid in np.meshgrid(np.geomspace(1e8, 1.5e8, 4), np.geomspace(1e9, 1e12, 5)))
    loss = ChinchillaLaw.chinchilla2022()(n, d) * np.exp(2e-2 * random.standard_normal(20))
    with pytest.warns(UserWarning, match="alpha cannot be told from zero"):
        fit = fit_scaling_law({"n_total": n, "n_tokens": d, "loss": loss}, "chinchilla", fixed={"c": 1.69})
    assert fit.intervals()["alpha"][0] <= 0 < fit.params["alpha"]


def test_exponent_that_runs_away_is_warned_about() -> None:
    # one small network is far worse than all others: no power law of size
    n = np.repeat([1e8, 1.01e8, 1e9, 1e10], 4)
    d = np.tile([1e9, 1e10, 1e11, 1e12], 4)
    loss = 2 + 30 / d**0.2 + np.where(n < 1.005e8, 3.0, 0.0)
    with pytest.warns(UserWarning, match="alpha = 5.* ran away"):
        fit = fit_scaling_law({"n_total": n, "n_tokens": d, "loss": loss}, "chinchilla", bootstrap=0)
    assert 5 < fit.params["alpha"] < 6


def test_fit_of_one_granularity_plans_for_it() -> None:
    columns = paper_runs()
    rows = {name: column[columns["granularity"] == 4] for name, column in columns.items()}
    fit = fit_scaling_law(rows, "chinchilla", bootstrap=0)
    assert fit.law.granularity == 4
    plan = ComputePlanner(fit.law).optimal(1e19)
    assert plan.n_experts == 256
    assert plan.loss == pytest.approx(ComputePlanner(FineGrainedMoELaw.paper()).optimal(1e19, 4).loss, rel=1e-5)


def test_resampling_is_repeatable_and_its_bands_hold_the_fit() -> None:
    runs = paper_runs(noise=3e-3)
    fits = [fit_scaling_law(runs, fixed=HELD, bootstrap=40, seed=seed) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(fits[0].samples["alpha"], fits[1].samples["alpha"])
    assert (fits[0].samples["alpha"] != fits[2].samples["alpha"]).any()
    low, high = fits[0].intervals(0.9)["alpha"]
    assert low < fits[0].params["alpha"] < high
    assert len(list(fits[0].laws())) == 40
    assert set(fits[0].samples["c"]) == {0.472}
    prediction = fits[0].predict([1e9, 1e10], 2e10, 4, ci=0.9)
    assert (prediction.low <= prediction.loss).all()
    assert (prediction.loss <= prediction.high).all()
    narrow = fits[0].predict([1e9, 1e10], 2e10, 4, ci=0.5)
    assert (narrow.high - narrow.low < prediction.high - prediction.low).all()


def test_subsamples_without_replacement_spread_less() -> None:
    runs = paper_runs(noise=3e-3)
    spreads = [
        np.std(fit_scaling_law(runs, fixed=HELD, bootstrap=100, subsample=share).samples["alpha"])
        for share in (None, 0.8, 0.95)
    ]
    assert spreads[2] < spreads[1] < spreads[0]


@pytest.mark.slow
def test_bands_hold_the_truth_as_often_as_they_should() -> None:
    truth = ComputePlanner(FineGrainedMoELaw.paper()).optimal(1e20).loss
    held = 0
    for seed in range(20):
        runs = paper_runs(noise=3e-3, seed=seed)
        fit = fit_scaling_law(runs, objective=Objective(0.1), fixed=HELD, bootstrap=100, holdout=0)
        low, high = ComputePlanner(fit.law).intervals(1e20, fit.laws())["loss"]
        held += low <= truth <= high
    assert held >= 12  # of 20, bands of 80 %


def test_holdout_is_a_fit_without_the_lowest_losses() -> None:
    runs = read_runs(paper_runs(noise=3e-3))
    fit = fit_scaling_law(runs, fixed=HELD, bootstrap=0, holdout=0.2)
    order = np.argsort(runs.loss)
    rest, held = runs.take(order[16:]), runs.take(order[:16])
    law = fit_scaling_law(rest, fixed=HELD, bootstrap=0, holdout=0).law
    residual = law(held.n_total, held.n_tokens, held.granularity) - held.loss
    assert fit.holdout_rmse == pytest.approx(np.sqrt((residual**2).mean()), rel=1e-4)
    assert fit_scaling_law(runs, fixed=HELD, bootstrap=0, holdout=0).holdout_rmse is None


def test_worst_runs_can_be_left_out() -> None:
    runs = paper_runs()
    worst = np.argsort(runs["loss"])[-7:]
    runs["loss"][worst] *= 2  # diverged late
    fit = fit_scaling_law(runs, drop_worst=0.1, fixed=HELD, bootstrap=0)
    assert len(fit.runs) == 71
    assert fit.params["gamma"] == pytest.approx(0.58, rel=0.05)
    assert fit.rmse < 0.01


def test_fit_survives_its_file(tmp_path) -> None:
    fit = fit_scaling_law(paper_runs(noise=3e-3), fixed=HELD, bootstrap=20)
    path = fit.save(tmp_path / "some" / "fit.json")
    again = FitResult.load(path)
    assert str(again) == str(fit)
    assert load_law(path) == fit.law == again.law
    assert again.predict(1e9, 2e10, 4) == fit.predict(1e9, 2e10, 4)
    np.testing.assert_array_equal(again.runs.flops, fit.runs.flops)
    path.write_text(path.read_text().replace('"version": 1', '"version": 9'))
    with pytest.raises(ValueError, match="expected version 1, got 9"):
        FitResult.load(path)


def test_summary_tells_estimates_intervals_and_what_was_held() -> None:
    fit = fit_scaling_law(paper_runs(noise=3e-3), fixed=HELD, bootstrap=20)
    lines = str(fit).splitlines()
    assert lines[1].split() == ["parameter", "estimate", "10", "%", "90", "%"]
    assert lines[-2].split() == ["c", "0.472", "-", "-", "fixed"]
    assert lines[3].endswith("fitted")
    assert "78 runs" in lines[-1]
    bare = fit_scaling_law(paper_runs(noise=3e-3), fixed=HELD, bootstrap=0)
    assert bare.intervals() == {}
    assert np.isnan(bare.predict(1e9, 2e10, 4).low)


def changed(**columns) -> dict[str, np.ndarray]:
    runs = paper_runs()
    return {**runs, **{name: np.full(78, value) for name, value in columns.items()}}


@pytest.mark.parametrize(
    ("runs", "options", "message"),
    [
        (changed(granularity=4.0), {}, r"all runs have granularity 4.*law='chinchilla'"),
        (changed(n_total=1e9), {}, "all runs have n_total = 1e"),
        (changed(n_tokens=1e9), {"law": "chinchilla"}, "all runs have n_tokens = 1e"),
        ({k: v[:8] for k, v in paper_runs().items()}, {}, "7 parameters needs at least 9 runs, got 8"),
        ({k: v for k, v in paper_runs().items() if k != "granularity"}, {}, "needs a column 'granularity'"),
        ({**paper_runs(), "expansion_rate": np.repeat([8, 64], 39)}, {}, r"\[8.0, 64.0\].*'expansion_rate': 64"),
        (paper_runs(), {"fixed": {"e": 1.7}}, "got 'e'"),
        (paper_runs(), {"fixed": {"a": 0}}, r"fixed\['a'\] > 0"),
        (paper_runs(), {"fixed": FineGrainedMoELaw.paper().coefficients}, "nothing to fit"),
        (paper_runs(), {"law": "kaplan"}, "got 'kaplan'"),
        (paper_runs(), {"holdout": 1.0}, r"holdout must lie in \[0, 1\)"),
        (paper_runs(), {"drop_worst": -0.1}, r"drop_worst must lie in \[0, 1\)"),
        (paper_runs(), {"subsample": 1.5}, r"subsample must lie in \(0, 1\)"),
        (paper_runs(), {"bootstrap": -1}, "bootstrap must be a whole number >= 0"),
    ],
)
def test_what_cannot_be_fitted_is_refused(runs: dict[str, np.ndarray], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_scaling_law(runs, **options)


def test_objective_checks_its_arguments() -> None:
    for arguments in ({"delta": 0}, {"penalty": -1}, {"target": "perplexity"}):
        with pytest.raises(ValueError, match=f"{next(iter(arguments))}"):
            Objective(**arguments)
