"""Policies that look at nothing: chance, and one sequence for all images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_eff.glimpse.config import ACTION_SIZE, GlimpseConfig
from lightning_eff.glimpse.observation import Observation
from lightning_eff.glimpse.policies.base import Policy
from lightning_eff.glimpse.world import FULL_VIEW


class RandomPolicy(Policy):
    """Glimpses at random.

    Args:
        config: Camera and scene.
        scale: ``"uniform"`` draws the zoom evenly; ``"area"`` with a density that falls as 1 - z, so that small
            glimpses, of which many are needed to cover a scene, are drawn more often.
        seed: Of its own generator.

    Raises:
        ValueError: ``scale`` is neither.
    """

    name: ClassVar[str] = "random"

    def __init__(self, config: GlimpseConfig, scale: Literal["uniform", "area"] = "uniform", seed: int = 0) -> None:
        super().__init__(config)
        if scale not in ("uniform", "area"):
            raise ValueError(f"scale must be 'uniform' or 'area', got {scale!r}")
        self.scale, self.seed = scale, seed
        self.generator = torch.Generator()
        self.restart()

    def restart(self) -> None:
        """Draw the same actions again."""
        super().restart()
        self.generator.manual_seed(self.seed)

    def __call__(self, observation: Observation) -> Tensor:
        """Return actions [A, 3]."""
        actions = torch.rand(len(observation), ACTION_SIZE, generator=self.generator)
        if self.scale == "area":
            actions[:, 2] = 1 - (1 - actions[:, 2]).sqrt()  # inverse of the distribution function 1 - (1 - z)^2
        return actions.to(observation.device)


class FullThenRandom(RandomPolicy):
    """As much of the scene as one can see at once, then glimpses at random; arguments of :class:`RandomPolicy`."""

    name: ClassVar[str] = "full_then_random"

    def __call__(self, observation: Observation) -> Tensor:
        """Return actions [A, 3]."""
        actions = super().__call__(observation)
        return torch.tensor(FULL_VIEW).to(actions).expand_as(actions) if self.taken(observation) == 0 else actions


class FixedSequence(Policy):
    """The same actions for every image.

    Args:
        config: Camera and scene.
        actions: (y, x, z) in [0, 1] [t, 3], taken in turn; from the first again after the last.

    Raises:
        ValueError: Actions have another shape or lie outside [0, 1].
    """

    name: ClassVar[str] = "fixed_sequence"

    def __init__(self, config: GlimpseConfig, actions: Tensor | Sequence[Sequence[float]]) -> None:
        super().__init__(config)
        actions = torch.as_tensor(actions, dtype=torch.float32)
        if actions.ndim != 2 or actions.shape[1] != ACTION_SIZE or not len(actions):
            raise ValueError(f"expected actions [t, {ACTION_SIZE}] with t >= 1, got {list(actions.shape)}")
        if not bool(((actions >= 0) & (actions <= 1)).all()):
            raise ValueError(f"actions must lie in [0, 1], got {actions.tolist()}")
        self.actions = actions

    def __call__(self, observation: Observation) -> Tensor:
        """Return actions [A, 3]."""
        action = self.actions[self.taken(observation) % len(self.actions)]
        return action.to(observation.device).expand(len(observation), ACTION_SIZE)


class RepeatFullView(FixedSequence):
    """The largest view in every glimpse: what more glimpses are worth in themselves.

    Args:
        config: Camera and scene.
    """

    name: ClassVar[str] = "repeat_full_view"

    def __init__(self, config: GlimpseConfig) -> None:
        super().__init__(config, [FULL_VIEW])


class FixedGrid(FixedSequence):
    """Coarse to fine: the whole scene, then its quadrants, then theirs, and so on, row by row.

    In a scene that is not square each level has as many views as cover it, spread evenly.

    Args:
        config: Camera and scene.
    """

    name: ClassVar[str] = "fixed_grid"

    def __init__(self, config: GlimpseConfig) -> None:
        super().__init__(config, quadtree_actions(config, config.num_glimpses))


class FineToCoarse(FixedSequence):
    """The glimpses of :class:`FixedGrid` the other way round.

    Args:
        config: Camera and scene.
    """

    name: ClassVar[str] = "fine_to_coarse"

    def __init__(self, config: GlimpseConfig) -> None:
        super().__init__(config, FixedGrid(config).actions.flip(0))


def quadtree_levels(config: GlimpseConfig) -> list[float]:
    """Return fields of view in pixels, each half of the one before, down to that of native resolution."""
    views = [config.max_view]
    while views[-1] > config.camera_size:
        views.append(max(views[-1] / 2, config.camera_size))
    return views


def tile_actions(config: GlimpseConfig, view: float) -> Tensor:
    """Return the actions of views of one size [n, 3] that cover the scene evenly, row by row.

    Args:
        config: Camera and scene.
        view: Field of view in pixels.
    """
    room = config.max_view - config.camera_size
    zoom = (view - config.camera_size) / room if room > 0 else 0.0
    # y and x are relative to the room that the view leaves: evenly spread tiles are evenly spread numbers
    rows, columns = (_evenly(math.ceil(side / view - 1e-9)) for side in config.scene)
    return torch.tensor([[y, x, zoom] for y in rows for x in columns])


def quadtree_actions(config: GlimpseConfig, count: int) -> Tensor:
    """Return the first ``count`` actions [n, 3] of all levels, the largest view first; fewer if there are no more."""
    tiles, found = [], 0
    for view in quadtree_levels(config):
        if found < count:
            tiles.append(tile_actions(config, view)[: count - found])
            found += len(tiles[-1])
    return torch.cat(tiles)


def _evenly(count: int) -> list[float]:
    return [0.5] if count == 1 else [i / (count - 1) for i in range(count)]
