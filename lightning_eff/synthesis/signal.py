"""What a release tells about itself: how much of it is noise, by class. Computed from released values alone.

``C`` classes, ``P`` coordinates of a feature; s_c = Delta sigma / m_c is the noise's standard deviation on each
coordinate of a class mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_eff.synthesis.embedding import MeanEmbedding
from lightning_eff.synthesis.options import Weighting


def noise_scale(embedding: MeanEmbedding) -> float:
    """Standard deviation of the noise on each coordinate of the class *sums*, Delta sigma."""
    return float(embedding.meta["sensitivity"] * embedding.meta["sigma"])


def signal_norms(embedding: MeanEmbedding) -> Tensor:
    """Estimate ``(C,)`` norms of the class sums without their noise: ``sqrt(max(0, |S_c|^2 - P (Delta sigma)^2))``."""
    noise = embedding.feature_dim * noise_scale(embedding) ** 2
    square: Tensor = embedding.square_norms() - noise
    return square.clamp(min=0).sqrt()


def noise_norms(embedding: MeanEmbedding) -> Tensor:
    """Return ``(C,)`` root mean square norms of the noise on the class *means*, ``sqrt(P) Delta sigma / m_c``."""
    norms: Tensor = embedding.counts.double().reciprocal() * (embedding.feature_dim**0.5 * noise_scale(embedding))
    return norms


def signal_to_noise(embedding: MeanEmbedding) -> Tensor:
    """Return ``(C,)`` estimated norm of each class sum over that of its noise; infinite without noise."""
    ratio: Tensor = signal_norms(embedding) / (embedding.feature_dim**0.5 * noise_scale(embedding))
    return ratio


def usable_classes(embedding: MeanEmbedding) -> Tensor:
    """Which classes ``(C,)`` have more records than three standard deviations of the noise on their count.

    The mean of the others is noise; it is left out of the loss. Where shares are public, so are the counts; the noise
    on the class sums then takes the place of that on the counts. A single class of public size is always used.
    """
    meta = embedding.meta
    if embedding.num_classes == 1 and meta.get("adjacency") == "replace_one":
        return torch.ones_like(embedding.counts, dtype=torch.bool)
    usable: Tensor = embedding.counts >= 3 * noise_scale(embedding) / (meta["count_weight"] or 1.0)
    if isinstance(prior := meta.get("label_prior"), list):
        usable = usable & (torch.tensor(prior, device=usable.device) > 0)
    return usable


def drowned_classes(embedding: MeanEmbedding) -> Tensor:
    """Which of the usable classes ``(C,)`` have an estimated signal below their noise."""
    drowned: Tensor = usable_classes(embedding) & (signal_to_noise(embedding) < 1)
    return drowned


def class_weights(embedding: MeanEmbedding, weighting: Weighting) -> Tensor:
    """Weights ``(C,)`` of the classes in the loss; 0 for those that are not usable, the others as if these were all.

    ``"conditional"`` 1 / C, ``"proportional"`` m_c / n, ``"joint"`` (m_c / n)^2.

    Raises:
        ValueError: No class is usable.
    """
    usable = usable_classes(embedding)
    if not usable.any():
        raise ValueError(
            "every class has too few records for this epsilon: nothing but noise is left to match; allow a larger "
            "epsilon, or merge classes"
        )
    counts = embedding.counts * usable
    shares = counts / counts.sum()
    if weighting == "conditional":
        return usable.to(shares.dtype) / usable.sum()
    return shares if weighting == "proportional" else shares**2


def noise_floor(embedding: MeanEmbedding, weights: Tensor) -> float:
    """Return the loss that the noise alone is expected to leave: ``sum_c w_c P s_c^2``.

    A generator whose samples have exactly the private means has this loss in expectation.
    """
    return float((weights.double() * noise_norms(embedding) ** 2).sum())


def class_warnings(embedding: MeanEmbedding) -> list[str]:
    """Sentences on classes of which a release says little or nothing."""
    told = []
    usable, drowned = usable_classes(embedding), drowned_classes(embedding)
    if not usable.all():
        few = ", ".join(str(c) for c in (~usable).nonzero().flatten().tolist())
        told.append(
            f"class {few}: too few records for this epsilon. Their counts lie within three standard "
            "deviations of the noise; they are left out of training, and what is generated for them is arbitrary"
        )
    if drowned.any():
        weak = ", ".join(str(c) for c in drowned.nonzero().flatten().tolist())
        told.append(
            f"class {weak}: the signal of the release is below its noise, so what is generated may show little "
            "of the records; merge classes, take smaller feature_widths, or allow a larger epsilon"
        )
    return told
