"""Arguments of a network with exits that few users need, together, so that a module and a YAML can hand them on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class NetworkOptions:
    """How a :class:`~lightning_eff.early_exit.MultiExitNetwork` reads and compacts features; ranges are checked there.

    Attributes:
        clone_features: copy features before heads read them; ``"auto"`` finds out where that is needed.
        compact_min_fraction: where fewer samples than this fraction leave, in [0, 1], they stay in the batch until a
            later exit.
        output_fn: takes the logits ``[B, C]`` out of what the backbone returns; None takes the first tensor, or
            ``.logits``.
    """

    clone_features: bool | Literal["auto"] = "auto"
    compact_min_fraction: float = 0.0
    output_fn: Callable[[Any], Any] | None = None
