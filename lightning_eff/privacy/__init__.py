"""Private training: differentially private SGD on fewer coordinates (arXiv 2306.11754, arXiv 2303.04612)."""

from lightning_eff.privacy.engine.engine import PerSampleEngine
from lightning_eff.privacy.engine.registry import register_rule
from lightning_eff.privacy.figures import accuracy_figure, epsilon_figure, kept_share_figure, tension_figure
from lightning_eff.privacy.isolation import IsolationReport, check_sample_isolation
from lightning_eff.privacy.networks import TanhCNN, TanhMLP
from lightning_eff.privacy.options import PrivateTrainingOptions
from lightning_eff.privacy.planning import PrivacyPlan
from lightning_eff.privacy.prepruning.callback import DPPrePruneCallback
from lightning_eff.privacy.sampling import PoissonBatchSampler
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
from lightning_eff.privacy.strategy import DPGradientDropDDPStrategy, DPGradientDropStrategy

__all__ = [
    "DPGradientDropDDPStrategy",
    "DPGradientDropStrategy",
    "DPPrePruneCallback",
    "IsolationReport",
    "MagnitudeSelector",
    "NoisyGradientSelector",
    "PerSampleEngine",
    "PoissonBatchSampler",
    "PrivacyPlan",
    "PrivateTrainingOptions",
    "PublicGradientSelector",
    "RandomSelector",
    "RateSchedule",
    "Selection",
    "SelectionContext",
    "SelectionPlan",
    "Selector",
    "TanhCNN",
    "TanhMLP",
    "accuracy_figure",
    "check_sample_isolation",
    "epsilon_figure",
    "kept_share_figure",
    "register_rule",
    "tension_figure",
]
