"""Policies measured on a data set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_eff.batch import BatchKeys
from lightning_eff.glimpse.backbones.base import Encoded, GlimpseBackbone, Seen
from lightning_eff.glimpse.backbones.canvas import CanvasBackbone
from lightning_eff.glimpse.config import GlimpseConfig
from lightning_eff.glimpse.evaluation import PolicyCurves, count_flops, evaluate_policies, stopping_curve
from lightning_eff.glimpse.exploration import explore
from lightning_eff.glimpse.metrics import PolicyMetrics
from lightning_eff.glimpse.policies import FixedGrid, GreedyLookahead, RandomPolicy
from lightning_eff.glimpse.tasks.classification import ClassificationTask
from lightning_eff.glimpse.tasks.reconstruction import ReconstructionTask
from lightning_eff.glimpse.world import GlimpseWorld

CONFIG = GlimpseConfig(image_size=32, num_glimpses=4, patch_size=4)


def classes(stop: float | None = None) -> GlimpseWorld:
    torch.manual_seed(0)
    config = GlimpseConfig(image_size=32, num_glimpses=4, patch_size=4, stop_threshold=stop)
    backbone = CanvasBackbone(1, num_classes=3)
    with torch.no_grad():
        backbone.head.weight.mul_(5)
    return GlimpseWorld(backbone, ClassificationTask(3), config)


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [(torch.rand(n, 1, 32, 32, generator=draw), torch.randint(3, (n,), generator=draw)) for n in (40, 25)]


def test_the_metric_after_every_glimpse_is_that_of_the_predictions(batches: list[tuple[Tensor, Tensor]]) -> None:
    world = classes()
    (curve,) = evaluate_policies(world, batches, {"grid": FixedGrid(CONFIG)}, scored=True)
    images, target = (torch.cat(part) for part in zip(*batches, strict=True))
    seen = explore(world, images, FixedGrid(CONFIG), target, predictions="all", scored=True)
    right = (seen.predictions.argmax(2) == target.unsqueeze(1)).float().mean(0)  # type: ignore[union-attr]
    assert curve.values == pytest.approx(right.tolist())
    assert curve.scores == pytest.approx(seen.scores[:, 1:].mean(0).tolist(), rel=1e-5)  # type: ignore[index]
    assert (curve.metric, curve.higher_is_better, curve.last) == ("accuracy", True, curve.values[-1])
    assert curve.glimpses == (1, 2, 3, 4)
    assert curve.pixel_percent == pytest.approx([6.25, 12.5, 18.75, 25])


def test_images_that_stopped_count_with_their_last_prediction(batches: list[tuple[Tensor, Tensor]]) -> None:
    images, target = batches[0]
    full = explore(classes(), images, FixedGrid(CONFIG), predictions="all")
    stop = float(full.predictions.softmax(2).amax(2)[:, :-1].amax(1).median())  # type: ignore[union-attr]
    world = classes(stop)
    (curve,) = evaluate_policies(world, batches[:1], {"grid": FixedGrid(world.config)})
    early = explore(world, images, FixedGrid(world.config))
    assert curve.last == pytest.approx(float((early.prediction.argmax(1) == target).float().mean()))  # type: ignore[union-attr]
    assert 1 < curve.glimpses[-1] < 4
    assert curve.glimpses[-1] == pytest.approx(float(early.taken.float().mean()))
    assert curve.pixel_percent[-1] == pytest.approx(6.25 * curve.glimpses[-1])


def test_every_batch_counts_once_when_all_its_images_have_stopped(batches: list[tuple[Tensor, Tensor]]) -> None:
    images, target = (torch.cat(part) for part in zip(*batches, strict=True))
    full = explore(classes(), images, FixedGrid(CONFIG), predictions="all")
    world = classes(float(full.predictions.softmax(2).amax(2)[:, :-1].amax(1).median()))  # type: ignore[union-attr]
    ones = [(images[i : i + 1], target[i : i + 1]) for i in range(len(images))]
    metrics = PolicyMetrics(world)
    for one in ones:
        metrics.update(FixedGrid(CONFIG), *one)
    seen = explore(world, images, FixedGrid(CONFIG), predictions="all")
    assert len(seen.taken.unique()) > 1
    right = (seen.predictions.argmax(2) == target.unsqueeze(1)).float().mean(0)  # type: ignore[union-attr]
    found = metrics.compute()
    assert [float(found[f"accuracy@{t}"]) for t in range(1, 5)] == pytest.approx(right.tolist())
    (curve,) = evaluate_policies(world, ones, {"grid": FixedGrid(CONFIG)}, flops=False)
    assert curve.values == pytest.approx(right.tolist())


def test_the_curve_of_thresholds_is_what_stopping_gives(batches: list[tuple[Tensor, Tensor]]) -> None:
    images, target = batches[0]
    full = explore(classes(), images, FixedGrid(CONFIG), predictions="all")
    surest = full.predictions.softmax(2).amax(2)[:, :-1].amax(1)  # type: ignore[union-attr]
    thresholds = (0.0, *surest.quantile(torch.tensor([0.3, 0.6])).tolist(), 1.0)
    points = stopping_curve(full, classes().task, images, target, thresholds)
    for threshold, percent, accuracy in points:
        early = explore(classes(threshold), images, FixedGrid(CONFIG))
        assert percent == pytest.approx(float(early.pixel_percent.mean()), rel=1e-5)
        assert accuracy == pytest.approx(float((early.prediction.argmax(1) == target).float().mean()))  # type: ignore[union-attr]
    assert points[0][1] == 6.25
    assert points[-1][1] == 25
    assert len({percent for _, percent, _ in points}) == 4
    with pytest.raises(ValueError, match="predictions='all'"):
        stopping_curve(explore(classes(), images, FixedGrid(CONFIG)), classes().task, images, target, [0.5])
    stopped = explore(classes(0.0), images, FixedGrid(CONFIG), predictions="all")
    with pytest.raises(ValueError, match=r"40 of 40 images stopped.*stop_threshold=None"):
        stopping_curve(stopped, classes().task, images, target, [0.5])
    with pytest.raises(ValueError, match="ReconstructionTask cannot tell how confident"):
        stopping_curve(full, ReconstructionTask(), images, target, [0.5])


def test_measuring_twice_gives_the_same(batches: list[tuple[Tensor, Tensor]]) -> None:
    policies = {"random": RandomPolicy(CONFIG, seed=2), "ahead": GreedyLookahead(CONFIG, tries=3)}
    first, second = (evaluate_policies(classes(), batches, policies) for _ in range(2))
    assert first == second


def test_a_teacher_scores_and_batches_may_have_another_form_or_images_alone(
    batches: list[tuple[Tensor, Tensor]],
) -> None:
    world, grid = classes(), {"grid": FixedGrid(CONFIG)}
    (plain,) = evaluate_policies(world, batches, grid)
    told = [{"x": images, "y": target} for images, target in batches]
    assert evaluate_policies(world, told, grid, split_batch=BatchKeys("x", "y"))[:] == (plain,)
    world.task.score_kind = "kl"  # type: ignore[assignment]
    policies = grid | {"ahead": GreedyLookahead(CONFIG, tries=2)}
    for curve in evaluate_policies(
        world, batches, policies, scored=True, teacher=lambda images: images.new_zeros(len(images), 3)
    ):
        assert all(score < 0 for score in curve.scores or [0.0])
    canvas = GlimpseWorld(CanvasBackbone(1), ReconstructionTask(), CONFIG)
    alone = evaluate_policies(canvas, [images for images, _ in batches], grid)
    assert alone == evaluate_policies(canvas, batches, grid)


def test_one_of_several_metrics_can_be_chosen(batches: list[tuple[Tensor, Tensor]]) -> None:
    world = GlimpseWorld(CanvasBackbone(1), ReconstructionTask(), CONFIG)
    grid = {"grid": FixedGrid(CONFIG)}
    (whole,) = evaluate_policies(world, batches, grid, metric="rmse", scored=True)
    (mean,) = evaluate_policies(world, batches, grid, metric="rmse_per_image", scored=True)
    assert mean.scores == pytest.approx([-value for value in mean.values], rel=1e-5)
    assert whole.last > mean.last  # the root of a mean is more than the mean of roots
    assert not whole.higher_is_better
    with pytest.raises(ValueError, match=r"metric must be one of rmse, rmse_per_image, got 'accuracy'"):
        evaluate_policies(world, batches, grid, metric="accuracy")
    with pytest.raises(ValueError, match="at least one policy"):
        evaluate_policies(world, batches, {})
    with pytest.raises(ValueError, match="at least one batch"):
        evaluate_policies(world, [], grid)


def test_operations_are_those_of_crops_and_of_one_prediction() -> None:
    class OneProduct(GlimpseBackbone):
        def __init__(self) -> None:
            super().__init__()
            self.channels = 1
            self.layer = nn.Linear(4 * 16, 3)
            self.nothing = nn.Parameter(torch.zeros(1, 4 * 16))

        def encode(self, seen: Seen, importance: bool = False) -> Encoded:
            if not seen.views.shape[1]:
                return Encoded(self.nothing.expand(len(seen.views), -1))
            return Encoded(seen.patches[:, -4:].flatten(1))

        def predict(self, encoded: Encoded, seen: Seen) -> Tensor:
            return self.layer(encoded.pooled)

    world = GlimpseWorld(OneProduct(), ClassificationTask(3), CONFIG)
    counted = count_flops(world, torch.rand(7, 1, 32, 32), FixedGrid(CONFIG))
    # two products a crop, 8 x 32 times 32 x 32 and 8 x 32 times 32 x 8; one prediction of 64 to 3
    assert counted == 4 * 2 * (8 * 32 * 32 + 8 * 32 * 8) + 2 * 64 * 3
    # scores want predictions after every glimpse and before the first, which is a view of a parameter
    looks = GreedyLookahead(CONFIG, tries=1)
    target = torch.zeros(7, dtype=torch.int64)
    assert count_flops(world, torch.rand(7, 1, 32, 32), looks, target) > counted + 8 * 2 * 64 * 3
    assert all(one.requires_grad for one in world.backbone.parameters())


def test_the_table_has_a_row_a_policy_and_a_column_a_glimpse(batches: list[tuple[Tensor, Tensor]]) -> None:
    curves = evaluate_policies(classes(), batches, {"grid": FixedGrid(CONFIG), "random": RandomPolicy(CONFIG)})
    table = curves.table()
    names = [column.name for column in table.columns]
    assert names == ["policy", *(f"accuracy@{t}" for t in range(1, 5)), "glimpses", "pixel %", "FLOPs/image"]
    assert table.rows[1][:2] == ("random", curves[1].values[0])
    assert table.rows[0][-3:-1] == (4.0, 25.0)
    assert "higher is better" in table.caption
    short = [column.name for column in PolicyCurves(curves.curves, every=3).table().columns]
    assert short[1:3] == ["accuracy@3", "accuracy@4"]
    with pytest.raises(ValueError, match="expected curves of one metric and one number of glimpses, got \\[\\]"):
        PolicyCurves([])
