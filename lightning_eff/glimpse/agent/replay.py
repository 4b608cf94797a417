"""Replay buffer that keeps each patch once: states of an episode are prefixes of each other.

A transition holds the k patches that its glimpse captured and the latents of the state it led to; the state before is
where its predecessor led. Padded pairs of states, as Stable-Baselines3 keeps them, take about seven times the memory.

Letters: M transitions drawn, A images of a step, k patches of a glimpse, T glimpses of an episode, D latent width.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import BaseBuffer, ReplayBuffer
from stable_baselines3.common.type_aliases import DictReplayBufferSamples
from torch import Tensor

from lightning_eff.documents import whole_state
from lightning_eff.glimpse.config import ACTION_SIZE, StatePart
from lightning_eff.glimpse.observation import PARTS, PRESENT, Observation, part_shapes, ranges

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Transitions:
    """M transitions, packed.

    Attributes:
        observations: States before, M of them.
        actions: u = 2 a - 1 in [-1, 1]^3 [M, 3].
        rewards: [M, 1].
        dones: 1 where the episode ended [M, 1].
        next_observations: States after.
    """

    observations: Observation
    actions: Tensor
    rewards: Tensor
    dones: Tensor
    next_observations: Observation


class GlimpseReplayBuffer(ReplayBuffer):
    """Ring of transitions; whole batches of episodes leave together, the oldest first.

    Args:
        buffer_size: Transitions kept at most.
        observation_space: Of :func:`~lightning_eff.glimpse.observation.observation_space`.
        action_space: [0, 1]^3.
        device: Of patches, latents, actions, rewards.
        n_envs: As Stable-Baselines3 passes it; does not matter.
        optimize_memory_usage: Of Stable-Baselines3; memory is saved anyway.
        patches_per_glimpse: k.
        latent_dtype: ``"float32"`` or ``"float16"``.
        seed: Of the buffer's own generator; None takes that of torch's global one.

    Raises:
        ValueError: The space is another one.
    """

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Dict,
        action_space: spaces.Space[Any],
        device: torch.device | str = "auto",
        n_envs: int = 1,
        optimize_memory_usage: bool = False,
        patches_per_glimpse: int = 1,
        latent_dtype: str = "float32",
        seed: int | None = None,
    ) -> None:
        # boxes are kept whoever looks at them
        shapes: dict[StatePart, tuple[int, ...]] = {"box": (4,), **part_shapes(observation_space)}
        # the arrays of ReplayBuffer, padded pairs, are what this one does without
        BaseBuffer.__init__(self, buffer_size, observation_space, action_space, device, n_envs=n_envs)
        self.patches_per_glimpse = patches_per_glimpse
        self.max_tokens = math.prod(observation_space[PRESENT].shape or ())
        self.num_glimpses = self.max_tokens // patches_per_glimpse
        self.generator = torch.Generator().manual_seed(torch.initial_seed() if seed is None else seed)
        k, rows = patches_per_glimpse, -(-patches_per_glimpse * (self.num_glimpses + 1) * buffer_size // 2)
        self._tokens: dict[str, Tensor] = {}  # once a patch
        self._rows: dict[str, Tensor] = {}  # once a patch and state
        for part, shape in shapes.items():
            if part in ("patch", "box"):
                self._tokens[PARTS[part]] = torch.empty(k * buffer_size, *shape, device=self.device)
            else:
                dtype = getattr(torch, latent_dtype) if part == "latent" else torch.float32
                self._rows[PARTS[part]] = torch.empty(rows, *shape, device=self.device, dtype=dtype)
        self._row_capacity = rows
        self._taken = torch.empty(buffer_size, ACTION_SIZE + 2, device=self.device)  # u, reward, done
        # of transition i, on the CPU: its glimpses' transitions, how many there were before, where its rows start
        self._chain = torch.zeros(buffer_size, self.num_glimpses, dtype=torch.int64)
        self._time = torch.zeros(buffer_size, dtype=torch.int64)
        self._row_start = torch.zeros(buffer_size, dtype=torch.int64)
        self.reset()

    def reset(self) -> None:
        """Forget all transitions; the generator stays where it is."""
        super().reset()
        self._count = 0
        self._next_row = 0
        self._batches: deque[int] = deque()  # transitions of each batch of episodes, the oldest first
        self._latest = torch.zeros(0, dtype=torch.int64)  # transition of each image of the open batch
        self._unfinished: list[list[tuple[Observation, np.ndarray, float, bool]]] = []  # episodes of environments

    def size(self) -> int:
        """Return the number of transitions held."""
        return self._count

    @property
    def waits(self) -> bool:
        """Whether environments have taken steps and none of their episodes has ended, so that nothing can be drawn."""
        return not self._count and any(self._unfinished)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        held = [*self._tokens.values(), *self._rows.values(), self._taken, self._chain, self._time, self._row_start]
        return sum(tensor.nbytes for tensor in held)

    def add_step(
        self, observation: Observation, actions: Tensor, rewards: Tensor, dones: Tensor, rows: Tensor | None = None
    ) -> None:
        """Add one glimpse of each of A images; a first glimpse begins a new batch of episodes.

        Args:
            observation: After the glimpse, A states of equally many patches.
            actions: a in [0, 1]^3 [A, 3].
            rewards: [A].
            dones: Whether the episode ended [A]; there is no bootstrapping from such states.
            rows: Number of each image in its batch [A], counted at the first glimpse; None if all of them go on.

        Raises:
            ValueError: The buffer cannot hold one batch of episodes, or a glimpse before this one is missing.
        """
        k, images = self.patches_per_glimpse, len(observation)
        length = int(observation.lengths[0]) if images else 0
        if not images:
            return
        if bool((observation.lengths != length).any()) or length % k or not k <= length <= self.max_tokens:
            raise ValueError(
                f"expected states of equally many tokens, {k} a glimpse and at most {self.max_tokens}, got "
                f"{sorted(set(observation.lengths.tolist()))}"
            )
        time = length // k - 1
        rows = torch.arange(images) if rows is None else rows.cpu()
        if time == 0:
            self._begin(images)
        elif len(rows) > len(self._latest) or bool((self._time[self._latest[rows]] != time - 1).any()):
            raise ValueError(f"glimpse {time + 1} of a batch of episodes was added without glimpse {time}")
        slots = (self.pos + torch.arange(images)) % self.buffer_size
        if time:
            self._chain[slots, :time] = self._chain[self._latest[rows], :time]
        self._chain[slots, time] = slots
        self._time[slots] = time
        self._row_start[slots] = self._next_row + torch.arange(images) * length
        self._latest[rows] = slots
        self._write(observation, actions, rewards, dones, slots, length)
        self.pos = (self.pos + images) % self.buffer_size
        self._next_row = (self._next_row + images * length) % self._row_capacity
        self._count += images
        self._batches[-1] += images

    def add(  # type: ignore[override]
        self,
        obs: Arrays,
        next_obs: Arrays,
        action: np.ndarray,
        reward: np.ndarray,
        done: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        """Add one step of each environment, as Stable-Baselines3 does; episodes can be drawn from their end on.

        Args:
            obs: Padded states before; what they hold is known already.
            next_obs: Padded states after.
            action: u in [-1, 1]^3 [E, 3].
            reward: [E].
            done: [E].
            infos: Of each environment; not read.
        """
        after = Observation.from_padded({key: torch.from_numpy(part) for key, part in next_obs.items()})
        if len(self._unfinished) != len(done):  # of other environments
            self._unfinished = [[] for _ in done]
        for i, episode in enumerate(self._unfinished):
            if after.lengths[i] == self.patches_per_glimpse:
                episode.clear()  # a reset has cut off the one before
            episode.append((after.take(torch.tensor([i])), (action[i] + 1) / 2, float(reward[i]), bool(done[i])))
        ended = {i: len(self._unfinished[i]) for i in np.flatnonzero(done).tolist()}
        for length in sorted(set(ended.values())):
            # episodes of one length go in together, step by step
            episodes = [self._unfinished[i] for i in ended if ended[i] == length]
            for steps in zip(*episodes, strict=True):
                states, actions, rewards, ends = zip(*steps, strict=True)
                self.add_step(
                    Observation.joined(states),
                    torch.from_numpy(np.stack(actions)),
                    torch.tensor(rewards),
                    torch.tensor(ends),
                )
        for i in ended:
            self._unfinished[i] = []

    def draw(self, batch_size: int) -> Transitions:
        """Draw M transitions with replacement, packed; the generator is the buffer's own.

        Raises:
            ValueError: The buffer is empty.
        """
        if self.waits:
            raise ValueError(
                "expected a replay buffer with transitions, got one of environments none of which has ended an episode "
                f"yet: use learning_starts >= {len(self._unfinished) * self.num_glimpses}, num_envs times num_glimpses"
            )
        slots, before, after = self._draw(batch_size)
        # an index on its way to a device keeps nobody waiting
        taken = self._taken.index_select(0, slots.to(self.device, non_blocking=True))
        actions, rewards, dones = torch.split(taken, [ACTION_SIZE, 1, 1], dim=1)
        return Transitions(before, actions, rewards, dones, after)

    def sample(self, batch_size: int, env: Any = None) -> DictReplayBufferSamples:  # type: ignore[override]
        """Draw as :meth:`draw` does, padded as Stable-Baselines3's own ``SAC.train`` wants it."""
        batch = self.draw(batch_size)
        return DictReplayBufferSamples(
            observations=self._padded(batch.observations),
            actions=batch.actions,
            next_observations=self._padded(batch.next_observations),
            dones=batch.dones,
            rewards=batch.rewards,
        )

    def move_to(self, device: torch.device | str) -> None:
        """Move what is on a device."""
        self.device = torch.device(device)
        self._taken = self._taken.to(self.device)
        for table in (self._tokens, self._rows):
            for name in table:
                table[name] = table[name].to(self.device)

    def state_dict(self) -> dict[str, Any]:
        """Return transitions, the oldest first, and the generator's state: tensors on the CPU and numbers."""
        slots = self._resident()
        lengths = self.patches_per_glimpse * (self._time[slots] + 1)
        tokens, rows = self._token_index(slots), self._row_index(slots, lengths)
        state: dict[str, Any] = {name: table[tokens.to(self.device)].cpu() for name, table in self._tokens.items()}
        state |= {name: table[rows.to(self.device)].cpu() for name, table in self._rows.items()}
        first = (self.pos - self._count) % self.buffer_size
        return state | {
            "taken": self._taken[slots.to(self.device)].cpu(),
            # by age: independent of where in the ring they happen to be
            "chain": torch.where(self._seen(slots), (self._chain[slots] - first) % self.buffer_size, 0),
            "time": self._time[slots].clone(),
            "batches": torch.tensor(list(self._batches), dtype=torch.int64),
            "latest": (self._latest - first) % self.buffer_size,
            "generator": self.generator.get_state(),
            "patches_per_glimpse": self.patches_per_glimpse,
            "num_glimpses": self.num_glimpses,
        }

    @whole_state
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take transitions and generator over.

        Raises:
            ValueError: They are of other glimpses or of another agent, or more than this buffer holds.
        """
        for name in ("num_glimpses", "patches_per_glimpse"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"the saved replay buffer has {name} = {state[name]}, this one {getattr(self, name)}: go on "
                    "without it (resume_buffer=False)"
                )
        tables = self._tokens | self._rows
        shapes = {name: tuple(table.shape[1:]) for name, table in tables.items()}
        saved = {name: tuple(state[name].shape[1:]) if name in state else None for name in shapes}
        others = [name for name in PARTS.values() if name in state and name not in shapes]
        if saved != shapes or others:
            raise ValueError(
                f"the saved replay buffer has {saved | dict.fromkeys(others)}, this one {shapes}: go on without it "
                "(resume_buffer=False)"
            )
        count = len(state["taken"])
        if count > self.buffer_size:
            raise ValueError(f"buffer_size must be >= {count}, the transitions saved, got {self.buffer_size}")
        self.reset()
        for name, table in tables.items():
            table[: len(state[name])] = state[name].to(table)
        self._taken[:count] = state["taken"].to(self._taken)
        self._chain[:count], self._time[:count] = state["chain"], state["time"]
        lengths = self.patches_per_glimpse * (state["time"] + 1)
        self._row_start[:count] = lengths.cumsum(0) - lengths
        self._count, self.pos = count, count % self.buffer_size
        self._next_row = int(lengths.sum()) % self._row_capacity
        self._batches.extend(state["batches"].tolist())
        self._latest = state["latest"].clone()
        self.generator.set_state(state["generator"])

    def _begin(self, images: int) -> None:
        """Make room for whole episodes of a batch of images."""
        needed = images * self.num_glimpses
        if needed > self.buffer_size:
            raise ValueError(
                f"buffer_size must be >= {needed}: {images} images of a batch, {self.num_glimpses} glimpses each; got "
                f"{self.buffer_size}"
            )
        while self._count + needed > self.buffer_size:
            self._count -= self._batches.popleft()
            self.full = True
        self._batches.append(0)
        self._latest = torch.full((images,), -1)

    def _write(
        self, observation: Observation, actions: Tensor, rewards: Tensor, dones: Tensor, slots: Tensor, length: int
    ) -> None:
        tokens = self._token_index(slots).to(self.device, non_blocking=True)
        for name, table in self._tokens.items():
            part: Tensor = getattr(observation, name)
            new = part.detach().view(-1, length, *part.shape[1:])[:, -self.patches_per_glimpse :].flatten(0, 1)
            table.index_copy_(0, tokens, new.to(table))
        rows = self._row_index(slots, torch.full_like(slots, length)).to(self.device, non_blocking=True)
        for name, table in self._rows.items():
            table.index_copy_(0, rows, getattr(observation, name).detach().to(table))
        taken = torch.cat([2 * actions - 1, rewards.view(-1, 1), dones.view(-1, 1)], dim=1)
        self._taken.index_copy_(0, slots.to(self.device), taken.detach().to(self._taken))

    def _draw(self, batch_size: int) -> tuple[Tensor, Observation, Observation]:
        if not self._count:
            raise ValueError("expected a replay buffer with transitions, got an empty one: add steps first")
        ages = torch.randint(self._count, (batch_size,), generator=self.generator)
        slots = (self.pos - self._count + ages) % self.buffer_size
        time = self._time[slots]
        previous = self._chain[slots, (time - 1).clamp(min=0)]
        return slots, self._states(slots, previous, time), self._states(slots, slots, time + 1)

    def _states(self, slots: Tensor, reached_by: Tensor, glimpses: Tensor) -> Observation:
        """Return states after the first ``glimpses`` of the episodes of ``slots``, reached by these transitions."""
        seen = torch.arange(self.num_glimpses) < glimpses.unsqueeze(1)
        tokens = self._token_index(self._chain[slots][seen]).to(self.device, non_blocking=True)
        lengths = glimpses * self.patches_per_glimpse
        parts = {name: table.index_select(0, tokens) for name, table in self._tokens.items()}
        if self._rows:
            rows = self._row_index(reached_by, lengths).to(self.device, non_blocking=True)
            parts |= {name: table.index_select(0, rows).float() for name, table in self._rows.items()}
        return Observation(lengths, **parts)

    def _token_index(self, slots: Tensor) -> Tensor:
        k = self.patches_per_glimpse
        return (slots.unsqueeze(1) * k + torch.arange(k)).flatten()

    def _row_index(self, slots: Tensor, lengths: Tensor) -> Tensor:
        return ranges(self._row_start[slots], lengths) % self._row_capacity

    def _seen(self, slots: Tensor) -> Tensor:
        """Return which entries of the chains of transitions mean something."""
        return torch.arange(self.num_glimpses) <= self._time[slots].unsqueeze(1)

    def _resident(self) -> Tensor:
        return (self.pos - self._count + torch.arange(self._count)) % self.buffer_size

    def _padded(self, observation: Observation) -> dict[str, Tensor]:
        padded = observation.padded(self.max_tokens)
        assert isinstance(self.observation_space, spaces.Dict)
        return {key: padded[key] for key in self.observation_space.spaces}
