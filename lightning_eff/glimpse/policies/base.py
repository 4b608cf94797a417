"""What chooses glimpses: anything that takes an observation and returns actions, and the class of those that need more.

Letters: A active images, t glimpses taken.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from torch import Tensor

from lightning_eff.glimpse.config import GlimpseConfig
from lightning_eff.glimpse.observation import Observation
from lightning_eff.glimpse.world import GlimpseWorld

#: What a world can be driven with: observation of A images to actions (y, x, z) in [0, 1] [A, 3].
PolicyLike = Callable[[Observation], Tensor]


class Policy(ABC):
    """A rule for the next glimpse of every active image.

    Args:
        config: Camera and scene.

    Attributes:
        name: As tables and logs call it.
        needs_scores: Whether it looks at scores, so that a world must be told targets.
        world: Whose glimpses are chosen; None before :meth:`begin`.
    """

    name: ClassVar[str]
    needs_scores: ClassVar[bool] = False

    def __init__(self, config: GlimpseConfig) -> None:
        self.config = config
        self.world: GlimpseWorld | None = None

    def restart(self) -> None:
        """Begin a data set anew: random generators and places in lists as they were when this was made."""
        self.world = None

    def begin(self, world: GlimpseWorld) -> None:
        """Be shown the world whose glimpses are to be chosen, after it was reset."""
        self.world = world

    @abstractmethod
    def __call__(self, observation: Observation) -> Tensor:
        """Return actions (y, x, z) in [0, 1] [A, 3]."""

    @property
    def shown(self) -> GlimpseWorld:
        """The world; RuntimeError if none was shown."""
        if self.world is None:
            raise RuntimeError(f"{self.name} looks into the world: call policy.begin(world) after world.reset(images)")
        return self.world

    def taken(self, observation: Observation) -> int:
        """Return t, glimpses taken of every active image; 0 if no image is active."""
        lengths = observation.lengths
        return int(lengths[0]) // self.config.patches_per_glimpse if len(lengths) else 0
