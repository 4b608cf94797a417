"""The processes that read private records together, and what they must agree on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

ONE_RELEASE = (
    "pass the data in a datamodule, trainer.fit(model, datamodule=...), which is released once for all processes; or "
    "release and train in one process, and give its checkpoint to the others"
)


@dataclass(frozen=True)
class Processes:
    """The processes that read together; one where torch.distributed is not running."""

    rank: int = 0
    world: int = 1

    @classmethod
    def running(cls) -> Processes:
        """Those of the default process group.

        Raises:
            RuntimeError: This process was started as one of several, which have no group yet.
        """
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        if _launched() > 1:
            raise RuntimeError(
                f"this is one of {_launched()} processes, which have no process group yet: each would make a release "
                f"with noise of its own and know of that one only; {ONE_RELEASE}"
            )
        return cls()

    def agree(self, problem: BaseException | None) -> None:
        """Raise the problem of any of them in all of them, so that none waits for one that has failed."""
        problems = self.gathered(None if problem is None else f"{type(problem).__name__}: {problem}")
        if problem is not None:
            raise problem
        if any(problems):
            failed = next(rank for rank, text in enumerate(problems) if text)
            raise RuntimeError(f"process {failed} could not read its records: {problems[failed]}")

    def gathered(self, value: Any) -> list[Any]:
        """Return the plain values of all of them, by rank."""
        values: list[Any] = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def sum(self, values: Tensor) -> Tensor:
        """Add up a tensor of each of them, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def from_first(self, values: Tensor) -> Tensor:
        """Overwrite a tensor by that of process 0."""
        if self.world > 1:
            dist.broadcast(values, src=0)
        return values


def _launched() -> int:
    """How many processes a launcher (torchrun, Lightning's own) says that it started; 1 where it says nothing."""
    try:
        world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    except ValueError:
        return 1
    return max(world, local + 1)
