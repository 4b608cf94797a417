"""Pictures of single explorations: where a policy looked, what it saw, what was made of it.

Functions that end in ``figure`` return one for ``reporting.save_figure``. Images are [B, C, H, W], bytes or floating
point; pixels beyond [0, 1], as those of normalised images, are stretched between the smallest and the largest of each
image. Predictions [B, K, H, W] are maps of classes where there are class names, where the target is a map, or where K
is not C; else they are images. Predictions [B, K] are logits of classes, or numbers where the target is one of numbers.

Letters: B images, C channels, H x W scene, T glimpses, k patches of a glimpse, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_eff.glimpse.backbones.canvas import CanvasBackbone
from lightning_eff.glimpse.crop import take_glimpse
from lightning_eff.glimpse.exploration import Trajectory
from lightning_eff.reporting import KEPT, REFERENCE, REMOVED, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STEPS = "plasma"  # first glimpses are dark, the last ones light
_NOBODY_LOOKED = (0.62, 0.66, 0.72)  # bluish: no grey of a scene is like it
_CORNERS = ((0, 0), (0, 1), (1, 1), (1, 0))  # of a view, clockwise: how far down, how far across
_MOST_CLASSES = 5  # bars of a prediction
_IGNORED = 255  # as maps of classes mark pixels that count nowhere


def exploration_figure(
    images: Tensor,
    trajectory: Trajectory,
    target: Tensor | None = None,
    class_names: Sequence[str] | None = None,
    count: int = 6,
) -> Figure:
    """Draw a row an image: the scene with numbered views, what was seen of it, and the prediction.

    Args:
        images: Scenes [B, C, H, W].
        trajectory: Of these images.
        target: Labels [B], numbers [B, K], images or maps of classes [B, H, W], shown with the prediction or beside it.
        class_names: In the order of the classes.
        count: Images shown, the first ones.

    Raises:
        ValueError: The trajectory is of another number of images.
    """
    _check(images, trajectory)
    images, count = in_unit(images), min(count, len(images))
    seen = what_was_seen(images[:count], trajectory)
    dense = trajectory.prediction is not None and trajectory.prediction.ndim == 4
    beside = has_own_panel(trajectory.prediction, target)
    columns = 2 + (trajectory.prediction is not None) + beside
    height, width = trajectory.config.scene
    tall = max(1.0, 2.1 * min(1.5, height / width))
    figure, axes = new_figure(count, columns, width=2.3 * columns, height=tall * count + 0.3)
    for row in range(count):
        draw_views(axes[row, 0], images[row], trajectory, row)
        axes[row, 1].imshow(seen[row, -1].numpy(), interpolation="nearest")
        axes[row, 1].set_title(f"{trajectory.pixel_percent[row]:.1f} % of the pixels", fontsize=8)
        if trajectory.prediction is not None:
            truth = None if target is None else target[row]
            draw_prediction(axes[row, 2], trajectory.prediction[row], truth, class_names, images[row])
        if beside and target is not None:
            draw_truth(axes[row, 3], target[row], images[row])
        if trajectory.scores is not None:
            last = trajectory.scores[row, trajectory.taken[row]]
            axes[row, 0].set_title(f"score {last:.3g}", fontsize=8)
        for axis in axes[row, : 3 if dense else 2]:
            _bare(axis)
    for column, title in zip(range(2, columns), ("prediction", "true"), strict=False):
        axes[0, column].set_title(title, fontsize=8)
    return figure


def steps_figure(
    images: Tensor,
    trajectory: Trajectory,
    index: int = 0,
    target: Tensor | None = None,
    class_names: Sequence[str] | None = None,
) -> Figure:
    """Draw one exploration glimpse by glimpse: views, what has been seen, and predictions where they were kept.

    Args:
        images: Scenes [B, C, H, W].
        trajectory: Of these images; with ``predictions="all"`` there is a third row.
        index: Of the image.
        target: Labels [B], numbers [B, K], images or maps of classes [B, H, W].
        class_names: In the order of the classes.

    Raises:
        ValueError: The trajectory is of another number of images.
    """
    _check(images, trajectory)
    images, beside = in_unit(images), has_own_panel(trajectory.predictions, target)
    taken = int(trajectory.taken[index])
    seen = what_was_seen(images[index : index + 1], _one(trajectory, index))[0]
    rows = 2 if trajectory.predictions is None else 3
    height, width = trajectory.config.scene
    tall = 1.9 * min(1.5, height / width) + 0.1
    columns = taken + beside
    figure, axes = new_figure(rows, columns, width=max(3.0, 1.9 * columns), height=tall * rows + 0.3)
    for t in range(taken):
        draw_views(axes[0, t], images[index], trajectory, index, until=t + 1)
        percent = trajectory.config.pixel_percent(t + 1)
        axes[0, t].set_title(f"glimpse {t + 1}", fontsize=8)
        axes[1, t].imshow(seen[t].numpy(), interpolation="nearest")
        axes[1, t].set_title(f"{percent:.1f} % of the pixels", fontsize=8)
        for axis in axes[:2, t]:
            _bare(axis)
        if trajectory.predictions is not None:
            truth = None if target is None else target[index]
            draw_prediction(axes[2, t], trajectory.predictions[index, t], truth, class_names, images[index])
            if trajectory.scores is not None:
                axes[2, t].set_title(f"score {trajectory.scores[index, t + 1]:.3g}", fontsize=8)
    if beside and target is not None:
        for axis in axes[:2, taken]:
            axis.set_axis_off()
        draw_truth(axes[2, taken], target[index], images[index])
        axes[2, taken].set_title("true", fontsize=8)
    return figure


def importance_figure(images: Tensor, boxes: Tensor, importance: Tensor, count: int = 4) -> Figure:
    """Draw how much each patch counts for a backbone: the scene, and patches coloured by their importance.

    Args:
        images: Scenes [B, C, H, W].
        boxes: y0, x0, y1, x1 of patches in pixels [B, n, 4], as ``Seen.boxes`` has them.
        importance: Of each [B, n, 1], as ``Encoded.importance`` has it; 1 / n is even.
        count: Images shown, the first ones.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    images, count = in_unit(images), min(count, len(images))
    relative = (importance[:count, :, 0] * importance.shape[1]).detach().cpu()
    height, width = images.shape[-2:]
    tall = max(2.0, 2.2 * min(1.5, height / width) + 0.4)  # the legend's words need so much
    figure, axes = new_figure(1, count, width=2.2 * count + 0.7, height=tall)
    shade = ScalarMappable(Normalize(0, float(relative.max().clamp(min=1.0))), "magma")
    for row in range(count):
        axis = axes[0, row]
        _show(axis, images[row])
        # large patches first, or they would hide the small ones
        sides = (boxes[row, :, 2] - boxes[row, :, 0]).cpu()
        for patch in sides.argsort(descending=True, stable=True).tolist():
            y0, x0, y1, x1 = boxes[row, patch].tolist()
            colour = shade.to_rgba(relative[row, patch].numpy())
            axis.add_patch(
                Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, facecolor=colour, alpha=0.35, edgecolor="none")
            )
            axis.add_patch(Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=1))
        _bare(axis)
    figure.colorbar(shade, ax=list(axes[0]), label="importance (1 is even)")
    figure.suptitle("How much patches count")
    return figure


