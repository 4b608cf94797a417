"""Write frames the way KITTI's archives lay them out: raw data, depth-completion set, cropped selection."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from lightning_eff.lidar.batches import BottomCrop
from lightning_eff.lidar.files import read_calibration, read_image, read_velodyne, write_depth_png
from lightning_eff.lidar.lines import assign_lines
from lightning_eff.lidar.projection import Calibration, project_points, rasterize
from lightning_eff.lidar.synthetic import SyntheticLidarDataset, synthetic_calibration

FRAME = "0000000005"


@dataclass
class Frame:
    """One frame at full size; `lines` are the true ones, `[1, H, W]`."""

    day: str
    rgb: Tensor
    points: Tensor
    calibration: Calibration
    sparse: Tensor
    lines: Tensor
    gt: Tensor

    @property
    def drive(self) -> str:
        return f"{self.day}_drive_0001_sync"


def synthetic_frames() -> list[Frame]:
    """Two streets on two days, within the dark border that makes them as large as KITTI's uncropped images."""
    streets, frames = SyntheticLidarDataset(2, seed=3), []
    for index, day in enumerate(("2011_09_26", "2011_09_28")):
        scene = streets.scene(index)
        rgb, gt = (pad(image, (13, 13, 23, 0)) for image in scene.photograph())
        points, lines = scene.scan(noise=0.02, dropout=0.05, generator=np.random.default_rng(index))
        calibration = synthetic_calibration().cropped(-23, -13)
        frames.append(_frame(day, rgb, points, calibration, lines, gt))
    # every day of KITTI has a focal length of its own
    frames[1] = replace(frames[1], calibration=_longer(frames[1].calibration))
    pixels, depth = project_points(frames[1].points, frames[1].calibration)
    lines = assign_lines(frames[1].points, "scan_order").lines
    frames[1].sparse, frames[1].lines = rasterize(pixels, depth, lines, (375, 1242))
    return frames


def real_frames(folder: Path) -> list[Frame]:
    """KITTI's object frames; their truth is the depth of all lines."""
    frames = []
    for stem, day in (("000000", "2011_09_28"), ("000001", "2011_09_26")):
        points = read_velodyne(folder / f"{stem}.bin")
        calibration = read_calibration(folder / f"{stem}.txt")
        lines = assign_lines(points, "scan_order").lines
        frames.append(_frame(day, read_image(folder / f"{stem}.png"), points, calibration, lines, None))
    return frames


def _longer(calibration: Calibration) -> Calibration:
    projection = calibration.projection.clone()
    projection[[0, 1], [0, 1]] = 707.0912
    return Calibration(projection, calibration.lidar_to_camera)


def _frame(day: str, rgb: Tensor, points: Tensor, calibration: Calibration, lines: Tensor, gt: Tensor | None) -> Frame:
    sparse, line_idx = rasterize(*project_points(points, calibration), lines, tuple(rgb.shape[1:]))
    return Frame(day, rgb, points, calibration, sparse, line_idx, sparse if gt is None else gt)


def write_tree(root: Path, frames: list[Frame]) -> Path:
    """Write the frames as `train`, `val_select` and `test` frames with the raw data they belong to."""
    for index, frame in enumerate(frames):
        _write_day(root / frame.day, frame.calibration)
        raw = root / frame.day / frame.drive
        _write_image(raw / "image_02" / "data" / f"{FRAME}.png", frame.rgb)
        (raw / "velodyne_points" / "data").mkdir(parents=True)
        xyzr = np.zeros((len(frame.points), 4), "<f4")
        xyzr[:, :3] = frame.points[:, :3]
        xyzr.tofile(raw / "velodyne_points" / "data" / f"{FRAME}.bin")
        for archive, kind, depth in (
            ("velodyne", "velodyne_raw", frame.sparse),
            ("annotated", "groundtruth", frame.gt),
        ):
            folder = root / f"data_depth_{archive}" / "train" / frame.drive / "proj_depth" / kind / "image_02"
            write_depth_png(folder / f"{FRAME}.png", depth)
        cropped = BottomCrop()({"rgb": frame.rgb, "sparse": frame.sparse, "gt": frame.gt})
        top, left = BottomCrop().offset(*frame.rgb.shape[1:])
        intrinsics = frame.calibration.cropped(top, left).projection[:, :3]
        selection = root / "depth_selection"
        for folder, name in (
            ("val_selection_cropped", f"{frame.drive}_{{}}_{FRAME}_image_02"),
            ("test_depth_completion_anonymous", f"{index:010d}"),
        ):
            write_depth_png(
                selection / folder / "velodyne_raw" / f"{name.format('velodyne_raw')}.png", cropped["sparse"]
            )
            _write_image(selection / folder / "image" / f"{name.format('image')}.png", cropped["rgb"])
            (selection / folder / "intrinsics").mkdir(exist_ok=True)
            text = " ".join(f"{number:.12e}" for number in intrinsics.flatten())
            (selection / folder / "intrinsics" / f"{name.format('image')}.txt").write_text(text)
            if folder == "val_selection_cropped":
                truth = selection / folder / "groundtruth_depth" / f"{name.format('groundtruth_depth')}.png"
                write_depth_png(truth, cropped["gt"])
    return root


def _write_day(folder: Path, calibration: Calibration) -> None:
    folder.mkdir(parents=True)
    right = calibration.projection.clone()
    right[0, 3] -= 0.54 * right[0, 0]  # the right camera is 54 cm to the right
    cameras = {"P_rect_02": calibration.projection, "P_rect_03": right, "R_rect_00": torch.eye(3)}
    lidar = {"R": calibration.lidar_to_camera[:3, :3], "T": calibration.lidar_to_camera[:3, 3]}
    for name, entries in (("calib_cam_to_cam.txt", cameras), ("calib_velo_to_cam.txt", lidar)):
        lines = [
            f"{key}: " + " ".join(f"{number:.12e}" for number in value.flatten()) for key, value in entries.items()
        ]
        (folder / name).write_text("\n".join(["calib_time: 09-Jan-2012 13:57:47", *lines, ""]))


def _write_image(path: Path, rgb: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((rgb * 255).round().byte().permute(1, 2, 0).numpy()).save(path)
