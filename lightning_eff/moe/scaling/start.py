"""Where a fit starts: for given exponents a law is linear in its coefficients, which are not negative."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
from numpy.typing import NDArray

from lightning_eff.moe.scaling.objective import Problem, log_columns
from lightning_eff.moe.scaling.runs import Runs

Floats = NDArray[np.float64]

_GRIDS = {
    "alpha": np.geomspace(0.05, 0.8, 12),
    "beta": np.geomspace(0.05, 0.8, 12),
    "gamma": np.geomspace(0.1, 1.5, 6),
}
_SMALL = 1e-3  # share of the loss a coefficient begins with where the best one is zero: its logarithm must be finite


def starts(runs: Runs, problem: Problem, count: int) -> Floats:
    """The best points of a grid of exponents, with the coefficients of least relative squared error there.

    Args:
        runs: R runs.
        problem: the fit they are for.
        count: how many points.

    Returns:
        Free parameters of the problem, [count, P].
    """
    names = list(problem.terms)
    exponents = [name for name in _GRIDS if any(name in term for term in problem.terms.values())]
    grids = [np.array([problem.fixed[name]]) if name in problem.fixed else _GRIDS[name] for name in exponents]
    cells = np.array(list(product(*grids)))  # [C, exponents]
    row_weights = np.sqrt(problem.weights) / runs.loss
    columns: list[Floats] = []
    place = np.empty((len(cells), len(names)), dtype=np.intp)
    logs = log_columns(runs)
    for k, name in enumerate(names):
        used = [e for e in problem.terms[name] if e is not None]
        keys, inverse = np.unique(cells[:, [exponents.index(e) for e in used]], axis=0, return_inverse=True)
        place[:, k] = len(columns) + inverse.reshape(-1)
        sources = [log for e, log in zip(problem.terms[name], logs, strict=True) if e is not None]
        for key in keys:
            powers = sum((v * log for v, log in zip(key, sources, strict=True)), np.zeros(len(runs)))
            columns.append(np.exp(-powers) * row_weights)
    basis = np.stack(columns, axis=1)
    size = np.linalg.norm(basis, axis=0)
    basis /= size
    gram, image = basis.T @ basis, basis.T @ (runs.loss * row_weights)
    held = [k for k, name in enumerate(names) if name in problem.fixed]
    coefficients, error = _least_squares(
        gram[place[:, :, None], place[:, None, :]],
        image[place],
        {k: problem.fixed[names[k]] * size[place[:, k]] for k in held},
    )
    chosen = np.argsort(error, kind="stable")[:count]
    raw = coefficients / size[place]
    least = _SMALL * runs.loss.mean() * np.sqrt((row_weights**2).sum()) / size[place]
    z = np.empty((len(chosen), len(problem.free)))
    for i, name in enumerate(problem.free):
        if name in names:
            k = names.index(name)
            z[:, i] = np.log(np.maximum(raw, least)[chosen, k])
            for exponent, log in zip(problem.terms[name], logs, strict=True):
                if exponent is not None:
                    z[:, i] -= cells[chosen, exponents.index(exponent)] * log.mean()
        else:
            z[:, i] = cells[chosen, exponents.index(name)]
    return z


def _least_squares(gram: Floats, image: Floats, held: dict[int, Floats]) -> tuple[Floats, Floats]:
    """Least squares without negative coefficients, by trying every set of positive ones.

    Args:
        gram: [C, K, K] products of columns of unit length.
        image: [C, K] products of columns and target.
        held: coefficients that are given, [C] by index.

    Returns:
        Coefficients [C, K] and squared errors [C], those less the target's square.
    """
    cells, k = image.shape
    given = np.zeros((cells, k))
    for index, value in held.items():
        given[:, index] = value
    free = [index for index in range(k) if index not in held]
    pushed = np.einsum("ckl,cl->ck", gram, given)
    constant = np.einsum("ck,ck->c", given, pushed - 2 * image)
    best, error = given.copy(), constant.copy()
    for length in range(1, len(free) + 1):
        for subset in combinations(free, length):
            inside = np.array(subset)
            block = gram[:, inside[:, None], inside[None, :]] + 1e-12 * np.eye(length)
            target = (image - pushed)[:, inside]
            solved = np.linalg.solve(block, target[:, :, None])[:, :, 0]
            reached = constant - np.einsum("ck,ck->c", solved, target)
            better = (solved >= 0).all(axis=1) & (reached < error)
            best[np.ix_(better, inside)] = solved[better]
            best[np.ix_(better, [i for i in free if i not in subset])] = 0
            error[better] = reached[better]
    return best, error
