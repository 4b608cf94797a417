"""The Gaussian mechanism on Poisson samples, which is DP-SGD: opacus' accountants, and what they do not say.

Privacy loss distributions, arXiv 2106.02848 ("prv"), and Renyi divergences, arXiv 1908.10530 ("rdp"), both for
data sets that differ in one record more or less. Both are upper bounds. What opacus 1.6 leaves to its callers is
settled here: no step costs nothing, no noise costs everything, full batches are exact, and values so large that the
prv grid would not fit into memory, or of so many kinds of steps that it would take minutes, are told by the rdp bound.
"""

import math
import operator
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from scipy.optimize import brentq

from lightning_eff.accounting.gaussian import (
    check_delta,
    check_epsilon,
    check_noise_multiplier,
    composed_sigma,
    gaussian_epsilon,
)
from lightning_eff.arguments import check_choice, check_number, check_whole

Accountant = Literal["prv", "rdp"]
ACCOUNTANTS: tuple[Accountant, ...] = ("prv", "rdp")

# The prv grid grows with epsilon and with the root of the steps; beyond this no guarantee is left to be told exactly.
_PRV_MOST = 60.0
# Orders around opacus' own: without them steps that cost little are reported at 0.1 and more.
_LOW_ORDERS = tuple(1 + order / 100 for order in range(1, 10))
_HIGH_ORDERS = (72, 80, 96, 128, 192, 256, 384, 512, 768, 1024)
_MOST_SIGMA = 1e3
PRV_MOST_PHASES = 8
"""Beyond so many different pairs of noise and rate, all is accounted for by the rdp bound."""


@dataclass(frozen=True)
class PrivacyEvent:
    """Steps that looked at private data in the same way.

    Args:
        noise_multiplier: Standard deviation of the noise divided by the sensitivity, >= 0.
        sample_rate: Probability in (0, 1] with which a record takes part in a step; 1 is the plain Gaussian mechanism.
        steps: How many of them, an integer >= 1, of whatever type.
        label: What they were for.
        sensitivity: The most that one record moves what was released (L2 norm), > 0.
    """

    noise_multiplier: float
    sample_rate: float = 1.0
    steps: int = 1
    label: str = ""
    sensitivity: float = 1.0

    def __post_init__(self) -> None:
        check_noise_multiplier(self.noise_multiplier)
        check_number("sample_rate", self.sample_rate, above=0, most=1)
        check_whole("steps", self.steps)
        check_number("sensitivity", self.sensitivity, above=0)
        # plain Python, so that files and checkpoints can hold it
        object.__setattr__(self, "steps", operator.index(self.steps))
        for name in ("noise_multiplier", "sample_rate", "sensitivity"):
            object.__setattr__(self, name, float(getattr(self, name)))


def subsampled_epsilon(events: Sequence[PrivacyEvent], delta: float, accountant: Accountant = "prv") -> float:
    """Epsilon of everything that was done, at a given delta, where neighbours differ by one record more or less.

    Args:
        events: What was done, in any order.
        delta: In (0, 1).
        accountant: ``"prv"``, which is tighter, or ``"rdp"``, which is quicker. Where every sample rate is 1 both
            give the exact value. Above epsilon 60, and for more than eight different pairs of noise and rate, both
            give the rdp bound.

    Returns:
        An upper bound; 0 without events, infinity where one of them had no noise.
    """
    check_delta(delta)
    check_choice("accountant", accountant, ACCOUNTANTS)
    # labels and order do not matter, and equal events are one
    counts: dict[tuple[float, float], int] = {}
    for event in events:
        key = event.noise_multiplier, event.sample_rate
        counts[key] = counts.get(key, 0) + event.steps
    if not counts:
        return 0.0
    if any(sigma == 0 for sigma, _ in counts):
        return math.inf
    if all(rate == 1 for _, rate in counts):
        sigma = composed_sigma(sigma / math.sqrt(steps) for (sigma, _), steps in counts.items())
        return gaussian_epsilon(sigma, delta)
    return _opacus_epsilon(tuple(sorted((*key, steps) for key, steps in counts.items())), delta, accountant)


