"""Which coordinates take part in a private step: rules, units, rates, and the plan that joins them."""

from lightning_eff.privacy.selection.plan import SelectionPlan
from lightning_eff.privacy.selection.schedule import RateSchedule
from lightning_eff.privacy.selection.selected import Selection
from lightning_eff.privacy.selection.selectors import (
    MagnitudeSelector,
    NoisyGradientSelector,
    PublicGradientSelector,
    RandomSelector,
    SelectionContext,
    Selector,
)

__all__ = [
    "MagnitudeSelector",
    "NoisyGradientSelector",
    "PublicGradientSelector",
    "RandomSelector",
    "RateSchedule",
    "Selection",
    "SelectionContext",
    "SelectionPlan",
    "Selector",
]
