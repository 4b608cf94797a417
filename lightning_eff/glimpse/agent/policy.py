"""Stable-Baselines3's actor and critics, which take packed observations besides padded dicts."""

from __future__ import annotations

from typing import Any

import torch
from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, create_mlp
from stable_baselines3.sac.policies import Actor, MultiInputPolicy
from torch import Tensor, nn

from lightning_eff.glimpse.observation import Observation


class PackedActor(Actor):
    """Actor in u-space: u = tanh(mu + sigma eps) in [-1, 1]^3, log sigma in [-20, 2]."""

    def extract_features(self, obs: Any, features_extractor: BaseFeaturesExtractor) -> Tensor:
        """Return vectors [R, h] of packed observations or of padded dicts."""
        return _features(super(), obs, features_extractor)


class PackedCritic(ContinuousCritic):
    """Critics on one extractor, which is not the actor's; they read actions at the width of states.

    Three numbers beside a vector of h say little to a first layer; encoded to h, as in the published agent, they were
    learnt from sooner.
    """

    def __init__(
        self, *, features_dim: int, net_arch: list[int], activation_fn: type[nn.Module], **options: Any
    ) -> None:
        super().__init__(features_dim=features_dim, net_arch=net_arch, activation_fn=activation_fn, **options)
        for i in range(self.n_critics):
            encoder = _ActionEncoder(features_dim, get_action_dim(self.action_space))
            layers = create_mlp(2 * features_dim, 1, net_arch, activation_fn)
            self.q_networks[i] = nn.Sequential(encoder, *layers)
            self.add_module(f"qf{i}", self.q_networks[i])

    def extract_features(self, obs: Any, features_extractor: BaseFeaturesExtractor) -> Tensor:
        """Return vectors [R, h] of packed observations or of padded dicts."""
        return _features(super(), obs, features_extractor)


class GlimpsePolicy(MultiInputPolicy):
    """Policy of packed observations; what :func:`~lightning_eff.glimpse.agent.sac.make_sac` builds.

    Holds the temperature, so that one module has everything that is trained.
    """

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> Actor:
        """Return a new actor."""
        return PackedActor(**self._update_features_extractor(self.actor_kwargs, features_extractor)).to(self.device)

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> ContinuousCritic:
        """Return new critics."""
        return PackedCritic(**self._update_features_extractor(self.critic_kwargs, features_extractor)).to(self.device)


class _ActionEncoder(nn.Module):
    """Encode the action behind the features to their width."""

    def __init__(self, features: int, actions: int) -> None:
        super().__init__()
        self.sizes = [features, actions]
        self.encoder = nn.Sequential(nn.Linear(actions, features), nn.LayerNorm(features), nn.GELU())

    def forward(self, inputs: Tensor) -> Tensor:
        """Return [M, 2 h] from features and actions [M, h + 3]."""
        features, actions = torch.split(inputs, self.sizes, dim=1)
        return torch.cat([features, self.encoder(actions)], dim=1)


def _features(parent: Any, obs: Any, features_extractor: BaseFeaturesExtractor) -> Tensor:
    if isinstance(obs, Observation):
        features: Tensor = features_extractor(obs)
    else:
        features = parent.extract_features(obs, features_extractor)
    return features