def subsampled_sigma(
    epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    accountant: Accountant = "prv",
    history: Sequence[PrivacyEvent] = (),
) -> float:
    """Noise multiplier with which ``steps`` more steps end at a given epsilon, to three digits.

    Args:
        epsilon: What may be spent in all, > 0; infinity asks for no noise.
        delta: In (0, 1).
        sample_rate: In (0, 1].
        steps: >= 1.
        accountant: See :func:`subsampled_epsilon`.
        history: What was done before.

    Returns:
        A noise multiplier of at most a thousandth above the smallest one that keeps epsilon.

    Raises:
        ValueError: No noise multiplier up to 1000 does; the message tells the smallest epsilon within reach.
    """
    check_epsilon(epsilon)
    PrivacyEvent(1.0, sample_rate, steps)
    if math.isinf(epsilon):
        return 0.0

    def reached(sigma: float, by: Accountant = accountant) -> float:
        return subsampled_epsilon([*history, PrivacyEvent(sigma, sample_rate, steps)], delta, by)

    if (least := reached(_MOST_SIGMA)) > epsilon:
        raise ValueError(
            f"epsilon {epsilon:g} is out of reach: {steps} steps at sample rate {sample_rate:.4g} end at epsilon "
            f"{least:.4g} even with noise multiplier {_MOST_SIGMA:g}; train fewer steps, sample less, or allow more"
        )
    if reached(_MOST_SIGMA, "rdp") > epsilon:
        return _smallest(reached, epsilon, _MOST_SIGMA)
    # the bound by rdp is cheap and never below: it ends the search by prv from above
    most = _smallest(lambda sigma: reached(sigma, "rdp"), epsilon, _MOST_SIGMA)
    return most if accountant == "rdp" else _smallest(reached, epsilon, most)


def _smallest(reached: Callable[[float], float], epsilon: float, most: float) -> float:
    """Smallest sigma up to ``most`` with ``reached(sigma) <= epsilon``, found from above in steps that double."""
    least, factor = most, 1.1
    while reached(least) <= epsilon:
        most, least, factor = least, least / factor, factor**2
        if least < 1e-4:
            return most
    root = brentq(lambda x: min(reached(math.exp(x)), 1e9) - epsilon, math.log(least), math.log(most), xtol=2e-4)
    sigma = math.exp(root)
    while reached(sigma) > epsilon:  # the root may lie on the wrong side
        sigma = min(most, sigma * 1.0002)
    return sigma


@lru_cache(maxsize=4096)
def _opacus_epsilon(history: tuple[tuple[float, float, int], ...], delta: float, accountant: Accountant) -> float:
    from opacus.accountants import PRVAccountant
    from opacus.accountants.analysis.rdp import get_privacy_spent

    with warnings.catch_warnings():
        # logarithms outside of a distribution's support, and the order chosen lying at an end of the list
        warnings.simplefilter("ignore")
        divergences = sum(steps * _renyi_divergences(sigma, rate) for sigma, rate, steps in history)
        bound = float(get_privacy_spent(orders=_orders(), rdp=divergences, delta=delta)[0])
        if accountant == "rdp" or not bound <= _PRV_MOST or len(history) > PRV_MOST_PHASES:
            return bound
        distribution = PRVAccountant()
        distribution.history = list(history)
        # error of a hundredth, or of a five-hundredth of a large epsilon
        value = float(distribution.get_epsilon(delta=delta, eps_error=0.01 * max(1.0, bound / 5)))
    return min(value, bound)


@lru_cache(maxsize=1024)
def _renyi_divergences(sigma: float, rate: float) -> Any:
    """Renyi divergences of one step at all orders, which is nearly all the work; those of more steps are multiples."""
    from opacus.accountants.analysis.rdp import compute_rdp

    return compute_rdp(q=rate, noise_multiplier=sigma, steps=1, orders=_orders())


def _orders() -> list[float]:
    from opacus.accountants import RDPAccountant

    return [*_LOW_ORDERS, *RDPAccountant.DEFAULT_ALPHAS, *_HIGH_ORDERS]
