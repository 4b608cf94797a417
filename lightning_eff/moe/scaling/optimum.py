"""Where the loss of a budget is least: the equations behind a planner.

arXiv 2402.07871, solved from the stationarity condition in place of a search. With d the width, r the aspect
d / n_layers, F the budget and D = F / phi tokens:

- N(d) = (8E + 4) d^3 / r parameters, phi(d, G) = (12 c_f d^2 + c_r E G d) d / r FLOPs a token;
- A_G = a + g G^-gamma, rho = d ln phi / d ln d, between 2 and 3;
- at the optimum 3 alpha A_G N^-alpha = beta b rho D^-beta. The logarithm of the one over the other falls with the width
  everywhere, so that there is one root.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq

from lightning_eff.moe.scaling.laws import FineGrainedMoELaw, ScalingLaw
from lightning_eff.moe.scaling.sizes import router_width

_LOG_WIDTH = (0.0, math.log(1e9))  # where the width is looked for first
_NOWHERE = 150.0  # logarithm of a width
_EXACT = 4 * np.finfo(float).eps


@dataclass(frozen=True)
class Optimum:
    """The stationary point of a law under a budget.

    Args:
        law: the law.
        expansion_rate: E.
        aspect: r, width over number of layers.
        c_f: FLOPs a token of an ordinary weight.
        c_r: FLOPs a token of a router weight.

    Raises:
        ValueError: an exponent or a coefficient of the law is not positive.
    """

    law: ScalingLaw
    expansion_rate: float
    aspect: float
    c_f: float
    c_r: float

    def __post_init__(self) -> None:
        told = self.law.coefficients
        wrong = {name: value for name, value in told.items() if value < 0 or (value == 0 and name != "c")}
        if wrong:
            values = ", ".join(f"{name} = {value:g}" for name, value in wrong.items())
            raise ValueError(f"the law has no optimum: expected positive coefficients and exponents, got {values}")

    def log_width(self, log_flops: float, granularity: float) -> float:
        """Logarithm of the best width d for a budget.

        Raises:
            ValueError: it lies at a width no network has, below 1e-65 or above 1e65.
        """
        low, high = _LOG_WIDTH
        while self.slope(low, log_flops, granularity) < 0:
            low = _farther(low, -10)
        while self.slope(high, log_flops, granularity) > 0:
            high = _farther(high, 10)
        return float(brentq(self.slope, low, high, args=(log_flops, granularity), xtol=1e-13, rtol=_EXACT))

    def slope(self, log_width: float, log_flops: float, granularity: float) -> float:
        """Logarithm of what a wider network gains over what fewer tokens lose."""
        log_tokens = log_flops - math.log(self.phi(math.exp(log_width), granularity))
        return self._log_balance(log_width, granularity) + self.law.beta * log_tokens

    def log_budget(self, log_width: float, granularity: float) -> float:
        """Logarithm of the budget F = phi D whose best network has this width.

        D = (beta b rho N^alpha / (3 alpha A_G))^(1/beta).
        """
        log_tokens = -self._log_balance(log_width, granularity) / self.law.beta
        return log_tokens + math.log(self.phi(math.exp(log_width), granularity))

    def granularity(self, log_flops: float) -> float:
        """The best real granularity for a budget, >= 1.

        Stationarity in G and d together has neither b, beta nor D in it:
        d*(G) = c_r E G / (36 c_f) x (3 alpha (a G^gamma + g) / (gamma g) - 2), which rises with G.

        Raises:
            ValueError: the law has no granularity, or routing costs nothing.
        """
        law = self.law
        if not isinstance(law, FineGrainedMoELaw):
            raise ValueError("granularity='continuous' needs a law with granularity, FineGrainedMoELaw")
        if self.c_r == 0:
            raise ValueError("without routing cost (c_r=0) finer is always better: no granularity is the best")

        def beyond(log_granularity: float) -> float:
            granularity = math.exp(log_granularity)
            balance = 3 * law.alpha * (law.a * granularity**law.gamma + law.g) / (law.gamma * law.g) - 2
            if balance <= 0:  # at any width a finer network is better
                return -math.inf
            width = self.c_r * self.expansion_rate * granularity / (36 * self.c_f) * balance
            return self.log_budget(math.log(width), granularity) - log_flops

        if beyond(0.0) >= 0:
            return 1.0
        low, high = 0.0, 1.0
        while beyond(high) < 0:
            low, high = high, _farther(high, 1)
        while beyond(low) == -math.inf:  # Brent's method needs numbers at both ends
            middle = (low + high) / 2
            low, high = (middle, high) if beyond(middle) < 0 else (low, middle)
        return math.exp(brentq(beyond, low, high, xtol=1e-13, rtol=_EXACT))

    def phi(self, width: float, granularity: float) -> float:
        """Training FLOPs a token."""
        routing = self.c_r * router_width(self.expansion_rate, granularity) * width
        return (12 * self.c_f * width**2 + routing) * width / self.aspect

    def rho(self, width: float, granularity: float) -> float:
        """How fast they grow with the width, d ln phi / d ln d."""
        routing = self.c_r * router_width(self.expansion_rate, granularity)
        return (36 * self.c_f * width + 2 * routing) / (12 * self.c_f * width + routing)

    def _log_balance(self, log_width: float, granularity: float) -> float:
        """Logarithm of 3 alpha A_G N^-alpha / (beta b rho): a sum, as a product may be too small for a number."""
        law = self.law
        log_n_total = math.log((8 * self.expansion_rate + 4) / self.aspect) + 3 * log_width
        gain = math.log(3) + math.log(law.alpha) + math.log(law.size_coefficient(granularity)) - law.alpha * log_n_total
        rho = self.rho(math.exp(log_width), granularity)
        return gain - math.log(law.beta) - math.log(law.b) - math.log(rho)


def _farther(place: float, by: float) -> float:
    if abs(place) > _NOWHERE:
        raise ValueError("the law has no optimum: it lies at a network of next to nothing, or at one without end")
    return place + by
