"""What a batch of lidar frames is, how its keys are renamed, and windows and flips that treat all its images alike.

A batch is a dict (a sample is the same without `B`, its `sample_id` and `sequence` being single strings):

| key | shape | meaning |
|---|---|---|
| `rgb` | `[B, 3, H, W]` floating point | image |
| `sparse` | `[B, 1, H, W]` floating point | depth from the lidar in metres, 0 = no return |
| `gt` | `[B, 1, H, W]` floating point | true depth in metres, 0 = unknown |
| `line_idx` | `[B, 1, H, W]` uint8 | line of the sensor that gave the depth, 0 = highest elevation, 255 = no return |
| `sample_id` | `B` strings or numbers, optional | names the frame, whatever the order of loading |
| `sequence` | `B` strings or numbers, optional | drive the frame belongs to |

Indexing a tensor with a uint8 tensor is a boolean mask in torch: make `line_idx` int64 first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_eff.arguments import check_number, check_whole

NO_LINE = 255
"""Value of `line_idx` where there is no return, or one whose line is not known."""

LidarSample = dict[str, Any]
"""One frame, keys as above, without the batch axis."""


@dataclass(frozen=True)
class LidarKeys:
    """Take inputs and target out of a lidar batch: the `split_batch` of everything that reads lidar frames.

    Args:
        rgb: key of the image in the user's batches.
        sparse: key of the sparse depth.
        gt: key of the true depth.
        line_idx: key of the line of every pixel.
        sample_id: key of the frame's name; batches need not have it.
        sequence: key of the drive's name; batches need not have it.

    Example:
        >>> import torch
        >>> depth, lines = torch.ones(2, 1, 4, 6), torch.zeros(2, 1, 4, 6, dtype=torch.uint8)
        >>> batch = {"image": torch.ones(2, 3, 4, 6), "sparse": depth, "gt": depth, "line_idx": lines}
        >>> inputs, target = LidarKeys(rgb="image")(batch)
        >>> sorted(inputs)
        ['line_idx', 'rgb', 'sparse']
    """

    rgb: str = "rgb"
    sparse: str = "sparse"
    gt: str = "gt"
    line_idx: str = "line_idx"
    sample_id: str = "sample_id"
    sequence: str = "sequence"

    def __call__(self, batch: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor]:
        """Return the inputs under the names of this class's arguments, and the true depth.

        Returns:
            Inputs: a dict of `rgb`, `sparse`, `line_idx` and, where the batch has them, `sample_id` and `sequence`;
            target: `[B, 1, H, W]` in metres.

        Raises:
            TypeError: the batch is no dict.
            KeyError: a key is missing; the message tells how to rename it or where it comes from.
            ValueError: shapes do not fit together, or `line_idx` is not integer.
        """
        inputs, target = self.inputs(batch), self._take(batch, "gt")
        _check_image("gt", target, like=inputs["sparse"])
        return inputs, target

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the inputs alone, for batches without true depth; raises what calling it raises."""
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"expected a lidar batch as a dict, got a {type(batch).__name__}: pass split_batch=, a callable batch "
                "-> (inputs, target) whose inputs are a dict of 'rgb', 'sparse' and 'line_idx'"
            )
        inputs = {name: self._take(batch, name) for name in ("rgb", "sparse", "line_idx")}
        _check_image("sparse", inputs["sparse"])
        _check_image("line_idx", inputs["line_idx"], like=inputs["sparse"])
        _check_image("rgb", inputs["rgb"], like=inputs["sparse"], channels=(1, 3))
        _check_integer(inputs["line_idx"])
        optional = {name: getattr(self, name) for name in ("sample_id", "sequence")}
        return inputs | {name: batch[key] for name, key in optional.items() if key in batch}

    def _take(self, batch: Mapping[str, Any], name: str) -> Any:
        key = getattr(self, name)
        if key in batch:
            return batch[key]
        hint = f"name the one that holds it with LidarKeys({name}=...)"
        if name == "line_idx":
            hint += (
                ", or obtain lines: KittiDepthDataset, KittiScanDataset and SyntheticLidarDataset give them, "
                "assign_lines(points) finds those of a scan and depth_lines(depth, calibration) those of a depth image"
            )
        raise KeyError(f"the batch has no {key!r}; its keys are {sorted(map(str, batch))}: {hint}")

    def to_dict(self) -> dict[str, str]:
        """The six keys as a plain dict, for checkpoints and reports."""
        return asdict(self)


def check_lines(line_idx: Tensor, num_lines: int) -> None:
    """Raise unless every entry is a line of the sensor or 255.

    Args:
        line_idx: any shape, integer.
        num_lines: lines of the sensor, 1 to 255.

    Raises:
        ValueError: entries are floating point, negative, or neither below `num_lines` nor 255; the message tells the
            smallest and the largest seen.
    """
    _check_integer(line_idx)
    lines = line_idx[line_idx != NO_LINE]
    if lines.numel() and (lines.min() < 0 or lines.max() >= num_lines):
        raise ValueError(
            f"expected line_idx to lie in 0 to {num_lines - 1}, or to be {NO_LINE} for no return, "
            f"got {_range(lines)}: check num_lines and how lines were assigned"
        )


