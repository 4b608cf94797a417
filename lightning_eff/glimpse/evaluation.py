"""What policies are worth on a data set: the task's metric after every glimpse, and what it costs.

Letters: B images, T glimpses of an episode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightning_eff.batch import SplitBatch, take
from lightning_eff.batch import split_batch as split_pair
from lightning_eff.glimpse.exploration import Trajectory, explore, needs_scores, steps_of
from lightning_eff.glimpse.policies.base import Policy, PolicyLike
from lightning_eff.glimpse.tasks.base import Task
from lightning_eff.glimpse.world import GlimpseWorld
from lightning_eff.reporting import Column, Report, Table, human
from lightning_eff.surgery.state import parameters_require_grad

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COUNTED = 16  # images of which operations are counted


@dataclass(frozen=True)
class PolicyCurve:
    """What a policy reaches after 1 to T glimpses.

    Images that stopped count with their last prediction.

    Attributes:
        policy: Its name.
        metric: Name of one of the task's metrics.
        higher_is_better: Of that metric.
        values: It, after each glimpse.
        glimpses: Mean number of glimpses that images have taken by then.
        pixel_percent: Pixels captured by then in percent of the scene, mean of the images.
        scores: Mean score after each glimpse; None if nothing was scored.
        flops: Floating-point operations an image and episode, with predictions only where they are needed; None if
            not counted.
    """

    policy: str
    metric: str
    higher_is_better: bool
    values: tuple[float, ...]
    glimpses: tuple[float, ...]
    pixel_percent: tuple[float, ...]
    scores: tuple[float, ...] | None = None
    flops: float | None = None

    @property
    def last(self) -> float:
        """The metric after the last glimpse."""
        return self.values[-1]


@dataclass(frozen=True)
class PolicyCurves(Sequence[PolicyCurve], Report):
    """Curves of several policies side by side: table and figure ``policies``.

    Args:
        curves: Of one task and one number of glimpses, at least one.
        title: Of the table.
        every: The table shows each so many glimpses, the last in any case, >= 1.

    Raises:
        ValueError: There are no curves, or they do not belong together.
    """

    curves: Sequence[PolicyCurve]
    title: str = "Policies"
    every: int = 1

    def __post_init__(self) -> None:
        kinds = {(curve.metric, len(curve.values)) for curve in self.curves}
        if len(kinds) != 1:
            raise ValueError(f"expected curves of one metric and one number of glimpses, got {sorted(kinds)}")

    @overload
    def __getitem__(self, index: int) -> PolicyCurve: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[PolicyCurve]: ...
    def __getitem__(self, index: int | slice) -> PolicyCurve | Sequence[PolicyCurve]:
        return self.curves[index]

    def __len__(self) -> int:
        return len(self.curves)

    def tables(self) -> dict[str, Table]:
        """A row a policy: its metric after glimpses, mean glimpses, pixels and operations."""
        metric, count = self.curves[0].metric, len(self.curves[0].values)
        shown = sorted({*range(self.every, count + 1, self.every), count})
        digits = ".3f" if all(abs(value) <= 1 for curve in self.curves for value in curve.values) else ".2f"
        columns: list[str | Column] = ["policy", *(Column(f"{metric}@{t}", digits) for t in shown)]
        columns += [Column("glimpses", ".2f"), Column("pixel %", ".2f"), Column("FLOPs/image", human)]
        rows = [
            [
                curve.policy,
                *(curve.values[t - 1] for t in shown),
                curve.glimpses[-1],
                curve.pixel_percent[-1],
                curve.flops,
            ]
            for curve in self.curves
        ]
        better = "higher" if self.curves[0].higher_is_better else "lower"
        caption = f"{metric} after each number of glimpses, {better} is better"
        return {"policies": Table(self.title, columns, rows, caption)}

    def figures(self) -> dict[str, Figure]:
        """The metric against pixels captured, a line a policy."""
        from lightning_eff.glimpse.figures import curve_figure

        return {"policies": curve_figure(self.curves)}


def evaluate_policies(
    world: GlimpseWorld,
    batches: Iterable[Any],
    policies: Mapping[str, PolicyLike],
    *,
    metric: str | None = None,
    split_batch: SplitBatch | None = None,
    teacher: Callable[[Tensor], Tensor] | None = None,
    scored: bool = False,
    flops: bool = True,
) -> PolicyCurves:
    """Let every policy look at all images.

    Args:
        world: Backbone, task, camera and scene.
        batches: Of images [B, C, H, W] and targets, or of images alone, read once; a DataLoader, or a list.
        policies: By name. A :class:`Policy` begins anew.
        metric: Name of one of the task's; None takes the first.
        split_batch: ``batch -> (images, target)``, for batches of another form.
        teacher: Images to a teacher's predictions, for tasks that score by it.
        scored: Whether scores are told as well.
        flops: Whether to count operations, on the first images.

    Raises:
        ValueError: There is no policy, no batch, or no such metric.
    """
    named = [str(name) for name in world.task.metrics()]
    shown = named[0] if metric is None else metric
    if shown not in named:
        raise ValueError(f"metric must be one of {', '.join(named)}, got {metric!r}")
    if not policies:
        raise ValueError("expected at least one policy, got none")
    tallies: dict[str, _Tally] = {}
    for batch in batches:
        if split_batch is None and isinstance(batch, Tensor):
            images, target = batch, None
        else:
            images, target = (split_batch or split_pair)(batch)
        with torch.no_grad():
            told = None if teacher is None else teacher(images)
        for name, policy in policies.items():
            if name not in tallies:
                some, its_target, its_teacher = (take(given, slice(_COUNTED)) for given in (images, target, told))
                counted = count_flops(world, some, policy, its_target, its_teacher) if flops else None
                tallies[name] = _Tally(world, name, shown, scored, counted)
                if isinstance(policy, Policy):
                    policy.restart()
            tallies[name].add(images, target, told, policy)
    if not tallies:
        raise ValueError("expected at least one batch, got none")
    return PolicyCurves(tuple(tally.curve() for tally in tallies.values()))


class _Tally:
    """Metrics of one policy after every glimpse, batch by batch."""

    def __init__(self, world: GlimpseWorld, policy: str, metric: str, scored: bool, flops: float | None) -> None:
        self.world, self.policy, self.metric, self.scored, self.flops = world, policy, metric, scored, flops
        count = world.config.num_glimpses
        self.metrics = [world.task.metrics()[metric] for _ in range(count)]
        self.taken, self.score = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
        self.images = 0

    def add(self, images: Tensor, target: Any, teacher: Tensor | None, policy: PolicyLike) -> None:
        world = self.world
        world.reset(images, target, teacher, scored=self.scored or needs_scores(policy))
        whole, score, prediction = world.images, torch.zeros(len(images), device=world.images.device), Tensor()
        for t, step in zip_longest(range(len(self.metrics)), steps_of(world, policy, predict=True)):
            if step is not None:  # else all have stopped
                assert step.prediction is not None
                if t == 0:
                    prediction = step.prediction.clone()
                prediction[step.rows] = step.prediction
                self.taken[t] += len(step.rows)
                if step.score is not None:
                    score[step.rows] = step.score
            self.metrics[t].to(prediction.device).update(*world.task.metric_inputs(prediction, whole, target))
            self.score[t] += score.sum().cpu()
        self.images += len(images)

    def curve(self) -> PolicyCurve:
        glimpses = (self.taken.cumsum(0) / self.images).tolist()
        return PolicyCurve(
            policy=self.policy,
            metric=self.metric,
            higher_is_better=bool(self.metrics[0].higher_is_better),
            values=tuple(float(metric.compute()) for metric in self.metrics),
            glimpses=tuple(glimpses),
            pixel_percent=tuple(self.world.config.pixel_percent(count) for count in glimpses),
            scores=tuple((self.score / self.images).tolist()) if self.scored else None,
            flops=self.flops,
        )


def count_flops(
    world: GlimpseWorld, images: Tensor, policy: PolicyLike, target: Any = None, teacher: Tensor | None = None
) -> float:
    """Return floating-point operations an image of whole episodes: crop, backbone and policy.

    A multiply-add counts as two. Predictions are made only where they are needed.

    Args:
        world: Backbone, task, camera and scene.
        images: Scenes [B, C, H, W].
        policy: Whose.
        target: Theirs, for policies that know the truth.
        teacher: A teacher's predictions from whole scenes, for policies that need scores.
    """
    # the counter does not know the fused attention of CPUs, and stumbles over inputs that are views of parameters
    frozen = parameters_require_grad(world.backbone, False)
    with frozen, FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        explore(world, images, policy, target, teacher=teacher)
    return float(counter.get_total_flops()) / len(images)


def stopping_curve(
    trajectory: Trajectory, task: Task, images: Tensor, target: Any, thresholds: Sequence[float]
) -> list[tuple[float, float, float]]:
    """Return what stopping at each threshold would have given: threshold, mean pixel %, metric.

    Args:
        trajectory: With predictions after every glimpse, explored without a threshold.
        task: Tells confidence and metric.
        images: The scenes explored [B, C, H, W].
        target: Theirs.
        thresholds: Confidences in [0, 1].

    Raises:
        ValueError: The trajectory lacks predictions or has stopped itself, or the task cannot tell how confident it is.
    """
    predictions, count = trajectory.predictions, trajectory.config.num_glimpses
    if predictions is None:
        raise ValueError("expected a trajectory with predictions after every glimpse: explore(..., predictions='all')")
    stopped = int((trajectory.taken < count).sum())
    if stopped:
        raise ValueError(
            f"expected a trajectory without early stops, got one in which {stopped} of {len(trajectory)} images "
            "stopped before their last glimpse: explore with GlimpseConfig(stop_threshold=None)"
        )
    told = [task.confidence(predictions[:, t]) for t in range(count)]
    confidence = torch.stack([one for one in told if one is not None], 1) if told[0] is not None else None
    if confidence is None:
        raise ValueError(f"{type(task).__name__} cannot tell how confident a prediction is: nothing stops early")
    points, rows = [], torch.arange(len(trajectory))
    for threshold in thresholds:
        sure = confidence >= threshold
        sure[:, -1] = True
        stop = sure.float().argmax(1)  # the first of the largest
        metrics = task.metrics()
        metrics.update(*task.metric_inputs(predictions[rows, stop], images, target))
        value = float(next(iter(metrics.compute().values())))
        points.append((threshold, trajectory.config.pixel_percent(float((stop + 1).float().mean())), value))
    return points
