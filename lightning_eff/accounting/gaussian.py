"""The Gaussian mechanism, exactly: (epsilon, delta) of one draw of noise and of several composed.

Analytic Gaussian mechanism: arXiv 1805.06530, theorem 8; with mu = 1 / sigma it is mu-Gaussian differential privacy,
arXiv 1905.02383, corollary 2.13. The noise multiplier sigma is the noise's standard deviation divided by the
sensitivity, so one formula serves every way of saying which data sets are neighbours.
"""

import math
from collections.abc import Iterable

from scipy.optimize import brentq
from scipy.special import log_ndtr

from lightning_eff.arguments import check_number

# Where the search for a noise multiplier ends: below it nothing is private, above it nothing is left of the data.
_LEAST, _MOST = 1e-6, 1e12


def gaussian_delta(sigma: float, epsilon: float) -> float:
    """Delta of the Gaussian mechanism at a given epsilon.

    ``delta = Phi(1 / (2 sigma) - epsilon sigma) - exp(epsilon) Phi(-1 / (2 sigma) - epsilon sigma)``

    Args:
        sigma: Noise multiplier, >= 0.
        epsilon: >= 0.

    Returns:
        The smallest delta in [0, 1]; 1 without noise.
    """
    check_noise_multiplier(sigma)
    if epsilon != math.inf:
        check_number("epsilon", epsilon, least=0)
    if sigma == 0:
        return 1.0
    return math.exp(_log_delta(sigma, epsilon))


def gaussian_epsilon(sigma: float, delta: float) -> float:
    """Epsilon of the Gaussian mechanism at a given delta, to twelve digits from 0.01 on.

    Args:
        sigma: Noise multiplier, >= 0.
        delta: In (0, 1).

    Returns:
        The smallest epsilon >= 0; infinity without noise.
    """
    check_noise_multiplier(sigma)
    check_delta(delta)
    if sigma == 0:
        return math.inf
    if gaussian_delta(sigma, 0.0) <= delta:
        return 0.0
    target, most = math.log(delta), 1.0
    while _log_delta(sigma, most) > target:
        most *= 2
    return float(brentq(lambda epsilon: _log_delta(sigma, epsilon) - target, 0.0, most, xtol=1e-14, rtol=1e-13))


def gaussian_sigma(epsilon: float, delta: float) -> float:
    """Noise multiplier that one release needs to be (epsilon, delta)-private, to twelve digits for epsilon >= 0.01.

    Args:
        epsilon: > 0; infinity asks for no noise. Far below 0.01 the two tails that delta is the difference of agree in
            most of their digits, which are lost.
        delta: In (0, 1).

    Returns:
        The smallest noise multiplier; 0 where epsilon is infinite.
    """
    check_epsilon(epsilon)
    check_delta(delta)
    if math.isinf(epsilon):
        return 0.0
    target = math.log(delta)

    def excess(log_sigma: float) -> float:
        return _log_delta(math.exp(log_sigma), epsilon) - target

    return math.exp(brentq(excess, math.log(_LEAST), math.log(_MOST), xtol=1e-14, rtol=1e-14))


def composed_sigma(sigmas: Iterable[float]) -> float:
    """Noise multiplier of the one release that is worth as much as several: ``1 / sigma^2 = sum_i 1 / sigma_i^2``.

    Args:
        sigmas: Noise multipliers of the releases, >= 0, chosen freely in view of the results of earlier ones.

    Returns:
        Infinity where there is no release, 0 where one of them had no noise.
    """
    values = list(sigmas)
    for sigma in values:
        check_noise_multiplier(sigma)
    if 0 in values:
        return 0.0
    precision = math.fsum(sigma**-2 for sigma in values)
    return precision**-0.5 if precision else math.inf


def check_noise_multiplier(sigma: float) -> None:
    """Raise a ValueError unless it is a number >= 0."""
    check_number("noise_multiplier", sigma, least=0)


def check_epsilon(epsilon: float) -> None:
    """Raise a ValueError unless it is a number > 0; infinity is one."""
    if epsilon != math.inf:
        check_number("epsilon", epsilon, above=0)


def check_delta(delta: float) -> None:
    """Raise a ValueError unless it lies in (0, 1)."""
    check_number("delta", delta, above=0, below=1)


def _log_delta(sigma: float, epsilon: float) -> float:
    # the difference of two tails, told by their logarithms: both may be far below the smallest float
    larger = float(log_ndtr(0.5 / sigma - epsilon * sigma))
    smaller = epsilon + float(log_ndtr(-0.5 / sigma - epsilon * sigma))
    gap = smaller - larger
    return larger + math.log(-math.expm1(gap)) if gap < 0 else -math.inf