def draw_views(axis: Axes, image: Tensor, trajectory: Trajectory, index: int, until: int | None = None) -> None:
    """Draw a scene [C, H, W] and the views of it, numbered; the thicker the larger.

    Numbers go from corner to corner, so that those of views that lie on one another can be read.
    """
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    _show(axis, image)
    config, taken = trajectory.config, int(trajectory.taken[index])
    colours = colormaps[_STEPS]
    for t in range(taken if until is None else until):
        y0, x0, side = trajectory.views[index, t].tolist()
        colour = colours(0.25 + 0.7 * t / max(1, config.num_glimpses - 1))
        width = 1.0 + 1.8 * side / config.max_view
        axis.add_patch(
            Rectangle((x0 - 0.5, y0 - 0.5), side, side, fill=False, edgecolor=colour, linewidth=width, clip_on=False)
        )
        box = {"facecolor": colour, "edgecolor": "none", "pad": 0.8}
        down, across = _CORNERS[t % len(_CORNERS)]
        axis.text(
            x0 + across * (side - 1),
            y0 + down * (side - 1),
            str(t + 1),
            bbox=box,
            color=_readable_on(colour),
            fontsize=7,
            ha="right" if across else "left",
            va="bottom" if down else "top",
        )


def _readable_on(colour: Sequence[float]) -> str:
    red, green, blue = colour[:3]
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.45 else "white"  # luma of BT.601


def draw_prediction(
    axis: Axes, prediction: Tensor, truth: Tensor | None, class_names: Sequence[str] | None, image: Tensor
) -> None:
    """Draw a prediction: bars of the most probable of K classes, numbers, an image, or a map of classes [K, H, W]."""
    if prediction.ndim == 3:
        map_of_classes = class_names is not None or (truth is not None and truth.ndim == 2)
        if map_of_classes or prediction.shape[0] != image.shape[0]:
            _show_classes(axis, prediction.argmax(0))
        else:
            _show(axis, prediction, like=image)
        _bare(axis)
    elif truth is not None and (truth.is_floating_point() or truth.numel() != 1):
        _draw_numbers(axis, prediction, truth)
    else:
        probability, classes = prediction.float().softmax(0).cpu().sort(descending=True)
        shown = classes[:_MOST_CLASSES].tolist()
        names = [str(one) if class_names is None else class_names[one] for one in shown]
        right = None if truth is None else int(truth)
        colours = [REFERENCE if right is None else KEPT if one == right else REMOVED for one in shown]
        axis.barh(range(len(shown)), probability[: len(shown)].tolist(), color=colours)
        axis.set_yticks(range(len(shown)), names, fontsize=7)
        axis.set(xlim=(0, 1), ylim=(len(shown) - 0.4, -0.6))
        axis.grid(False, axis="y")
        if right is not None:
            name = str(right) if class_names is None else class_names[right]
            axis.set_xlabel(f"probability; true: {name}", fontsize=7)


