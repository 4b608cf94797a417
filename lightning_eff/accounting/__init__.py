"""(epsilon, delta): one ledger for every technique that looks at private data.

Exact for the plain Gaussian mechanism, opacus' accountants for the one on Poisson samples. Knows no network and no
Lightning.
"""

from lightning_eff.accounting.gaussian import composed_sigma, gaussian_delta, gaussian_epsilon, gaussian_sigma
from lightning_eff.accounting.ledger import Adjacency, PrivacyBudgetExceeded, PrivacyLedger
from lightning_eff.accounting.subsampled import Accountant, PrivacyEvent, subsampled_epsilon, subsampled_sigma

__all__ = [
    "Accountant",
    "Adjacency",
    "PrivacyBudgetExceeded",
    "PrivacyEvent",
    "PrivacyLedger",
    "composed_sigma",
    "gaussian_delta",
    "gaussian_epsilon",
    "gaussian_sigma",
    "subsampled_epsilon",
    "subsampled_sigma",
]
