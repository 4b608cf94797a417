"""Per-sample gradient norms and clipped sums of any module, without a per-sample gradient where none is needed."""

from lightning_eff.privacy.engine.engine import PerSampleEngine
from lightning_eff.privacy.engine.registry import register_rule  # its import registers the rules of every layer

__all__ = ["PerSampleEngine", "register_rule"]
