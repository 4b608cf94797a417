"""From points of a lidar to pixels of a camera and back.

Pixel `(u, v)` (column, row) has its centre at whole numbers: points are rounded to pixels, which is what explains
KITTI's own depth images best. All of it runs on the CPU, where data sets are read.

Shapes: `N` points, `H` rows, `W` columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lightning_eff.arguments import check_choice
from lightning_eff.lidar.batches import NO_LINE
from lightning_eff.lidar.lines import KITTI_HDL64E, LaserTable, LineAssignment, LineMethod, assign_lines


@dataclass(frozen=True, eq=False)
class Calibration:
    """How a camera sees the points of a lidar.

    Args:
        projection: `P`, `[3, 4]`: `[u w, v w, w] = P [x, y, z, 1]` for points in (rectified) camera coordinates,
            depth being `w`. Kept as float64.
        lidar_to_camera: rigid transform `[4, 4]` from lidar to (rectified) camera coordinates. Kept as float64.

    Raises:
        ValueError: a matrix has another shape.
    """

    projection: Tensor
    lidar_to_camera: Tensor

    def __post_init__(self) -> None:
        for name, shape in (("projection", (3, 4)), ("lidar_to_camera", (4, 4))):
            matrix = torch.as_tensor(getattr(self, name), dtype=torch.float64)
            if tuple(matrix.shape) != shape:
                raise ValueError(f"expected {name} to be {list(shape)}, got {list(matrix.shape)}")
            object.__setattr__(self, name, matrix)

    def cropped(self, top: int, left: int) -> Calibration:
        """The calibration of a window of the image that begins at this row and column."""
        shift = torch.eye(3, dtype=torch.float64)
        shift[0, 2], shift[1, 2] = -left, -top
        return Calibration(shift @ self.projection, self.lidar_to_camera)

    def downscaled(self, factor: int) -> Calibration:
        """The calibration of the image whose pixels are blocks of `factor` x `factor` pixels."""
        shrink = torch.eye(3, dtype=torch.float64) / factor
        shrink[2, 2] = 1
        shrink[:2, 2] = -(factor - 1) / 2 / factor  # the centre of the first block is the new origin
        return Calibration(shrink @ self.projection, self.lidar_to_camera)

    def with_intrinsics(self, intrinsics: Tensor) -> Calibration:
        """The same camera with another matrix `K` `[3, 3]`, e.g. that of a cropped image."""
        change = intrinsics.double() @ self.projection[:, :3].inverse()
        return Calibration(change @ self.projection, self.lidar_to_camera)


def project_points(points: Tensor, calibration: Calibration) -> tuple[Tensor, Tensor]:
    """Project points into the image.

    Args:
        points: `[N, 3]` or with more columns, lidar coordinates in metres.
        calibration: of lidar and camera.

    Returns:
        Pixels `(u, v)` (column, row), float64 `[N, 2]`, and depths in metres, float64 `[N]`. Points behind the
        camera have depths <= 0, their pixels mean nothing.
    """
    matrix = calibration.projection @ calibration.lidar_to_camera
    homogeneous = points[:, :3].double() @ matrix[:, :3].T + matrix[:, 3]
    depth = homogeneous[:, 2]
    return homogeneous[:, :2] / depth.unsqueeze(1), depth


def nearest_pixels(pixels: Tensor, rounding: Literal["round", "floor"] = "round") -> Tensor:
    """Whole pixels `(u, v)` of projected points, float64 `[N, 2]`: `"floor"` is what some data sets were made with."""
    check_choice("rounding", rounding, ("round", "floor"))
    return pixels.round() if rounding == "round" else pixels.floor()


def in_image(pixels: Tensor, depth: Tensor, size: tuple[int, int]) -> Tensor:
    """Bool `[N]`: points before the camera whose pixels, whole numbers, lie inside an image of `size` (H, W)."""
    (u, v), (height, width) = pixels.unbind(1), size
    return (depth > 0) & (u >= 0) & (u < width) & (v >= 0) & (v < height)


def rasterize(
    pixels: Tensor,
    depth: Tensor,
    lines: Tensor,
    size: tuple[int, int],
    rounding: Literal["round", "floor"] = "round",
) -> tuple[Tensor, Tensor]:
    """Draw projected points into images; of several in one pixel the nearest wins.

    Args:
        pixels: `(u, v)` (column, row), `[N, 2]`.
        depth: in metres, `[N]`; points with depth <= 0 are left out, as those outside the image.
        lines: line of every point, uint8 `[N]`.
        size: height and width of the image.
        rounding: how points become pixels.

    Returns:
        Sparse depth in metres, float32 `[1, H, W]`, 0 = none, and lines, uint8 `[1, H, W]`, 255 = none.
    """
    height, width = size
    whole = nearest_pixels(pixels, rounding)
    inside = in_image(whole, depth, size)
    u, v = whole[inside].long().unbind(1)
    flat, near = (v * width + u).numpy(), depth[inside].numpy()
    order = np.lexsort((near, flat))
    first = torch.from_numpy(order[np.diff(flat[order], prepend=-1) > 0])
    sparse, line_idx = torch.zeros(height * width), torch.full((height * width,), NO_LINE, dtype=torch.uint8)
    where = torch.from_numpy(flat)[first]
    sparse[where] = depth[inside][first].float()
    line_idx[where] = lines[inside][first]
    return sparse.view(1, height, width), line_idx.view(1, height, width)


def back_project(depth: Tensor, calibration: Calibration) -> tuple[Tensor, Tensor]:
    """Put the pixels of a depth image back into lidar coordinates.

    Args:
        depth: `[1, H, W]` in metres, 0 = none.
        calibration: of lidar and camera.

    Returns:
        Points, float64 `[N, 3]` in metres, and where they are in the image: bool `[H, W]`, True at `N` pixels, which
        the points follow row by row.

    Raises:
        ValueError: another shape.
    """
    if depth.ndim != 3 or depth.shape[0] != 1:
        raise ValueError(f"expected a depth image [1, H, W], got {list(depth.shape)}")
    where = depth[0] > 0
    v, u = where.nonzero(as_tuple=True)
    w = depth[0][where].double()
    camera, offset = calibration.projection[:, :3], calibration.projection[:, 3]
    rays = torch.stack([u * w, v * w, w], 1) - offset
    in_camera = rays @ camera.inverse().T
    rotation, translation = calibration.lidar_to_camera[:3, :3], calibration.lidar_to_camera[:3, 3]
    return (in_camera - translation) @ rotation.inverse().T, where


def depth_lines(
    depth: Tensor,
    calibration: Calibration,
    method: LineMethod = "laser_table",
    *,
    num_lines: int = 64,
    table: LaserTable = KITTI_HDL64E,
    max_residual: float | None = None,
) -> tuple[Tensor, LineAssignment]:
    """Find the line of every pixel of a sparse depth image.

    Args:
        depth: `[1, H, W]` in metres, 0 = none.
        calibration: of lidar and camera.
        method: one of :func:`assign_lines` that needs neither order nor ring numbers.
        num_lines: see :func:`assign_lines`.
        table: see :func:`assign_lines`.
        max_residual: see :func:`assign_lines`.

    Returns:
        Lines, uint8 `[1, H, W]`, 255 = none, and the assignment of the pixels row by row, with residuals.

    Raises:
        ValueError: shape of `depth`, or a method that needs a scan.
    """
    if method in ("ring", "scan_order"):
        raise ValueError(f"expected a method that works on pixels, got {method!r}, which needs a scan")
    points, where = back_project(depth, calibration)
    found = assign_lines(points, method, num_lines=num_lines, table=table, max_residual=max_residual)
    line_idx = torch.full(depth.shape, NO_LINE, dtype=torch.uint8)
    line_idx[0][where] = found.lines
    return line_idx, found
