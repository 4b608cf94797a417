"""How the remaining weights are corrected after channels were removed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning_eff.arguments import check_number, check_whole
from lightning_eff.pruning.settings import check_choices


class RepairError(RuntimeError):
    """The weights of a layer could not be corrected; its weights are as they were."""


@dataclass(frozen=True)
class Repair:
    """Least-squares correction of the weights that read what is left, and new statistics for BatchNorm.

    Attributes:
        update: ``"gram"`` fits every layer to its inputs in the whole network: the moments of those are taken once and
            serve any number of plans. ``"sequential"`` fits layer after layer to the inputs in the already corrected
            smaller network: the best, and one forward pass a layer. ``"channel"`` mixes whole channels, the same for
            all kernel positions: the cheapest. ``"none"`` leaves the weights. ``"auto"``: ``"gram"`` to rank
            candidates, ``"sequential"`` for what is kept.
        ridge: penalty on large weights as a fraction of the mean second moment of the inputs, in [0, 1].
        fit_bias: fit the biases of layers that have one as well.
        positions: output positions of a convolution that are used per sample, >= 1.
        samples: calibration samples the weights are fitted on, >= 1.
        bn_samples: samples for new BatchNorm statistics, 0 to leave those.
        max_memory_mb: what moments may take; the largest layers are corrected channel by channel beyond it.
    """

    update: Literal["auto", "gram", "sequential", "channel", "none"] = "auto"
    ridge: float = 1e-3
    fit_bias: bool = True
    positions: int = 32
    samples: int = 512
    bn_samples: int = 512
    max_memory_mb: float = 2048

    def __post_init__(self) -> None:
        """Check choices and ranges."""
        check_choices(self)
        check_number("ridge", self.ridge, least=0, most=1)
        for name, least in (("positions", 1), ("samples", 1), ("bn_samples", 0)):
            check_whole(name, getattr(self, name), least)
        check_number("max_memory_mb", self.max_memory_mb, above=0)
