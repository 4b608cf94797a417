"""Policies that know what no camera knows: upper references. They need labels, or boxes of objects."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lightning_eff.arguments import check_whole
from lightning_eff.glimpse.config import ACTION_SIZE, GlimpseConfig
from lightning_eff.glimpse.geometry import action_of
from lightning_eff.glimpse.observation import Observation
from lightning_eff.glimpse.policies.base import Policy
from lightning_eff.glimpse.world import FULL_VIEW, GlimpseWorld


class GreedyLookahead(Policy):
    """Try some random glimpses of every image and take the one with the highest true score.

    Args:
        config: Camera and scene.
        tries: Glimpses tried, >= 1; each costs a pass of the backbone.
        seed: Of its own generator.

    Raises:
        ValueError: ``tries`` is less than 1.
    """

    name: ClassVar[str] = "greedy_lookahead"
    needs_scores: ClassVar[bool] = True

    def __init__(self, config: GlimpseConfig, tries: int = 16, seed: int = 0) -> None:
        super().__init__(config)
        check_whole("tries", tries)
        self.tries, self.seed = tries, seed
        self.generator = torch.Generator()
        self.restart()

    def restart(self) -> None:
        """Draw the same tries again."""
        super().restart()
        self.generator.manual_seed(self.seed)

    def __call__(self, observation: Observation) -> Tensor:
        """Return actions [A, 3].

        Raises:
            RuntimeError: The world does not score.
        """
        world = self.shown
        best = torch.full((world.active,), -torch.inf, device=world.images.device)
        chosen = best.new_zeros(world.active, ACTION_SIZE)
        for _ in range(self.tries):
            actions = torch.rand(*chosen.shape, generator=self.generator).to(chosen)
            score = world.look(actions).score
            if score is None:
                raise RuntimeError(f"{self.name} needs scores: call world.reset(images, target), with scored=True")
            better = score > best
            best = torch.where(better, score, best)
            chosen = torch.where(better.unsqueeze(1), actions, chosen)
        return chosen


class Oracle(Policy):
    """Knows where the object is: the whole scene, then the object, then its middle, then those two in turn.

    Args:
        config: Camera and scene.
        boxes: y0, x0, y1, x1 in pixels of the object of every image, in the order in which images are explored
            [N, 4]; from the first again after the last.

    Raises:
        ValueError: Boxes have another shape.
    """

    name: ClassVar[str] = "oracle"

    def __init__(self, config: GlimpseConfig, boxes: Tensor) -> None:
        super().__init__(config)
        if boxes.ndim != 2 or boxes.shape[1] != 4 or not len(boxes):
            raise ValueError(f"expected a box an image [N, 4], got {list(boxes.shape)}")
        self.boxes = boxes.float()
        self.restart()

    def restart(self) -> None:
        """Begin with the first box again."""
        super().restart()
        self._next, self._first = 0, 0

    def begin(self, world: GlimpseWorld) -> None:
        """Take the boxes of the images of this world."""
        super().begin(world)
        self._first = self._next
        self._next = (self._first + len(world.images)) % len(self.boxes)

    def __call__(self, observation: Observation) -> Tensor:
        """Return actions [A, 3]."""
        world, taken = self.shown, self.taken(observation)
        if taken == 0:
            return torch.tensor(FULL_VIEW, device=world.images.device).expand(world.active, ACTION_SIZE)
        boxes = self.boxes.to(world.images.device)[(self._first + world.rows) % len(self.boxes)]
        corner, other = boxes[:, :2], boxes[:, 2:]
        side = (other - corner).amax(1) * (1.0 if taken % 2 else 0.5)
        side = side.clamp(self.config.camera_size, self.config.max_view)
        return view_actions((corner + other) / 2, side, self.config)


def view_actions(centres: Tensor, sides: Tensor, config: GlimpseConfig) -> Tensor:
    """Return the actions [A, 3] of square views, pushed into the scene where they reach beyond it.

    Args:
        centres: y, x in pixels [A, 2].
        sides: Fields of view in pixels, from the camera's size to the largest view [A].
        config: Camera and scene.
    """
    room = centres.new_tensor(config.scene) - sides.unsqueeze(1)
    corners = (centres - sides.unsqueeze(1) / 2).clamp(min=0).minimum(room)
    return action_of(torch.cat([corners, sides.unsqueeze(1)], 1), config)
