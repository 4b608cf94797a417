"""The world of an agent that looks: a batch of scenes, a camera, and a backbone that says what the glimpses are worth.

A Markov decision process (arXiv 2404.03482, section 3) on tensors: all images of a batch take their next glimpse
together, and those that have stopped leave the tensors. The end of an episode is a true end, nothing follows it.

Letters: B images of the batch, A of them still active, t glimpses taken of each of these, k patches of a glimpse.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_eff.batch import take
from lightning_eff.glimpse.backbones.base import Encoded, Glimpse, GlimpseBackbone, Seen
from lightning_eff.glimpse.config import ACTION_SIZE, GlimpseConfig, RewardOptions, StatePart
from lightning_eff.glimpse.crop import check_images, take_glimpse
from lightning_eff.glimpse.geometry import normalised, views_of
from lightning_eff.glimpse.observation import Observation
from lightning_eff.glimpse.tasks.base import Task

#: y, x and zoom of the largest view, from the middle of the scene.
FULL_VIEW = (0.5, 0.5, 1.0)


@dataclass(frozen=True)
class Step:
    """One more glimpse of each of A images.

    Attributes:
        rows: Places of these images in the batch [A], int64.
        actions: As taken, (y, x, z) in [0, 1] [A, 3]: the first one and the zoom may be given by the configuration.
        glimpse: What was captured.
        observation: A states after the glimpse, those of images that stop included.
        done: Which images take no more glimpses [A], bool.
        score: After the glimpse [A]; None in a world that does not score.
        reward: Of the glimpse [A]; None as above.
        prediction: After the glimpse [A, ...]; None unless it was asked for or needed.
        seen: All that has been seen of these images.
    """

    rows: Tensor
    actions: Tensor
    glimpse: Glimpse
    observation: Observation
    done: Tensor
    score: Tensor | None
    reward: Tensor | None
    prediction: Tensor | None
    seen: Seen


class GlimpseWorld:
    """A batch of scenes that is looked at glimpse by glimpse.

    The backbone is asked in evaluation mode and without a graph, and given back in its own mode. It is asked for no
    more than is needed: a prediction where something is scored, may stop or asked for one, an encoding where that or
    the state needs one.

    Example::

        observation = world.reset(images, target)
        while world.active:
            step = world.step(policy(world.observation))

    Args:
        backbone: Predicts from glimpses.
        task: Judges predictions.
        config: Camera, scene and end of an episode.
        reward: What a glimpse is paid.
        state_parts: What observations tell of each patch; boxes are always told.

    Attributes:
        rows: Places of active images in the batch [A], int64.
        images: Active scenes [A, C, H, W], floating point.
        target: Their targets.
        teacher: The teacher's prediction for them; None without a teacher.
        seen: What has been seen of them.
        observation: A states that ask for actions.
        score: Of what has been seen [A]; None in a world that does not score.
        taken: t.

    Raises:
        ValueError: There is a stop threshold and the task cannot tell how confident a prediction is, or the state is
            to tell what the backbone does not have.
    """

    rows: Tensor
    images: Tensor
    target: Any
    teacher: Tensor | None
    seen: Seen
    observation: Observation
    score: Tensor | None

    def __init__(
        self,
        backbone: GlimpseBackbone,
        task: Task,
        config: GlimpseConfig,
        reward: RewardOptions = RewardOptions(),  # noqa: B008 (frozen)
        state_parts: Sequence[StatePart] = ("patch", "box"),
    ) -> None:
        if config.stop_threshold is not None and type(task).confidence is Task.confidence:
            raise ValueError(
                f"stop_threshold = {config.stop_threshold} needs a task that can tell how confident a prediction is, "
                f"and {type(task).__name__} cannot: set stop_threshold to null (None in Python)"
            )
        check_state_parts(state_parts, backbone)
        self.backbone, self.task, self.config, self.reward = backbone, task, config, reward
        self.state_parts = tuple(state_parts)
        self._camera = replace(config, fixed_scale=None)  # actions as taken have it already, the full view has not
        self.taken = 0
        self._scored = False

    @property
    def active(self) -> int:
        """A, number of images that take another glimpse."""
        return len(self.rows)

    def reset(
        self, images: Tensor, target: Any = None, teacher: Tensor | None = None, *, scored: bool = True
    ) -> Observation:
        """Begin an episode of every image.

        Args:
            images: Scenes [B, C, H, W]; bytes are divided by 255.
            target: What the task needs to know of them.
            teacher: A teacher's prediction from whole scenes [B, ...].
            scored: Whether predictions are scored; rewards need it.

        Returns:
            B states without a token.

        Raises:
            ValueError: Scenes are not of the configured size.
            FloatingPointError: A score is not finite; the message tells of which images.
        """
        check_images(images, self.config)
        if not images.is_floating_point():
            images = images.float() / 255
        self.images, self.target, self.teacher = images, target, teacher
        self.rows = torch.arange(len(images), device=images.device)
        self.seen = self.backbone.begin(images, self.config.patch_size)
        self.taken, self._scored = 0, scored
        encoded, prediction = self._ask(self.seen, predict=scored)
        self.observation = self._observation(self.seen, encoded)
        self.score = self._score(prediction) if scored and prediction is not None else None
        return self.observation

    def step(self, actions: Tensor, *, predict: bool = False) -> Step:
        """Take a glimpse of every active image.

        Args:
            actions: (y, x, z) in [0, 1] [A, 3].
            predict: Whether a prediction is wanted.

        Returns:
            What came of it, for the A images that were active; :attr:`observation` and its like then tell of those
            that still are.

        Raises:
            ValueError: An action lies outside [0, 1] or is no number, or no image is active.
            FloatingPointError: A score is not finite; the message tells of which images.
        """
        step = self.look(actions, predict=predict)
        self.taken += 1
        self.seen, self.observation, self.score = step.seen, step.observation, step.score
        if self.taken >= self.config.num_glimpses:
            self._keep(self.rows.new_zeros(0))
        elif self.config.stop_threshold is not None and bool(step.done.any()):
            self._keep((~step.done).nonzero().squeeze(1))
        return step

    def look(self, actions: Tensor, *, predict: bool = False) -> Step:
        """Return what :meth:`step` would return, and take no glimpse; arguments as there."""
        if not self.active:
            raise ValueError("no image takes another glimpse: call reset with new ones")
        if tuple(actions.shape) != (self.active, ACTION_SIZE):
            raise ValueError(
                f"expected actions [{self.active}, {ACTION_SIZE}], one for each active image, got {list(actions.shape)}"
            )
        actions = self._as_taken(actions.to(self.images.device, torch.float32))
        glimpse = take_glimpse(self.images, views_of(actions, self._camera), self.config)
        seen = self.backbone.observe(self.seen, glimpse)
        last = self.taken + 1 >= self.config.num_glimpses
        threshold = None if last else self.config.stop_threshold
        encoded, prediction = self._ask(seen, predict=predict or self._scored or threshold is not None)
        done = torch.full_like(self.rows, last, dtype=torch.bool)
        if threshold is not None and prediction is not None:
            confidence = self.task.confidence(prediction)
            assert confidence is not None
            done = confidence >= threshold
        score = self._score(prediction, self.taken + 1) if self._scored and prediction is not None else None
        return Step(
            rows=self.rows,
            actions=actions,
            glimpse=glimpse,
            observation=self._observation(seen, encoded),
            done=done,
            score=score,
            reward=None if score is None else self._reward(score, actions),
            prediction=prediction,
            seen=seen,
        )

    def predict(self) -> Tensor:
        """Return the prediction from what has been seen of active images [A, ...]."""
        prediction = self._ask(self.seen, predict=True)[1]
        assert prediction is not None
        return prediction

    def _as_taken(self, actions: Tensor) -> Tensor:
        if self.config.first_glimpse == "full" and self.taken == 0:
            return torch.tensor(FULL_VIEW, device=actions.device).expand_as(actions)
        if self.config.fixed_scale is None:
            return actions
        zoom = torch.full_like(actions[:, 2:], self.config.fixed_scale)
        return torch.cat([actions[:, :2], zoom], 1)

    @torch.no_grad()
    def _ask(self, seen: Seen, predict: bool) -> tuple[Encoded | None, Tensor | None]:
        importance = "importance" in self.state_parts
        if not (predict or importance or "latent" in self.state_parts):
            return None, None
        with evaluating(self.backbone):
            encoded = self.backbone.encode(seen, importance=importance)
            return encoded, self.backbone.predict(encoded, seen) if predict else None

    @torch.no_grad()
    def _observation(self, seen: Seen, encoded: Encoded | None) -> Observation:
        parts = self.state_parts
        latents = encoded.latents if encoded is not None and "latent" in parts else None
        importance = encoded.importance if encoded is not None and "importance" in parts else None
        return Observation.of_equal_lengths(
            normalised(seen.boxes, self.config.scene).float(),
            patches=seen.patches.float() if "patch" in parts else None,
            importance=None if importance is None else importance.float(),
            latents=None if latents is None else latents.float(),
        )

    @torch.no_grad()
    def _score(self, prediction: Tensor, taken: int = 0) -> Tensor:
        score = self.task.score(prediction, self.images, self.target, self.teacher).float()
        if not bool(torch.isfinite(score).all()):
            bad = self.rows[~torch.isfinite(score)].tolist()
            raise FloatingPointError(
                f"the score is not finite for images {bad} of the batch after glimpse {taken}: look at these images "
                "and lower the learning rate of the backbone if its weights are not finite either"
            )
        return score

    def _reward(self, score: Tensor, actions: Tensor) -> Tensor:
        kind = self.reward.kind
        if kind == "difference":
            assert self.score is not None
            paid = score - self.score
        elif kind == "score_normalized":
            paid = (score - score.mean()) / score.std(correction=0).clamp_min(1e-8)
        else:
            paid = score
        return self.reward.scale * paid - self.reward.scale_penalty * actions[:, 2]

    def _keep(self, active: Tensor) -> None:
        """Go on with these of the active images alone."""
        self.rows, self.images = self.rows[active], self.images[active]
        self.target, self.teacher = take(self.target, active), take(self.teacher, active)
        self.score = take(self.score, active)
        self.seen, self.observation = self.seen.take(active), self.observation.take(active)


def check_state_parts(state_parts: Sequence[StatePart], backbone: GlimpseBackbone) -> None:
    """Raise a ValueError if the state is to tell what the backbone does not have."""
    has = {"latent": backbone.latent_dim > 0, "importance": backbone.has_importance}
    for part, there in has.items():
        if part in state_parts and not there:
            told = tuple(name for name in state_parts if has.get(name, True))
            raise ValueError(
                f"state_parts has {part!r}, and {type(backbone).__name__} tells no {part} of patches: use "
                f"state_parts={told or ('patch', 'box')}"
            )


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode, and each part back into its own on leaving."""
    trained = [part for part in module.modules() if part.training]
    try:
        for part in trained:
            part.training = False
        yield
    finally:
        for part in trained:
            part.training = True
