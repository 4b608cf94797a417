"""Where KITTI's files lie, and which of them show one frame.

Files are paired by drive, camera and frame, which their names tell, never by their position in a sorted list.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from lightning_eff.arguments import check_choice

DepthSplit = Literal["train", "val", "val_select", "test"]

_SELECTION = {"val_select": "val_selection_cropped", "test": "test_depth_completion_anonymous"}
_IN_NAME = re.compile(r"(?P<drive>\d{4}_\d\d_\d\d_drive_\d{4}_sync)_\w+_(?P<frame>\d{10})_image_0(?P<camera>\d)\.\w+$")
_IN_PATH = re.compile(
    r"(?P<drive>\d{4}_\d\d_\d\d_drive_\d{4}_sync)/(?:.*image_0(?P<camera>\d)|velodyne_points)/(?:data/)?"
    r"(?P<frame>\d{10})\.\w+$"
)


class FrameName(NamedTuple):
    """What a file shows.

    Attributes:
        drive: e.g. `2011_09_26_drive_0002_sync`; empty where names do not tell.
        camera: 2 or 3; `None` for scans and where names do not tell.
        frame: number of the frame as written, e.g. `0000000005`.
    """

    drive: str
    camera: int | None
    frame: str

    @classmethod
    def of(cls, path: Path) -> FrameName:
        """Read it from a path of the raw data or of the depth-completion set."""
        found = _IN_NAME.search(path.name) or _IN_PATH.search(path.as_posix())
        if found is None:
            return cls("", None, path.stem)
        return cls(found["drive"], int(found["camera"]) if found["camera"] else None, found["frame"])

    def agrees(self, other: FrameName) -> bool:
        """Whether both can be of one frame."""
        cameras = self.camera, other.camera
        same_camera = None in cameras or cameras[0] == cameras[1]
        return self.drive == other.drive and self.frame == other.frame and same_camera

    def __str__(self) -> str:
        parts = self.drive, "" if self.camera is None else f"image_0{self.camera}", self.frame
        return "/".join(filter(None, parts))


@dataclass(frozen=True)
class DepthFiles:
    """The files of one frame of the depth-completion set.

    Args:
        sparse: depth image of the lidar.
        image: of the camera.
        gt: depth image of the truth; `None` where it is not public.
        intrinsics: camera matrix of a cropped frame; `None` for frames of full size.
        calibration: folder of the day with its two calibration files; `None` looks for the day by focal length among
            the folders in `raw_root`.
        scan: the raw scan, for the line sources that need it.
        raw_root: folder that holds the days.

    Raises:
        ValueError: two of the files are of different frames; the message names both.
    """

    sparse: Path
    image: Path
    gt: Path | None
    intrinsics: Path | None
    calibration: Path | None
    scan: Path | None
    raw_root: Path

    def __post_init__(self) -> None:
        _check_one_frame(self.sparse, self.image, self.gt, self.intrinsics, self.scan)

    @property
    def name(self) -> FrameName:
        """Drive, camera and frame."""
        return FrameName.of(self.sparse)


@dataclass(frozen=True)
class ScanFiles:
    """The files of one full scan with its image.

    Args:
        scan: of the lidar.
        image: of the camera.
        calibration: a file, or the folder of a day of the raw data.

    Raises:
        ValueError: scan and image are of different frames; the message names both.
    """

    scan: Path
    image: Path
    calibration: Path

    def __post_init__(self) -> None:
        _check_one_frame(self.scan, self.image, self.calibration if self.calibration.suffix == ".txt" else None)

    @property
    def name(self) -> FrameName:
        """Drive, camera and frame."""
        return FrameName.of(self.image)


def find_depth_frames(
    root: str | Path, split: DepthSplit, raw_root: str | Path | None = None, cameras: Sequence[int] = (2, 3)
) -> list[DepthFiles]:
    """Find the frames of KITTI's depth-completion set.

    Args:
        root: folder the archives were unpacked into: it holds `data_depth_velodyne/train`,
            `data_depth_annotated/train` and so on for `"train"` and `"val"`, `depth_selection/val_selection_cropped`
            for `"val_select"` and `depth_selection/test_depth_completion_anonymous` for `"test"`. The outer folder of
            either may be missing.
        split: which frames; `"val_select"` are the 1,000 cropped ones, `"test"` those without public truth.
        raw_root: folder of the raw data: days such as `2011_09_26`, with their calibration files, and in them drives
            with images and scans; by default `root`.
        cameras: 2 (left), 3 (right) or both; of no effect where names do not tell the camera.

    Returns:
        Frames in the order of their names.

    Raises:
        ValueError: another split.
        FileNotFoundError: a folder or the partner of a file is missing, or no frame is there.
    """
    check_choice("split", split, get_args(DepthSplit))
    root, raw = Path(root), Path(root if raw_root is None else raw_root)
    frames = list(_selected(root, split, raw) if split in _SELECTION else _by_drive(root, split, raw))
    frames = [frame for frame in frames if frame.name.camera is None or frame.name.camera in cameras]
    if not frames:
        raise FileNotFoundError(f"expected depth images of the cameras {list(cameras)} in {root}, split {split!r}")
    return frames


def _by_drive(root: Path, split: str, raw: Path) -> Iterator[DepthFiles]:
    inputs = _folder(root / "data_depth_velodyne" / split, root / split)
    truth = _folder(root / "data_depth_annotated" / split, root / split)
    for sparse in sorted(inputs.glob("*_sync/proj_depth/velodyne_raw/image_0?/*.png")):
        name = FrameName.of(sparse)
        gt = truth / name.drive / "proj_depth" / "groundtruth" / f"image_0{name.camera}" / sparse.name
        image = _drive_folder(raw, name.drive) / f"image_0{name.camera}" / "data" / sparse.name
        yield DepthFiles(
            sparse=sparse,
            image=_partner(sparse, image, "image"),
            gt=_partner(sparse, gt, "true depth"),
            intrinsics=None,
            calibration=raw / name.drive[:10],
            scan=_drive_folder(raw, name.drive) / "velodyne_points" / "data" / f"{name.frame}.bin",
            raw_root=raw,
        )


def _selected(root: Path, split: str, raw: Path) -> Iterator[DepthFiles]:
    folder = _folder(root / "depth_selection" / _SELECTION[split], root / _SELECTION[split])
    for sparse in sorted((folder / "velodyne_raw").glob("*.png")):
        name = FrameName.of(sparse)
        image = folder / "image" / sparse.name.replace("velodyne_raw", "image")
        intrinsics = (folder / "intrinsics" / image.name).with_suffix(".txt")
        gt = folder / "groundtruth_depth" / sparse.name.replace("velodyne_raw", "groundtruth_depth")
        scan = _drive_folder(raw, name.drive) / "velodyne_points" / "data" / f"{name.frame}.bin"
        yield DepthFiles(
            sparse=sparse,
            image=_partner(sparse, image, "image"),
            gt=None if split == "test" else _partner(sparse, gt, "true depth"),
            intrinsics=_partner(sparse, intrinsics, "intrinsics"),
            calibration=raw / name.drive[:10] if name.drive else None,
            scan=scan if name.drive else None,
            raw_root=raw,
        )


def find_scan_frames(root: str | Path, camera: int = 2) -> list[ScanFiles]:
    """Find full scans with their images.

    Args:
        root: of the object benchmark (`velodyne`, `image_2` and `calib`, or these in `training`); of the raw data
            (days, in them drives); or one folder with `NAME.bin`, `NAME.png` and `NAME.txt`.
        camera: 2 (left) or 3 (right).

    Returns:
        Frames in the order of their names.

    Raises:
        FileNotFoundError: no scan is there, or the image or calibration of one is missing.
    """
    root = Path(root)
    base = root / "training" if (root / "training" / "velodyne").is_dir() else root
    if (base / "velodyne").is_dir():
        places = [
            (scan, base / f"image_{camera}" / f"{scan.stem}.png", base / "calib" / f"{scan.stem}.txt")
            for scan in sorted((base / "velodyne").glob("*.bin"))
        ]
    elif flat := sorted(root.glob("*.bin")):
        places = [(scan, scan.with_suffix(".png"), scan.with_suffix(".txt")) for scan in flat]
    else:
        places = [
            (scan, scan.parents[2] / f"image_0{camera}" / "data" / f"{scan.stem}.png", scan.parents[3])
            for scan in sorted(root.glob("*/*_sync/velodyne_points/data/*.bin"))
        ]
    if not places:
        raise FileNotFoundError(
            f"expected scans in {root}: velodyne/*.bin (object benchmark), DAY/DRIVE_sync/velodyne_points/data/*.bin "
            "(raw data) or *.bin, got none"
        )
    return [
        ScanFiles(scan, _partner(scan, image, "image"), _partner(scan, calibration, "calibration"))
        for scan, image, calibration in places
    ]


def _drive_folder(raw: Path, drive: str) -> Path:
    return raw / drive[:10] / drive  # a drive's name begins with its day


def _folder(*places: Path) -> Path:
    for place in places:
        if place.is_dir():
            return place
    raise FileNotFoundError(f"expected one of the folders {', '.join(map(str, places))}, got none")


def _partner(of: Path, path: Path, what: str) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"expected the {what} of {of} at {path}, got none (files are paired by name)")
    return path


def _check_one_frame(first: Path, *others: Path | None) -> None:
    for other in others:
        if other is not None and not FrameName.of(first).agrees(FrameName.of(other)):
            raise ValueError(f"expected files of one drive, camera and frame, got {first} and {other}")
