"""The best sequence of glimpses that is the same for every image: what a policy gains without looking.

Found by the cross-entropy method: R. Rubinstein, Methodology and Computing in Applied Probability 1, 1999.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from lightning_eff.glimpse.backbones.base import GlimpseBackbone
from lightning_eff.glimpse.config import ACTION_SIZE, GlimpseConfig
from lightning_eff.glimpse.policies.plain import FixedGrid, FixedSequence
from lightning_eff.glimpse.tasks.base import Task
from lightning_eff.glimpse.world import GlimpseWorld
from lightning_eff.reporting import progress
from lightning_eff.surgery.state import quiet_model

_SPREAD = 0.02  # least standard deviation of a coordinate while searching
_KEEP = 0.3  # of the old mean and spread in each round


class BestFixedSequence(FixedSequence):
    """One sequence for all images, fitted on training images by :meth:`fit`; the best policy that never looks."""

    name: ClassVar[str] = "best_fixed_sequence"

    @classmethod
    def fit(
        cls,
        backbone: GlimpseBackbone,
        task: Task,
        config: GlimpseConfig,
        images: Tensor,
        target: Any = None,
        *,
        rounds: int = 20,
        population: int = 40,
        seed: int = 0,
        show: bool = False,
    ) -> Self:
        """Search the sequence with the highest mean score after the last glimpse.

        Args:
            backbone: Predicts; not changed.
            task: Scores.
            config: Camera and scene.
            images: Training scenes [B, C, H, W]; some hundreds will do.
            target: Theirs, first axis B; None where the task needs none.
            rounds: Of the search, >= 1.
            population: Sequences tried a round, >= 5.
            seed: Of the search's own generator.
            show: Whether to show progress.

        Raises:
            ValueError: ``rounds`` or ``population`` is too small.
        """
        if rounds < 1 or population < 5:
            raise ValueError(f"expected rounds >= 1 and population >= 5, got {rounds} and {population}")
        draw = torch.Generator().manual_seed(seed)
        shape = config.num_glimpses, ACTION_SIZE
        mean, spread = torch.full(shape, 0.5), torch.full(shape, 0.35)
        grid = FixedGrid(config)
        best = torch.stack([grid.actions[t % len(grid.actions)] for t in range(config.num_glimpses)])
        with quiet_model(backbone), torch.no_grad():
            highest = float(sequence_scores(backbone, task, config, images, target, best).mean())
            with progress("best fixed sequence", rounds * population, enabled=show, unit="sequences") as bar:
                for _ in range(rounds):
                    tried = (mean + spread * torch.randn(population, *shape, generator=draw)).clamp_(0, 1)
                    scores = []
                    for actions in tried:
                        scores.append(float(sequence_scores(backbone, task, config, images, target, actions).mean()))
                        bar.advance(note=f"{max(highest, *scores, -torch.inf):.4g}")
                    elite = tried[torch.tensor(scores).argsort(descending=True)[: max(3, population // 6)]]
                    if max(scores) > highest:
                        highest, best = max(scores), elite[0]
                    mean = _KEEP * mean + (1 - _KEEP) * elite.mean(0)
                    spread = (_KEEP * spread + (1 - _KEEP) * elite.std(0)).clamp_(min=_SPREAD)
        return cls(config, best)


def sequence_scores(
    backbone: GlimpseBackbone, task: Task, config: GlimpseConfig, images: Tensor, target: Any, actions: Tensor
) -> Tensor:
    """Return the score of each image after the last of given glimpses [B].

    Args:
        backbone: Predicts.
        task: Scores.
        config: Camera and scene.
        images: Scenes [B, C, H, W].
        target: Theirs.
        actions: The same for all images [t, 3], or of each image [B, t, 3].
    """
    given = actions.unbind(-2)
    world = GlimpseWorld(backbone, task, replace(config, num_glimpses=len(given), stop_threshold=None))
    world.reset(images, target, scored=False)
    images, prediction = world.images, None  # bytes are floating point now
    for action in given:
        step = world.step(action.to(images.device).expand(len(images), ACTION_SIZE), predict=action is given[-1])
        prediction = step.prediction
    assert prediction is not None
    return task.score(prediction, images, target)
