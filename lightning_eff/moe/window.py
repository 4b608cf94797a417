"""The mean of the last training losses: the loss of a run that scaling laws are fitted to."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_eff.arguments import check_whole


class LossWindow:
    """The last losses, kept where they were computed: adding one waits for no device.

    Args:
        size: How many are kept, >= 1.

    Raises:
        ValueError: ``size`` is no whole number of at least 1.
    """

    def __init__(self, size: int) -> None:
        check_whole("loss_window", size)
        self.size = size
        self._ring = torch.empty(0)
        self._added = 0

    def __len__(self) -> int:
        return min(self._added, self.size)

    def add(self, loss: Tensor) -> None:
        """Take a scalar in, and drop the oldest if there are ``size`` already."""
        if self._ring.device != loss.device or not self._ring.numel():
            kept = self.state()
            self._ring = torch.zeros(self.size, device=loss.device)
            self._ring[: len(kept)] = kept
            self._added = len(kept)
        self._ring[self._added % self.size] = loss.detach()
        self._added += 1

    def mean(self) -> Tensor:
        """Return the mean of what is kept, a scalar; NaN if that is nothing."""
        return self.state().mean()  # oldest first: the same to the last bit wherever the ring has come to

    def state(self) -> Tensor:
        """Return what is kept, oldest first, float32."""
        kept = self._ring[: len(self)]
        return kept.roll(-(self._added % self.size), 0) if len(self) == self.size else kept.clone()

    def load(self, losses: Tensor) -> None:
        """Keep the last of ``losses``, oldest first, in place of all there was."""
        kept = losses[-self.size :].float()
        self._ring = torch.zeros(self.size, device=kept.device)
        self._ring[: len(kept)] = kept
        self._added = len(kept)
