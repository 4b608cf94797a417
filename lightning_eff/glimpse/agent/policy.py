"""Stable-Baselines3's actor and critics, which take packed observations besides padded dicts."""

from __future__ import annotations

from typing import Any

from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.sac.policies import Actor, MultiInputPolicy
from torch import Tensor

from lightning_eff.glimpse.observation import Observation


class PackedActor(Actor):
    """Actor in u-space: u = tanh(mu + sigma eps) in [-1, 1]^3, log sigma in [-20, 2]."""

    def extract_features(self, obs: Any, features_extractor: BaseFeaturesExtractor) -> Tensor:
        """Return vectors [R, h] of packed observations or of padded dicts."""
        return _features(super(), obs, features_extractor)


class PackedCritic(ContinuousCritic):
    """Two critics on one extractor, which is not the actor's."""

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


def _features(parent: Any, obs: Any, features_extractor: BaseFeaturesExtractor) -> Tensor:
    if isinstance(obs, Observation):
        features: Tensor = features_extractor(obs)
    else:
        features = parent.extract_features(obs, features_extractor)
    return features
