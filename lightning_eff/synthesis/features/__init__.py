"""Neural-tangent features without per-sample gradient tensors: class sums, kernel, squared mean discrepancy."""

from lightning_eff.synthesis.features.ntk import NTKFeatures
from lightning_eff.synthesis.features.objective import MMD2Terms
from lightning_eff.synthesis.features.sums import ClassSums

__all__ = ["ClassSums", "MMD2Terms", "NTKFeatures"]
