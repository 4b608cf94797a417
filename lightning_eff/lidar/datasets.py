"""KITTI's frames as samples with the line of every pixel: the depth-completion set, and full scans.

Keys and shapes: :mod:`lightning_eff.lidar.batches`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_eff.arguments import check_choice
from lightning_eff.lidar.batches import NO_LINE, BottomCrop, Downscale, LidarSample
from lightning_eff.lidar.files import read_calibration, read_depth_png, read_image, read_intrinsics, read_velodyne
from lightning_eff.lidar.layout import DepthFiles, DepthSplit, ScanFiles, find_depth_frames, find_scan_frames
from lightning_eff.lidar.lines import KITTI_HDL64E, LaserTable, LineMethod, assign_lines
from lightning_eff.lidar.projection import Calibration, depth_lines, project_points, rasterize

CROP = (352, 1216)
"""Height and width every frame of KITTI can be cropped to."""

REACH = 3.0
"""Farthest pixel of a projected scan a pixel of a depth image takes its line from."""


class KittiDepthDataset(Dataset[LidarSample]):
    """KITTI's depth-completion set: sparse depth of the lidar, image, semi-dense truth.

    Its depth images do not tell lines. `line_source` finds them: `"laser_table"` and `"elevation"` put every pixel
    back into space, `"scan_order"` and `"official"` need the raw scans and take the line of the nearest pixel of the
    projected scan.

    Args:
        root: see :func:`lightning_eff.lidar.layout.find_depth_frames`.
        split: `"train"`, `"val"`, `"val_select"` or `"test"`; the last has no truth: its `gt` is 0 everywhere.
        raw_root: folder of the raw data, by default `root`; its days' calibration files are always needed.
        cameras: 2 (left), 3 (right) or both.
        line_source: how lines are found.
        table: lasers of the sensor.
        crop: height and width of the window, at the bottom and centred; `None` keeps images of full size, which
            differ from day to day.
        scale: divides the resolution after the crop, >= 1.
        frames: files of the frames to use instead of those found in `root`.

    Raises:
        ValueError: an argument lies outside its range.
        FileNotFoundError: files are missing.
    """

    def __init__(
        self,
        root: str | Path,
        split: DepthSplit = "val_select",
        *,
        raw_root: str | Path | None = None,
        cameras: Sequence[int] = (2, 3),
        line_source: LineMethod = "laser_table",
        table: LaserTable = KITTI_HDL64E,
        crop: tuple[int, int] | None = CROP,
        scale: int = 1,
        frames: Sequence[DepthFiles] | None = None,
    ) -> None:
        check_choice("line_source", line_source, ("laser_table", "elevation", "scan_order", "official"))
        self.line_source, self.table = line_source, table
        self._window = _Window(crop, scale)
        self.frames = list(find_depth_frames(root, split, raw_root, cameras) if frames is None else frames)

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> LidarSample:
        """Return a frame.

        Raises:
            ValueError: image, sparse depth and truth differ in size, or a file holds what it should not; paths are
                told.
        """
        files = self.frames[index]
        rgb, sparse = read_image(files.image), read_depth_png(files.sparse)
        gt = torch.zeros_like(sparse) if files.gt is None else read_depth_png(files.gt)
        for path, image in ((files.image, rgb), (files.gt, gt)):
            if image.shape[1:] != sparse.shape[1:]:
                raise ValueError(
                    f"expected images of one size, got {list(image.shape[1:])} in {path} and "
                    f"{list(sparse.shape[1:])} in {files.sparse}"
                )
        name = files.name
        return self._window(
            {
                "rgb": rgb,
                "sparse": sparse,
                "gt": gt,
                "line_idx": self._lines(sparse, files),
                "sample_id": str(name),
                "sequence": str(name).rpartition("/")[0] or str(name),
            }
        )

    def _lines(self, sparse: Tensor, files: DepthFiles) -> Tensor:
        calibration = _calibration_of(files)
        if self.line_source in ("laser_table", "elevation"):
            line_idx, _ = depth_lines(
                sparse, calibration, self.line_source, num_lines=len(self.table), table=self.table
            )
            return line_idx
        if files.scan is None:
            raise ValueError(
                f"expected a raw scan for line_source {self.line_source!r}, but {files.sparse} does not tell its "
                "drive: use 'laser_table'"
            )
        points = read_velodyne(files.scan)
        lines = assign_lines(points, self.line_source, num_lines=len(self.table)).lines
        known = lines != NO_LINE
        pixels, depth = project_points(points[known], calibration)
        _, scanned = rasterize(pixels, depth, lines[known], (sparse.shape[1], sparse.shape[2]))
        # the published code takes the nearest line however far it is
        return take_nearest(scanned, sparse, math.inf if self.line_source == "official" else REACH)


def take_nearest(line_idx: Tensor, sparse: Tensor, reach: float) -> Tensor:
    """Give every pixel with depth the line of the nearest pixel that has one.

    Args:
        line_idx: uint8 `[1, H, W]`, 255 = none.
        sparse: depth in metres, `[1, H, W]`, 0 = none.
        reach: in pixels; where none is so near the line is 255.

    Returns:
        Lines, uint8 `[1, H, W]`.
    """
    from scipy.ndimage import distance_transform_edt

    if not (line_idx != NO_LINE).any():
        return torch.full_like(line_idx, NO_LINE)
    distance, (rows, columns) = distance_transform_edt((line_idx[0] == NO_LINE).numpy(), return_indices=True)
    nearest = line_idx[0].numpy()[rows, columns]
    found = (torch.from_numpy(distance) <= reach) & (sparse[0] > 0)
    return torch.where(found, torch.from_numpy(nearest), NO_LINE).unsqueeze(0)


class KittiScanDataset(Dataset[LidarSample]):
    """Full scans of KITTI projected into the image; the truth is the depth of all lines together.

    Args:
        root: see :func:`lightning_eff.lidar.layout.find_scan_frames`.
        camera: 2 (left) or 3 (right).
        line_source: a method of :func:`lightning_eff.lidar.lines.assign_lines`.
        table: lasers of the sensor.
        crop: height and width of the window, at the bottom and centred; `None` keeps images of full size.
        scale: divides the resolution after the crop, >= 1.
        frames: files of the frames to use instead of those found in `root`.

    Raises:
        ValueError: an argument lies outside its range.
        FileNotFoundError: files are missing.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        camera: int = 2,
        line_source: LineMethod = "scan_order",
        table: LaserTable = KITTI_HDL64E,
        crop: tuple[int, int] | None = CROP,
        scale: int = 1,
        frames: Sequence[ScanFiles] | None = None,
    ) -> None:
        self.camera, self.line_source, self.table = camera, line_source, table
        self._window = _Window(crop, scale)
        self.frames = list(find_scan_frames(root, camera) if frames is None else frames)

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> LidarSample:
        """Return a frame; ValueError where lines cannot be found the way that was asked for."""
        files = self.frames[index]
        rgb, points = read_image(files.image), read_velodyne(files.scan)
        found = assign_lines(points, self.line_source, num_lines=len(self.table), table=self.table)
        pixels, depth = project_points(points, read_calibration(files.calibration, self.camera))
        sparse, line_idx = rasterize(pixels, depth, found.lines, (rgb.shape[1], rgb.shape[2]))
        name = files.name
        return self._window(
            {
                "rgb": rgb,
                "sparse": sparse,
                "gt": sparse.clone(),
                "line_idx": line_idx,
                "sample_id": str(name),
                # frames of the object benchmark follow no other: each is its own sequence
                "sequence": str(name).rpartition("/")[0] or str(name),
            }
        )


