"""Fitting and planning against what is common: many quasi-Newton searches from a grid, and PyPI's `chinchilla`.

Fit: sum of Huber losses of the logarithm, delta 1e-3, Chinchilla's law; 35 real runs (mlfoundations/scaling, dataset
rpj, if the environment variable LIGHTNING_EFF_DATA names the folder that holds moe_scaling/overtrain_runs.csv) and 250
runs that a law makes, with 0.3 % noise. `grid` is L-BFGS with the analytic gradient from 500 of the 4500 starts of
arXiv 2203.15556. Every contender must end at the same optimum, within what the table says, before anything is timed.
Bootstrap: 200 fits to resampled runs, each from the optimum of all. Plans: Brent's search for the least loss over the
width, for each granularity, as the published code does it.

Needs the extra ``bench``. Run: python examples/benchmarks/moe_scaling_fit.py          (about 3 minutes)
"""

import os
import tempfile
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
from chinchilla import Chinchilla
from chinchilla._metrics import log_huber
from harness import Headline, best, compare, entry, main
from scipy.optimize import minimize, minimize_scalar

from lightning_eff.moe import ChinchillaLaw, ComputePlanner, FineGrainedMoELaw, fit_scaling_law, read_runs
from lightning_eff.moe.scaling import Runs
from lightning_eff.reporting import Column, Table

TECHNIQUE = "Scaling laws"
DELTA = 1e-3


class Quasi:
    """The objective and its gradient, written out, for scipy's minimisers; theta = log a, log b, log c, alpha, beta."""

    def __init__(self, runs: Runs, weights: np.ndarray | None = None) -> None:
        n, d = np.log(runs.n_total), np.log(runs.n_tokens)
        one, zero = np.ones(len(n)), np.zeros(len(n))
        self.design = np.stack(
            [
                np.stack([one, zero, zero, -n, zero]),
                np.stack([zero, one, zero, zero, -d]),
                np.stack([zero, zero, one, zero, zero]),
            ]
        )  # [term, theta, run]
        self.target, self.weights = np.log(runs.loss), one if weights is None else weights

    def __call__(self, theta: np.ndarray) -> tuple[float, np.ndarray]:
        logs = np.einsum("ktr,t->kr", self.design, theta)
        top = logs.max(0)
        shares = np.exp(logs - top)
        total = shares.sum(0)
        residual = top + np.log(total) - self.target
        size = np.abs(residual)
        huber = np.where(size <= DELTA, residual**2 / 2, DELTA * (size - DELTA / 2))
        pull = self.weights * np.clip(residual, -DELTA, DELTA)
        gradient = np.einsum("ktr,kr->t", self.design, pull * shares / total)
        return (self.weights * huber).sum() / DELTA, gradient / DELTA

    def from_grid(self, count: int = 500) -> float:
        starts = list(product(range(0, 26, 5), range(0, 26, 5), (-1, -0.5, 0, 0.5, 1), *2 * [(0, 0.5, 1, 1.5, 2)]))
        chosen = np.random.default_rng(0).permutation(len(starts))[:count]
        options = {"maxiter": 2000, "maxfun": 4000, "ftol": 1e-15, "gtol": 1e-10}
        found = [
            minimize(self, np.array(starts[i], float), jac=True, method="L-BFGS-B", options=options) for i in chosen
        ]
        return min(float(result.fun) for result in found) * DELTA


def peer(runs: Runs, folder: str) -> Callable[[], float]:
    """PyPI's chinchilla: BFGS with numerical gradients from 3^5 starts."""
    grid = {
        "e": np.linspace(-1, 1, 3),
        "a": np.linspace(1, 10, 3),
        "b": np.linspace(1, 10, 3),
        "alpha": np.linspace(0.1, 0.7, 3),
        "beta": np.linspace(0.1, 0.7, 3),
    }
    model = Chinchilla(folder, param_grid=grid, loss_fn=lambda y, p: log_huber(y, p, DELTA), log_level=50)
    for n_total, n_tokens, loss in zip(runs.n_total, runs.n_tokens, runs.loss, strict=True):
        model.append(N=float(n_total), D=float(n_tokens), loss=float(loss))
    model.visualizer.optim = lambda *args, **kwargs: None  # draws a figure: not timed

    def fit() -> float:
        model.fit(parallel=False)
        theta = np.array([np.log(model.A), np.log(model.B), np.log(model.E), model.alpha, model.beta])
        return float(Quasi(runs)(theta)[0]) * DELTA

    return fit


def fits(runs: Runs, title: str, repeats: int = 3) -> list[Table]:
    def ours() -> float:
        return fit_scaling_law(runs, "chinchilla", bootstrap=0, holdout=0).value

    with tempfile.TemporaryDirectory() as folder:
        contenders = {"grid of 500": Quasi(runs).from_grid, "chinchilla 0.2": peer(runs, folder), "ours": ours}
        reached = {name: run() for name, run in contenders.items()}
        least = min(reached.values())
        assert reached["ours"] <= least + 1e-9, reached
        rows = [[name, value, value / least - 1] for name, value in reached.items()]
        columns = ["contender", Column("objective", ".9g"), Column("above the best", ".1e")]

        assert all(abs(value - least) < 0.1 * least for value in reached.values()), reached
        timed = compare(
            contenders, reference="grid of 500", repeats=repeats, warmup=0, check=None, title=f"Fit, {title}"
        )
    return [Table(f"Optimum, {title}", columns, rows), timed]


