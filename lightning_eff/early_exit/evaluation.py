"""Evaluation mode for as long as anybody predicts, in any thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


class Evaluation:
    """Modes found by the first who enters are put back by the last who leaves; copies start afresh."""

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._training: list[nn.Module] = []

    @contextmanager
    def of(self, network: nn.Module) -> Iterator[None]:
        """Keep ``network`` in evaluation mode while the block runs."""
        with self._lock:
            self._inside += 1
            training = [module for module in network.modules() if module.training]
            for module in training:
                module.training = False
            self._training += training
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    for module in self._training:
                        module.training = True
                    self._training = []

    def __reduce__(self) -> tuple[Any, ...]:
        return Evaluation, ()
