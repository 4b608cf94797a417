"""Where an action looks: fields of view and boxes of patches in pixels of the scene.

Letters: B glimpses, k patches of a glimpse, H x W scene, g grid, d side of a field of view.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_eff.glimpse.config import ACTION_SIZE, GlimpseConfig

# what rounding down forgives, so that the action of a field of view leads back to it in float32
_FORGIVEN = 1e-2


def views_of(actions: Tensor, config: GlimpseConfig) -> Tensor:
    """Return the fields of view of actions; every action is legal, none is clipped.

    The side is d = z (d_max - d_min) + d_min, the corner y (H - d), x (W - d): place is relative to the room that the
    zoom leaves. ``config.quantize`` rounds all three down to whole pixels; ``config.fixed_scale`` replaces z.

    Args:
        actions: y, x, z in [0, 1] [B, 3].
        config: Of the camera.

    Returns:
        Upper row, left column and side in pixels [B, 3], float32.

    Raises:
        ValueError: An action is no number or lies outside of [0, 1]; the message tells row and value.
    """
    check_actions(actions)
    actions = actions.float()
    zoom = actions[:, 2] if config.fixed_scale is None else torch.full_like(actions[:, 2], config.fixed_scale)
    side = _whole(zoom * (config.max_view - config.camera_size) + config.camera_size, config)
    room = _room(side, config)
    corner = _whole(actions[:, :2] * room, config)
    return torch.cat([corner, side.unsqueeze(1)], dim=1)


def action_of(views: Tensor, config: GlimpseConfig) -> Tensor:
    """Return the actions y, x, z in [0, 1] [B, 3] that lead to ``views`` [B, 3]; 1/2 where there is no choice."""
    side = views[:, 2]
    room = _room(side, config)
    place = torch.where(room > 0, views[:, :2] / room.clamp(min=torch.finfo(room.dtype).tiny), 0.5)
    range_ = config.max_view - config.camera_size
    zoom = (side - config.camera_size) / range_ if range_ else torch.full_like(side, 0.5)
    return torch.cat([place, zoom.unsqueeze(1)], dim=1).clamp(0, 1)


def patch_edges(views: Tensor, config: GlimpseConfig) -> tuple[Tensor, Tensor]:
    """Return the g + 1 rows and columns between which the patches of ``views`` [B, 3] lie: [B, g + 1] each, pixels.

    Patches are as large as each other, rounded down if ``config.quantize``; the last one has what remains.
    """
    side = views[:, 2:]
    steps = torch.arange(config.grid + 1, dtype=views.dtype, device=views.device)
    within = _whole(side / config.grid, config) * steps
    within[:, -1:] = side
    return views[:, :1] + within, views[:, 1:2] + within


def patch_boxes(views: Tensor, config: GlimpseConfig) -> Tensor:
    """Return boxes y0, x0, y1, x1 of the patches of ``views`` [B, 3], row by row: [B, k, 4] in pixels."""
    rows, columns = patch_edges(views, config)
    grid = config.grid
    top, bottom = (edge.unsqueeze(2).expand(-1, grid, grid) for edge in (rows[:, :-1], rows[:, 1:]))
    left, right = (edge.unsqueeze(1).expand(-1, grid, grid) for edge in (columns[:, :-1], columns[:, 1:]))
    return torch.stack([top, left, bottom, right], dim=-1).flatten(1, 2)


def normalised(boxes: Tensor, scene: tuple[int, int]) -> Tensor:
    """Return ``boxes`` [..., 4] in pixels of a scene of (height, width) as numbers from -1 to 1."""
    height, width = scene
    return boxes / boxes.new_tensor([height, width, height, width]) * 2 - 1


def check_actions(actions: Tensor) -> None:
    """Raise a ValueError unless ``actions`` are [B, 3] numbers in [0, 1]."""
    if actions.ndim != 2 or actions.shape[1] != ACTION_SIZE:
        raise ValueError(f"expected actions (y, x, z) of shape [B, {ACTION_SIZE}], got {list(actions.shape)}")
    legal = (actions >= 0) & (actions <= 1)  # False for NaN
    if not bool(legal.all()):
        row = int((~legal).any(1).nonzero()[0])
        raise ValueError(f"expected actions (y, x, z) in [0, 1], got {actions[row].tolist()} in row {row}")


def _room(side: Tensor, config: GlimpseConfig) -> Tensor:
    """Pixels by which a field of view of ``side`` [B] can be moved down and to the right [B, 2]."""
    height, width = config.scene
    return torch.stack([height - side, width - side], dim=1)


def _whole(pixels: Tensor, config: GlimpseConfig) -> Tensor:
    return (pixels + _FORGIVEN).floor() if config.quantize else pixels
