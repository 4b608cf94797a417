"""Errors of completed depth against ground truth, as the development kit of KITTI depth completion measures them.

Errors are means over the valid pixels of one image, and a data set's are the means of its images', so that an image
with little ground truth counts as much as any other. Depth comes in metres, errors go in millimetres (``rmse``,
``mae``), mm² (``mse``), 1/km (``irmse``, ``imae``), percent (``silog``) or as shares (``rel``, ``log10``, ``delta1``
to ``delta3``). Shapes: ``B`` images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_eff.arguments import check_choice, check_number

DEVKIT = ("rmse", "mae", "irmse", "imae")

_WIDE = torch.float32 if torch.backends.mps.is_available() else torch.float64  # MPS has no float64

_PIXEL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "square": lambda p, g: (p - g).square(),
    "absolute": lambda p, g: (p - g).abs(),
    "inverse_square": lambda p, g: (1 / p - 1 / g).square(),
    "inverse_absolute": lambda p, g: (1 / p - 1 / g).abs(),
    "relative": lambda p, g: (p - g).abs() / g,
    "log10": lambda p, g: (p / g).log10().abs(),
    "within1": lambda p, g: torch.maximum(p / g, g / p) < 1.25,
    "within2": lambda p, g: torch.maximum(p / g, g / p) < 1.25**2,
    "within3": lambda p, g: torch.maximum(p / g, g / p) < 1.25**3,
    "log": lambda p, g: (p / g).log(),
    "log_square": lambda p, g: (p / g).log().square(),
}

# name -> means over pixels that it needs, and what it makes of them
_ERRORS: dict[str, tuple[tuple[str, ...], Callable[..., Tensor]]] = {
    "rmse": (("square",), lambda m: 1000 * m.sqrt()),
    "mae": (("absolute",), lambda m: 1000 * m),
    "irmse": (("inverse_square",), lambda m: 1000 * m.sqrt()),
    "imae": (("inverse_absolute",), lambda m: 1000 * m),
    "mse": (("square",), lambda m: 1e6 * m),
    "rel": (("relative",), lambda m: m),
    "log10": (("log10",), lambda m: m),
    "delta1": (("within1",), lambda m: m),
    "delta2": (("within2",), lambda m: m),
    "delta3": (("within3",), lambda m: m),
    "silog": (("log_square", "log"), lambda square, mean: 100 * (square - mean.square()).clamp(min=0).sqrt()),
}

METRICS = tuple(_ERRORS)


def depth_errors(
    prediction: Tensor,
    target: Tensor,
    names: Sequence[str] = DEVKIT,
    *,
    min_depth: float = 0.9,
    min_target: float = 0.0,
) -> dict[str, Tensor]:
    """Return the errors of each image.

    Args:
        prediction: depth in metres, ``[B, ...]``; values <= 0 count as ``min_depth``.
        target: true depth in metres, of the same shape or one that broadcasts to it; pixels count where it is greater
            than ``min_target``.
        names: which of :data:`METRICS`.
        min_depth: in metres, > 0.
        min_target: in metres, >= 0; 0.1 is what the published code of arXiv 2303.11720 uses.

    Returns:
        Name -> float64 ``[B]``, NaN for images without a valid pixel.

    Raises:
        ValueError: a name that is not known, shapes that do not go together.
    """
    _check(names, min_depth, min_target)
    sums, pixels, _ = _image_sums(prediction, target, names, min_depth, min_target)
    return _errors(names, sums, pixels)


class DepthCompletionMetrics(Metric):
    """Errors of a data set, exact over any number of batches and processes.

    ``compute`` gives every error by name, and how many there were: ``images`` with ground truth, ``skipped`` images
    without, and ``clamped`` valid pixels whose prediction was <= 0.

    Args:
        names: which of :data:`METRICS`.
        reduction: ``"mean"`` averages the images' errors, as the development kit does; ``"pooled"`` takes all pixels
            for one image.
        min_depth: what a prediction <= 0 counts as, in metres, > 0.
        min_target: pixels count where the true depth is greater, in metres, >= 0.
        kwargs: of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: an argument lies outside its range.
    """

    full_state_update = False
    sums: Tensor
    pixels: Tensor
    images: Tensor
    skipped: Tensor
    clamped: Tensor

    def __init__(
        self,
        names: Sequence[str] = METRICS,
        reduction: Literal["mean", "pooled"] = "mean",
        min_depth: float = 0.9,
        min_target: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        _check(names, min_depth, min_target)
        check_choice("reduction", reduction, ("mean", "pooled"))
        self.names, self.reduction = tuple(names), reduction
        self.min_depth, self.min_target = min_depth, min_target
        self._summed = self.names if reduction == "mean" else _needed(names)
        self.add_state("sums", torch.zeros(len(self._summed), dtype=_WIDE), dist_reduce_fx="sum")
        for count in ("pixels", "images", "skipped", "clamped"):
            self.add_state(count, torch.tensor(0), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Take in images: depth in metres, ``[B, ...]`` both; see :func:`depth_errors`."""
        sums, pixels, clamped = _image_sums(
            prediction.detach(), target.detach(), self.names, self.min_depth, self.min_target
        )
        values = _errors(self.names, sums, pixels) if self.reduction == "mean" else sums
        valid = pixels > 0
        # not in place: states that were reset in inference mode may be updated outside
        self.sums = self.sums + torch.stack([values[name][valid].sum() for name in self._summed])
        self.pixels = self.pixels + pixels.sum()
        self.images = self.images + valid.sum()
        self.skipped = self.skipped + (~valid).sum()
        self.clamped = self.clamped + clamped.sum()

    def compute(self) -> dict[str, Tensor]:
        """Return the errors, float64, NaN without any image that has ground truth, and the three counts, int64."""
        values = dict(zip(self._summed, self.sums, strict=True))
        if self.reduction == "pooled":
            values = _errors(self.names, values, self.pixels)
        else:
            values = {name: value / self.images for name, value in values.items()}
        return {**values, "images": self.images, "skipped": self.skipped, "clamped": self.clamped}


