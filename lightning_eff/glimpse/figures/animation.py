"""An exploration as a moving picture, one glimpse a second."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_eff.documents import whole_file
from lightning_eff.glimpse.exploration import Trajectory
from lightning_eff.glimpse.figures.scenes import (
    draw_prediction,
    draw_truth,
    draw_views,
    has_own_panel,
    in_unit,
    what_was_seen,
)
from lightning_eff.reporting import new_figure

if TYPE_CHECKING:
    from PIL.Image import Image


def save_animation(
    images: Tensor,
    trajectory: Trajectory,
    path: str | Path,
    *,
    index: int = 0,
    target: Tensor | None = None,
    class_names: Sequence[str] | None = None,
    seconds: float = 1.0,
    dpi: int = 100,
) -> Path:
    """Write an exploration of one image as an animated GIF that repeats.

    Args:
        images: Scenes [B, C, H, W].
        trajectory: Of these images; predictions are shown where it has them after every glimpse.
        path: Of a ``.gif``; folders are made.
        index: Of the image.
        target: Labels [B], numbers [B, K], images or maps of classes.
        class_names: In the order of the classes.
        seconds: Of a glimpse, > 0; the last one stays twice as long.
        dpi: Pixels an inch; a column is 2.4 inches wide.

    Raises:
        ValueError: The file is no GIF, or the trajectory is of another number of images.
    """
    path = Path(path)
    if path.suffix != ".gif":
        raise ValueError(f"expected a file name that ends in .gif, got {path.name!r}")
    if len(images) != len(trajectory):
        raise ValueError(f"expected the images of the trajectory, {len(trajectory)} of them, got {len(images)}")
    frames = _frames(images, trajectory, index, target, class_names, dpi)
    lasting = [round(1000 * seconds)] * len(frames)
    lasting[-1] *= 2
    with whole_file(path) as beside:
        frames[0].save(beside, "GIF", save_all=True, append_images=frames[1:], duration=lasting, loop=0)
    return path


def _frames(
    images: Tensor,
    trajectory: Trajectory,
    index: int,
    target: Tensor | None,
    class_names: Sequence[str] | None,
    dpi: int,
) -> list[Image]:
    from PIL.Image import open as read

    images, beside = in_unit(images), has_own_panel(trajectory.predictions, target)
    taken = int(trajectory.taken[index])
    some = slice(index, index + 1)
    alone = Trajectory(trajectory.config, trajectory.actions[some], trajectory.views[some], trajectory.taken[some])
    seen = what_was_seen(images[some], alone)[0]
    columns = 2 + (trajectory.predictions is not None) + beside
    height, width = trajectory.config.scene
    frames = []
    for t in range(taken):
        figure, axes = new_figure(1, columns, width=2.4 * columns, height=2.2 * min(1.5, height / width) + 0.5)
        draw_views(axes[0, 0], images[index], trajectory, index, until=t + 1)
        axes[0, 1].imshow(seen[t].numpy(), interpolation="nearest")
        axes[0, 0].set_title(f"glimpse {t + 1} of {taken}", fontsize=9)
        axes[0, 1].set_title(f"{trajectory.config.pixel_percent(t + 1):.1f} % of the pixels", fontsize=9)
        for axis in axes[0, :2]:
            axis.set_axis_off()
        if trajectory.predictions is not None:
            truth = None if target is None else target[index]
            draw_prediction(axes[0, 2], trajectory.predictions[index, t], truth, class_names, images[index])
            axes[0, 2].set_title("prediction", fontsize=9)
        if beside and target is not None:
            draw_truth(axes[0, 3], target[index], images[index])
            axes[0, 3].set_title("true", fontsize=9)
        figure.savefig(drawn := BytesIO(), format="png", dpi=dpi)
        frames.append(read(drawn).convert("RGB"))
    return frames
