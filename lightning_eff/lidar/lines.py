"""Which line of a spinning lidar every point belongs to.

KITTI stores no ring number. Scan order and the table of lasers recover it exactly; bins of elevation do not, since
every laser sits at its own height and looks along its own angle: laser k hits points with `z = h_k + rho tan(phi_k)`,
`rho = sqrt(x^2 + y^2)`.

Shapes: `N` points, `L` lines of the sensor. Line 0 has the highest elevation.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_eff.arguments import check_whole
from lightning_eff.lidar.batches import NO_LINE

LineMethod = Literal["ring", "scan_order", "laser_table", "elevation", "official"]

LARGE_RESIDUAL = 0.1
"""Median residual in degrees above which points do not come from the lasers of the table; KITTI has 0.001 to 0.03."""

LARGE_SHARE = 0.25
"""The same in halves of the angle to the next laser. Points that have nothing to do with the table have 0.5, depth
images of KITTI 0.15; with the calibration of the other camera it is 0.3, and every seventh line is wrong."""


class LidarWarning(UserWarning):
    """Something about lidar data or lines that a user should know but that does not stop the work."""


@dataclass(frozen=True)
class LaserTable:
    """Where the lasers of a sensor sit and where they look.

    Args:
        elevations: angle `phi_k` of every laser above the horizon in degrees, falling, `L` of them.
        heights: height `h_k` of every laser above the origin of the cloud in metres, `L` of them.

    Raises:
        ValueError: lengths differ, there is no laser or more than 255, or elevations do not fall.
    """

    elevations: tuple[float, ...]
    heights: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "elevations", tuple(map(float, self.elevations)))
        object.__setattr__(self, "heights", tuple(map(float, self.heights)))
        if len(self.elevations) != len(self.heights) or not 1 <= len(self.elevations) <= NO_LINE:
            raise ValueError(
                f"expected as many heights as elevations, 1 to {NO_LINE}, "
                f"got {len(self.heights)} and {len(self.elevations)}"
            )
        if any(upper <= lower for upper, lower in zip(self.elevations, self.elevations[1:], strict=False)):
            raise ValueError("expected elevations to fall from line to line, line 0 being the highest")

    def __len__(self) -> int:
        return len(self.elevations)

    @property
    def slopes(self) -> Tensor:
        """`tan(phi_k)`, float64 `[L]`: metres of height a laser gains a metre of horizontal distance."""
        return torch.tensor(self.elevations, dtype=torch.float64).deg2rad().tan()

    @property
    def gaps(self) -> Tensor:
        """Angle from every laser to the nearest other one in degrees, float64 `[L]`; infinite for a single laser."""
        steps = -torch.tensor([math.inf, *self.elevations, -math.inf], dtype=torch.float64).diff()
        return torch.minimum(steps[:-1], steps[1:])


# fmt: off
KITTI_HDL64E = LaserTable(
    elevations=(
        1.937, 1.574, 1.305, 0.872, 0.579, 0.181, -0.089, -0.452, -0.803, -1.201, -1.494, -1.833, -2.208, -2.547,
        -2.874, -3.236, -3.539, -3.936, -4.216, -4.588, -4.914, -5.251, -5.611, -5.958, -6.329, -6.676, -6.999,
        -7.287, -7.679, -8.058, -8.310, -8.711, -9.026, -9.573, -10.063, -10.471, -10.957, -11.599, -12.115, -12.562,
        -13.041, -13.485, -14.048, -14.597, -15.189, -15.657, -16.176, -16.555, -17.188, -17.730, -18.322, -18.798,
        -19.320, -19.737, -20.224, -20.789, -21.317, -21.935, -22.438, -22.856, -23.322, -23.971, -24.507, -25.002,
    ),
    heights=(
        0.2091, 0.2086, 0.2083, 0.2077, 0.2073, 0.2068, 0.2065, 0.2060, 0.2056, 0.2051, 0.2048, 0.2044, 0.2039,
        0.2036, 0.2032, 0.2028, 0.2025, 0.2021, 0.2018, 0.2015, 0.2011, 0.2008, 0.2005, 0.2001, 0.1998, 0.1995,
        0.1992, 0.1990, 0.1986, 0.1983, 0.1981, 0.1978, 0.1258, 0.1254, 0.1251, 0.1247, 0.1244, 0.1240, 0.1235,
        0.1233, 0.1229, 0.1226, 0.1223, 0.1218, 0.1216, 0.1212, 0.1209, 0.1208, 0.1205, 0.1200, 0.1195, 0.1194,
        0.1191, 0.1189, 0.1187, 0.1184, 0.1178, 0.1176, 0.1174, 0.1171, 0.1169, 0.1166, 0.1163, 0.1163,
    ),
)
"""The Velodyne HDL-64E of KITTI's car, fitted to the rings of full scans by :func:`fit_laser_table`."""
# fmt: on


