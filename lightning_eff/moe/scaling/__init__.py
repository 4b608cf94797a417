"""Scaling laws of dense networks and fine-grained mixtures of experts: fit them to runs, plan with them."""

from lightning_eff.moe.scaling.fitting import fit_scaling_law
from lightning_eff.moe.scaling.laws import ChinchillaLaw, FineGrainedMoELaw, ScalingLaw, load_law
from lightning_eff.moe.scaling.objective import Objective
from lightning_eff.moe.scaling.plan import Plan, PlanTable
from lightning_eff.moe.scaling.planner import ComputePlanner
from lightning_eff.moe.scaling.result import FitResult, Prediction
from lightning_eff.moe.scaling.runs import RUN_COLUMNS, Runs, append_run, read_runs, run_names
from lightning_eff.moe.scaling.sizes import DecoderShape

__all__ = [
    "RUN_COLUMNS",
    "ChinchillaLaw",
    "ComputePlanner",
    "DecoderShape",
    "FineGrainedMoELaw",
    "FitResult",
    "Objective",
    "Plan",
    "PlanTable",
    "Prediction",
    "Runs",
    "ScalingLaw",
    "append_run",
    "fit_scaling_law",
    "load_law",
    "read_runs",
    "run_names",
]
