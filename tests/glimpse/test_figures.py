"""Figures of explorations and policies show what happened."""

from __future__ import annotations

from pathlib import Path

import matplotlib.patches
import pytest
import torch
from PIL import Image
from torch import Tensor

from lightning_eff.glimpse.backbones.canvas import CanvasBackbone
from lightning_eff.glimpse.config import GlimpseConfig
from lightning_eff.glimpse.evaluation import PolicyCurve
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
from lightning_eff.glimpse.figures.scenes import what_was_seen
from lightning_eff.glimpse.figures.statistics import coverage
from lightning_eff.glimpse.policies import FixedSequence
from lightning_eff.glimpse.tasks.classification import ClassificationTask
from lightning_eff.glimpse.tasks.reconstruction import ReconstructionTask
from lightning_eff.glimpse.tasks.segmentation import SegmentationTask
from lightning_eff.glimpse.world import GlimpseWorld
from lightning_eff.reporting import KEPT, save_figure

CONFIG = GlimpseConfig(image_size=(32, 48), num_glimpses=3, patch_size=4)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 1, 32, 48, generator=torch.Generator().manual_seed(0))


def classes(images: Tensor, stop: float | None = None) -> Trajectory:
    torch.manual_seed(0)
    config = GlimpseConfig(image_size=(32, 48), num_glimpses=3, patch_size=4, stop_threshold=stop)
    world = GlimpseWorld(CanvasBackbone(1, num_classes=7), ClassificationTask(7), config)
    policy = FixedSequence(config, [[0.5, 0.5, 1], [0, 0, 0], [1, 1, 0.5]])
    return explore(world, images, policy, torch.tensor([1, 2, 3]), predictions="all", scored=True)


def scenes(images: Tensor) -> Trajectory:
    policy = FixedSequence(CONFIG, [[0.5, 0.5, 1], [0, 0, 0], [1, 1, 0.5]])
    world = GlimpseWorld(CanvasBackbone(1), ReconstructionTask(), CONFIG)
    return explore(world, images, policy, predictions="all", scored=True)


def squares(axis: object) -> list[tuple[float, float, float]]:
    found = [one for one in axis.patches if isinstance(one, matplotlib.patches.Rectangle)]  # type: ignore[attr-defined]
    return [(one.get_y() + 0.5, one.get_x() + 0.5, one.get_width()) for one in found]


def test_an_exploration_shows_numbered_views_what_was_seen_and_what_was_made_of_it(
    images: Tensor, tmp_path: Path
) -> None:
    seen = scenes(images)
    figure = exploration_figure(images, seen, count=2)
    axes = figure.axes
    assert len(axes) == 6
    assert squares(axes[0]) == [tuple(view) for view in seen.views[0].tolist()]
    assert [text.get_text() for text in axes[0].texts] == ["1", "2", "3"]
    pasted = torch.from_numpy(axes[1].images[0].get_array().data)
    torch.testing.assert_close(pasted, what_was_seen(images, seen)[0, -1])
    prediction = torch.from_numpy(axes[2].images[0].get_array().data)[..., 0]
    torch.testing.assert_close(prediction, seen.prediction[0, 0])  # type: ignore[index]
    save_figure(figure, tmp_path / "exploration.png")
    with pytest.raises(ValueError, match="expected the images of the trajectory, 3 of them, got 2"):
        exploration_figure(images[:2], seen)


def test_classes_are_bars_with_the_right_one_in_its_colour(images: Tensor) -> None:
    seen = classes(images)
    names = [f"class {i}" for i in range(7)]
    figure = exploration_figure(images, seen, torch.tensor([1, 2, 3]), names)
    axis = figure.axes[2]
    probability = seen.prediction[0].softmax(0)  # type: ignore[index]
    assert [bar.get_width() for bar in axis.patches] == pytest.approx(probability.topk(5).values.tolist())
    labels = [label.get_text() for label in axis.get_yticklabels()]
    assert labels[0] == names[int(probability.argmax())]
    right = [label == "class 1" for label in labels]
    kept = tuple(int(KEPT[i : i + 2], 16) / 255 for i in (1, 3, 5))
    assert [bar.get_facecolor()[:3] == pytest.approx(kept) for bar in axis.patches] == right
    assert axis.get_xlabel() == "probability; true: class 1"


def test_steps_are_columns_up_to_where_the_image_stopped(images: Tensor) -> None:
    full = classes(images)
    assert len(steps_figure(images, full, 1).axes) == 9
    stop = float(full.predictions.softmax(2).amax(2)[1, 1])  # type: ignore[union-attr]
    early = classes(images, stop)
    taken = int(early.taken[1])
    assert taken < 3
    figure = steps_figure(images, early, 1)
    assert len(figure.axes) == 3 * taken
    assert [len(squares(axis)) for axis in figure.axes[:taken]] == list(range(1, taken + 1))


