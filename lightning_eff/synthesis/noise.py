"""Gaussian noise that nobody can draw again.

torch's generator on the CPU keeps 32 of the 64 bits of its seed: whoever holds a noisy release could try all streams.
Here every bit comes from the operating system's own cryptographic source. The mean of four draws makes the low bits of
floating point numbers no guide to what was drawn (Holohan, Braghin, arXiv 2107.10138).
"""

from __future__ import annotations

import os

import numpy as np
import torch
from torch import Tensor

_CHUNK = 1 << 20  # numbers drawn at a time: 8 MiB of random bits


class NormalNoise:
    """A source of standard normal numbers.

    Args:
        seed: ``None`` draws from the operating system's entropy: nothing reproduces it, and no generator's state is
            used or changed. A seed is for tests: everybody who knows it can draw the same numbers.
    """

    def __init__(self, seed: int | None = None) -> None:
        self._generator = None if seed is None else torch.Generator().manual_seed(seed)

    def draw(self, size: int) -> Tensor:
        """Return ``[size]`` further numbers, float64, on the CPU."""
        if self._generator is not None:
            return torch.randn(size, dtype=torch.float64, generator=self._generator)
        drawn = np.empty(size)
        for start in range(0, size, _CHUNK):
            part = drawn[start : start + _CHUNK]
            part[:] = sum(_box_muller(len(part)) for _ in range(4)) / 2
        return torch.from_numpy(drawn)


def _box_muller(size: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    pairs = (size + 1) // 2
    bits = np.frombuffer(os.urandom(16 * pairs), dtype=np.uint64).reshape(2, pairs)
    uniform = ((bits >> np.uint64(11)) + np.uint64(1)) * 2.0**-53  # in (0, 1]
    radius, angle = np.sqrt(-2 * np.log(uniform[0])), 2 * np.pi * uniform[1]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:size]
