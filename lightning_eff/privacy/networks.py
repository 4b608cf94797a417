"""Two networks that train well under clipping and noise: bounded activations, no statistics of the batch.

The convolutional one is the common small network of the field, with 26,010 parameters for Fashion-MNIST. Shapes: ``B``
batch, ``C`` channels, ``H``, ``W`` height and width, ``K`` classes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn

from lightning_eff.arguments import check_whole


class TanhCNN(nn.Module):
    """Two convolutions, two pools and two dense layers, with tanh between them.

    Args:
        in_channels: Channels C of the images, >= 1.
        num_classes: Classes K, >= 1.
        image_size: Side of the square images in pixels, >= 16.

    Raises:
        ValueError: An argument lies outside its range.
    """

    def __init__(self, in_channels: int = 1, num_classes: int = 10, image_size: int = 28) -> None:
        super().__init__()
        check_whole("in_channels", in_channels)
        check_whole("num_classes", num_classes)
        check_whole("image_size", image_size, 16)
        side = ((image_size - 2) // 2 + 1 - 1 - 4) // 2 + 1 - 1
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, 16, 8, stride=2, padding=3),
            nn.Tanh(),
            nn.MaxPool2d(2, 1),
            nn.Conv2d(16, 32, 4, stride=2),
            nn.Tanh(),
            nn.MaxPool2d(2, 1),
            nn.Flatten(),
            nn.Linear(32 * side * side, 32),
            nn.Tanh(),
            nn.Linear(32, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[B, C, H, W]`` to logits ``[B, K]``."""
        logits: Tensor = self.layers(x)
        return logits


class TanhMLP(nn.Module):
    """Dense layers with tanh between them, on inputs of any shape.

    Args:
        in_features: Numbers in an input, >= 1.
        hidden: Widths of the hidden layers, each >= 1.
        num_classes: Classes K, >= 1.

    Raises:
        ValueError: A width is less than one.
    """

    def __init__(self, in_features: int = 784, hidden: Sequence[int] = (512, 512), num_classes: int = 10) -> None:
        super().__init__()
        widths = [in_features, *hidden, num_classes]
        for width in widths:
            check_whole("each width", width)
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in itertools.pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.Tanh()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs ``[B, ...]`` to logits ``[B, K]``."""
        logits: Tensor = self.layers(x)
        return logits
