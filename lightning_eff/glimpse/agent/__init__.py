"""The agent: soft actor-critic on sets of tokens, and its replay buffer. Importing it imports Stable-Baselines3."""

from lightning_eff.glimpse.agent.extractor import GlimpseExtractor
from lightning_eff.glimpse.agent.policy import GlimpsePolicy
from lightning_eff.glimpse.agent.replay import GlimpseReplayBuffer, Transitions
from lightning_eff.glimpse.agent.sac import GlimpseSAC, make_sac

__all__ = ["GlimpseExtractor", "GlimpsePolicy", "GlimpseReplayBuffer", "GlimpseSAC", "Transitions", "make_sac"]
