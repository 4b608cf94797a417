"""Early exits: classifiers on intermediate layers, so that easy inputs leave early and cost less."""

from lightning_eff.early_exit.calibration import Calibration, calibrate
from lightning_eff.early_exit.costs import ExitCosts, exit_costs
from lightning_eff.early_exit.heads import Head
from lightning_eff.early_exit.leaving import ExitOutput
from lightning_eff.early_exit.network import MultiExitNetwork

__all__ = ["Calibration", "ExitCosts", "ExitOutput", "Head", "MultiExitNetwork", "calibrate", "exit_costs"]
