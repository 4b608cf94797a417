"""Policies that a learned one has to beat, and some that nothing can beat."""

from __future__ import annotations

from collections.abc import Callable

from lightning_eff.glimpse.config import GlimpseConfig
from lightning_eff.glimpse.policies.base import Policy, PolicyLike
from lightning_eff.glimpse.policies.entropy import AttentionEntropy, QuadtreeEntropy
from lightning_eff.glimpse.policies.fitted import BestFixedSequence
from lightning_eff.glimpse.policies.informed import GreedyLookahead, Oracle
from lightning_eff.glimpse.policies.plain import (
    FineToCoarse,
    FixedGrid,
    FixedSequence,
    FullThenRandom,
    RandomPolicy,
    RepeatFullView,
)
from lightning_eff.glimpse.policies.reference import UniformLowRes

__all__ = [
    "POLICY_NAMES",
    "AttentionEntropy",
    "BestFixedSequence",
    "FineToCoarse",
    "FixedGrid",
    "FixedSequence",
    "FullThenRandom",
    "GreedyLookahead",
    "Oracle",
    "Policy",
    "PolicyLike",
    "QuadtreeEntropy",
    "RandomPolicy",
    "RepeatFullView",
    "UniformLowRes",
    "make_policy",
]

_STILL: dict[str, Callable[[GlimpseConfig], Policy]] = {
    "fixed_grid": FixedGrid,
    "fine_to_coarse": FineToCoarse,
    "repeat_full_view": RepeatFullView,
    "attention_entropy": AttentionEntropy,
    "quadtree_entropy": QuadtreeEntropy,
}
_DRAWN: dict[str, type[RandomPolicy] | type[GreedyLookahead]] = {
    kind.name: kind for kind in (RandomPolicy, FullThenRandom, GreedyLookahead)
}
_MAKE_YOURSELF = {
    "best_fixed_sequence": "BestFixedSequence.fit(backbone, task, config, images, target)",
    "oracle": "Oracle(config, boxes)",
    "uniform_low_res": "UniformLowRes(config)",
}

#: Names that :func:`make_policy` knows.
POLICY_NAMES = (*_DRAWN, "random_area", *_STILL)


def make_policy(name: str, config: GlimpseConfig, seed: int = 0) -> Policy:
    """Make a baseline that needs nothing but the scene.

    Args:
        name: One of :data:`POLICY_NAMES`.
        config: Camera and scene.
        seed: Of policies that draw.

    Raises:
        ValueError: No policy has that name, or it needs data: the message says how to make it.
    """
    if name == "random_area":
        return RandomPolicy(config, scale="area", seed=seed)
    if name in _MAKE_YOURSELF:
        raise ValueError(f"{name} needs data or is no policy: make it with {_MAKE_YOURSELF[name]}")
    if name in _DRAWN:
        return _DRAWN[name](config, seed=seed)
    if name in _STILL:
        return _STILL[name](config)
    raise ValueError(f"policy must be one of {', '.join(POLICY_NAMES)}, got {name!r}")
