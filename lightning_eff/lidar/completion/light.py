"""A small network that corrects a training-free completion, made to be asked about many line subsets of one image.

Image and depth have encoders of their own, so that the image's features are computed once for all subsets. Shapes:
``B`` batch, ``H``, ``W`` height and width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_eff.arguments import check_number, check_whole
from lightning_eff.lidar.completion.hole_filling import pull_push


class LightDepthCompletionNet(nn.Module):
    """Two encoders whose maps are added at each of four resolutions, and a decoder that corrects pull-push completion.

    The answer is ``fill * exp(y)`` with ``fill`` the pull-push completion and ``y`` the network's output, which starts
    at 0. Normalisation is by groups: a frame's depth does not depend on the batch, nor on the mode. Width 16 has 0.18 M
    parameters.

    Args:
        width: channels at full resolution, a multiple of 4; twice as many at the next, four times at the last two.
        image_channels: 3, or 1 for grey images.
        empty_depth: what pull-push takes for an image without any point, in metres, > 0.

    Raises:
        ValueError: an argument lies outside its range.
    """

    def __init__(self, width: int = 16, image_channels: int = 3, empty_depth: float = 15.0) -> None:
        super().__init__()
        if width < 4 or width % 4:
            raise ValueError(f"expected width to be a multiple of 4, got {width}")
        check_whole("image_channels", image_channels)
        check_number("empty_depth", empty_depth, above=0)
        self.empty_depth = empty_depth
        widths = [width, 2 * width, 4 * width, 4 * width]
        self.image_encoder = _encoder(image_channels, widths)
        self.depth_encoder = _encoder(2, widths)
        self.decoder = nn.ModuleList(_conv(low, high) for low, high in zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.head = nn.Conv2d(width, 1, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]

    def forward(self, rgb: Tensor, sparse: Tensor) -> Tensor:
        """Complete depth.

        Args:
            rgb: ``[B, 3, H, W]`` in [0, 1].
            sparse: ``[B, 1, H, W]`` in metres, 0 = none.

        Returns:
            Depth ``[B, 1, H, W]`` in metres, > 0.
        """
        return self.decode(self.encode_image(rgb), sparse)

    def encode_image(self, rgb: Tensor) -> list[Tensor]:
        """Return the image's features, which do not depend on depth: four maps, the first at full resolution."""
        return _maps(self.image_encoder, rgb)

    def decode(self, features: Sequence[Tensor], sparse: Tensor) -> Tensor:
        """Complete depth, given the image's features; see :meth:`forward`.

        Args:
            features: of :meth:`encode_image`, for ``B`` images or for one that all ``B`` depths belong to.
            sparse: ``[B, 1, H, W]``.
        """
        fill = pull_push(sparse, self.empty_depth)
        depth = torch.cat([(fill / self.empty_depth).log(), (sparse > 0).to(fill.dtype)], 1)
        maps = [image + depth for image, depth in zip(features, _maps(self.depth_encoder, depth), strict=True)]
        y = maps.pop()
        for layer in self.decoder:
            beside = maps.pop()
            y = beside + F.interpolate(layer(y), size=beside.shape[-2:], mode="nearest")
        correction: Tensor = self.head(F.relu(y))
        return fill * correction.exp()


def _encoder(inputs: int, widths: Sequence[int]) -> nn.ModuleList:
    pairs = zip([inputs, *widths[:-1]], widths, strict=True)
    return nn.ModuleList(_conv(low, high, 1 if i == 0 else 2) for i, (low, high) in enumerate(pairs))


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.GroupNorm(4, outputs), nn.ReLU(inplace=True))


def _maps(encoder: nn.ModuleList, x: Tensor) -> list[Tensor]:
    maps = []
    for layer in encoder:
        x = layer(x)
        maps.append(x)
    return maps
