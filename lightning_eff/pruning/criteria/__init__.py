"""Which channels matter: one small class for each published criterion, a registry, and one call that runs any."""

from lightning_eff.pruning.criteria.fisher import KLFisher
from lightning_eff.pruning.criteria.kl import KL
from lightning_eff.pruning.criteria.learned import DirichletCriterion, ShapleyCriterion
from lightning_eff.pruning.criteria.magnitude import L1, L2, GeometricMedian, NormScale, Random
from lightning_eff.pruning.criteria.reduction import Reduction
from lightning_eff.pruning.criteria.registry import (
    CRITERIA,
    Criterion,
    Needs,
    check_needs,
    importance,
    needs,
    register_criterion,
    resolve_criterion,
)
from lightning_eff.pruning.criteria.sensitivity import EmpiricalSensitivity
from lightning_eff.pruning.criteria.taylor import Taylor

__all__ = [
    "CRITERIA",
    "KL",
    "L1",
    "L2",
    "Criterion",
    "DirichletCriterion",
    "EmpiricalSensitivity",
    "GeometricMedian",
    "KLFisher",
    "Needs",
    "NormScale",
    "Random",
    "Reduction",
    "ShapleyCriterion",
    "Taylor",
    "check_needs",
    "importance",
    "needs",
    "register_criterion",
    "resolve_criterion",
]