def test_what_was_seen_is_fine_where_the_camera_was_near_and_coloured_where_nobody_looked(images: Tensor) -> None:
    config = GlimpseConfig(image_size=(32, 48), num_glimpses=2, patch_size=4)
    world = GlimpseWorld(CanvasBackbone(1), ReconstructionTask(), config)
    seen = explore(world, images, FixedSequence(config, [[0, 0, 0], [1, 1, 0]]), predictions="none")
    shown = what_was_seen(images, seen)
    torch.testing.assert_close(shown[:, 0, :8, :8], images[:, 0, :8, :8, None].expand(-1, -1, -1, 3))
    torch.testing.assert_close(shown[:, 1, -8:, -8:], images[:, 0, -8:, -8:, None].expand(-1, -1, -1, 3))
    unseen = shown[:, 1, 8:-8]
    assert len(unseen.flatten(0, 2).unique(dim=0)) == 1
    assert unseen[0, 0, 0, 2] > unseen[0, 0, 0, 0]


def test_normalised_and_coloured_images_are_shown_whole(images: Tensor) -> None:
    normalised = (images - 0.5) / 0.25
    figure = exploration_figure(normalised, scenes(normalised), count=1)
    shown = torch.from_numpy(figure.axes[0].images[0].get_array().data)
    assert (float(shown.min()), float(shown.max())) == (0, 1)
    coloured = images.expand(-1, 3, -1, -1) * torch.tensor([1.0, 0.5, 0.0]).view(3, 1, 1)
    world = GlimpseWorld(CanvasBackbone(3), ReconstructionTask(), CONFIG)
    seen = explore(world, coloured, FixedSequence(CONFIG, [[0, 0, 1]]))
    shown = torch.from_numpy(exploration_figure(coloured, seen, count=1).axes[0].images[0].get_array().data)
    torch.testing.assert_close(shown, coloured[0].permute(1, 2, 0))


def test_an_animation_has_a_picture_a_glimpse_and_stays_on_the_last(images: Tensor, tmp_path: Path) -> None:
    path = save_animation(images, classes(images), tmp_path / "made" / "seen.gif", index=2, seconds=0.5)
    with Image.open(path) as animation:
        assert animation.n_frames == 3
        lasting, pictures = [], []
        for frame in range(3):
            animation.seek(frame)
            lasting.append(animation.info["duration"])
            pictures.append(animation.convert("RGB").tobytes())
        assert animation.info["loop"] == 0
    assert lasting == [500, 500, 1000]
    assert len(set(pictures)) == 3
    with pytest.raises(ValueError, match=r"ends in \.gif, got 'seen\.png'"):
        save_animation(images, classes(images), tmp_path / "seen.png")


def curve(policy: str, *values: float) -> PolicyCurve:
    glimpses = tuple(float(t + 1) for t in range(len(values)))
    return PolicyCurve(policy, "accuracy", True, values, glimpses, tuple(10 * t for t in glimpses))


def test_curves_of_several_seeds_become_their_mean_with_a_band() -> None:
    curves = [curve("learned", 0.5, 0.7), curve("random", 0.2, 0.3), curve("learned", 0.6, 0.9)]
    figure = curve_figure(curves, stopping=[(0.9, 15, 0.75), (0.5, 12, 0.6)], references={"even": (20, 0.95)})
    axis = figure.axes[0]
    lines = {line.get_label(): line for line in axis.lines}
    assert list(lines["learned (2 seeds)"].get_ydata()) == pytest.approx([0.55, 0.8])
    assert list(lines["learned (2 seeds)"].get_xdata()) == [10, 20]
    assert list(lines["random"].get_ydata()) == [0.2, 0.3]
    assert list(lines["stops when sure"].get_xdata()) == [12, 15]
    assert list(lines["even"].get_ydata()) == [0.95]
    (band,) = axis.collections
    low, high = band.get_paths()[0].vertices[:, 1].min(), band.get_paths()[0].vertices[:, 1].max()
    assert (low, high) == (0.5, 0.9)
    assert axis.get_ylabel() == "accuracy (higher is better)"
    with pytest.raises(ValueError, match="expected curves of one metric"):
        curve_figure([])


def test_coverage_is_the_share_of_views_that_hold_a_place(images: Tensor) -> None:
    share = coverage(torch.tensor([[0.0, 0, 8], [0, 4, 8], [0, 0, 32], [24, 40, 8]]), (32, 48))
    assert share[0, 0] == 0.5
    assert share[7, 5] == 0.75
    assert share[8, 5] == 0.25
    assert share[31, 47] == 0.25
    assert share[31, 35] == 0
    assert bool((coverage(torch.zeros(0, 3), (4, 5)) == 0).all())
    figure = coverage_figure(classes(images, stop=1.0))
    assert [axis.get_title() for axis in figure.axes[:3]] == ["glimpse 1", "glimpse 2", "glimpse 3"]


def test_scales_are_counted_by_glimpse(images: Tensor) -> None:
    figure = scale_figure(scenes(images), bins=12)
    shares = [[bar.get_height() for bar in axis.patches] for axis in figure.axes]
    assert shares[0] == [0] * 11 + [1]  # the whole scene: 32 pixels
    assert shares[1] == [1] + [0] * 11  # native: 8
    assert shares[2][6] == 1  # 20 = 8 + 24 / 2 begins the upper half
    assert [axis.lines[0].get_xdata()[0] for axis in figure.axes] == [32, 8, 20]


