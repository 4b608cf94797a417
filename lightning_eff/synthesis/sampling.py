"""Which classes and which latent codes samples are made of; nothing here is secret or touches global generators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Labels = int | str | Sequence[int | str] | Tensor | None


def class_labels(
    n: int,
    labels: Labels,
    shares: Tensor,
    random: torch.Generator,
    names: Sequence[Any] = (),
) -> Tensor:
    """Classes of ``n`` samples.

    Args:
        n: >= 1.
        labels: One class for all, one for each, or ``None`` for all classes by their shares, in random order. A text
            is the name of a class.
        shares: Of the C classes, >= 0, up to a factor, ``(C,)`` float64.
        random: Draws the order.
        names: Of the classes, where they have any.

    Returns:
        ``[n]`` int64.

    Raises:
        ValueError: Labels are no integers in 0..C-1 and no names of classes, or not as many as samples.
    """
    if labels is None:
        classes = torch.arange(len(shares)).repeat_interleave(apportioned(shares, n))
        return classes[torch.randperm(n, generator=random)]
    y = torch.as_tensor(_numbered(labels, names)).cpu()
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise ValueError(f"labels must be integers, got {y.dtype}")
    y = y.long().expand(n) if not y.ndim else y.long()
    if y.shape != (n,):
        raise ValueError(f"expected one class or n = {n} of them as labels, got shape {list(y.shape)}")
    least, most = int(y.min()), int(y.max())
    if least < 0 or most >= len(shares):
        raise ValueError(f"labels must lie in 0..{len(shares) - 1}, got {least}..{most}")
    return y.clone()


def _numbered(labels: Any, names: Sequence[Any]) -> Any:
    """Numbers in the place of names."""
    if isinstance(labels, str):
        number = {str(name): index for index, name in enumerate(names)}
        if labels not in number:
            known = ", ".join(f"{name!r} = {index}" for name, index in number.items())
            raise ValueError(
                f"labels: expected one of the classes {known}, got {labels!r}"
                if names
                else f"labels: expected the number of a class, as these classes have no names, got {labels!r}"
            )
        return number[labels]
    if isinstance(labels, list | tuple):
        return [_numbered(label, names) for label in labels]
    return labels


def apportioned(shares: Tensor, n: int) -> Tensor:
    """Whole numbers ``(C,)`` in proportion to shares and with sum ``n``, by largest remainder."""
    exact = shares / shares.sum() * n
    whole = exact.floor().long()
    largest = (exact - whole).argsort(descending=True, stable=True)[: n - int(whole.sum())]
    whole[largest] += 1
    return whole


def latent_codes(samples: int, noise_dim: int, key: Sequence[int]) -> Tensor:
    """Standard normal codes ``[samples, noise_dim]`` float32 on the CPU, given by the integers of ``key`` alone."""
    seed = int(np.random.SeedSequence(list(key)).generate_state(1)[0])
    random = torch.Generator().manual_seed(seed)
    return torch.randn(samples, noise_dim, generator=random, dtype=torch.float32)
