"""Take glimpses: crop boxes of any place and size out of a batch of scenes and bring them to the camera's size.

Letters: B images, C channels, H x W scene, g grid, p patch side, k = g^2 patches of a glimpse.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_eff.glimpse.backbones.base import Glimpse
from lightning_eff.glimpse.config import GlimpseConfig
from lightning_eff.glimpse.geometry import patch_boxes, patch_edges

# multiplications of a whole image from which on, on a CPU, leaving out what lies outside of its view saves time
_ALONE_PAYS = 2_000_000


def take_glimpse(images: Tensor, views: Tensor, config: GlimpseConfig) -> Glimpse:
    """Take one glimpse of each image.

    Each patch is what torchvision's ``resized_crop`` makes of its box, with or without ``antialias`` as ``config``
    says: it takes nothing from outside of the box. Differentiable in ``images``.

    Args:
        images: Scenes [B, C, H, W]; bytes are divided by 255.
        views: Fields of view [B, 3] in pixels, as :func:`~lightning_eff.glimpse.geometry.views_of` gives them.
        config: Of the camera.

    Raises:
        ValueError: Images are not of the size that ``config`` tells, or there are more or fewer of them than views.
    """
    check_images(images, config)
    if views.shape != (len(images), 3):
        raise ValueError(f"expected views of shape [{len(images)}, 3], one an image, got {list(views.shape)}")
    if not images.is_floating_point():
        images = images.float() / 255
    rows, columns = patch_edges(views, config)
    # autocast would multiply pixels in half precision
    with torch.autocast(images.device.type, enabled=False):
        if config.antialias:
            glimpses = _filtered(images, rows, columns, config.patch_size)
        else:
            glimpses = _sampled(images, rows, columns, config.patch_size)
    grid, side = config.grid, config.patch_size
    patches = glimpses.reshape(*images.shape[:2], grid, side, grid, side).permute(0, 2, 4, 1, 3, 5)
    return Glimpse(views, patches.flatten(1, 2), patch_boxes(views, config))


def check_images(images: Tensor, config: GlimpseConfig) -> None:
    """Raise a ValueError unless ``images`` are [B, C, H, W] of the size that ``config`` tells."""
    height, width = config.scene
    if images.ndim != 4 or images.shape[2:] != (height, width):
        raise ValueError(
            f"expected images [B, C, {height}, {width}], as image_size={config.image_size} says, got "
            f"{list(images.shape)}; give GlimpseConfig the size of the images"
        )


def _sampled(images: Tensor, rows: Tensor, columns: Tensor, side: int) -> Tensor:
    """Read the image between its pixels at the centres of the camera's pixels [B, C, g p, g p]."""
    height, width = images.shape[2:]
    y = centres(rows, side) / height * 2 - 1
    x = centres(columns, side) / width * 2 - 1
    where = torch.stack([x.unsqueeze(1).expand(-1, y.shape[1], -1), y.unsqueeze(2).expand(-1, -1, x.shape[1])], dim=-1)
    return F.grid_sample(images, where.to(images.dtype), padding_mode="border", align_corners=False)


def _filtered(images: Tensor, rows: Tensor, columns: Tensor, side: int) -> Tensor:
    """Weigh columns, then rows, with the triangle filter [B, C, g p, g p]."""
    batch, channels, height, width = images.shape
    down = filter_weights(rows, side, height).to(images.dtype)
    across = filter_weights(columns, side, width).to(images.dtype)
    camera = down.shape[1]
    if images.device.type == "cpu" and channels * height * width * camera > _ALONE_PAYS:
        return _filtered_alone(images, rows, columns, down, across)
    narrow = images.reshape(batch, channels * height, width) @ across.mT
    stacked = narrow.view(batch, channels, height, camera).transpose(1, 2).reshape(batch, height, channels * camera)
    return (down @ stacked).view(batch, camera, channels, camera).transpose(1, 2)


def _filtered_alone(images: Tensor, rows: Tensor, columns: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """Do the same image by image, patch by patch in each direction, multiplying only what their boxes cover."""
    side = down.shape[1] // (rows.shape[1] - 1)
    glimpses = []
    for image, y, x, w, v in zip(images, _whole_edges(rows), _whole_edges(columns), down, across, strict=True):
        bands = [
            image[:, y[0][0] : y[-1][1], left:right] @ v[number * side : (number + 1) * side, left:right].mT
            for number, (left, right) in enumerate(x)
        ]
        narrow = torch.cat(bands, dim=2)
        glimpses.append(
            torch.cat(
                [
                    w[number * side : (number + 1) * side, top:bottom] @ narrow[:, top - y[0][0] : bottom - y[0][0]]
                    for number, (top, bottom) in enumerate(y)
                ],
                dim=1,
            )
        )
    return torch.stack(glimpses)


def _whole_edges(edges: Tensor) -> list[list[tuple[int, int]]]:
    """Pixels, first and one behind the last, that hold each patch, for each image."""
    first, last = edges[:, :-1].floor().int().tolist(), edges[:, 1:].ceil().int().tolist()
    return [list(zip(begins, ends, strict=True)) for begins, ends in zip(first, last, strict=True)]


def centres(edges: Tensor, side: int) -> Tensor:
    """Return where the centres of ``side`` pixels a patch lie between ``edges`` [B, g + 1]: [B, g p]."""
    within = (torch.arange(side, dtype=edges.dtype, device=edges.device) + 0.5) / side
    return (edges[:, :-1, None] + edges.diff(dim=1).unsqueeze(2) * within).flatten(1)


def filter_weights(edges: Tensor, side: int, length: int) -> Tensor:
    """Return what each pixel of an axis counts in each of the camera's: [B, g p, length], rows sum to 1.

    The weight of pixel j is max(0, 1 - |j + 1/2 - c| / max(s, 1)) about the centre c, where s is the shrinking factor
    of the patch, and 0 outside of the patch: the antialiased bilinear filter of PyTorch and Pillow.

    Args:
        edges: Between which patches lie [B, g + 1], pixels.
        side: Pixels a side of a patch as sampled, p.
        length: Pixels of the axis.
    """
    pixels = torch.arange(length, dtype=edges.dtype, device=edges.device) + 0.5
    support = (edges.diff(dim=1) / side).clamp(min=1).repeat_interleave(side, dim=1).unsqueeze(2)
    weights = (1 - (pixels - centres(edges, side).unsqueeze(2)).abs() / support).clamp(min=0)
    low, high = (edge.repeat_interleave(side, dim=1).unsqueeze(2) for edge in (edges[:, :-1], edges[:, 1:]))
    weights = weights * ((pixels >= low) & (pixels < high))
    return weights / weights.sum(2, keepdim=True)
