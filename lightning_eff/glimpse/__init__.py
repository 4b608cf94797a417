"""Active visual exploration: look where it pays, at the zoom that pays; arXiv 2404.03482.

Options come at once; what needs torch, Lightning or Stable-Baselines3 is imported on first use (PEP 562), so that
backbones, tasks and policies cost nothing that they do not need.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_eff.glimpse.config import AgentConfig, GlimpseConfig, ReplayOptions, RewardOptions, TrainingPlan, ViTSize

if TYPE_CHECKING:
    from lightning_eff.glimpse.agent import GlimpseExtractor, GlimpseReplayBuffer, GlimpseSAC, make_sac
    from lightning_eff.glimpse.backbones import (
        CanvasBackbone,
        ClassHead,
        ElasticViT,
        GlimpseBackbone,
        ImageDecoder,
        SegmentationHead,
    )
    from lightning_eff.glimpse.callbacks import GlimpseReport
    from lightning_eff.glimpse.environments import GlimpseEnv, GlimpseVecEnv
    from lightning_eff.glimpse.evaluation import PolicyCurve, PolicyCurves, evaluate_policies, stopping_curve
    from lightning_eff.glimpse.exploration import Trajectory, explore
    from lightning_eff.glimpse.figures import (
        coverage_figure,
        curve_figure,
        exploration_figure,
        importance_figure,
        save_animation,
        scale_figure,
        steps_figure,
    )
    from lightning_eff.glimpse.module import AdaGlimpseModule
    from lightning_eff.glimpse.observation import Observation
    from lightning_eff.glimpse.policies import (
        BestFixedSequence,
        FineToCoarse,
        FixedGrid,
        FixedSequence,
        FullThenRandom,
        GreedyLookahead,
        Oracle,
        Policy,
        RandomPolicy,
        RepeatFullView,
        UniformLowRes,
        make_policy,
    )
    from lightning_eff.glimpse.report import ExplorationReport
    from lightning_eff.glimpse.tasks import ClassificationTask, ReconstructionTask, SegmentationTask, Task
    from lightning_eff.glimpse.world import GlimpseWorld, Step

_PLACES = {
    "agent": ("GlimpseExtractor", "GlimpseReplayBuffer", "GlimpseSAC", "make_sac"),
    "backbones": (
        "CanvasBackbone",
        "ClassHead",
        "ElasticViT",
        "GlimpseBackbone",
        "ImageDecoder",
        "SegmentationHead",
    ),
    "callbacks": ("GlimpseReport",),
    "environments": ("GlimpseEnv", "GlimpseVecEnv"),
    "evaluation": ("PolicyCurve", "PolicyCurves", "evaluate_policies", "stopping_curve"),
    "exploration": ("Trajectory", "explore"),
    "figures": (
        "coverage_figure",
        "curve_figure",
        "exploration_figure",
        "importance_figure",
        "save_animation",
        "scale_figure",
        "steps_figure",
    ),
    "module": ("AdaGlimpseModule",),
    "observation": ("Observation",),
    "policies": (
        "BestFixedSequence",
        "FineToCoarse",
        "FixedGrid",
        "FixedSequence",
        "FullThenRandom",
        "GreedyLookahead",
        "Oracle",
        "Policy",
        "RandomPolicy",
        "RepeatFullView",
        "UniformLowRes",
        "make_policy",
    ),
    "report": ("ExplorationReport",),
    "tasks": ("ClassificationTask", "ReconstructionTask", "SegmentationTask", "Task"),
    "world": ("GlimpseWorld", "Step"),
}
_PLACE_OF = {name: place for place, names in _PLACES.items() for name in names}

__all__ = [
    "AdaGlimpseModule",
    "AgentConfig",
    "BestFixedSequence",
    "CanvasBackbone",
    "ClassHead",
    "ClassificationTask",
    "ElasticViT",
    "ExplorationReport",
    "FineToCoarse",
    "FixedGrid",
    "FixedSequence",
    "FullThenRandom",
    "GlimpseBackbone",
    "GlimpseConfig",
    "GlimpseEnv",
    "GlimpseExtractor",
    "GlimpseReplayBuffer",
    "GlimpseReport",
    "GlimpseSAC",
    "GlimpseVecEnv",
    "GlimpseWorld",
    "GreedyLookahead",
    "ImageDecoder",
    "Observation",
    "Oracle",
    "Policy",
    "PolicyCurve",
    "PolicyCurves",
    "RandomPolicy",
    "ReconstructionTask",
    "RepeatFullView",
    "ReplayOptions",
    "RewardOptions",
    "SegmentationHead",
    "SegmentationTask",
    "Step",
    "Task",
    "TrainingPlan",
    "Trajectory",
    "UniformLowRes",
    "ViTSize",
    "coverage_figure",
    "curve_figure",
    "evaluate_policies",
    "exploration_figure",
    "explore",
    "importance_figure",
    "make_policy",
    "make_sac",
    "save_animation",
    "scale_figure",
    "steps_figure",
    "stopping_curve",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_PLACE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