class _Window:
    """The part of a frame a data set hands out: cropped, then smaller."""

    def __init__(self, crop: tuple[int, int] | None, scale: int) -> None:
        self.crop = None if crop is None else BottomCrop(*crop)
        self.downscale = Downscale(scale)
        if crop is not None and any(side % scale for side in crop):
            raise ValueError(f"expected scale to divide the crop of {crop[0]} x {crop[1]}, got {scale}")

    def __call__(self, sample: LidarSample) -> LidarSample:
        return self.downscale(sample if self.crop is None else self.crop(sample))


def _calibration_of(files: DepthFiles) -> Calibration:
    if files.intrinsics is None:
        return _day(_needed(files), files.name.camera or 2)
    intrinsics = read_intrinsics(files.intrinsics)
    if files.calibration is not None:
        return _day(_needed(files), files.name.camera or 2).with_intrinsics(intrinsics)
    # anonymous frames tell neither day nor camera; every day of KITTI has a focal length of its own
    days = sorted(path.parent for path in files.raw_root.glob("*/calib_cam_to_cam.txt"))
    fitting = [day for day in days if abs(_day(day, 2).projection[0, 0] - intrinsics[0, 0]) < 0.01]
    if not fitting:
        raise FileNotFoundError(
            f"expected a day with the focal length {intrinsics[0, 0]:.4f} of {files.intrinsics} in {files.raw_root}, "
            f"got {', '.join(day.name for day in days) or 'no folder with calib_cam_to_cam.txt'}"
        )
    return _day(fitting[0], 2).with_intrinsics(intrinsics)


def _needed(files: DepthFiles) -> Path:
    if files.calibration is None or not files.calibration.is_dir():
        raise FileNotFoundError(
            f"expected the calibration of {files.sparse} in the folder {files.calibration}, got none: unpack the raw "
            "data's calibration files of that day and pass raw_root=, the folder that holds the days"
        )
    return files.calibration


@lru_cache(maxsize=32)
def _day(folder: Path, camera: int) -> Calibration:
    return read_calibration(folder, camera)
