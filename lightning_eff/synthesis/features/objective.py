"""The squared mean discrepancy between a target and generated samples, and its gradient."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class MMD2Terms(NamedTuple):
    """The squared mean discrepancy and the terms it is made of, each a scalar summed over classes with their weights.

    ``mmd2 = target - 2 * cross + spread``.
    """

    mmd2: Tensor
    """What :meth:`NTKFeatures.mmd2` returns; the only one that carries a gradient."""
    target: Tensor
    """Squared norm of the target means."""
    cross: Tensor
    """Inner product of target means and generated means."""
    spread: Tensor
    """Squared norm of the generated means, as estimated."""
