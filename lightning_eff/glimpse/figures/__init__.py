"""Figures of explorations and of policies."""

from lightning_eff.glimpse.figures.animation import save_animation
from lightning_eff.glimpse.figures.scenes import exploration_figure, importance_figure, steps_figure
from lightning_eff.glimpse.figures.statistics import coverage_figure, curve_figure, scale_figure

__all__ = [
    "coverage_figure",
    "curve_figure",
    "exploration_figure",
    "importance_figure",
    "save_animation",
    "scale_figure",
    "steps_figure",
]
