"""Fine-grained mixtures of experts: scaling laws, and plans for a budget of FLOPs.

arXiv 2402.07871. What is here needs NumPy and SciPy alone.
"""

from lightning_eff.moe.scaling import (
    ChinchillaLaw,
    ComputePlanner,
    DecoderShape,
    FineGrainedMoELaw,
    FitResult,
    Objective,
    Plan,
    PlanTable,
    append_run,
    fit_scaling_law,
    load_law,
    read_runs,
)

__all__ = [
    "ChinchillaLaw",
    "ComputePlanner",
    "DecoderShape",
    "FineGrainedMoELaw",
    "FitResult",
    "Objective",
    "Plan",
    "PlanTable",
    "append_run",
    "fit_scaling_law",
    "load_law",
    "read_runs",
]
