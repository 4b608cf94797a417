"""Switches on disk while they are trained, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lightning_eff.documents import reading, whole_file


class SwitchMemory:
    """What :class:`SwitchTraining` keeps, until :func:`forget` deletes it after the step.

    Args:
        dirpath: where to keep it; None keeps nothing.
        step: of the schedule.
        fingerprint: of everything the switches depend on; what was kept under another one is not taken up.
    """

    def __init__(self, dirpath: Path | None, step: int, fingerprint: str) -> None:
        self._path = None if dirpath is None else dirpath / "scores" / f"step{step}-switches.pt"
        self._fingerprint = fingerprint

    def keep(self, state: Mapping[str, Any]) -> None:
        """Write the state of a training in place of the last one."""
        if self._path is None:
            return
        with whole_file(self._path) as beside, beside.open("wb") as file:
            torch.save({"fingerprint": self._fingerprint, "state": dict(state)}, file)

    def stored(self) -> dict[str, Any] | None:
        """The state of the same training, if one was kept."""
        if self._path is None or not self._path.exists():
            return None
        with reading(f"{self._path} holds no switches, delete it"):
            stored = torch.load(self._path, map_location="cpu", weights_only=True)
            state: dict[str, Any] = stored["state"]
            return state if stored["fingerprint"] == self._fingerprint else None
