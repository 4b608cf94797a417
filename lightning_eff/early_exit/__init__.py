"""Early exits: classifiers on intermediate layers, so that easy inputs leave early and cost less."""

from lightning_eff.early_exit.analysis import GradientDominance
from lightning_eff.early_exit.calibration import Calibration, calibrate, fit_temperatures
from lightning_eff.early_exit.callbacks import PhaseEarlyStopping
from lightning_eff.early_exit.costs import ExitCosts, exit_costs
from lightning_eff.early_exit.curve import CurveResult, EarlyExitCurve
from lightning_eff.early_exit.figures import (
    curve_figure,
    exit_figure,
    history_figure,
    reliability_figure,
    samples_figure,
)
from lightning_eff.early_exit.heads import Head
from lightning_eff.early_exit.leaving import ExitOutput, Rule, select_from_all
from lightning_eff.early_exit.losses import ExitLosses
from lightning_eff.early_exit.module import EarlyExitModule
from lightning_eff.early_exit.network import MultiExitNetwork
from lightning_eff.early_exit.phases import Phase
from lightning_eff.early_exit.policies import Entropy, Margin, MaxProb, Patience, Policy
from lightning_eff.early_exit.report import ExitReport, ThresholdCalibration
from lightning_eff.early_exit.self_check import SelfCheck
from lightning_eff.early_exit.tables import compare_table, to_latex

__all__ = [
    "Calibration",
    "CurveResult",
    "EarlyExitCurve",
    "EarlyExitModule",
    "Entropy",
    "ExitCosts",
    "ExitLosses",
    "ExitOutput",
    "ExitReport",
    "GradientDominance",
    "Head",
    "Margin",
    "MaxProb",
    "MultiExitNetwork",
    "Patience",
    "Phase",
    "PhaseEarlyStopping",
    "Policy",
    "Rule",
    "SelfCheck",
    "ThresholdCalibration",
    "calibrate",
    "compare_table",
    "curve_figure",
    "exit_costs",
    "exit_figure",
    "fit_temperatures",
    "history_figure",
    "reliability_figure",
    "samples_figure",
    "select_from_all",
    "to_latex",
]
