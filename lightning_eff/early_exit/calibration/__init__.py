"""From recorded scores to thresholds that keep a budget or an accuracy."""

from lightning_eff.early_exit.calibration.calibrate import Calibration, Method, calibrate
from lightning_eff.early_exit.calibration.temperature import fit_temperatures
from lightning_eff.early_exit.evaluation.replay import replay

__all__ = ["Calibration", "Method", "calibrate", "fit_temperatures", "replay"]
