"""Synthetic streets seen by a lidar and a camera: every depth is known, every line too.

Rays are cast against flat ground, boxes and two walls. Directions are scaled so that the slab test of a box is done
axis by axis on arrays of one row or one column, and only its outcome on the whole image.

Shapes: `H` rows, `W` columns of the camera; `L` lines, `A` azimuths of the lidar; `O` boxes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from lightning_eff.arguments import check_choice, check_number, check_whole
from lightning_eff.lidar.batches import LidarSample
from lightning_eff.lidar.lines import KITTI_HDL64E, LaserTable
from lightning_eff.lidar.projection import Calibration, project_points, rasterize

Array = NDArray[np.floating]
Part = Literal["train", "val", "test"]

IMAGE_SIZE = (352, 1216)
"""Height and width of KITTI's cropped frames."""

CAMERA_POSITION = (0.27, 0.0, -0.08)
"""Of the camera in lidar coordinates, metres: about where KITTI's left colour camera is."""

_PROJECTION = [[721.5377, 0, 609.56 - 13, 0], [0, 721.5377, 172.85 - 23, 0], [0, 0, 1, 0]]  # KITTI's, after the crop
_GROUND_COLOR, _SKY_COLOR = (0.42, 0.42, 0.44), (0.62, 0.76, 0.92)


def synthetic_calibration(scale: int = 1) -> Calibration:
    """Calibration of the synthetic camera at 1 / `scale` of 352 x 1216: KITTI's intrinsics, no rotation."""
    lidar_to_camera = torch.tensor([[0.0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]], dtype=torch.float64)
    lidar_to_camera[:3, 3] = -lidar_to_camera[:3, :3] @ torch.tensor(CAMERA_POSITION, dtype=torch.float64)
    return Calibration(torch.tensor(_PROJECTION, dtype=torch.float64), lidar_to_camera).downscaled(scale)