@dataclass(frozen=True, eq=False)
class LineAssignment:
    """The line of every point.

    Args:
        lines: uint8 `[N]`, 0 = highest elevation, 255 = not known.
        residuals: angle between a point and its laser in degrees, >= 0, float32 `[N]`; NaN by methods that know no
            angles.
    """

    lines: Tensor
    residuals: Tensor

    @property
    def median_residual(self) -> float:
        """Median angle between points and their lasers in degrees; NaN where there is none."""
        return self.residuals.nanmedian().item() if self.residuals.numel() else math.nan


def assign_lines(
    points: Tensor,
    method: LineMethod = "laser_table",
    *,
    num_lines: int = 64,
    table: LaserTable = KITTI_HDL64E,
    max_residual: float | None = None,
    elevation_range: tuple[float, float] | None = None,
    ring_column: int = 4,
) -> LineAssignment:
    """Find the line of every point of a cloud.

    - `"ring"`: the cloud has a column of ring numbers that rise from the lowest ring (nuScenes).
    - `"scan_order"`: full scans stored laser after laser, top to bottom (raw KITTI, also motion-compensated): a line
      begins where the azimuth falls back to 0.
    - `"laser_table"`: the laser of `table` whose line passes nearest in angle. Any part of a cloud in any order, and
      points back-projected from a depth image; not motion-compensated scans.
    - `"elevation"`: the nearest of `num_lines` lasers that sit in the origin and look along evenly spaced angles. For
      sensors of which nothing else is known: on KITTI it mixes lines.
    - `"official"`: the bins of the published code, to reproduce its figures only. It takes the squared cosine of the
      elevation for the cosine; a fifth of all points gets no line and a bin mixes several lasers.

    Args:
        points: `[N, 3]` or with more columns, x forward, y left, z up in metres, origin at the sensor.
        method: how.
        num_lines: lines of the sensor, 1 to 255; by `"laser_table"` it is the length of `table`.
        table: lasers of the sensor.
        max_residual: by `"laser_table"`, points farther from every laser than this many degrees get line 255.
        elevation_range: by `"elevation"`, angles of the highest and the lowest laser in degrees; by default those
            of `table`.
        ring_column: by `"ring"`, the column of ring numbers.

    Returns:
        Lines and, by `"laser_table"`, residuals. Points with a coordinate that is not finite have line 255.

    Raises:
        ValueError: shape of `points`, an unknown method, a number of rings other than `num_lines`, or ring numbers
            out of range.

    Warns:
        LidarWarning: residuals of `"laser_table"` are large.
    """
    if points.ndim != 2 or points.shape[1] < 3:
        raise ValueError(f"expected points [N, 3] or more columns, got {list(points.shape)}")
    check_whole("num_lines", num_lines, 1, NO_LINE)
    finite = points[:, :3].isfinite().all(dim=1)
    points = points[finite]  # an angle of NaN is near to no laser, and hides where a line begins
    residuals = torch.full((len(points),), torch.nan)
    if method == "laser_table":
        lines, residuals = _by_laser_table(points, table, max_residual)
    elif method == "scan_order":
        lines = _by_scan_order(points, num_lines)
    elif method == "ring":
        lines = _by_ring(points, num_lines, ring_column)
    elif method == "elevation":
        lines = _by_elevation(points, num_lines, *(elevation_range or (table.elevations[0], table.elevations[-1])))
    elif method == "official":
        lines = _by_official_bins(points, num_lines)
    else:
        raise ValueError(f"method must be one of {', '.join(get_args(LineMethod))}, got {method!r}")
    every_line = torch.full((len(finite),), NO_LINE, dtype=torch.uint8)
    every_line[finite] = lines.to(torch.uint8)
    every_residual = torch.full((len(finite),), torch.nan)
    every_residual[finite] = residuals
    return LineAssignment(every_line, every_residual)


