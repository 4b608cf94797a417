"""Least-squares correction of the weights that remain after channels were removed (arXiv 2205.05676)."""

from lightning_eff.pruning.repair.moments import Moments, NestedMoments, Solution
from lightning_eff.pruning.repair.norms import recalibrate_norms
from lightning_eff.pruning.repair.settings import Repair, RepairError
from lightning_eff.pruning.repair.update import collect_moments, repair

__all__ = [
    "Moments",
    "NestedMoments",
    "Repair",
    "RepairError",
    "Solution",
    "collect_moments",
    "recalibrate_norms",
    "repair",
]