@dataclass(frozen=True, eq=False)
class Scene:
    """Flat ground and axis-aligned boxes, in lidar coordinates (x forward, y left, z up).

    Args:
        boxes: `[O, 2, 3]`: lowest and highest corner of every box in metres. A box around a sensor is not seen by it.
        colors: `[O, 3]`, in [0, 1].
        ground: height of the ground in metres, below the sensors.

    Raises:
        ValueError: shapes do not fit, or a box has its corners in the wrong order.
    """

    boxes: Array
    colors: Array
    ground: float = -1.73

    def __post_init__(self) -> None:
        boxes, colors = np.asarray(self.boxes, float).reshape(-1, 2, 3), np.asarray(self.colors, float).reshape(-1, 3)
        if len(boxes) != len(colors):
            raise ValueError(f"expected a colour for each box, got {len(colors)} and {len(boxes)}")
        if (boxes[:, 0] >= boxes[:, 1]).any():
            raise ValueError("expected the first corner of every box to be the lower one along every axis")
        object.__setattr__(self, "boxes", boxes)
        object.__setattr__(self, "colors", colors)

    @classmethod
    def random(cls, generator: np.random.Generator, num_boxes: int = 12) -> Scene:
        """Draw a street: two walls 8 to 16 m to the sides, and boxes of the size of posts, cars and vans between.

        Args:
            generator: the only source of chance.
            num_boxes: boxes besides the walls, >= 0.
        """
        ground = -1.73
        left, right = generator.uniform(8, 16, size=2)
        tops = ground + generator.uniform(6, 12, size=2)
        walls = [[[-100, left, ground], [100, left + 1, tops[0]]], [[-100, -right - 1, ground], [100, -right, tops[1]]]]
        size = generator.uniform((0.4, 0.4, 0.8), (5.0, 2.5, 3.5), size=(num_boxes, 3))
        # uniform in the logarithm of the distance: as many near boxes, which cover much, as far ones
        x = np.exp(generator.uniform(np.log(5), np.log(70), size=num_boxes))
        y = generator.uniform(-right + 1, left - 3.5, size=num_boxes)
        lowest = np.stack([x, y, np.full(num_boxes, ground)], 1)
        boxes = np.concatenate([np.array(walls), np.stack([lowest, lowest + size], 1)])
        return cls(boxes, generator.uniform(0.1, 0.9, size=(len(boxes), 3)), ground)

    def moved(self, forward: float) -> Scene:
        """The scene as it looks when the sensors have gone this many metres forward."""
        return replace(self, boxes=self.boxes - np.array([forward, 0, 0]))

    def cast(self, origin: tuple[Array | float, ...], direction: tuple[Array | float, ...]) -> tuple[Array, Array]:
        """Follow rays to what they hit first.

        Args:
            origin: x, y, z where rays begin, arrays that broadcast with each other and with `direction`.
            direction: x, y, z of their directions, of any length.

        Returns:
            Length of every ray in units of its direction, infinite where it hits nothing, and what it hits: -1
            nothing, 0 the ground, 1 + i box i.
        """
        shape = np.broadcast_shapes(*(np.shape(array) for array in (*origin, *direction)))
        length, hit = np.full(shape, np.inf), np.full(shape, -1)
        with np.errstate(divide="ignore", invalid="ignore"):
            inverse = [1 / np.asarray(axis, float) for axis in direction]
            to_ground = np.broadcast_to((self.ground - np.asarray(origin[2])) * inverse[2], shape)
            below = to_ground > 0
            length[below], hit[below] = to_ground[below], 0
            for i, (lowest, highest) in enumerate(self.boxes):
                enter, leave = np.zeros(()), np.full((), np.inf)
                for axis in range(3):
                    first = (lowest[axis] - np.asarray(origin[axis])) * inverse[axis]
                    last = (highest[axis] - np.asarray(origin[axis])) * inverse[axis]
                    enter = np.maximum(enter, np.minimum(first, last))
                    leave = np.minimum(leave, np.maximum(first, last))
                nearer = (enter < leave) & (enter > 0) & (enter < length)
                np.copyto(length, enter, where=nearer)
                hit[nearer] = 1 + i
        return length, hit

    def scan(
        self,
        table: LaserTable = KITTI_HDL64E,
        *,
        azimuths: Array | None = None,
        noise: float = 0.0,
        dropout: float = 0.0,
        max_range: float = 80.0,
        generator: np.random.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Scan the scene, laser after laser from the top, azimuth rising: the order of KITTI's files.

        Args:
            table: lasers of the sensor.
            azimuths: angles `[A]` at which they fire, in degrees, rising; by default a full turn in steps of 0.18.
            noise: standard deviation of the range in metres, >= 0.
            dropout: share of returns that are lost, in [0, 1).
            max_range: farthest return in metres.
            generator: source of noise and dropout; needed for either.

        Returns:
            Points, float32 `[N, 3]` in metres, and their lines, uint8 `[N]`.

        Raises:
            ValueError: noise or dropout without a generator.
        """
        if generator is None and (noise or dropout):
            raise ValueError("expected a generator for noise and dropout, got None")
        angle = np.deg2rad(np.arange(0, 360, 0.18) if azimuths is None else azimuths)
        x, y, z = np.cos(angle), np.sin(angle), table.slopes.numpy()[:, None]
        height = np.array(table.heights)[:, None]
        rho, _ = self.cast((0.0, 0.0, height), (x, y, z))
        stretch = np.sqrt(1 + z**2)  # metres of range a metre of horizontal distance
        seen = rho * stretch <= max_range
        if generator is not None:
            if dropout:
                seen &= generator.random(rho.shape) >= dropout
            if noise:
                rho = rho + generator.normal(0, noise, rho.shape) / stretch
        line, column = seen.nonzero()
        rho = rho[seen]
        points = np.stack([rho * x[column], rho * y[column], height[line, 0] + rho * z[line, 0]], 1)
        return torch.from_numpy(points.astype(np.float32)), torch.from_numpy(line.astype(np.uint8))

    def photograph(self, scale: int = 1, max_depth: float = 80.0) -> tuple[Tensor, Tensor]:
        """Take the camera's image and the depth of every pixel.

        Args:
            scale: divides the resolution of 352 x 1216.
            max_depth: what is farther, in metres, has no depth.

        Returns:
            Image, float32 `[3, H, W]` in [0, 1], darker with distance, and exact depth along the centre of every
            pixel, float32 `[1, H, W]` in metres, 0 where there is none.
        """
        height, width = (side // scale for side in IMAGE_SIZE)
        camera = synthetic_calibration(scale).projection.numpy()
        left = (camera[0, 2] - np.arange(width)) / camera[0, 0]
        up = (camera[1, 2] - np.arange(height)[:, None]) / camera[1, 1]
        depth, hit = self.cast(CAMERA_POSITION, (1.0, left, up))
        palette = np.concatenate([[_GROUND_COLOR], self.colors, [_SKY_COLOR]]).astype(np.float32)
        shade = np.where(hit < 0, 1, np.exp(-np.minimum(depth, 1000) / 60)).astype(np.float32)
        image = torch.from_numpy(palette.T[:, hit] * shade)
        depth = np.where(depth <= max_depth, depth, 0).astype(np.float32)
        return image, torch.from_numpy(depth).unsqueeze(0)


class SyntheticLidarDataset(Dataset[LidarSample]):
    """Random streets as frames of a lidar and a camera.

    The lidar fires 0.18 degrees apart, with noise and lost returns; the camera is KITTI's. What a frame holds depends
    on `(seed, part, index)` alone.

    Args:
        length: frames, >= 1.
        part: `"train"`, `"val"` or `"test"`: parts share no scene.
        scale: divides the resolution of 352 x 1216; one of 1, 2, 4, 8, 16, 32.
        seed: of everything, >= 0.
        table: lasers of the sensor.
        num_boxes: boxes a scene has besides its two walls, >= 0.
        noise: standard deviation of the range in metres, >= 0.
        dropout: share of returns that are lost, in [0, 1).
        max_range: farthest return of the lidar and farthest true depth in metres, > 0.
        sequence_length: frames that show one scene from places `step` apart, one sequence; 1 makes every frame new.
        step: metres forward from one frame of a sequence to the next.

    Raises:
        ValueError: an argument lies outside its range.
    """

    def __init__(
        self,
        length: int = 64,
        part: Part = "train",
        *,
        scale: int = 4,
        seed: int = 0,
        table: LaserTable = KITTI_HDL64E,
        num_boxes: int = 12,
        noise: float = 0.02,
        dropout: float = 0.05,
        max_range: float = 80.0,
        sequence_length: int = 1,
        step: float = 0.5,
    ) -> None:
        for name, value, bound in (
            ("length", length, 1),
            ("seed", seed, 0),
            ("num_boxes", num_boxes, 0),
            ("sequence_length", sequence_length, 1),
        ):
            check_whole(name, value, bound)
        check_number("noise", noise, least=0)
        check_choice("part", part, get_args(Part))
        if scale < 1 or any(side % scale for side in IMAGE_SIZE):
            raise ValueError(f"expected scale to divide {IMAGE_SIZE[0]} and {IMAGE_SIZE[1]}, got {scale}")
        check_number("dropout", dropout, least=0, below=1)
        check_number("max_range", max_range, above=0)
        self.length, self.part, self.scale, self.seed = length, part, scale, seed
        self.table, self.num_boxes = table, num_boxes
        self.noise, self.dropout, self.max_range = noise, dropout, max_range
        self.sequence_length, self.step = sequence_length, step

    def __len__(self) -> int:
        return self.length

    def scene(self, index: int) -> Scene:
        """The street frame `index` shows."""
        sequence, frame = divmod(index, self.sequence_length)
        scene = Scene.random(np.random.default_rng([*self._key, 0, sequence]), self.num_boxes)
        return scene.moved(frame * self.step)

    def __getitem__(self, index: int) -> LidarSample:
        """Return frame `index`: keys and shapes as :mod:`lightning_eff.lidar.batches` tells.

        Raises:
            IndexError: `index` lies outside the data set.
        """
        if not 0 <= index < self.length:
            raise IndexError(f"expected an index from 0 to {self.length - 1}, got {index}")
        scene, calibration = self.scene(index), synthetic_calibration(self.scale)
        rgb, gt = scene.photograph(self.scale, self.max_range)
        points, lines = scene.scan(
            self.table,
            azimuths=np.arange(-45, 45, 0.18),  # the camera sees 40 degrees to either side
            noise=self.noise,
            dropout=self.dropout,
            max_range=self.max_range,
            generator=np.random.default_rng([*self._key, 1, index]),
        )
        sparse, line_idx = rasterize(*project_points(points, calibration), lines, (gt.shape[1], gt.shape[2]))
        return {
            "rgb": rgb,
            "sparse": sparse,
            "gt": gt,
            "line_idx": line_idx,
            "sample_id": f"{self.part}/{index:06d}",
            "sequence": f"{self.part}/{index // self.sequence_length:06d}",
        }

    @property
    def _key(self) -> tuple[int, int]:
        return self.seed, get_args(Part).index(self.part)
