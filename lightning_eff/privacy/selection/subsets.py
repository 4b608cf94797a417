"""Exactly ``k`` of ``n``: at random without looking at all ``n``, or the largest scores with ties to the lower index.

The first ``k`` different values of independent uniform draws are a uniform subset: drawing until there are enough needs
about ``k`` random numbers where ``k`` is small against ``n``.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from lightning_eff.privacy.selection.selected import count_true, flat_positions

FEW = 1024  # so many missing ones are looked at one by one, which ends at once instead of in ever smaller rounds


def random_subset(n: int, k: int, generator: torch.Generator, *, allowed: Tensor | None = None) -> Tensor:
    """Draw a uniform subset without replacement.

    Args:
        n: size of the whole.
        k: size of the subset, at most what is allowed.
        generator: its device is where the result lies. A seed gives the same subset on every device of a kind.
        allowed: bool ``[n]`` of what may be drawn; None is everything.

    Returns:
        Bool ``[n]``, exactly ``k`` of them True.
    """
    device = generator.device
    if device.type != "cpu":  # no waiting for counts; a permutation costs little there
        places = torch.arange(n, device=device) if allowed is None else flat_positions(allowed)
        drawn = places[torch.randperm(len(places), generator=generator, device=device)[:k]]
        return torch.zeros(n, dtype=torch.bool, device=device).index_fill_(0, drawn, True)
    many = n if allowed is None else count_true(allowed)
    if 2 * k <= many:
        chosen = torch.zeros(n, dtype=torch.bool)
        _mark(chosen, k, generator, True, allowed, many)
        return chosen
    chosen = torch.ones(n, dtype=torch.bool) if allowed is None else allowed.clone()
    _mark(chosen, many - k, generator, False, allowed, many)
    return chosen


def _mark(flags: Tensor, k: int, generator: torch.Generator, value: bool, allowed: Tensor | None, many: int) -> None:
    """Set ``k`` random allowed flags, none of which has it, to ``value``."""
    n = len(flags)
    before, missing = count_true(flags), k
    while missing > 0:
        tries = math.ceil(missing * n / many)
        drawn = torch.randint(n, (4 * tries + 64 if missing <= FEW else tries,), generator=generator)
        if allowed is not None:
            drawn = drawn[allowed[drawn]]
        if missing <= FEW:
            new = drawn[flags[drawn] != value].tolist()
            drawn = torch.tensor(list(dict.fromkeys(new))[:missing], dtype=torch.int64)
            flags.index_fill_(0, drawn, value)
            missing -= len(drawn)
        else:  # so many draws cannot give more different ones than are missing
            flags.index_fill_(0, drawn[:missing], value)
            missing = k - abs(count_true(flags) - before)


def largest_subset(scores: Tensor, k: int, *, allowed: Tensor | None = None) -> Tensor:
    """Take the ``k`` largest scores; of equal ones those with the lower index.

    Args:
        scores: ``[n]``; NaN counts as the lowest.
        k: size of the subset, at most what is allowed.
        allowed: bool ``[n]`` of what may be taken; None is everything.

    Returns:
        Bool ``[n]``, exactly ``k`` of them True.
    """
    if allowed is not None:
        chosen = torch.zeros_like(allowed)
        places = flat_positions(allowed)
        chosen[places[largest_subset(scores[places], k)]] = True
        return chosen
    n = len(scores)
    if k <= 0 or k >= n:
        return torch.full((n,), k > 0, dtype=torch.bool, device=scores.device)
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if scores.isnan().any():
        scores = scores.masked_fill(scores.isnan(), -math.inf)
    if scores.device.type == "cpu":
        least = torch.tensor(_kth_largest(scores.numpy(), k), dtype=scores.dtype)
    else:
        least = scores.topk(k, sorted=False).values.min()
    chosen = scores > least
    ties = flat_positions(scores == least)
    chosen[ties[: k - count_true(chosen)]] = True
    return chosen


def _kth_largest(values: np.ndarray, k: int) -> float:
    """Find the k-th largest of many between two bounds that a sample gives (R. W. Floyd, R. L. Rivest, 1975).

    A partition of the whole takes three times as long, and a hundred times where most values are equal.
    """
    n = len(values)
    if n > 20_000:
        sample = np.sort(values[:: n // 4096])
        place, spread = (n - k) * len(sample) // n, 2 * math.isqrt(len(sample))  # four standard deviations
        low = sample[place - spread] if place >= spread else -math.inf
        high = sample[place + spread] if place + spread < len(sample) else math.inf
        at_high = np.count_nonzero(values >= high)
        if at_high >= k and np.count_nonzero(values > high) < k:
            return float(high)
        inside = values[(values > low) & (values < high)]
        if at_high < k <= at_high + len(inside):
            return float(np.partition(inside, len(inside) + at_high - k)[len(inside) + at_high - k])
        if at_high + len(inside) < k <= np.count_nonzero(values >= low):
            return float(low)
    return float(np.partition(values, n - k)[n - k])
