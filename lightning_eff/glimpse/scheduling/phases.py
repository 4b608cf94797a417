"""Who learns when, and how fast: the course of training of arXiv 2404.03482, section 3 and supplement."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_eff.glimpse.config import TrainingPlan


@dataclass(frozen=True)
class Phase:
    """What one batch teaches.

    Attributes:
        name: As messages call it.
        number: As logs call it.
        agent: Whether the agent learns.
        backbone: Whether the backbone learns.
        random: Whether glimpses are drawn at random, without the agent.
    """

    name: str
    number: int
    agent: bool = False
    backbone: bool = False
    random: bool = False


@dataclass
class Counts:
    """How far training has come.

    Attributes:
        turns: Batches since turns began.
        glimpses: Glimpses of a batch that the agent, or chance in its place, has chosen.
        env_steps: Transitions stored.
        unpaid: Batches in a row in which no glimpse changed a score.
        stale: Whether the backbone has learnt since transitions were last forgotten.
    """

    turns: int = 0
    glimpses: int = 0
    env_steps: int = 0
    unpaid: int = 0
    stale: bool = False


PRETRAINING = Phase("pretraining", 0, backbone=True, random=True)
AGENT = Phase("agent", 1, agent=True)
BACKBONE = Phase("backbone", 2, backbone=True)
BOTH = Phase("agent and backbone", 3, agent=True, backbone=True)

_CONSTANT = {"constant": BOTH, "frozen": AGENT, "backbone_only": BACKBONE}


def phase_of(plan: TrainingPlan, epoch: int, batches: int) -> Phase:
    """Return the phase of a batch.

    Args:
        plan: Of training.
        epoch: Whose batch it is, from 0.
        batches: Batches that were trained on since turns began, before this one.
    """
    if epoch < plan.pretrain_epochs:
        return PRETRAINING
    turns_since = epoch - plan.pretrain_epochs - plan.rl_only_epochs
    if turns_since < 0:
        return AGENT
    if plan.regime != "alternating":
        return _CONSTANT[plan.regime]
    done = turns_since if plan.alternate_unit == "epoch" else batches
    return AGENT if done // plan.alternate_every % 2 == 0 else BACKBONE


def batches_of_a_turn(plan: TrainingPlan, batches: float) -> float:
    """Return after how many batches at most the backbone learns again, once turns have begun.

    Args:
        plan: Of training.
        batches: Of an epoch.
    """
    if plan.regime == "constant":
        return 1
    if plan.regime != "alternating":
        return math.inf
    return plan.alternate_every * (1 if plan.alternate_unit == "batch" else batches)


def turns_begun(plan: TrainingPlan, epoch: int) -> bool:
    """Whether batches of this epoch count as those of a turn."""
    return epoch >= plan.pretrain_epochs + plan.rl_only_epochs


def trains_backbone(plan: TrainingPlan) -> bool:
    """Whether the backbone ever learns."""
    return plan.pretrain_epochs > 0 or plan.regime != "frozen"


def trains_agent(plan: TrainingPlan) -> bool:
    """Whether the agent ever learns."""
    return plan.rl_only_epochs > 0 or plan.regime != "backbone_only"


def learning_rate_factor(plan: TrainingPlan, progress: float | None) -> float:
    """Return what a learning rate is multiplied by, in [0, 1].

    Args:
        plan: Of training.
        progress: Share of training that is done, in [0, 1]; None if nobody knows when it ends.
    """
    if plan.learning_rates == "constant" or progress is None:
        return 1.0
    warmup = plan.warmup_fraction
    if progress < warmup:
        return progress / warmup
    return (1 + math.cos(math.pi * (min(progress, 1) - warmup) / (1 - warmup))) / 2


def progress_after(progress: float | None, start: float) -> float | None:
    """Return the share of what begins at ``start`` that is done; all shares in [0, 1]."""
    return None if progress is None else max(0.0, (progress - start) / (1 - start)) if start < 1 else 0.0
