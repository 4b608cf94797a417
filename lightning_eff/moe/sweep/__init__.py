"""Many runs from one YAML, trained one after another or by several callers, and what they say together.

On the command line ``python -m lightning_eff.moe.sweep make | run | fit | plan``.
"""

from lightning_eff.moe.sweep.answers import fit_sweep, plan_budget
from lightning_eff.moe.sweep.points import SweepRun, make_sweep, sweep_table
from lightning_eff.moe.sweep.running import run_sweep

__all__ = ["SweepRun", "fit_sweep", "make_sweep", "plan_budget", "run_sweep", "sweep_table"]