def _check_integer(line_idx: Tensor) -> None:
    if line_idx.is_floating_point() or line_idx.dtype == torch.bool:
        raise ValueError(
            f"expected line_idx to hold integers (uint8, {NO_LINE} = no return), got {line_idx.dtype}, "
            f"{_range(line_idx)}: a line index must not be normalised or interpolated"
        )


def _range(values: Tensor) -> str:
    return f"values from {values.min().item()} to {values.max().item()}" if values.numel() else "no values"


def _check_image(name: str, image: Any, like: Tensor | None = None, channels: tuple[int, ...] = (1,)) -> None:
    if not isinstance(image, Tensor) or image.ndim != 4 or image.shape[1] not in channels:
        got = list(image.shape) if isinstance(image, Tensor) else f"a {type(image).__name__}"
        expected = " or ".join(f"[B, {count}, H, W]" for count in channels)
        raise ValueError(f"expected {name} to be a tensor {expected}, got {got}")
    if like is not None and (image.shape[0], *image.shape[2:]) != (like.shape[0], *like.shape[2:]):
        raise ValueError(
            f"expected {name} and sparse to agree in B, H, W, got {list(image.shape)} and {list(like.shape)}"
        )


class BottomCrop:
    """Cut the same window out of every image of a frame: at the bottom, centred left to right.

    The window of KITTI's cropped depth frames: rows from `H - height`, columns from `(W - width) // 2`.

    Args:
        height: rows of the window, >= 1.
        width: columns of the window, >= 1.
    """

    def __init__(self, height: int = 352, width: int = 1216) -> None:
        if height < 1 or width < 1:
            raise ValueError(f"expected height and width of the crop >= 1, got {height} and {width}")
        self.height, self.width = height, width

    def offset(self, height: int, width: int) -> tuple[int, int]:
        """First row and first column of the window in an image of this size; ValueError where it is too small."""
        if height < self.height or width < self.width:
            raise ValueError(
                f"expected images of at least {self.height} x {self.width} (height x width) to crop, got "
                f"{height} x {width}: choose a smaller crop"
            )
        return height - self.height, (width - self.width) // 2

    def __call__(self, frame: Mapping[str, Any]) -> LidarSample:
        """Crop every image (tensor of three or more axes) of a sample or batch; other entries stay."""
        return _map_images(frame, self._crop)

    def _crop(self, image: Tensor) -> Tensor:
        top, left = self.offset(*image.shape[-2:])
        return image[..., top:, left : left + self.width]


class Downscale:
    """Divide the resolution of every image of a frame by a whole number.

    Colour is averaged over blocks; of sparse depth and truth the nearest return of a block stays, with its line.
    Interpolated depths would be returns that no laser saw.

    Args:
        factor: >= 1; height and width must be multiples of it.
    """

    def __init__(self, factor: int) -> None:
        check_whole("factor", factor)
        self.factor = factor

    def __call__(self, frame: Mapping[str, Any]) -> LidarSample:
        """Shrink the images of a sample or batch with the keys of the module; other entries stay."""
        factor = self.factor
        if factor == 1:
            return dict(frame)
        height, width = frame["sparse"].shape[-2:]
        if height % factor or width % factor:
            raise ValueError(f"expected height and width to be multiples of {factor}, got {height} x {width}: crop")
        sparse, winner = _nearest(frame["sparse"], factor)
        lines = _blocks(frame["line_idx"], factor).gather(-1, winner).squeeze(-1)
        shrunk = {"sparse": sparse, "line_idx": torch.where(sparse > 0, lines, NO_LINE)}
        if "gt" in frame:
            shrunk["gt"], _ = _nearest(frame["gt"], factor)
        return {**frame, "rgb": F.avg_pool2d(frame["rgb"], factor), **shrunk}


def _blocks(image: Tensor, factor: int) -> Tensor:
    """`[..., H, W]` to `[..., H/factor, W/factor, factor*factor]`."""
    return image.unfold(-2, factor, factor).unfold(-2, factor, factor).flatten(-2)


def _nearest(depth: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    blocks = _blocks(depth, factor)
    nearest, winner = torch.where(blocks > 0, blocks, torch.inf).min(-1, keepdim=True)
    return torch.where(nearest.isinf(), 0, nearest).squeeze(-1), winner


class RandomFlip:
    """Mirror every image of a sample left to right, with a probability; drawn from torch's global generator.

    Args:
        p: probability, in [0, 1].
    """

    def __init__(self, p: float = 0.5) -> None:
        check_number("p", p, least=0, most=1)
        self.p = p

    def __call__(self, frame: Mapping[str, Any]) -> LidarSample:
        """Return the sample, mirrored or not."""
        return _map_images(frame, lambda image: image.flip(-1)) if torch.rand(()) < self.p else dict(frame)


def _map_images(frame: Mapping[str, Any], change: Any) -> LidarSample:
    return {
        key: change(entry) if isinstance(entry, Tensor) and entry.ndim >= 3 else entry for key, entry in frame.items()
    }
