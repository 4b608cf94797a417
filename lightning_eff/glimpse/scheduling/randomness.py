"""Random numbers of training that go on in a resumed run where they stopped, and leave the global ones alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_eff.documents import whole_state


class RandomStream:
    """What torch draws while this runs: actions, noise of the policy, dropout.

    Args:
        seed: Of the stream; the same one gives the same numbers.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._states: dict[str, Tensor] = {}

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """Let torch's global generators, the CPU's and that of ``device``, draw from here; then put them back."""
        cuda = device.type == "cuda"
        before = torch.get_rng_state(), torch.cuda.get_rng_state(device) if cuda else None
        self._set("cpu", torch.default_generator)
        if cuda:
            self._set("cuda", torch.cuda.default_generators[device.index or 0])
        try:
            yield
        finally:
            self._states["cpu"] = torch.get_rng_state()
            torch.set_rng_state(before[0])
            if before[1] is not None:
                self._states["cuda"] = torch.cuda.get_rng_state(device)
                torch.cuda.set_rng_state(before[1], device)

    def state_dict(self) -> dict[str, Any]:
        """Return seed and states: numbers and tensors."""
        return {"seed": self.seed, "states": dict(self._states)}

    @whole_state
    def load_state_dict(self, state: dict[str, Any], other: int = 0) -> None:
        """Go on where a stream stopped.

        Args:
            state: Of :meth:`state_dict`.
            other: 0 to go on with its numbers; anything else begins another stream, one for each number.
        """
        self.seed = state["seed"]
        self._states = {name: value.cpu() for name, value in state["states"].items()}
        if other and "cpu" in self._states:
            drawn = torch.randint(2**62, (), generator=_generator(self._states["cpu"]))
            self.seed, self._states = int(drawn) + other, {}

    def _set(self, name: str, generator: torch.Generator) -> None:
        if name in self._states:
            generator.set_state(self._states[name])
        else:
            generator.manual_seed(self.seed)


def _generator(state: Tensor) -> torch.Generator:
    generator = torch.Generator()
    generator.set_state(state)
    return generator
