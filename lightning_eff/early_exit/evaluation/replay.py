"""Where samples would have left, from scores that were recorded once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_eff.arguments import check_choice

Comparison = Literal["ge", "gt"]


def replay(scores: Any, thresholds: Sequence[float] | Tensor, comparison: Comparison = "ge") -> Tensor:
    """Return the output at which each sample leaves.

    Args:
        scores: ``[E, N]``, tensor or array, higher is surer.
        thresholds: ``[E]`` in the domain of the scores; +inf disables an exit, at -inf every sample leaves.
        comparison: ``"ge"`` leaves at a score that equals the threshold, ``"gt"`` (published evaluation) does not.

    Returns:
        ``[N]``, int64, in ``0 .. E``; ``E`` is the backbone's own output.

    Raises:
        ValueError: there is not one threshold for each exit, or the comparison is unknown.
    """
    scores = torch.as_tensor(scores)
    # in the precision of the scores: a threshold that was one of them must meet it again
    limits = torch.as_tensor(thresholds, dtype=scores.dtype, device=scores.device)
    if scores.ndim != 2 or not len(scores) or limits.shape != scores.shape[:1]:
        raise ValueError(
            f"expected scores [E, N], E >= 1, and thresholds [E], got {list(scores.shape)} and {list(limits.shape)}"
        )
    check_choice("comparison", comparison, ("ge", "gt"))
    limits = limits[:, None]
    leaves = scores >= limits if comparison == "ge" else (scores > limits) | (limits == -torch.inf)
    leaves &= limits < torch.inf
    left_at = torch.full_like(leaves[0], len(scores), dtype=torch.int64)
    for k in reversed(range(len(scores))):
        left_at.masked_fill_(leaves[k], k)
    return left_at
