"""Fit a scaling law to training runs: a grid that is solved exactly, Newton's method, a bootstrap and a hold-out.

The objective is that of the third approach of arXiv 2203.15556, extended to granularity as in arXiv 2402.07871.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lightning_eff.arguments import check_number, check_whole
from lightning_eff.moe.scaling.laws import ChinchillaLaw, FineGrainedMoELaw, ScalingLaw
from lightning_eff.moe.scaling.objective import WIDEST, Objective, Problem
from lightning_eff.moe.scaling.result import FitResult, quality
from lightning_eff.moe.scaling.runs import Runs, read_runs
from lightning_eff.moe.scaling.sizes import FLOPS_PER_PARAMETER
from lightning_eff.moe.scaling.start import starts

Floats = NDArray[np.float64]
LawName = Literal["fine_grained", "chinchilla"]

_LAWS: dict[str, type[ScalingLaw]] = {"fine_grained": FineGrainedMoELaw, "chinchilla": ChinchillaLaw}
_STARTS = 8
_AGREE = 1e-6  # relative, of objectives that are called the same
_NO_LOSS = 1e-2  # share of the lowest loss below which c is not told from zero


def fit_scaling_law(
    runs: str | Path | Mapping[str, Any] | Runs | Any,
    law: LawName = "fine_grained",
    *,
    objective: Objective | None = None,
    fixed: Mapping[str, float] | None = None,
    drop_worst: float = 0.0,
    holdout: float = 0.2,
    bootstrap: int = 200,
    subsample: float | None = None,
    seed: int = 0,
) -> FitResult:
    """Fit L(N, D, G) or L(N, D) to runs.

    Args:
        runs: what :func:`read_runs` takes (a CSV file, columns by name, a data frame), or what it returns.
        law: ``"fine_grained"``, for which runs differ in granularity, or ``"chinchilla"``.
        objective: what is minimised; by default the sum of Huber losses of the logarithm with delta 1e-3.
        fixed: coefficients that are not fitted: ``{"c": 0.472}``.
        drop_worst: share of the runs, those of highest loss, that is left out; in [0, 1).
        holdout: share of the runs, those of lowest loss, that a second fit leaves out and is measured on; in [0, 1).
        bootstrap: further fits to resampled runs, which intervals come from; 0 for none.
        subsample: resample this share without replacement, in (0, 1); None draws as many as there are, with
            replacement.
        seed: of the resampling.

    Returns:
        The law with intervals, residuals and checks.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: runs that cannot tell the coefficients apart (too few, one N, one D, one G), several expansion
            rates, or an argument out of range.

    Warns:
        UserWarning: the runs do not identify a coefficient; the message says which.

    Example:
        >>> law = ChinchillaLaw.chinchilla2022()
        >>> n, d = np.meshgrid([1e8, 3e8, 1e9], [2e9, 8e9, 3e10])
        >>> runs = {"n_total": n.ravel(), "n_tokens": d.ravel(), "loss": law(n, d).ravel()}
        >>> fit = fit_scaling_law(runs, "chinchilla")
        >>> round(fit.law.alpha, 4), round(fit.law.beta, 4)
        (0.34, 0.28)
    """
    objective = objective or Objective()
    fixed = _checked_fixed(law, fixed or {})
    for name, value in (("drop_worst", drop_worst), ("holdout", holdout)):
        check_number(name, value, least=0, below=1)
    if subsample is not None:
        check_number("subsample", subsample, above=0, below=1)
    check_whole("bootstrap", bootstrap, 0)
    runs = runs if isinstance(runs, Runs) else read_runs(runs)
    if drop_worst:
        runs = runs.take(np.sort(np.argsort(runs.loss, kind="stable")[: math.ceil(len(runs) * (1 - drop_worst))]))
    check_runs(runs, law, len(_LAWS[law].parameters) - len(fixed))

    problem = Problem(runs, law, objective, fixed)
    z, values = problem.minimise(starts(runs, problem, _STARTS))
    best = int(np.argmin(values))
    agree = values - values[best] <= _AGREE * values[best] + 1e-20
    fitted = _law(runs, law, problem, z[best : best + 1])
    samples = _bootstrap(problem, z[best], bootstrap, subsample, seed)
    rmse, r2 = quality(fitted, runs)
    result = FitResult(
        law=fitted,
        objective=objective,
        fixed=tuple(sorted(fixed)),
        value=float(values[best]),
        spread=float(values.max() - values[best]),
        converged=bool(agree.sum() >= 2),
        rmse=rmse,
        r2=r2,
        holdout_rmse=_holdout(runs, law, objective, fixed, holdout),
        runs=runs,
        samples=samples,
    )
    result.notes.extend(_notes(result))
    for note in result.notes:
        warnings.warn(note, stacklevel=2)
    return result


def check_runs(runs: Runs, law: LawName, n_free: int) -> None:
    """Raise ValueError where runs cannot tell ``n_free`` parameters of a law apart."""
    if len(runs) < n_free + 2:
        raise ValueError(f"a fit of {n_free} parameters needs at least {n_free + 2} runs, got {len(runs)}")
    for name, values in (("n_total", runs.n_total), ("n_tokens", runs.n_tokens)):
        if len(np.unique(values)) < 2:
            raise ValueError(f"all runs have {name} = {values[0]:g}: the law's exponent of it cannot be told; vary it")
    if runs.expansion_rate is not None and len(rates := np.unique(runs.expansion_rate)) > 1:
        raise ValueError(
            f"the law has no term for the expansion rate, and the runs have {rates.tolist()}: fit one at a time, "
            f"read_runs(..., where={{'expansion_rate': {rates[-1]:g}}})"
        )
    if law == "fine_grained":
        if runs.granularity is None:
            raise ValueError("law='fine_grained' needs a column 'granularity'; use law='chinchilla' without one")
        if len(np.unique(runs.granularity)) < 2:
            raise ValueError(
                f"all runs have granularity {runs.granularity[0]:g}: gamma is not identifiable; use law='chinchilla'"
            )


def _checked_fixed(law: str, fixed: Mapping[str, float]) -> dict[str, float]:
    if law not in _LAWS:
        raise ValueError(f"expected law {' or '.join(map(repr, _LAWS))}, got {law!r}")
    known = _LAWS[law].parameters
    for name, value in fixed.items():
        if name not in known:
            raise ValueError(f"fixed holds parameters of the law, {', '.join(known)}; got {name!r}")
        if not math.isfinite(value) or value < 0 or (value == 0 and name != "c"):
            raise ValueError(f"expected fixed[{name!r}] {'>=' if name == 'c' else '>'} 0, got {value}")
    if len(fixed) == len(known):
        raise ValueError("every parameter is fixed: there is nothing to fit")
    return {name: float(value) for name, value in fixed.items()}


def _law(runs: Runs, law: str, problem: Problem, z: Floats) -> ScalingLaw:
    coefficients = {name: float(value[0]) for name, value in problem.parameters(z).items()}
    rate = None if runs.expansion_rate is None else float(runs.expansion_rate[0])
    flops = runs.flops
    if flops is None and runs.n_active is not None:
        flops = FLOPS_PER_PARAMETER * runs.n_active * runs.n_tokens
    if flops is None and law == "chinchilla" and rate in (None, 1.0):
        flops = FLOPS_PER_PARAMETER * runs.n_total * runs.n_tokens
    span = None if flops is None else (float(flops.min()), float(flops.max()))
    told: dict[str, Any] = {"expansion_rate": rate, "fitted_flops": span, "source": f"fit to {len(runs)} runs"}
    if law == "chinchilla" and runs.granularity is not None and len(np.unique(runs.granularity)) == 1:
        told["granularity"] = float(runs.granularity[0])
    return _LAWS[law](**{**coefficients, **told})


def _bootstrap(problem: Problem, z: Floats, count: int, subsample: float | None, seed: int) -> dict[str, Floats]:
    n, generator = len(problem.loss), np.random.default_rng(seed)
    if subsample is None:
        drawn = [np.bincount(generator.integers(n, size=n), minlength=n) for _ in range(count)]
    else:
        size = max(1, round(subsample * n))
        drawn = [np.bincount(generator.choice(n, size, replace=False), minlength=n) for _ in range(count)]
    if not drawn:
        return {}
    weights = np.stack(drawn) * problem.weights
    zs, _ = problem.minimise(np.repeat(z[None], count, axis=0), weights, polish_only=True)
    return problem.parameters(zs)


def _holdout(runs: Runs, law: str, objective: Objective, fixed: Mapping[str, float], share: float) -> float | None:
    """RMSE on the runs of lowest loss of a law fitted without them; None where too few are left or none held out."""
    order = np.argsort(runs.loss, kind="stable")
    count = round(share * len(runs))
    rest, held = runs.take(np.sort(order[count:])), runs.take(np.sort(order[:count]))
    try:
        check_runs(rest, law, len(_LAWS[law].parameters) - len(fixed))  # type: ignore[arg-type]
    except ValueError:
        return None
    if not count:
        return None
    problem = Problem(rest, law, objective, fixed)
    z, values = problem.minimise(starts(rest, problem, _STARTS))
    best = int(np.argmin(values))
    return quality(_law(rest, law, problem, z[best : best + 1]), held)[0]


def _notes(result: FitResult) -> list[str]:
    notes = []
    intervals = result.intervals()
    for name in ("alpha", "beta", "gamma"):
        value = result.params.get(name)
        if value is not None and abs(value) > WIDEST and name not in result.fixed:
            notes.append(f"{name} = {value:.3g} ran away: the runs do not tell it")
        elif value is not None and value <= 0:
            notes.append(f"{name} = {value:.3g} is not positive: the runs do not show that more of it lowers the loss")
        elif name not in result.fixed and name in intervals and intervals[name][0] <= 0:
            notes.append(f"{name} cannot be told from zero: its interval begins at {intervals[name][0]:.3g}")
    low = intervals["c"][0] if "c" in intervals and "c" not in result.fixed else result.law.c
    if "c" not in result.fixed and low < _NO_LOSS * result.runs.loss.min():
        notes.append(
            "c cannot be told from zero: runs cover too little; fix it (fixed={'c': ...}) or trust predictions, not it"
        )
    if not result.converged:
        notes.append(
            f"no two starts ended at the same optimum (objectives differ by {result.spread:.2g}): the runs hardly "
            "tell the coefficients apart"
        )
    return notes
