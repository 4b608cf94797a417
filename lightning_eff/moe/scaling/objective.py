"""What a fit minimises, with its first and second derivatives, and the minimiser: Newton's method on many fits at once.

Every term of a law is a power law, so that its logarithm is linear in theta = (log coefficients, exponents), and the
logarithm of the loss is a log-sum-exp of them (third approach of arXiv 2203.15556). The Huber loss of its residuals has
few parameters and cheap second derivatives: Newton's method converges where quasi-Newton methods creep.

Letters: B fits that run side by side, R runs, K terms, P free parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from lightning_eff.arguments import check_choice, check_number
from lightning_eff.moe.scaling.runs import Runs

Floats = NDArray[np.float64]
Evaluation = tuple[Floats, Floats, Floats]  # value [B], gradient [B, P], Hessian [B, P, P]

_DELTAS = (0.1, 0.01)
_BEYOND = 0.3
#: Exponents beyond it are pushed back: runs that tell nothing would drive them to infinity.
WIDEST = 5.0
_LARGEST = 700.0  # of a logarithm: e^709 is the largest number there is

#: Terms of a law: coefficient, and the exponents of N, D and G in it.
TERMS: dict[str, dict[str, tuple[str | None, str | None, str | None]]] = {
    "chinchilla": {"a": ("alpha", None, None), "b": (None, "beta", None), "c": (None, None, None)},
    "fine_grained": {
        "a": ("alpha", None, None),
        "b": (None, "beta", None),
        "g": ("alpha", None, "gamma"),
        "c": (None, None, None),
    },
}


@dataclass(frozen=True)
class Objective:
    """Sum over runs of weight x Huber_delta(residual), plus penalty x |theta|^2.

    Args:
        delta: residual up to which the Huber loss is a square, > 0. Small: nearly absolute values, which outliers move
            little. Large: least squares.
        target: residual of the logarithm of the loss or of the loss itself.
        penalty: lambda, >= 0; theta are the logarithms of a, b, c, g and the exponents, without those held fixed.

    Raises:
        ValueError: an argument lies outside its range.
    """

    delta: float = 1e-3
    target: Literal["log_loss", "loss"] = "log_loss"
    penalty: float = 0.0

    def __post_init__(self) -> None:
        check_number("delta", self.delta, above=0)
        check_number("penalty", self.penalty, least=0)
        check_choice("target", self.target, ("log_loss", "loss"))

    @classmethod
    def paper(cls) -> Self:
        """What arXiv 2402.07871 states: delta 0.1, lambda 5e-4, residual of the loss.

        Its code held c at 0.472 (``fixed={"c": 0.472}``), took the mean over runs and other penalties.
        """
        return cls(delta=0.1, target="loss", penalty=5e-4)


class Problem:
    """The objective of one law on one set of runs, as a function of its free parameters z.

    z are the exponents and, for each coefficient, the logarithm of its term at the mean run: unlike that of the
    coefficient itself it hardly moves when an exponent does, which makes the problem well conditioned.

    Args:
        runs: R runs.
        law: a key of :data:`TERMS`.
        objective: what to minimise.
        fixed: coefficients and exponents that are held, by name, as they stand in the law.

    Attributes:
        free: names of the P free parameters.
        weights: of the runs, [R].
    """

    def __init__(self, runs: Runs, law: str, objective: Objective, fixed: Mapping[str, float]) -> None:
        self.objective, self.fixed, self.terms = objective, dict(fixed), TERMS[law]
        names = [*self.terms, *dict.fromkeys(e for term in self.terms.values() for e in term if e)]
        self.free = tuple(name for name in names if name not in fixed)
        p = len(self.free)
        self.exponents = np.array([name not in self.terms for name in self.free])  # [P]
        self.design = np.zeros((len(self.terms), len(runs), p))  # [K, R, P]: log of a term = offset + design z
        self.offset = np.zeros((len(self.terms), len(runs)))
        self.to_theta, self.theta_offset = np.eye(p), np.zeros(p)  # theta = theta_offset + to_theta z
        for k, (coefficient, exponents) in enumerate(self.terms.items()):
            row = self._index(coefficient)
            if row is None:
                self.offset[k] += _log(fixed[coefficient])
            else:
                self.design[k, :, row] = 1
            for exponent, log in zip(exponents, log_columns(runs), strict=True):
                if exponent is None:
                    continue
                centre = 0.0 if row is None else float(log.mean())
                column = self._index(exponent)
                if column is None:
                    self.offset[k] -= fixed[exponent] * (log - centre)
                else:
                    self.design[k, :, column] = centre - log
                if row is not None and column is not None:
                    self.to_theta[row, column] += centre
                elif row is not None:
                    self.theta_offset[row] += fixed[exponent] * centre
        self.outer = np.einsum("krp,krq->krpq", self.design, self.design).reshape(len(self.terms), len(runs), -1)
        self.loss, self.log_loss = runs.loss, np.log(runs.loss)
        self.weights = np.ones(len(runs)) if runs.weight is None else runs.weight

    def evaluate(self, z: Floats, weights: Floats, delta: float) -> Evaluation:
        """Value, gradient and (nearly) Hessian, divided by delta.

        Args:
            z: [B, P].
            weights: of the runs, [B, R].
            delta: of the Huber loss.
        """
        b, p = z.shape
        logs = self.offset[None] + np.einsum("krp,bp->bkr", self.design, z)  # [B, K, R]
        top = logs.max(axis=1)
        shares = np.exp(logs - top[:, None])
        total = shares.sum(axis=1)
        shares /= total[:, None]  # of each term in the predicted loss
        predicted = top + np.log(total)
        slope = sum(shares[:, k, :, None] * self.design[k] for k in range(len(self.terms)))  # [B, R, P]
        if self.objective.target == "log_loss":
            residual, stretch = predicted - self.log_loss, None
        else:
            stretch = np.exp(np.minimum(predicted, _LARGEST))
            residual = stretch - self.loss
        inside = np.abs(residual) <= delta
        huber = np.where(inside, 0.5 * residual**2, delta * (np.abs(residual) - 0.5 * delta))
        pull = weights * np.clip(residual, -delta, delta)  # derivative of the Huber loss
        # its second derivative; beyond delta, where that is zero, a part of the curvature of a square that touches it
        # there, without which steps run past the kinks
        bend = weights * np.where(inside, 1.0, _BEYOND * delta / np.abs(residual).clip(1e-300))
        # second derivatives of log L are sum_k share_k x_k x_k' - slope slope'; those of L are L sum_k share_k x_k x_k'
        if stretch is None:
            square = bend - pull
        else:
            pull = pull * stretch
            square = bend * stretch**2
        curved = pull[:, None] * shares
        hessian = sum(curved[:, k] @ self.outer[k] for k in range(len(self.terms))).reshape(b, p, p)
        hessian = hessian + (slope * square[:, :, None]).transpose(0, 2, 1) @ slope
        gradient = np.einsum("br,brp->bp", pull, slope)
        value = (weights * huber).sum(axis=1)
        if self.objective.penalty:
            theta = self.theta_offset + z @ self.to_theta.T
            value = value + self.objective.penalty * (theta**2).sum(axis=1)
            gradient = gradient + 2 * self.objective.penalty * theta @ self.to_theta
            hessian = hessian + 2 * self.objective.penalty * self.to_theta.T @ self.to_theta
        over = np.where(self.exponents, z - np.clip(z, -WIDEST, WIDEST), 0.0)
        if over.any():
            push = weights.sum(axis=1) * delta
            value = value + push * (over**2).sum(axis=1)
            gradient = gradient + 2 * push[:, None] * over
            hessian = hessian + 2 * push[:, None, None] * np.eye(p) * (over != 0)[:, None, :]
        return value / delta, gradient / delta, hessian / delta

    def minimise(self, z: Floats, weights: Floats | None = None, *, polish_only: bool = False) -> tuple[Floats, Floats]:
        """Minimise from every start; delta comes down to its own value from large ones, which have fewer kinks.

        Args:
            z: starts, [B, P].
            weights: of the runs, [B, R] or [R]; None takes those of the runs.
            polish_only: start at the objective's own delta, for starts that are nearly right.

        Returns:
            z [B, P] and the objective [B].
        """
        rows = np.broadcast_to(self.weights if weights is None else weights, (len(z), len(self.loss)))
        last = self.objective.delta
        deltas = [last] if polish_only else [delta for delta in _DELTAS if delta > last] + [last]
        for delta in deltas:

            def evaluate(z: Floats, fits: NDArray[np.intp], delta: float = delta) -> Evaluation:
                return self.evaluate(z, rows[fits], delta)

            z, value = newton(evaluate, z)
        return z, value * last

    def parameters(self, z: Floats) -> dict[str, Floats]:
        """Coefficients and exponents as they stand in the law, [B] each."""
        theta = self.theta_offset + z @ self.to_theta.T
        told = {
            name: np.exp(np.minimum(theta[:, i], _LARGEST)) if name in self.terms else theta[:, i]
            for i, name in enumerate(self.free)
        }
        return {**told, **{name: np.full(len(z), float(value)) for name, value in self.fixed.items()}}

    def _index(self, name: str) -> int | None:
        return self.free.index(name) if name in self.free else None


def log_columns(runs: Runs) -> tuple[Floats, Floats, Floats]:
    """Logarithms of N, D and G, [R] each; G is 1 where runs do not tell it."""
    granularity = np.ones(len(runs)) if runs.granularity is None else runs.granularity
    return np.log(runs.n_total), np.log(runs.n_tokens), np.log(granularity)


def _log(coefficient: float) -> float:
    return math.log(coefficient) if coefficient > 0 else -math.inf


def newton(
    evaluate: Callable[[Floats, NDArray[Any]], Evaluation], theta: Floats, *, iterations: int = 300
) -> tuple[Floats, Floats]:
    """Minimise B smooth functions at once by Newton's method with Levenberg's damping.

    Negative curvature is taken as positive, so that every step descends; a step that does not lower its function is
    taken back and damped more.

    Args:
        evaluate: value [b], gradient [b, P] and Hessian [b, P, P] at theta [b, P] of the functions with these indices,
            [b].
        theta: where to start, [B, P].
        iterations: most steps.

    Returns:
        Where it ended, [B, P], and the values there, [B].
    """
    theta = theta.copy()
    active = np.arange(len(theta))
    value, gradient, hessian = evaluate(theta, active)
    best = value.copy()
    damping = np.full(len(theta), 1e-3)
    for _ in range(iterations):
        scale = 1 / np.sqrt(np.abs(np.diagonal(hessian, axis1=1, axis2=2)).clip(1e-300))  # makes it free of units
        curvature, axes = np.linalg.eigh(hessian * scale[:, :, None] * scale[:, None, :])
        slope = np.einsum("bpq,bp->bq", axes, gradient * scale)
        damped = np.abs(curvature) + damping[:, None]
        step = -np.einsum("bpq,bq->bp", axes, slope / damped) * scale
        # a coefficient that goes to zero has a logarithm without bounds: its steps are
        step *= np.minimum(1, 5 / np.abs(step).max(axis=1).clip(1e-300))[:, None]
        promised = -(np.einsum("bp,bp->b", gradient, step) + 0.5 * np.einsum("bp,bpq,bq->b", step, hessian, step))
        new_value, new_gradient, new_hessian = evaluate(theta[active] + step, active)
        gained = value - new_value
        better = gained > 0
        theta[active[better]] += step[better]
        best[active[better]] = new_value[better]
        keeps = better[:, None]
        value = np.where(better, new_value, value)
        gradient = np.where(keeps, new_gradient, gradient)
        hessian = np.where(keeps[:, :, None], new_hessian, hessian)
        floor = 0.03 * np.abs(curvature).min(axis=1) + 1e-14  # less would change no step
        good = gained > 0.5 * np.abs(promised)
        damping = np.where(good, np.maximum(damping / 8, floor), np.where(better, damping, damping * 6))
        # by what an undamped step could still gain, or where nothing can be gained in double precision
        left = 0.5 * (slope**2 / np.maximum(np.abs(curvature), 1e-14)).sum(axis=1)
        going = (left > 1e-15 * np.abs(value)) & (value > 1e-26) & (damping < 1e12)
        if not going.any():
            break
        if not going.all():
            active, damping = active[going], damping[going]
            value, gradient, hessian = value[going], gradient[going], hessian[going]
    return theta, best
