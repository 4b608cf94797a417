"""Exploring images without a Trainer, and the files that tell of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_eff.glimpse.backbones.canvas import CanvasBackbone
from lightning_eff.glimpse.config import GlimpseConfig
from lightning_eff.glimpse.exploration import SCHEMA, Trajectory, explore
from lightning_eff.glimpse.figures import coverage_figure, exploration_figure, scale_figure
from lightning_eff.glimpse.observation import Observation
from lightning_eff.glimpse.policies import FixedGrid, RandomPolicy
from lightning_eff.glimpse.tasks.classification import ClassificationTask
from lightning_eff.glimpse.tasks.reconstruction import ReconstructionTask
from lightning_eff.glimpse.world import GlimpseWorld


def classes(stop: float | None = None, glimpses: int = 5) -> GlimpseWorld:
    torch.manual_seed(0)
    config = GlimpseConfig(image_size=32, num_glimpses=glimpses, patch_size=4, stop_threshold=stop)
    backbone = CanvasBackbone(1, num_classes=3)
    with torch.no_grad():
        backbone.head.weight.mul_(5)  # confidences that differ
    return GlimpseWorld(backbone, ClassificationTask(3), config)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(12, 1, 32, 32, generator=torch.Generator().manual_seed(1))


def threshold(images: Tensor) -> float:
    """One at which some images stop early and others do not."""
    full = explore(classes(), images, FixedGrid(classes().config), predictions="all")
    assert full.predictions is not None
    return float(full.predictions.softmax(2).amax(2)[:, :-1].amax(1).median())


def test_images_that_stop_keep_the_prediction_of_the_whole_run(images: Tensor) -> None:
    stop = threshold(images)
    world = classes(stop)
    policy = FixedGrid(world.config)
    whole, early = explore(classes(), images, policy, predictions="all"), explore(world, images, policy)
    assert 0 < int((early.taken < 5).sum()) < len(images)
    assert whole.predictions is not None
    torch.testing.assert_close(early.prediction, whole.predictions[torch.arange(12), early.taken - 1])
    told = explore(world, images, policy, predictions="all").predictions
    torch.testing.assert_close(told[:, -1], early.prediction)  # type: ignore[index]
    for row, taken in enumerate(early.taken.tolist()):
        assert bool(early.views[row, :taken].isfinite().all())
        assert bool(early.views[row, taken:].isnan().all())
    assert early.pixel_percent.tolist() == pytest.approx([100 * t * 64 / 1024 for t in early.taken.tolist()])


def test_nothing_is_predicted_that_is_not_needed(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    world, asked = classes(), []
    predict = world.backbone.predict
    monkeypatch.setattr(world.backbone, "predict", lambda *args: asked.append(1) or predict(*args))
    policy = FixedGrid(world.config)
    lazy = explore(world, images, policy)
    assert len(asked) == 1
    every = explore(world, images, policy, predictions="all")
    assert len(asked) == 1 + 5
    nothing = explore(world, images, policy, predictions="none")
    assert len(asked) == 6
    assert nothing.prediction is None
    torch.testing.assert_close(lazy.prediction, every.predictions[:, -1])  # type: ignore[index]
    assert lazy.predictions is None


def test_batches_do_not_matter(images: Tensor) -> None:
    world = classes(threshold(images))
    policy = FixedGrid(world.config)
    whole, parts = (explore(world, images, policy, predictions="all", batch_size=size) for size in (12, 5))
    assert torch.equal(whole.taken, parts.taken)
    torch.testing.assert_close(whole.predictions, parts.predictions)
    torch.testing.assert_close(whole.views, parts.views, equal_nan=True)


def test_the_number_of_glimpses_can_be_another_one_and_the_world_stays_as_it_is(images: Tensor) -> None:
    world = classes()
    world.backbone.train()
    seen = explore(world, images, RandomPolicy(world.config), max_glimpses=7)
    assert seen.views.shape == (12, 7, 3)
    assert world.config.num_glimpses == 5
    assert world.backbone.training
    assert not seen.prediction.requires_grad  # type: ignore[union-attr]
    assert not hasattr(world, "images")


def test_scores_are_those_of_nothing_and_of_every_glimpse(images: Tensor) -> None:
    config = GlimpseConfig(image_size=32, num_glimpses=3, patch_size=4)
    task = ReconstructionTask()
    world = GlimpseWorld(CanvasBackbone(1), task, config)
    seen = explore(world, images, FixedGrid(config), predictions="all", scored=True)
    assert seen.scores is not None
    torch.testing.assert_close(seen.scores[:, 0], -255 * images.square().mean((1, 2, 3)).sqrt())
    torch.testing.assert_close(seen.scores[:, 2], task.score(seen.predictions[:, 1], images, None))  # type: ignore[index]
    assert explore(world, images, FixedGrid(config)).scores is None


def test_any_callable_is_a_policy_and_its_mistakes_are_named(images: Tensor) -> None:
    world = classes()
    seen = explore(world, images, lambda observation: torch.full((len(observation), 3), 0.5))
    assert seen.actions.unique().tolist() == [0.5]

    def wrong(observation: Observation) -> Tensor:
        actions = torch.full((len(observation), 3), 0.5)
        actions[4, 1] = 1.5
        return actions

    with pytest.raises(ValueError, match=r"\[0.5, 1.5, 0.5\] in row 4"):
        explore(world, images, wrong)
    with pytest.raises(ValueError, match="predictions must be 'last', 'all' or 'none', got 'some'"):
        explore(world, images, wrong, predictions="some")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_size >= 1 and at least one image, got 256 and 0"):
        explore(world, images[:0], wrong)


def test_json_lines_tell_every_glimpse(images: Tensor, tmp_path: Path) -> None:
    world = classes(threshold(images))
    target = torch.arange(12) % 3
    seen = explore(world, images, FixedGrid(world.config), target, predictions="all", scored=True)
    path = seen.save(tmp_path / "made" / "seen.jsonl", ids=[f"image-{i}" for i in range(12)])

    def no_nan(name: str) -> Any:
        raise AssertionError(f"{name} is no JSON")

    lines = [json.loads(line, parse_constant=no_nan) for line in path.read_text().splitlines()]
    assert len(lines) == 12
    row = int(seen.taken.argmin())
    record, stopped = lines[row], int(seen.taken[row])
    assert record["schema"] == SCHEMA
    assert record["id"] == f"image-{row}"
    assert record["stopped_at"] == stopped < 5
    assert [glimpse["t"] for glimpse in record["glimpses"]] == list(range(1, stopped + 1))
    first = record["glimpses"][0]
    assert (first["y0"], first["x0"], first["size"], first["action"]) == (0, 0, 32, [0.5, 0.5, 1.0])
    assert first["prediction"] == int(seen.predictions[row, 0].argmax())  # type: ignore[index]
    assert first["score"] == pytest.approx(float(seen.scores[row, 1]))  # type: ignore[index]

    again = Trajectory.load(path, world.config)
    torch.testing.assert_close(again.views, seen.views, equal_nan=True, atol=1e-4, rtol=0)
    torch.testing.assert_close(again.scores, seen.scores, equal_nan=True)
    assert torch.equal(again.taken, seen.taken)


def test_without_scores_and_with_one_prediction_lines_say_less(images: Tensor, tmp_path: Path) -> None:
    world = classes()
    seen = explore(world, images, FixedGrid(world.config))
    glimpses = seen.records()[3]["glimpses"]
    assert [sorted({"score", "prediction"} & set(glimpse)) for glimpse in glimpses] == [[]] * 4 + [["prediction"]]
    assert Trajectory.load(seen.save(tmp_path / "seen.jsonl"), world.config).scores is None


def test_files_of_another_kind_are_refused(images: Tensor, tmp_path: Path) -> None:
    world = classes()
    seen = explore(world, images, FixedGrid(world.config))
    path = seen.save(tmp_path / "seen.jsonl")
    with pytest.raises(ValueError, match=r"line 1: written for image_size \(32, 32\) and camera_size 8"):
        Trajectory.load(path, GlimpseConfig(image_size=48, patch_size=4))
    path.write_text('{"schema": "other/1"}\n')
    with pytest.raises(ValueError, match=r"line 1: expected schema lightning_eff.glimpse.trajectory/1, got 'other/1'"):
        Trajectory.load(path, world.config)
    with pytest.raises(ValueError, match="expected 12 ids, one for each image, got 1"):
        seen.records(ids=["one"])
    with pytest.raises(ValueError, match="expected at least one trajectory"):
        Trajectory.cat([])


@pytest.mark.parametrize("glimpses", [2, 8])
def test_trajectories_with_more_or_fewer_glimpses_than_usual_are_read_and_drawn(
    images: Tensor, tmp_path: Path, glimpses: int
) -> None:
    world = classes()
    seen = explore(world, images, FixedGrid(world.config), max_glimpses=glimpses)
    again = Trajectory.load(seen.save(tmp_path / "seen.jsonl"), world.config)
    assert again.views.shape[1] == again.config.num_glimpses == max(glimpses, world.config.num_glimpses)
    torch.testing.assert_close(again.views[:, :glimpses], seen.views, atol=1e-4, rtol=0)
    assert bool(again.views[:, glimpses:].isnan().all())
    coverage_figure(again)
    scale_figure(again)
    exploration_figure(images, again)