def bootstrap(runs: Runs, title: str) -> Table:
    draws = np.random.default_rng(0)
    counts = [np.bincount(draws.integers(len(runs), size=len(runs)), minlength=len(runs)) for _ in range(200)]
    law = fit_scaling_law(runs, "chinchilla", bootstrap=0, holdout=0).law
    start = np.array([*np.log([law.a, law.b, law.c]), law.alpha, law.beta])

    def loop() -> np.ndarray:
        found = [
            minimize(Quasi(runs, count), start, jac=True, method="BFGS", options={"gtol": 1e-8}) for count in counts
        ]
        return np.array([np.exp(result.x[2]) for result in found])

    def ours() -> np.ndarray:
        return fit_scaling_law(runs, "chinchilla", bootstrap=200, holdout=0, seed=0).samples["c"]

    def alike(actual: np.ndarray, expected: np.ndarray) -> None:
        # the same resamples; at kinks BFGS stops early, so that single fits differ
        np.testing.assert_allclose(
            np.percentile(actual, [10, 50, 90]), np.percentile(expected, [10, 50, 90]), rtol=0.02
        )

    title = f"200 resampled fits (ours with the fit to all), {title}"
    return compare(
        {"scipy BFGS, one by one": loop, "ours": ours},
        reference="scipy BFGS, one by one",
        repeats=3,
        check=alike,
        title=title,
    )


def plans() -> list[Table]:
    law = FineGrainedMoELaw.paper()
    planner = ComputePlanner(law)
    budgets = np.geomspace(1e18, 1e21, 200).tolist()

    def searched(flops: float) -> float:
        best = np.inf
        for granularity in planner.granularities:

            def loss(log_width: float, granularity: float = granularity) -> float:
                width = np.exp(log_width)
                per_token = (72 * width**2 + 14 * width * 64 * granularity) * width / 64
                return law(516 * width**3 / 64, flops / per_token, granularity)

            best = min(best, float(minimize_scalar(loss, bracket=(5, 9), method="brent").fun))
        return best

    def close(actual: list[float], expected: list[float]) -> None:
        np.testing.assert_allclose(actual, expected, rtol=1e-9)

    one = {"search of the least loss": lambda: [searched(1e20)], "ours": lambda: [planner.optimal(1e20).loss]}
    many = {
        "search of the least loss": lambda: [searched(flops) for flops in budgets],
        "ours": lambda: planner.frontier(budgets[0], budgets[-1], 200).column("loss").tolist(),
    }
    reference = "search of the least loss"
    return [
        compare(one, reference=reference, repeats=9, check=close, title="Plan for one budget, nine granularities"),
        compare(many, reference=reference, repeats=3, check=close, title="Frontier of 200 budgets"),
    ]


def made(count: int = 250) -> Runs:
    draws = np.random.default_rng(0)
    n_total, n_tokens = 10 ** draws.uniform(7, 10, count), 10 ** draws.uniform(9, 11.5, count)
    loss = ChinchillaLaw.chinchilla2022()(n_total, n_tokens) * np.exp(3e-3 * draws.standard_normal(count))
    return read_runs({"n_total": n_total, "n_tokens": n_tokens, "loss": loss})


def tables() -> list[Table]:
    measured = plans()
    data = [("250 made runs", made())]
    real = Path(os.environ.get("LIGHTNING_EFF_DATA", "none")) / "moe_scaling" / "overtrain_runs.csv"
    if real.exists():
        names = {"n_total": "n_params", "loss": "loss_c4_val"}
        data.append(("35 real runs", read_runs(real, columns=names, where={"dataset": "rpj"})))
    for title, runs in data:
        measured += fits(runs, title)
        measured.append(bootstrap(runs, title))
    return measured


def short() -> list[Table]:
    title, runs = "250 made runs", made()
    return [*plans(), *fits(runs, title, repeats=1), bootstrap(runs, title)]


def headlines(tables: list[Table]) -> list[Headline]:
    ours, column = "ours", "median [s]"
    cases = {
        "Fit, 250 made runs": (["grid of 500", "chinchilla 0.2"], 0.3, False),
        "200 resampled fits (ours with the fit to all), 250 made runs": (["scipy BFGS, one by one"], 8, True),
        "Plan for one budget": (["search of the least loss"], 0.005, False),
        "Frontier of 200 budgets": (["search of the least loss"], 0.5, True),
    }
    return [
        Headline(
            title, entry(tables, title, ours, column), *best(tables, title, peers, column), limit=limit, aside=aside
        )
        for title, (peers, limit, aside) in cases.items()
    ]


if __name__ == "__main__":
    main(tables, headlines, short)
