"""Active visual exploration: look where it pays, at the zoom that pays; arXiv 2404.03482."""

from lightning_eff.glimpse.config import AgentConfig, GlimpseConfig, ReplayConfig, RewardConfig, TrainingPlan

__all__ = ["AgentConfig", "GlimpseConfig", "ReplayConfig", "RewardConfig", "TrainingPlan"]
