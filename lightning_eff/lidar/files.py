"""KITTI's files: depth images of 16 bits, images, scans and calibrations.

Source: A. Geiger, P. Lenz, R. Urtasun, Are we ready for autonomous driving?, CVPR 2012; J. Uhrig et al., Sparsity
invariant CNNs, 3DV 2017 (depth images).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightning_eff.documents import whole_file
from lightning_eff.lidar.projection import Calibration

METRES = 256
"""Units of a depth image in a metre."""

MAX_DEPTH = 65535 / METRES
"""Farthest depth a depth image can hold, in metres."""


def read_depth_png(path: str | Path) -> Tensor:
    """Read a depth image.

    Args:
        path: PNG of 16 bits, 256 units a metre, 0 = no depth.

    Returns:
        Depth in metres, float32 `[1, H, W]`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the image has no 16 bits, or looks as if it had been saved with 8: its largest value is not above
            255, which is less than one metre.
    """
    from PIL import Image

    with Image.open(_existing(path)) as image:
        if not image.mode.startswith("I"):
            raise ValueError(f"expected a depth image of 16 bits at {path}, got one of mode {image.mode}")
        raw = np.asarray(image).astype(np.int32)
    if 0 < raw.max(initial=0) <= 255:
        raise ValueError(
            f"expected a depth image of 16 bits, 256 units a metre, at {path}, got values up to {raw.max()}, less "
            "than a metre: it was probably saved with 8 bits"
        )
    return torch.from_numpy(raw).float().div_(METRES).unsqueeze(0)


def write_depth_png(path: str | Path, depth: Tensor) -> Path:
    """Write a depth image, rounded to 1 / 256 m; folders are made.

    Args:
        path: of the PNG.
        depth: in metres, `[1, H, W]` or `[H, W]`, 0 = none, at most 255.996.

    Raises:
        ValueError: another shape, or a depth that is no number, negative or too large; nothing is written then.
    """
    from PIL import Image

    path = Path(path)
    if depth.ndim not in (2, 3) or (depth.ndim == 3 and depth.shape[0] != 1):
        raise ValueError(f"expected a depth image [1, H, W] or [H, W], got {list(depth.shape)}")
    units = (depth.detach().cpu().double().view(depth.shape[-2:]) * METRES).round()
    if not ((units >= 0) & (units <= 65535)).all():
        raise ValueError(
            f"expected depths from 0 to {MAX_DEPTH:.3f} m for {path}, got {depth.min().item():g} to "
            f"{depth.max().item():g}: clamp them first"
        )
    with whole_file(path) as beside:
        Image.fromarray(units.numpy().astype(np.uint16)).save(beside, "PNG")
    return path


def read_image(path: str | Path) -> Tensor:
    """Read an image in colour: float32 `[3, H, W]` in [0, 1]; FileNotFoundError where there is none."""
    from PIL import Image

    with Image.open(_existing(path)) as image:
        pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).float().div_(255)


def read_velodyne(path: str | Path, columns: int = 4) -> Tensor:
    """Read a scan.

    Args:
        path: little-endian float32, point after point.
        columns: values a point: 4 for KITTI (x, y, z in metres, reflectance), 5 for nuScenes (and ring).

    Returns:
        Points, float32 `[N, columns]`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file does not hold a whole number of points.
    """
    values = np.fromfile(_existing(path), dtype="<f4")
    size = Path(path).stat().st_size
    if size % (4 * columns):
        raise ValueError(f"expected points of {columns} float32 values in {path}, got {size} bytes: check columns")
    return torch.from_numpy(values.astype(np.float32, copy=False).reshape(-1, columns))


def read_calibration(path: str | Path, camera: int = 2) -> Calibration:
    """Read how a camera sees the lidar's points.

    Args:
        path: a file of the object or odometry benchmark (`P0` to `P3`, `R0_rect` and `Tr_velo_to_cam`, or `Tr`), or
            the folder of a day of the raw data, which holds `calib_cam_to_cam.txt` and `calib_velo_to_cam.txt`.
        camera: 0 to 3; 2 and 3 are the colour cameras.

    Returns:
        The calibration of rectified images of full size.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an entry is missing or has the wrong length; the message lists those that are there.
    """
    path = Path(path)
    rectify, to_camera = torch.eye(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    if path.is_dir():
        cameras, lidar = path / "calib_cam_to_cam.txt", path / "calib_velo_to_cam.txt"
        projection = _matrix(cameras, f"P_rect_{camera:02d}", 3, 4)
        rectify[:3, :3] = _matrix(cameras, "R_rect_00", 3, 3)
        to_camera[:3, :3], to_camera[:3, 3:] = _matrix(lidar, "R", 3, 3), _matrix(lidar, "T", 3, 1)
    else:
        projection = _matrix(path, f"P{camera}", 3, 4)
        if "Tr" in read_numbers(path):  # odometry: rectification is part of it
            to_camera[:3] = _matrix(path, "Tr", 3, 4)
        else:
            rectify[:3, :3] = _matrix(path, "R0_rect", 3, 3)
            to_camera[:3] = _matrix(path, "Tr_velo_to_cam", 3, 4)
    return Calibration(projection, rectify @ to_camera)


def read_intrinsics(path: str | Path) -> Tensor:
    """Read the nine numbers of a camera matrix, as beside KITTI's cropped frames: float64 `[3, 3]`."""
    numbers = np.loadtxt(_existing(path)).reshape(-1)
    if numbers.size != 9:
        raise ValueError(f"expected nine numbers in {path}, got {numbers.size}")
    return torch.from_numpy(numbers.reshape(3, 3))


def read_numbers(path: str | Path) -> dict[str, Tensor]:
    """Read lines `name: numbers` into float64 vectors; lines that hold anything else, such as dates, are skipped."""
    entries = {}
    for line in _existing(path).read_text().splitlines():
        name, colon, rest = line.partition(":")
        try:
            numbers = [float(word) for word in rest.split()]
        except ValueError:
            continue
        if colon and numbers:
            entries[name.strip()] = torch.tensor(numbers, dtype=torch.float64)
    return entries


def _matrix(path: Path, name: str, rows: int, columns: int) -> Tensor:
    entries = read_numbers(path)
    if name not in entries:
        raise ValueError(f"expected an entry {name} in {path}, got {', '.join(entries) or 'none'}")
    if len(entries[name]) != rows * columns:
        raise ValueError(f"expected {rows * columns} numbers of {name} in {path}, got {len(entries[name])}")
    return entries[name].view(rows, columns)


def _existing(path: str | Path) -> Path:
    if not Path(path).is_file():
        raise FileNotFoundError(f"expected a file at {path}, got none")
    return Path(path)
