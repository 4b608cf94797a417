"""What is known of the importance of a layer's channels: a Dirichlet distribution, arXiv 2011.05985.

``s ~ Dir(phi)`` are the switches of one layer, one a channel, not negative and one in sum. A single switch is
``s_j ~ Beta(phi_j, phi_+ - phi_j)``, and of two alone ``s_i / (s_i + s_j) ~ Beta(phi_i, phi_j)``, ``phi_+ = sum phi``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def dirichlet_kl(concentration: Tensor, alpha0: float) -> Tensor:
    """Kullback-Leibler divergence of ``Dir(concentration)`` from the symmetric prior ``Dir(alpha0, ..., alpha0)``.

    Args:
        concentration: ``phi > 0``, ``[..., C]``; computed in float32 at least.
        alpha0: concentration of the prior, > 0.

    Returns:
        Nats, ``[...]``; zero where all of ``phi`` is ``alpha0``.

    Raises:
        ValueError: ``alpha0`` is not above zero.
    """
    if alpha0 <= 0:
        raise ValueError(f"alpha0 must be > 0, got {alpha0}")
    phi = concentration.to(torch.promote_types(concentration.dtype, torch.float32))
    size, total = phi.shape[-1], phi.sum(-1)
    prior = torch.full_like(total, alpha0)
    normalisers = total.lgamma() - (size * prior).lgamma() - phi.lgamma().sum(-1) + size * prior.lgamma()
    return normalisers + ((phi - alpha0) * (phi.digamma() - total.digamma().unsqueeze(-1))).sum(-1)


@dataclass(frozen=True, eq=False)
class DirichletPosterior:
    """The switches of one layer's channels after training.

    Attributes:
        concentration: ``phi > 0``, ``[C]``, C >= 2; kept as float32 on the CPU.

    Raises:
        ValueError: another shape, or a value that is not a finite number above zero.
    """

    concentration: Tensor

    def __post_init__(self) -> None:
        """Check and detach."""
        phi = torch.as_tensor(self.concentration).detach().to("cpu", torch.float32)
        if phi.ndim != 1 or len(phi) < 2:
            raise ValueError(f"expected concentrations [C] of at least two channels, got {list(phi.shape)}")
        if not bool((phi.isfinite() & (phi > 0)).all()):
            raise ValueError(f"concentrations must be finite and > 0, got {phi.tolist()}")
        object.__setattr__(self, "concentration", phi)

    @property
    def mean(self) -> Tensor:
        """Expected switches, one in sum: ``[C]``."""
        return self.concentration / self.concentration.sum()

    @property
    def relative(self) -> Tensor:
        """Expected switches times C, so that 1 is an average channel of any layer: ``[C]``."""
        return len(self.concentration) * self.mean

    @property
    def variance(self) -> Tensor:
        """Variance of each switch: ``[C]``."""
        mean = self.mean
        return mean * (1 - mean) / (self.concentration.sum() + 1)

    def interval(self, level: float = 0.9) -> tuple[Tensor, Tensor]:
        """Bounds ``[C]`` between which each switch lies with probability ``level``, as much below as above."""
        from scipy.stats import beta

        if not 0 < level < 1:
            raise ValueError(f"level must lie in (0, 1), got {level}")
        phi = self.concentration.double().numpy()
        low, high = (beta.ppf(q, phi, phi.sum() - phi) for q in ((1 - level) / 2, (1 + level) / 2))
        return torch.from_numpy(low).float(), torch.from_numpy(high).float()

    def prob_greater(self, i: int, j: int) -> float:
        """Probability that channel ``i`` matters more than channel ``j``: ``1 - I_1/2(phi_i, phi_j)``."""
        from scipy.special import betainc

        if i == j:
            raise ValueError(f"expected two channels, got {i} twice")
        return float(1 - betainc(float(self.concentration[i]), float(self.concentration[j]), 0.5))

    def rank(self) -> list[int]:
        """Channels, best first; of equal ones the one of the lower number first."""
        order: list[int] = self.concentration.sort(descending=True, stable=True).indices.tolist()
        return order

    def prob_at_cut(self, kept: int | Sequence[int]) -> float:
        """Probability that the last channel kept matters more than the first one removed: how sure the cut is.

        Args:
            kept: the channels, or how many of the best.

        Returns:
            In [0, 1]; NaN where nothing or everything is removed.
        """
        stays = set(self.rank()[:kept] if isinstance(kept, int) else kept)
        left = [c for c in self.rank() if c in stays]
        gone = [c for c in self.rank() if c not in stays]
        return self.prob_greater(left[-1], gone[0]) if left and gone else float("nan")