def test_importance_colours_patches_the_small_ones_on_top(images: Tensor) -> None:
    boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 32, 32], [8, 8, 16, 16]]).expand(3, -1, -1)
    importance = torch.tensor([0.6, 0.1, 0.3]).view(1, 3, 1).expand(3, -1, -1)
    figure = importance_figure(images, boxes, importance, count=2)
    filled = [one for one in figure.axes[0].patches if one.get_fill()]
    assert [one.get_width() for one in filled] == [32, 8, 4]
    assert figure.axes[-1].get_ylabel() == "importance (1 is even)"
    assert filled[2].get_facecolor()[0] > filled[0].get_facecolor()[0]  # magma: bright is much


def test_bytes_are_shown_as_the_same_pictures_in_floating_point_are(images: Tensor) -> None:
    coloured = (images.expand(-1, 3, -1, -1) * 200).to(torch.uint8)
    world = GlimpseWorld(CanvasBackbone(3), ReconstructionTask(), CONFIG)
    seen = explore(world, coloured, FixedSequence(CONFIG, [[0.5, 0.5, 1], [0, 0, 0]]), predictions="all")
    for draw in (exploration_figure, steps_figure):
        shown, expected = (draw(one, seen) for one in (coloured, coloured.float() / 255))
        for axis, other in zip(shown.axes, expected.axes, strict=True):
            torch.testing.assert_close(picture(axis), picture(other))
    assert float(picture(exploration_figure(coloured, seen).axes[2]).max()) > 0.5  # the prediction is not black


def picture(axis: object) -> Tensor:
    return torch.from_numpy(axis.images[0].get_array().data.copy())  # type: ignore[attr-defined]


class Thirds(CanvasBackbone):
    """Says that the left, middle and right third of a scene are of class 0, 1 and 2."""

    def predict(self, encoded: object, seen: object) -> Tensor:
        classes = torch.arange(48) // 16
        logits = torch.nn.functional.one_hot(classes, 3).float().T[None, :, None]
        return logits.expand(len(seen.views), 3, 32, 48)  # type: ignore[attr-defined]


def test_a_map_of_as_many_classes_as_images_have_channels_is_no_picture(images: Tensor, tmp_path: Path) -> None:
    coloured, truth = images.expand(-1, 3, -1, -1), (torch.arange(48) // 16).expand(3, 32, 48).clone()
    truth[:, 0] = 255
    world = GlimpseWorld(Thirds(3), SegmentationTask(3), CONFIG)
    seen = explore(world, coloured, FixedSequence(CONFIG, [[0.5, 0.5, 1]]), truth, predictions="all", scored=True)
    figure = exploration_figure(coloured, seen, truth, count=2)
    assert [axis.get_title() for axis in figure.axes[2:4]] == ["prediction", "true"]
    said, true = picture(figure.axes[2]), picture(figure.axes[3])
    assert len(said.flatten(0, 1).unique(dim=0)) == 3
    torch.testing.assert_close(said[1:], true[1:])
    assert bool((true[0] == 1).all())  # nobody knows
    named = exploration_figure(coloured, seen, class_names=["a", "b", "c"], count=2)
    torch.testing.assert_close(picture(named.axes[2]), said)
    assert [len(one.axes) for one in (figure, named, steps_figure(coloured, seen, 0, truth))] == [8, 6, 12]
    with Image.open(save_animation(coloured, seen, tmp_path / "map.gif", target=truth)) as animation:
        assert animation.size[0] == pytest.approx(4 * 240, abs=2)


def test_numbers_are_bars_with_the_truth_as_a_mark(images: Tensor) -> None:
    seen = classes(images)
    truth = torch.linspace(-1, 1, 21).view(3, 7)
    axis = exploration_figure(images, seen, truth).axes[2]
    assert [bar.get_width() for bar in axis.patches] == pytest.approx(seen.prediction[0, :5].tolist())  # type: ignore[index]
    assert list(axis.lines[0].get_xdata()) == pytest.approx(truth[0, :5].tolist())


def test_numbers_of_views_that_lie_on_one_another_do_not_hide_each_other(images: Tensor) -> None:
    world = GlimpseWorld(CanvasBackbone(1), ReconstructionTask(), CONFIG)
    seen = explore(world, images, FixedSequence(CONFIG, [[0.5, 0.5, 1]]))
    texts = exploration_figure(images, seen).axes[0].texts
    assert [text.get_text() for text in texts] == ["1", "2", "3"]
    assert [(text.get_ha(), text.get_va()) for text in texts] == [
        ("left", "top"),
        ("right", "top"),
        ("right", "bottom"),
    ]
    assert [text.get_position() for text in texts] == [(8, 0), (39, 0), (39, 31)]  # 32 pixels from 8 on