def _image_sums(
    prediction: Tensor, target: Tensor, names: Sequence[str], min_depth: float, min_target: float
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Sums over the valid pixels of each image, float64 ``[B]``; how many are valid and how many clamped, ``[B]``."""
    try:
        target = target.expand_as(prediction).flatten(1)
    except (RuntimeError, IndexError):
        raise ValueError(
            f"expected prediction and target [B, ...] of one shape, got {list(prediction.shape)} and "
            f"{list(target.shape)}"
        ) from None
    valid = target > min_target
    pixels = valid.sum(1)
    lengths = pixels.tolist()
    p, g = prediction.flatten(1)[valid].to(_WIDE), target[valid].to(_WIDE)
    below = p <= 0
    p = p.masked_fill(below, min_depth)

    def per_image(values: Tensor) -> Tensor:
        return torch.stack([part.sum() for part in torch.split(values, lengths)])

    sums = {name: per_image(_PIXEL[name](p, g).to(_WIDE)) for name in _needed(names)}
    return sums, pixels, per_image(below)


def _errors(names: Sequence[str], sums: dict[str, Tensor], pixels: Tensor) -> dict[str, Tensor]:
    return {name: _ERRORS[name][1](*(sums[needed] / pixels for needed in _ERRORS[name][0])) for name in names}


def _needed(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(quantity for name in names for quantity in _ERRORS[name][0]))


def _check(names: Sequence[str], min_depth: float, min_target: float) -> None:
    unknown = [name for name in names if name not in _ERRORS]
    if isinstance(names, str) or unknown or not names:
        raise ValueError(f"expected names out of {list(METRICS)}, got {names!r}")
    check_number("min_depth", min_depth, above=0)
    check_number("min_target", min_target, least=0)
