"""The world for those who bring an agent of their own: Stable-Baselines3's VecEnv, and gymnasium's Env.

Training with a Trainer does not go through here: what NumPy costs at the edge, and padding, it does without.

Letters: E environments, P largest number of tokens of a state.
"""

from __future__ import annotations

import copy
from typing import Any, SupportsFloat

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from lightning_eff.arguments import check_whole
from lightning_eff.batch import SplitBatch
from lightning_eff.batch import split_batch as split_pair
from lightning_eff.glimpse.config import ACTION_SIZE
from lightning_eff.glimpse.observation import PRESENT, Observation, observation_space
from lightning_eff.glimpse.world import GlimpseWorld

Arrays = dict[str, np.ndarray]


class GlimpseVecEnv(VecEnv):
    """E scenes at a time; a new one takes the place of each whose episode has ended.

    ``SAC("MultiInputPolicy", GlimpseVecEnv(world, dataset, 64)).learn(...)`` works, better with
    ``policy_kwargs={"features_extractor_class": GlimpseExtractor}``. Actions are (y, x, z) in [0, 1]; observations are
    those of :meth:`~lightning_eff.glimpse.observation.Observation.padded`. The end of an episode is a true end, never
    a time limit.

    Args:
        world: Backbone, task, camera and reward; it is not changed.
        dataset: Map-style; items are scenes with targets. Every scene comes once before one comes again.
        num_envs: E, >= 1.
        seed: Of the order of scenes; :meth:`seed` sets another one.
        split_batch: ``batch -> (images, target)``, for batches of another form.
        device: Where scenes go: the backbone's.

    Raises:
        ValueError: ``num_envs`` is below 1 or the data set is empty.
    """

    render_mode: str | None = None

    def __init__(
        self,
        world: GlimpseWorld,
        dataset: Dataset[Any],
        num_envs: int = 1,
        *,
        seed: int = 0,
        split_batch: SplitBatch | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        check_whole("num_envs", num_envs)
        self.world, self._scenes = world, _Scenes(dataset, seed, split_batch, device)
        # images that stop early make room for others, which are behind: a world has images of one age alone
        self._ages: list[tuple[GlimpseWorld, Tensor]] = []
        self._observations: Arrays = {}
        self._actions = np.zeros((num_envs, ACTION_SIZE), np.float32)
        self._returns, self._lengths = np.zeros(num_envs), np.zeros(num_envs, int)
        super().__init__(num_envs, space_of(world), spaces.Box(0.0, 1.0, (ACTION_SIZE,)))

    def reset(self) -> Arrays:
        """Begin E new episodes and return their states, none of which has a token."""
        self._ages = []
        space = self.observation_space
        assert isinstance(space, spaces.Dict)
        self._observations = {
            key: np.zeros((self.num_envs, *(part.shape or ())), part.dtype) for key, part in space.items()
        }
        if self._seeds[0] is not None:
            self._scenes.seed(self._seeds[0])
        self._begin(np.arange(self.num_envs))
        self.reset_infos = [{} for _ in range(self.num_envs)]
        self._reset_seeds()
        self._reset_options()
        return self._copy()

    def step_async(self, actions: np.ndarray) -> None:
        """Take note of actions [E, 3]."""
        self._actions = np.asarray(actions, np.float32)

    def step_wait(self) -> tuple[Arrays, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Take a glimpse of every scene: states [E, ...], rewards [E], ends [E] and what else is to be told.

        Where an episode has ended, the state is the first of the next one, and ``terminal_observation`` holds the
        last; ``episode`` holds return ``r`` and length ``l``, which Stable-Baselines3 logs.
        """
        rewards, dones = np.zeros(self.num_envs, np.float32), np.zeros(self.num_envs, bool)
        infos: list[dict[str, Any]] = [{"TimeLimit.truncated": False} for _ in range(self.num_envs)]
        for world, environments in self._ages:
            where = environments[world.rows.cpu()].numpy()
            step = world.step(torch.from_numpy(self._actions[where]))
            assert step.reward is not None
            rewards[where], dones[where] = step.reward.cpu().numpy(), step.done.cpu().numpy()
            self._put(where, step.observation)
        self._ages = [(world, environments) for world, environments in self._ages if world.active]
        self._returns += rewards
        self._lengths += 1
        ended = dones.nonzero()[0]
        for i in ended.tolist():
            infos[i]["terminal_observation"] = {key: part[i].copy() for key, part in self._observations.items()}
            infos[i]["episode"] = {"r": float(self._returns[i]), "l": int(self._lengths[i])}
        if len(ended):
            self._begin(ended)
        return self._copy(), rewards, dones, infos

    def close(self) -> None:
        """Let go of scenes."""
        self._ages = []

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """Return an attribute of this object for each environment asked for."""
        return [getattr(self, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Set an attribute of this object, for all environments."""
        setattr(self, attr_name, value)

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        """Call a method of this object for each environment asked for."""
        method = getattr(self, method_name)
        return [method(*method_args, **method_kwargs) for _ in self._get_indices(indices)]

    def env_is_wrapped(
        self, wrapper_class: type[gymnasium.Wrapper[Any, Any, Any, Any]], indices: Any = None
    ) -> list[bool]:
        """Return False for each environment asked for: there is nothing to wrap."""
        return [False for _ in self._get_indices(indices)]

    def _begin(self, where: np.ndarray) -> None:
        world = copy.copy(self.world)
        self._put(where, world.reset(*self._scenes.next(len(where))))
        self._ages.append((world, torch.from_numpy(where)))
        self._returns[where], self._lengths[where] = 0, 0

    def _put(self, where: np.ndarray, observation: Observation) -> None:
        for key, part in arrays(observation, self.world).items():
            self._observations[key][where] = part

    def _copy(self) -> Arrays:
        return {key: part.copy() for key, part in self._observations.items()}


class GlimpseEnv(gymnasium.Env[Any, np.ndarray]):
    """One scene at a time; see :class:`GlimpseVecEnv`, which takes the same and is faster.

    ``info`` of a step holds ``score`` and ``view`` (y0, x0 and side in pixels).

    Raises:
        ValueError: The data set is empty, or rewards are told by comparing the scenes of a batch.
    """

    metadata: dict[str, Any] = {"render_modes": []}

    def __init__(
        self,
        world: GlimpseWorld,
        dataset: Dataset[Any],
        *,
        seed: int = 0,
        split_batch: SplitBatch | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if world.reward.kind == "score_normalized":
            raise ValueError(
                "a single scene has no others to be compared with, all its rewards would be 0: use "
                "RewardOptions(kind='score'), or GlimpseVecEnv"
            )
        self.world, self._scenes = copy.copy(world), _Scenes(dataset, seed, split_batch, device)
        self.observation_space = space_of(world)
        self.action_space = spaces.Box(0.0, 1.0, (ACTION_SIZE,))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Arrays, dict[str, Any]]:
        """Begin an episode with the next scene, or with the first of another order."""
        super().reset(seed=seed)
        if seed is not None:
            self._scenes.seed(seed)
        return self._state(self.world.reset(*self._scenes.next(1))), {}

    def step(self, action: np.ndarray) -> tuple[Arrays, SupportsFloat, bool, bool, dict[str, Any]]:
        """Take a glimpse."""
        step = self.world.step(torch.as_tensor(action, dtype=torch.float32).unsqueeze(0))
        assert step.reward is not None
        assert step.score is not None
        info = {"score": float(step.score), "view": step.glimpse.view[0].cpu().numpy()}
        return self._state(step.observation), float(step.reward), bool(step.done), False, info

    def _state(self, observation: Observation) -> Arrays:
        return {key: part[0] for key, part in arrays(observation, self.world).items()}


def space_of(world: GlimpseWorld) -> spaces.Dict:
    """Return the space of a world's states, padded."""
    return observation_space(world.config, world.state_parts, world.backbone.channels, world.backbone.latent_dim)


def arrays(observation: Observation, world: GlimpseWorld) -> Arrays:
    """Return states of a world as padded arrays of :func:`space_of`."""
    padded = observation.padded(world.config.max_patches)
    return {key: padded[key].cpu().numpy() for key in (PRESENT, *world.state_parts)}


class _Scenes:
    """Scenes in random order, again and again."""

    def __init__(self, dataset: Any, seed: int, split_batch: SplitBatch | None, device: torch.device | str) -> None:
        self._dataset = dataset
        if not len(dataset):
            raise ValueError("expected a data set with scenes, got an empty one")
        self._split_batch, self._device = split_batch or split_pair, device
        self.seed(seed)

    def seed(self, seed: int) -> None:
        """Begin another order."""
        self._generator = torch.Generator().manual_seed(seed)
        self._left: list[int] = []

    def next(self, number: int) -> tuple[Tensor, Any]:
        """Return so many images and their targets."""
        while len(self._left) < number:
            self._left += torch.randperm(len(self._dataset), generator=self._generator).tolist()
        taken, self._left = self._left[:number], self._left[number:]
        fetch = getattr(self._dataset, "__getitems__", lambda indices: [self._dataset[i] for i in indices])
        images, target = self._split_batch(default_collate(fetch(taken)))
        return images.to(self._device), target.to(self._device) if isinstance(target, Tensor) else target
