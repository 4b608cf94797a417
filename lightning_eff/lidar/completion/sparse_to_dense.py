"""The network that lidar line selection was published with: a residual encoder at full resolution, a plain decoder.

It is the one of "Self-supervised Sparse-to-Dense" (Ma, Cavalheiro and Karaman, arXiv 1807.00275), with the names of its
published code, so that weights published for that code fit. Shapes: ``B`` batch, ``H``, ``W`` height and width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_eff.arguments import check_choice
from lightning_eff.lidar.completion.forwarding import grey

_NEAREST = 0.9  # range within which the lidar sees nothing, metres


class SparseToDenseResNet(nn.Module):
    """Encoder of a ResNet, decoder of five transposed convolutions, both with a connection at every resolution.

    In training mode depth is ``100 y`` for an output ``y``, in evaluation mode at least 0.9 m. With 18 layers and a
    grey image it has 16.0 M parameters and takes 586 GFLOP for 352 x 1216 pixels, with 34 layers 26.1 M and 1091.

    Args:
        layers: of the ResNet.
        modality: what is read: grey image and depth, colour image and depth, or depth alone.
        pretrained: start the encoder from torchvision's ImageNet weights, which are downloaded.

    Raises:
        ValueError: an argument is none of its choices.
    """

    def __init__(
        self, layers: Literal[18, 34] = 18, modality: Literal["gd", "rgbd", "d"] = "gd", pretrained: bool = False
    ) -> None:
        from torchvision.models import resnet18, resnet34

        super().__init__()
        if layers not in (18, 34):
            raise ValueError(f"expected layers 18 or 34, got {layers!r}")
        check_choice("modality", modality, ("gd", "rgbd", "d"))
        self.modality = modality
        of_depth = 64 // len(modality)
        self.conv1_d = _conv(1, of_depth)
        if modality != "d":
            self.conv1_img = _conv(3 if modality == "rgbd" else 1, 64 - of_depth)
        encoder = (resnet18 if layers == 18 else resnet34)(weights="DEFAULT" if pretrained else None)
        if not pretrained:
            encoder.apply(_initialise)
        self.conv2, self.conv3, self.conv4, self.conv5 = encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4
        self.conv6 = _conv(512, 512, stride=2)
        self.convt5 = _transposed(512, 256)
        self.convt4 = _transposed(256 + 512, 128)
        self.convt3 = _transposed(128 + 256, 64)
        self.convt2 = _transposed(64 + 128, 64)
        self.convt1 = _transposed(64 + 64, 64, stride=1)
        self.convtf = nn.Sequential(nn.Conv2d(64 + 64, 1, 1))
        self.convtf.apply(_initialise)

    def forward(self, rgb: Tensor | None, sparse: Tensor) -> Tensor:
        """Complete depth.

        Args:
            rgb: ``[B, 3, H, W]``; not read with modality ``"d"``.
            sparse: ``[B, 1, H, W]`` in metres, 0 = none.

        Returns:
            Depth ``[B, 1, H, W]`` in metres; in training mode it may be negative.

        Raises:
            ValueError: there is no image, and the modality wants one.
        """
        first = self.conv1_d(sparse)
        if self.modality != "d":
            if rgb is None:
                raise ValueError(f"expected an image with modality {self.modality!r}, got None")
            image = self.conv1_img(rgb if self.modality == "rgbd" else grey(rgb))
            first = torch.cat([first, image], 1)
        maps = [first]
        for layer in (self.conv2, self.conv3, self.conv4, self.conv5):
            maps.append(layer(maps[-1]))
        y = self.conv6(maps[-1])
        for layer in (self.convt5, self.convt4, self.convt3, self.convt2, self.convt1):
            beside = maps.pop()
            # a transposed convolution makes one row or column too much of an odd number
            y = torch.cat([layer(y)[..., : beside.size(-2), : beside.size(-1)], beside], 1)
        depth: Tensor = 100 * self.convtf(y)
        return depth if self.training else F.relu(depth - _NEAREST) + _NEAREST


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return _block(nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), outputs)


def _transposed(inputs: int, outputs: int, stride: int = 2) -> nn.Sequential:
    layer = nn.ConvTranspose2d(inputs, outputs, 3, stride, padding=1, output_padding=stride - 1, bias=False)
    return _block(layer, outputs)


def _block(layer: nn.Module, channels: int) -> nn.Sequential:
    block = nn.Sequential(layer, nn.BatchNorm2d(channels), nn.LeakyReLU(0.2, inplace=True))
    return block.apply(_initialise)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0, 1e-3)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
