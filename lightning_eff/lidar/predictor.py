"""Line values from the image alone: a small network that learns them from the calibration frames (ours).

Shapes: `F` frames, `n` candidates, `h`, `w` of an eighth of the image.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_eff.lidar.records import FrameId
from lightning_eff.lidar.report import in_order
from lightning_eff.surgery.state import untouched_generators

SHRINK = 8


def thumbnail(rgb: Tensor) -> Tensor:
    """An eighth of an image in each direction, on the CPU: `[3 or 1, H, W]` to `[3, h, w]`."""
    size = [max(8, side // SHRINK) for side in rgb.shape[-2:]]
    return F.interpolate(rgb.detach().float().cpu()[None], size=size, mode="area")[0].expand(3, -1, -1).clone()


class ValuePredictor(nn.Module):
    """Three convolutions and a mean over the image; answers in standardised values.

    Args:
        n: number of candidates.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, n: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, n),
        )
        self.register_buffer("mean", torch.zeros(n))
        self.register_buffer("scale", torch.ones(n))

    def forward(self, images: Tensor) -> Tensor:
        """Map thumbnails `[F, 3, h, w]` to values `[F, n]`, in the unit of the metric."""
        values: Tensor = self.layers(images) * self.scale + self.mean
        return values

    @classmethod
    def trained(cls, images: Tensor, values: Tensor, steps: int = 200, seed: int = 0) -> ValuePredictor:
        """Train on frames, all of them in every step; the global generators are left as they were.

        Args:
            images: thumbnails `[F, 3, h, w]`.
            values: of the frames `[F, n]`.
            steps: of Adam, >= 1.
            seed: of the weights.
        """
        with untouched_generators(), torch.inference_mode(False), torch.enable_grad():
            torch.manual_seed(seed)
            model, images, values = cls(values.shape[1]), images.clone(), values.float().clone()
            model.mean.copy_(values.mean(0))
            model.scale.copy_(values.std(0, correction=0).clamp(min=1e-6))
            target = (values - model.mean) / model.scale
            optimizer = torch.optim.Adam(model.layers.parameters(), lr=1e-3)
            for _ in range(steps):
                optimizer.zero_grad()
                loss = F.mse_loss(model.layers(images), target)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        return model.eval().requires_grad_(False)

    @classmethod
    def of_frames(
        cls, thumbnails: Mapping[FrameId, Tensor], values: Mapping[FrameId, Tensor], steps: int, seed: int
    ) -> ValuePredictor:
        """Train on the frames that have both; see :meth:`trained`.

        Raises:
            ValueError: their images are of several sizes.
        """
        ids = [id_ for id_ in in_order(thumbnails) if id_ in values]
        if len({thumbnails[id_].shape for id_ in ids}) > 1:
            raise ValueError("the predictor needs images of one size: crop them")
        images = torch.stack([thumbnails[id_] for id_ in ids])
        return cls.trained(images, torch.stack([values[id_] for id_ in ids]), steps, seed)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> ValuePredictor:
        """The network whose `state_dict` this is."""
        model = cls(len(state["mean"]))
        model.load_state_dict(state)
        return model.eval().requires_grad_(False)