def has_own_panel(prediction: Tensor | None, target: Tensor | None) -> bool:
    """Return whether the truth is a picture of its own, an image or a map, beside predictions [B, ..., H, W]."""
    return prediction is not None and prediction.ndim >= 4 and target is not None and target.ndim >= 3


def draw_truth(axis: Axes, truth: Tensor, image: Tensor) -> None:
    """Draw what should have been predicted: an image [C, H, W], or a map of classes [H, W]."""
    if truth.ndim == 2:
        _show_classes(axis, truth)
    else:
        _show(axis, in_unit(truth), like=image)
    _bare(axis)


def _show_classes(axis: Axes, classes: Tensor) -> None:
    """Draw a map of classes [H, W]; labels of ignored pixels, 255 or below 0, are left white."""
    from matplotlib import colormaps

    classes = classes.cpu().long()
    colours = torch.tensor(colormaps["tab20"].colors, dtype=torch.float32)  # type: ignore[attr-defined]
    picture = colours[classes % len(colours)]
    ignored = ((classes < 0) | (classes == _IGNORED)).unsqueeze(-1)
    axis.imshow(torch.where(ignored, torch.ones(3), picture).numpy(), interpolation="nearest")


def _draw_numbers(axis: Axes, prediction: Tensor, truth: Tensor) -> None:
    """Draw predicted numbers as bars and what they should be as marks."""
    predicted, true = (one.detach().float().flatten().cpu()[:_MOST_CLASSES].tolist() for one in (prediction, truth))
    axis.barh(range(len(predicted)), predicted, color=REFERENCE)
    axis.plot(true, range(len(true)), "|", color=KEPT, markersize=14, markeredgewidth=2)
    axis.set_yticks(range(len(predicted)), [str(i) for i in range(len(predicted))], fontsize=7)
    axis.set_ylim(len(predicted) - 0.4, -0.6)
    axis.grid(False, axis="y")
    axis.set_xlabel("predicted; the mark is the truth", fontsize=7)


def what_was_seen(images: Tensor, trajectory: Trajectory) -> Tensor:
    """Return what was known of scenes after every glimpse, for the eye [B, T, H, W, 3] in [0, 1].

    Glimpses lie at their resolution, finer over coarser ones; places that nobody looked at are bluish.
    """
    canvas = CanvasBackbone(images.shape[1])
    config, images = trajectory.config, in_unit(images.detach().cpu()).float()
    seen = canvas.begin(images, config.patch_size)
    frames = []
    for t in range(config.num_glimpses):
        active = t < trajectory.taken[: len(images)]
        views = trajectory.views[: len(images), t]
        if bool(active.any()):
            whole = torch.where(active.unsqueeze(1), views, views[active][0])
            painted = canvas.observe(seen, take_glimpse(images, whole, config))
            assert seen.memory is not None
            assert painted.memory is not None
            memory = torch.where(active[:, None, None, None], painted.memory, seen.memory)
            seen = type(painted)(painted.views, painted.patches, painted.boxes, memory)
        assert seen.memory is not None
        picture = torch.stack(
            [_for_the_eye(one[:-1], like=image) for one, image in zip(seen.memory, images, strict=True)]
        )
        unknown = seen.memory[:, -1].isinf().unsqueeze(-1)
        frames.append(torch.where(unknown, torch.tensor(_NOBODY_LOOKED), picture))
    return torch.stack(frames, 1)


def in_unit(images: Tensor) -> Tensor:
    """Return images of bytes in [0, 1], others as they are."""
    return images if images.is_floating_point() else images.float() / 255


def _one(trajectory: Trajectory, index: int) -> Trajectory:
    some = slice(index, index + 1)
    return Trajectory(trajectory.config, trajectory.actions[some], trajectory.views[some], trajectory.taken[some])


def _check(images: Tensor, trajectory: Trajectory) -> None:
    if len(images) != len(trajectory):
        raise ValueError(f"expected the images of the trajectory, {len(trajectory)} of them, got {len(images)}")


def _for_the_eye(image: Tensor, like: Tensor | None = None) -> Tensor:
    """Return an image [C, H, W] as [H, W, 3] in [0, 1], stretched as ``like`` would be."""
    image, like = image.detach().cpu().float(), (image if like is None else like).detach().cpu().float()
    low, high = float(like.min()), float(like.max())
    if low < 0 or high > 1:
        image = (image - low) / max(high - low, 1e-8)
    image = image if image.shape[0] == 3 else image[:1] if image.shape[0] < 3 else image.mean(0, keepdim=True)
    return image.clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0)


def _show(axis: Axes, image: Tensor, like: Tensor | None = None) -> None:
    axis.imshow(_for_the_eye(image, like).numpy(), interpolation="nearest")


def _bare(axis: Axes) -> None:
    axis.set(xticks=[], yticks=[])
    axis.grid(False)
    for spine in axis.spines.values():
        spine.set_visible(False)
