"""Look at images with a trained backbone and any policy, without a Trainer, and keep where it looked.

Images that stop leave the batch, and predictions are made only where something depends on them.

Letters: B images, T most glimpses of an episode.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from lightning_eff.batch import take
from lightning_eff.documents import parsed, reading, write_text
from lightning_eff.glimpse.config import ACTION_SIZE, GlimpseConfig
from lightning_eff.glimpse.policies.base import Policy, PolicyLike
from lightning_eff.glimpse.world import GlimpseWorld, Step

#: Name and version of a line of a file of trajectories.
SCHEMA = "lightning_eff.glimpse.trajectory/1"

Predictions = Literal["last", "all", "none"]


@dataclass(frozen=True)
class Trajectory:
    """Where a policy looked in B images, and what came of it. Tensors are on the CPU.

    Numbers of glimpses that an image did not take are NaN.

    Attributes:
        config: Camera and scene.
        actions: (y, x, z) in [0, 1] [B, T, 3].
        views: y0, x0 and side of the field of view in pixels [B, T, 3].
        taken: Glimpses taken of each image [B], int64.
        prediction: Each image's last [B, ...]; None if it was not asked for.
        predictions: After each glimpse [B, T, ...], the last one repeated after a stop; None unless asked for.
        scores: Of nothing seen and after each glimpse [B, T + 1]; None without targets.
    """

    config: GlimpseConfig
    actions: Tensor
    views: Tensor
    taken: Tensor
    prediction: Tensor | None = None
    predictions: Tensor | None = None
    scores: Tensor | None = None

    def __len__(self) -> int:
        return len(self.taken)

    @property
    def pixel_percent(self) -> Tensor:
        """Pixels captured of each image in percent of the scene [B]; overlaps count twice."""
        return self.taken.float() * self.config.pixel_percent(1)

    def records(self, ids: Sequence[Any] | None = None) -> list[dict[str, Any]]:
        """Return one JSON object an image.

        Where predictions are logits of classes [B, T, classes], each glimpse has that of the highest.

        Args:
            ids: Names of images; their numbers from 0 if None.

        Raises:
            ValueError: There are not as many names as images.
        """
        if ids is not None and len(ids) != len(self):
            raise ValueError(f"expected {len(self)} ids, one for each image, got {len(ids)}")
        percent = self.pixel_percent.tolist()
        return [
            {
                "schema": SCHEMA,
                "id": i if ids is None else ids[i],
                "image_size": list(self.config.scene),
                "camera_size": self.config.camera_size,
                "score_of_nothing": None if self.scores is None else float(self.scores[i, 0]),
                "glimpses": [self._glimpse(i, t) for t in range(int(self.taken[i]))],
                "stopped_at": int(self.taken[i]),
                "pixel_percent": round(percent[i], 4),
            }
            for i in range(len(self))
        ]

    def save(self, path: str | Path, ids: Sequence[Any] | None = None) -> Path:
        """Write JSON lines, one an image; folders are made. Arguments as of :meth:`records`."""
        return write_text(path, "".join(json.dumps(record) + "\n" for record in self.records(ids)))

    @classmethod
    def load(cls, path: str | Path, config: GlimpseConfig) -> Self:
        """Read what :meth:`save` wrote: views, actions and scores of glimpses, without predictions.

        Args:
            path: Of the file.
            config: Camera and scene it was written with; ``num_glimpses`` grows to the most that an image has.

        Raises:
            ValueError: A line is of another schema, or of another scene or camera.
        """
        with reading(f"{path} holds no explorations"):
            lines = Path(path).read_text(encoding="utf-8").splitlines()
            records = [parsed(dict[str, Any], json.loads(line), "a line") for line in lines if line]
            return cls._read(records, path, config)

    @classmethod
    def _read(cls, records: Sequence[dict[str, Any]], path: str | Path, config: GlimpseConfig) -> Self:
        for number, record in enumerate(records, 1):
            if record.get("schema") != SCHEMA:
                raise ValueError(f"{path}, line {number}: expected schema {SCHEMA}, got {record.get('schema')!r}")
            found = (*record["image_size"], record["camera_size"])
            if found != (*config.scene, config.camera_size):
                raise ValueError(
                    f"{path}, line {number}: written for image_size {found[:2]} and camera_size {found[2]}, the "
                    f"configuration has {config.scene} and {config.camera_size}"
                )
        most = max(config.num_glimpses, *(len(record["glimpses"]) for record in records), 0)
        config = replace(config, num_glimpses=most)
        numbers = torch.full((len(records), most, 7), torch.nan)
        for i, record in enumerate(records):
            for t, glimpse in enumerate(record["glimpses"]):
                place, score = (glimpse["y0"], glimpse["x0"], glimpse["size"]), glimpse.get("score", torch.nan)
                numbers[i, t] = torch.tensor([*glimpse["action"], *place, score])
        taken = torch.tensor([len(record["glimpses"]) for record in records], dtype=torch.int64)
        first = [record["score_of_nothing"] for record in records]
        scored = bool(records) and None not in first
        scores = torch.cat([torch.tensor(first).unsqueeze(1), numbers[..., 6]], 1) if scored else None
        return cls(config, numbers[..., :3], numbers[..., 3:6], taken, scores=scores)

    @classmethod
    def cat(cls, parts: Iterable[Trajectory]) -> Self:
        """Put trajectories of one configuration behind each other, e.g. those of ``Trainer.predict``."""
        parts = list(parts)
        if not parts:
            raise ValueError("expected at least one trajectory, got none")
        names = ("actions", "views", "taken", "prediction", "predictions", "scores")
        columns = {name: [getattr(part, name) for part in parts] for name in names}
        there = {
            name: None if any(v is None for v in column) else torch.cat(column) for name, column in columns.items()
        }
        return cls(parts[0].config, **there)  # type: ignore[arg-type]

    def to(self, device: torch.device | str) -> Self:
        """Return the same on another device; a Trainer brings what ``predict_step`` returns to the CPU by it."""
        held = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        moved: dict[str, Any] = {name: value.to(device) for name, value in held.items()}
        return replace(self, **moved)

    def _glimpse(self, i: int, t: int) -> dict[str, Any]:
        y0, x0, size = (round(value, 4) for value in self.views[i, t].tolist())
        action = [round(value, 6) for value in self.actions[i, t].tolist()]
        glimpse: dict[str, Any] = {"t": t + 1, "y0": y0, "x0": x0, "size": size, "action": action}
        if self.scores is not None:
            glimpse["score"] = float(self.scores[i, t + 1])
        if self.predictions is not None and self.predictions.ndim == 3:
            glimpse["prediction"] = int(self.predictions[i, t].argmax())
        elif self.prediction is not None and self.prediction.ndim == 2 and t + 1 == int(self.taken[i]):
            glimpse["prediction"] = int(self.prediction[i].argmax())
        return glimpse


def explore(
    world: GlimpseWorld,
    images: Tensor,
    policy: PolicyLike,
    target: Any = None,
    *,
    teacher: Tensor | None = None,
    predictions: Predictions = "last",
    scored: bool = False,
    max_glimpses: int | None = None,
    batch_size: int = 256,
) -> Trajectory:
    """Look at images until each has all its glimpses or its task is confident enough.

    Args:
        world: Backbone, task, camera and scene; left as it is.
        images: Scenes [B, C, H, W].
        policy: Observation of A images to actions [A, 3].
        target: Theirs, for tasks whose score needs one and for policies that know the truth.
        teacher: A teacher's predictions from whole scenes.
        predictions: ``"last"`` one of each image, ``"all"`` after every glimpse, or ``"none"``.
        scored: Whether to score what is predicted after every glimpse, which means a prediction after each.
        max_glimpses: T, if not the configuration's, >= 1.
        batch_size: Images looked at together, >= 1.

    Raises:
        ValueError: An argument lies outside its range, or there are no images.
    """
    if predictions not in ("last", "all", "none"):
        raise ValueError(f"predictions must be 'last', 'all' or 'none', got {predictions!r}")
    if batch_size < 1 or not len(images):
        raise ValueError(f"expected batch_size >= 1 and at least one image, got {batch_size} and {len(images)}")
    config = world.config if max_glimpses is None else replace(world.config, num_glimpses=max_glimpses)
    world = GlimpseWorld(world.backbone, world.task, config, world.reward, world.state_parts)
    parts = []
    for start in range(0, len(images), batch_size):
        some = slice(start, start + batch_size)
        given = images[some], take(target, some), take(teacher, some)
        parts.append(_explore(world, *given, policy, predictions, scored))
    return Trajectory.cat(parts)


@torch.no_grad()
def steps_of(world: GlimpseWorld, policy: PolicyLike, predict: bool | Literal["last"] = "last") -> Iterator[Step]:
    """Drive a world that was just reset until no image takes another glimpse.

    Args:
        world: To be driven.
        policy: Observation of A images to actions [A, 3]; a :class:`Policy` is shown the world first.
        predict: Whether a prediction is wanted after each glimpse, or after the last one of an episode.
    """
    if isinstance(policy, Policy):
        policy.begin(world)
    while world.active:
        last = world.taken + 1 == world.config.num_glimpses
        yield world.step(policy(world.observation), predict=last if predict == "last" else predict)


@torch.no_grad()
def _explore(
    world: GlimpseWorld,
    images: Tensor,
    target: Any,
    teacher: Tensor | None,
    policy: PolicyLike,
    predictions: Predictions,
    scored: bool,
) -> Trajectory:
    count = world.config.num_glimpses
    world.reset(images, target, teacher, scored=scored or needs_scores(policy))
    taken = torch.zeros_like(world.rows)
    actions = torch.full((len(images), count, ACTION_SIZE), torch.nan, device=taken.device)
    views, scores = torch.full_like(actions, torch.nan), torch.full_like(actions[..., 0], torch.nan)
    start, prediction = world.score if scored else None, None
    every: list[Tensor] = []
    for t, step in enumerate(steps_of(world, policy, "last" if predictions == "last" else predictions == "all")):
        taken[step.rows] += 1
        actions[step.rows, t], views[step.rows, t] = step.actions, step.glimpse.view.to(views)
        if step.score is not None:
            scores[step.rows, t] = step.score
        if step.prediction is not None and predictions != "none":
            if prediction is None:
                prediction = step.prediction.new_empty(len(images), *step.prediction.shape[1:])
            prediction[step.rows] = step.prediction
        if predictions == "all" and prediction is not None:
            every.append(prediction.clone())
    every += every[-1:] * (count - len(every))
    return Trajectory(
        config=world.config,
        actions=actions.cpu(),
        views=views.cpu(),
        taken=taken.cpu(),
        prediction=None if prediction is None else prediction.cpu(),
        predictions=torch.stack(every, 1).cpu() if predictions == "all" else None,
        scores=None if start is None else torch.cat([start.unsqueeze(1), scores], 1).cpu(),
    )


def needs_scores(policy: PolicyLike) -> bool:
    """Return whether a policy looks at scores, which a world must be told to make."""
    return isinstance(policy, Policy) and policy.needs_scores
