"""Randomness that nobody can foresee: of the noise, and of who takes part in a step.

Every step has generators of its own, derived by SHAKE-256 from a key of 256 bits, the purpose and the step. The key
comes from the operating system, lives in memory only, and owes nothing to ``seed_everything``. It fills the whole state
of torch's CPU generator: ``manual_seed`` would use 32 bits of it, few enough to try them all.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

_WORDS = 624
# torch's state on the CPU: a header of 24 bytes, the words of the Mersenne twister as 64-bit integers, cached normals
_HEADER, _STATE_BYTES = 24, 5056


class SecretStreams:
    """Generators by purpose and step.

    Args:
        key: The secret, 32 bytes; ``None`` takes them from the operating system.
    """

    def __init__(self, key: bytes | None = None) -> None:
        self._key = os.urandom(32) if key is None else key
        self._next: Counter[str] = Counter()

    @classmethod
    def from_seed(cls, seed: int) -> SecretStreams:
        """Make streams that come out the same in every run: whoever knows the seed can take the noise away again."""
        return cls(hashlib.sha256(f"lightning_eff noise_seed {seed}".encode()).digest())

    @property
    def key(self) -> bytes:
        """The secret, for the processes that train together and nobody else."""
        return self._key

    def next_step(self, purpose: str) -> int:
        """Count the steps of a purpose: 0, 1, ..., never one of them twice, whoever asks."""
        step = self._next[purpose]
        self._next[purpose] += 1
        return step

    def torch_generator(self, purpose: str, step: int, device: torch.device | str = "cpu") -> torch.Generator:
        """Make the generator of one step; off the CPU its seed has 64 bits, which is what they take."""
        generator = torch.Generator(device)
        if generator.device.type != "cpu":
            return generator.manual_seed(int.from_bytes(self._bytes(purpose, step, 8)))
        state = generator.manual_seed(0).get_state()
        if state.numel() != _STATE_BYTES:
            raise RuntimeError(f"expected a generator state of {_STATE_BYTES} bytes, this torch has {state.numel()}")
        words = np.frombuffer(self._bytes(purpose, step, 4 * _WORDS), dtype="<u4").astype(np.uint64)
        state[_HEADER : _HEADER + 8 * _WORDS] = torch.from_numpy(words.view(np.uint8))
        return generator.set_state(state)

    def numpy_generator(self, purpose: str, step: int) -> np.random.Generator:
        """Make the NumPy generator of one step."""
        seed = np.random.SeedSequence(int.from_bytes(self._bytes(purpose, step, 32)))
        return np.random.Generator(np.random.PCG64DXSM(seed))

    def normal(self, step: int, like: Tensor) -> Tensor:
        """Draw the standard normal noise of a step: shape, dtype and device of ``like``."""
        generator = self.torch_generator("noise", step, like.device)
        return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)

    def __reduce__(self) -> NoReturn:
        raise TypeError("the key of the noise never leaves the process: whoever has it can take the noise away again")

    def _bytes(self, purpose: str, step: int, count: int) -> bytes:
        return hashlib.shake_256(self._key + f"{purpose} {step}".encode()).digest(count)
