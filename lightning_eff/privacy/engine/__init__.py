"""Per-sample gradient norms and clipped sums of any module, without a per-sample gradient where none is needed."""

from lightning_eff.privacy.engine import convolution, linear  # their import registers the rules
from lightning_eff.privacy.engine.engine import PerSampleEngine

__all__ = ["PerSampleEngine", "convolution", "linear"]