def _by_laser_table(points: Tensor, table: LaserTable, max_residual: float | None) -> tuple[Tensor, Tensor]:
    xyz = points[:, :3].float()
    angles, heights = torch.tensor(table.elevations).deg2rad(), torch.tensor(table.heights)
    nearest = torch.empty(len(xyz), dtype=torch.int64)
    residuals = torch.empty(len(xyz))
    for start in range(0, len(xyz), 8192):  # N x L angles at once would leave the cache
        part = xyz[start : start + 8192]
        rho = torch.hypot(part[:, 0], part[:, 1]).unsqueeze(1)
        residual, line = (torch.atan2(part[:, 2:] - heights, rho) - angles).abs().min(dim=1)
        nearest[start : start + 8192], residuals[start : start + 8192] = line, residual.rad2deg()
    lines = nearest if max_residual is None else torch.where(residuals <= max_residual, nearest, NO_LINE)
    share = (residuals / (table.gaps[nearest] / 2)).median().item() if len(xyz) else 0.0
    half = residuals.median().item() if len(xyz) else 0.0
    if share > LARGE_SHARE or half > LARGE_RESIDUAL:
        warnings.warn(
            f"half of the points lie {half:.3f} degrees or more from every laser of the table, "
            f"{share:.2f} of the way to where the next laser takes over: lines are probably wrong. Image cropped "
            "or from another camera than the calibration's, another sensor, or a motion-compensated scan, for which "
            "method='scan_order' works",
            LidarWarning,
            stacklevel=3,
        )
    return lines, residuals


def _by_scan_order(points: Tensor, num_lines: int) -> Tensor:
    azimuth = torch.atan2(points[:, 1].double(), points[:, 0].double()).rad2deg().remainder(360)
    line = (azimuth.diff() < -180).cumsum(0)
    line = torch.cat([line.new_zeros(min(1, len(points))), line])
    rings = int(line[-1]) + 1 if len(line) else 0
    if rings != num_lines:
        raise ValueError(
            f"expected {num_lines} rings in scan order, found {rings}: the cloud is probably reduced to a field of "
            "view or re-ordered; use method='laser_table', or pass num_lines for another sensor"
        )
    return line


def _by_ring(points: Tensor, num_lines: int, column: int) -> Tensor:
    if not 3 <= column < points.shape[1]:
        raise ValueError(f"expected ring numbers in column {column}, got points of {points.shape[1]} columns")
    ring = points[:, column]
    if len(ring) and (ring.min() < 0 or ring.max() >= num_lines or (ring != ring.round()).any()):
        raise ValueError(
            f"expected whole ring numbers from 0 to {num_lines - 1} in column {column}, "
            f"got values from {ring.min().item():g} to {ring.max().item():g}: check ring_column and num_lines"
        )
    return num_lines - 1 - ring.long()


def _by_elevation(points: Tensor, num_lines: int, top: float, bottom: float) -> Tensor:
    if num_lines < 2 or top <= bottom:
        raise ValueError(
            f"expected two lines or more and elevation_range (highest, lowest), got {num_lines} and {(top, bottom)}"
        )
    xyz = points[:, :3].double()
    elevation = torch.atan2(xyz[:, 2], xyz[:, :2].norm(dim=1)).rad2deg()
    return ((top - elevation) / (top - bottom) * (num_lines - 1)).round().clamp(0, num_lines - 1)


def _by_official_bins(points: Tensor, num_lines: int) -> Tensor:
    first, step = -23.68, 0.41  # degrees; the published code counts its bins from below
    squared = points[:, :3].double().square()
    cosine_squared = squared[:, :2].sum(1) / squared.sum(1)
    stretched = torch.acos(cosine_squared.clamp(0, 1)).rad2deg() * points[:, 2].double().sign()
    bin_ = ((stretched - first) / step).floor()
    return torch.where((bin_ >= 0) & (bin_ < num_lines), num_lines - 1 - bin_, NO_LINE)


def fit_laser_table(scans: Sequence[Tensor], num_lines: int = 64) -> LaserTable:
    """Fit the table of a sensor's lasers to raw scans: least squares of `z` on `[rho, 1]`, ring by ring.

    Args:
        scans: full clouds `[N, 3]` or with more columns, each in scan order; more than one gives each laser more
            distances.
        num_lines: lines of the sensor, 1 to 255.

    Returns:
        The table, angles and heights of all lasers.

    Raises:
        ValueError: no scan, a scan without `num_lines` rings, or a ring of points at one distance only.
    """
    if not scans:
        raise ValueError("expected at least one scan, got none")
    points = torch.cat([scan[:, :3].double() for scan in scans])
    lines = torch.cat([assign_lines(scan, "scan_order", num_lines=num_lines).lines for scan in scans])
    elevations, heights = [], []
    for line in range(num_lines):
        ring = points[lines == line]
        rho, z = ring[:, :2].norm(dim=1), ring[:, 2]
        spread = (rho - rho.mean()).square().sum()
        if spread < 1e-6 * len(ring):
            raise ValueError(f"expected ring {line} to see several distances, got {rho.mean():.3f} m only: add scans")
        slope = ((rho - rho.mean()) * (z - z.mean())).sum() / spread
        elevations.append(math.degrees(math.atan(slope.item())))
        heights.append((z.mean() - slope * rho.mean()).item())
    return LaserTable(tuple(elevations), tuple(heights))
