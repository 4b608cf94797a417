"""torchrl as a peer of glimpse_agent.py: the same world as an EnvBase, the same networks in its SACLoss."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchrl.data import Bounded, Composite, LazyTensorStorage, TensorDictReplayBuffer, Unbounded
from torchrl.envs import EnvBase
from torchrl.modules import ProbabilisticActor, TanhNormal
from torchrl.objectives import SACLoss, SoftUpdate

from lightning_eff.glimpse.config import AgentConfig
from lightning_eff.glimpse.observation import PRESENT, Observation, observation_space
from lightning_eff.glimpse.world import GlimpseWorld


class BatchedWorld(EnvBase):
    """All scenes as one environment with a batch axis; states are padded."""

    def __init__(self, world: GlimpseWorld, data: TensorDataset) -> None:
        super().__init__(batch_size=torch.Size([len(data)]))
        self.world, self.scenes = world, data[:]
        self.keys_seen = (PRESENT, *world.state_parts)
        example = self._padded(world.reset(*self.scenes))
        batch = self.batch_size
        self.observation_spec = Composite(
            {key: Unbounded(part.shape, dtype=part.dtype) for key, part in example.items()}, shape=batch
        )
        self.action_spec = Bounded(0.0, 1.0, (*batch, 3))
        self.reward_spec = Unbounded((*batch, 1))

    def _reset(self, tensordict: Any = None, **_: Any) -> TensorDict:
        return TensorDict(self._padded(self.world.reset(*self.scenes)), self.batch_size)

    def _step(self, tensordict: TensorDict) -> TensorDict:
        step = self.world.step(tensordict["action"])
        assert step.reward is not None
        told = {
            "reward": step.reward.unsqueeze(1),
            "done": step.done.unsqueeze(1),
            "terminated": step.done.unsqueeze(1),
        }
        return TensorDict(self._padded(step.observation) | told, self.batch_size)

    def _set_seed(self, seed: int | None) -> None:
        pass

    def _padded(self, observation: Observation) -> dict[str, Tensor]:
        padded = observation.padded(self.world.config.max_patches)
        return {key: padded[key] for key in self.keys_seen}


def total_in_torchrl(environment: BatchedWorld, actions: np.ndarray) -> Tensor:
    """Return the mean over scenes of the sum of an episode's rewards."""
    state, total = environment.reset(), torch.zeros(())
    for action in actions:
        state = environment.step(state.set("action", torch.from_numpy(action)))["next"]
        total = total + state["reward"].mean()
    return total


class Policy(nn.Module):
    """Location and scale of actions."""

    def __init__(self, extractor: nn.Module, keys: tuple[str, ...], hidden: int) -> None:
        super().__init__()
        self.extractor, self.keys = extractor, keys
        self.net = nn.Sequential(nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, 6))

    def forward(self, *parts: Tensor) -> tuple[Tensor, Tensor]:
        features = self.extractor(dict(zip(self.keys, parts, strict=True)))
        mean, log_std = self.net(features).chunk(2, -1)
        return mean, log_std.clamp(-20, 2).exp()


class Value(nn.Module):
    """Value of a state and an action."""

    def __init__(self, extractor: nn.Module, keys: tuple[str, ...], hidden: int) -> None:
        super().__init__()
        self.extractor, self.keys = extractor, keys
        self.net = nn.Sequential(nn.Linear(hidden + 3, hidden), nn.GELU(), nn.Linear(hidden, 1))

    def forward(self, action: Tensor, *parts: Tensor) -> Tensor:
        features = self.extractor(dict(zip(self.keys, parts, strict=True)))
        out: Tensor = self.net(torch.cat([features, action], -1))
        return out


class TorchRLLoop:
    """Training with torchrl's loss and buffer; two episodes a call, an update after every glimpse."""

    def __init__(
        self, world: GlimpseWorld, data: TensorDataset, agent: AgentConfig, extractor: type[nn.Module]
    ) -> None:
        torch.manual_seed(0)
        self.environment = BatchedWorld(world, data)
        keys = self.environment.keys_seen
        space = observation_space(world.config, world.state_parts, world.backbone.channels, world.backbone.latent_dim)
        policy = Policy(extractor(space, hidden=agent.hidden, heads=agent.heads), keys, agent.hidden)
        value = Value(extractor(space, hidden=agent.hidden, heads=agent.heads), keys, agent.hidden)
        self.actor = ProbabilisticActor(
            TensorDictModule(policy, list(keys), ["loc", "scale"]),
            in_keys=["loc", "scale"],
            distribution_class=TanhNormal,
            distribution_kwargs={"low": 0.0, "high": 1.0},
            return_log_prob=True,
            spec=self.environment.action_spec,
        )
        critic = TensorDictModule(value, ["action", *keys], ["state_action_value"])
        self.loss = SACLoss(self.actor, critic, num_qvalue_nets=2, alpha_init=0.1, target_entropy=-3.0)
        self.loss.make_value_estimator(gamma=agent.gamma)
        self.target = SoftUpdate(self.loss, tau=agent.tau)
        self.optimizers = [
            torch.optim.AdamW(self.loss.actor_network_params.flatten_keys().values(), agent.lr, fused=True),
            torch.optim.AdamW(self.loss.qvalue_network_params.flatten_keys().values(), agent.lr, fused=True),
            torch.optim.Adam([self.loss.log_alpha], agent.lr),
        ]
        self.buffer = TensorDictReplayBuffer(
            storage=LazyTensorStorage(agent.replay.buffer_size), batch_size=agent.replay.batch_size
        )
        self.episode(learn=False)

    def episode(self, learn: bool = True) -> None:
        state = self.environment.reset()
        for _ in range(self.environment.world.config.num_glimpses):
            with torch.no_grad():
                taken = self.environment.step(self.actor(state))
            self.buffer.extend(taken.exclude("loc", "scale", "action_log_prob"))
            state = taken["next"].exclude("reward", "done", "terminated")
            if learn:
                self.update()

    def update(self) -> None:
        losses = self.loss(self.buffer.sample())
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        (losses["loss_actor"] + losses["loss_qvalue"] + losses["loss_alpha"]).backward()
        for optimizer in self.optimizers:
            optimizer.step()
        self.target.step()

    def __call__(self) -> None:
        self.episode()
        self.episode()
