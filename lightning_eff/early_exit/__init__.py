"""Early exits: classifiers on intermediate layers, so that easy inputs leave early and cost less."""

from lightning_eff.early_exit.analysis import GradientDominance
from lightning_eff.early_exit.attaching.costs import ExitCosts, exit_costs
from lightning_eff.early_exit.attaching.heads import Head
from lightning_eff.early_exit.attaching.self_check import SelfCheck
from lightning_eff.early_exit.calibration import Calibration, calibrate, fit_temperatures
from lightning_eff.early_exit.callbacks import PhaseEarlyStopping
from lightning_eff.early_exit.evaluation.curve import CurveResult, EarlyExitCurve
from lightning_eff.early_exit.evaluation.figures import (
    curve_figure,
    exit_figure,
    history_figure,
    reliability_figure,
    samples_figure,
)
from lightning_eff.early_exit.evaluation.tables import compare_table, to_latex
from lightning_eff.early_exit.inference.export import export_early_exit
from lightning_eff.early_exit.inference.exported import load_early_exit
from lightning_eff.early_exit.inference.leaving import ExitOutput, Rule, select_from_all
from lightning_eff.early_exit.inference.policies import Custom, Entropy, Margin, MaxProb, Patience, Policy
from lightning_eff.early_exit.module import EarlyExitModule
from lightning_eff.early_exit.network import MultiExitNetwork
from lightning_eff.early_exit.options import NetworkOptions
from lightning_eff.early_exit.report import ExitReport, ThresholdCalibration
from lightning_eff.early_exit.training.losses import ExitLosses
from lightning_eff.early_exit.training.phases import Phase

__all__ = [
    "Calibration",
    "CurveResult",
    "Custom",
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
    "NetworkOptions",
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
    "export_early_exit",
    "fit_temperatures",
    "history_figure",
    "load_early_exit",
    "reliability_figure",
    "samples_figure",
    "select_from_all",
    "to_latex",
]
