"""Class-conditional generators: ``generator(z, y) -> x``.

All randomness comes in with ``z``, also that of drawn categories, so a generator is a function: the same ``z`` gives
the same samples in any batch. A generator of your own is any module that maps ``z [B, latent_dim]`` and classes
``y [B]`` to records ``[B, ...]``; if it wants more numbers than ``latent_dim``, it says how many as ``noise_dim``.

Shapes: B samples, Z latent numbers, C classes (and channels where it says so).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_eff.arguments import check_choice, check_number, check_whole
from lightning_eff.synthesis.tables import Head, TableSchema

Output = Literal["sigmoid", "tanh", "identity"]
_OUTPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}


class ConvImageGenerator(nn.Module):
    """Two convolutions behind two doublings of the size: the published generator for small grey images.

    ``[z, onehot(y)]`` -> linear 200, BatchNorm, ReLU -> linear, BatchNorm -> 16 channels of a quarter of the size ->
    bilinear x2 -> 5x5 convolution to 8 channels, ReLU -> bilinear x2 -> 5x5 convolution.

    Args:
        latent_dim: Z, >= 1.
        num_classes: C, >= 1.
        image_shape: Channels, height and width of an image; height and width are multiples of 4.
        output: ``"sigmoid"`` for images in [0, 1], ``"tanh"`` for [-1, 1].

    Raises:
        ValueError: An argument lies outside its range.
    """

    def __init__(
        self,
        latent_dim: int,
        num_classes: int = 1,
        image_shape: Sequence[int] = (1, 28, 28),
        output: Output = "sigmoid",
    ) -> None:
        super().__init__()
        channels, height, width = _image_shape(image_shape, multiple=4)
        self.num_classes, self.noise_dim = num_classes, latent_dim
        self.first = nn.Sequential(
            nn.Linear(latent_dim + num_classes, 200), nn.BatchNorm1d(200), nn.ReLU(),
            nn.Linear(200, height * width), nn.BatchNorm1d(height * width),
            nn.Unflatten(1, (16, height // 4, width // 4)),
        )  # fmt: skip
        self.convolutions = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True), nn.Conv2d(16, 8, 5, padding=2), nn.ReLU(),
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True), nn.Conv2d(8, channels, 5, padding=2),
        ).to(memory_format=torch.channels_last)  # fmt: skip  # so few channels: half the time on a CPU
        self.output = _output(output)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """Map ``z [B, Z]`` and classes ``y [B]`` to images ``[B, channels, height, width]``."""
        small = self.first(_with_class(z, y, self.num_classes)).to(memory_format=torch.channels_last)
        return _OUTPUTS[self.output](self.convolutions(small))


class MLPGenerator(nn.Module):
    """Linear layers with BatchNorm and ReLU, for images or vectors.

    Args:
        latent_dim: Z, >= 1.
        num_classes: C, >= 1.
        output_shape: Shape of one record.
        widths: Of the hidden layers.
        output: ``"sigmoid"`` for records in [0, 1], ``"tanh"`` for [-1, 1], ``"identity"`` for any number.

    Raises:
        ValueError: An argument lies outside its range.
    """

    def __init__(
        self,
        latent_dim: int,
        num_classes: int = 1,
        output_shape: Sequence[int] = (1, 28, 28),
        widths: Sequence[int] = (256, 512),
        output: Output = "sigmoid",
    ) -> None:
        super().__init__()
        self.num_classes, self.noise_dim = num_classes, latent_dim
        self.output_shape = tuple(output_shape)
        self.layers = _mlp(latent_dim + num_classes, widths, math.prod(self.output_shape))
        self.output = _output(output)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """Map ``z [B, Z]`` and classes ``y [B]`` to records ``[B, *output_shape]``."""
        x: Tensor = self.layers(_with_class(z, y, self.num_classes))
        return _OUTPUTS[self.output](x).reshape(-1, *self.output_shape)


class ResNetImageGenerator(nn.Module):
    """Three residual blocks, each of twice the size: the published generator for colour images of 32 x 32 pixels.

    Args:
        latent_dim: Z, >= 1.
        num_classes: C, >= 1.
        image_shape: Channels, height and width; height and width are multiples of 8.
        width: Channels of the last block, >= 1; each block before has twice as many as the next. 64 is the published.
        output: ``"tanh"`` for images in [-1, 1], ``"sigmoid"`` for [0, 1].

    Raises:
        ValueError: An argument lies outside its range.
    """

    def __init__(
        self,
        latent_dim: int,
        num_classes: int = 1,
        image_shape: Sequence[int] = (3, 32, 32),
        width: int = 64,
        output: Output = "sigmoid",
    ) -> None:
        super().__init__()
        check_whole("width", width, least=1)
        channels, height, size = _image_shape(image_shape, multiple=8)
        self.num_classes, self.noise_dim = num_classes, latent_dim
        self.first = nn.ConvTranspose2d(latent_dim + num_classes, 8 * width, (height // 8, size // 8))
        self.blocks = nn.Sequential(*(_UpBlock(2 ** (k + 1) * width, 2**k * width) for k in (2, 1, 0)))
        self.last = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, channels, 3, padding=1))
        self.output = _output(output)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.xavier_uniform_(module.weight)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """Map ``z [B, Z]`` and classes ``y [B]`` to images ``[B, channels, height, width]``."""
        return _OUTPUTS[self.output](
            self.last(self.blocks(self.first(_with_class(z, y, self.num_classes)[..., None, None])))
        )


class _UpBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.BatchNorm2d(inputs), nn.ReLU(), nn.Upsample(scale_factor=2), nn.Conv2d(inputs, outputs, 3, padding=1),
            nn.BatchNorm2d(outputs), nn.ReLU(), nn.Conv2d(outputs, outputs, 3, padding=1),
        )  # fmt: skip
        self.skip = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        # a 1x1 convolution and nearest neighbours commute: before the doubling it costs a quarter
        output: Tensor = self.main(x) + F.interpolate(self.skip(x), scale_factor=2)
        return output


class TabularGenerator(nn.Module):
    """Linear layers, and for every column of a table the output it needs.

    A block of one-hot coordinates is drawn by the Gumbel rule from the numbers in ``z`` that belong to it: forward it
    is exactly one-hot, backward it has the gradient of the softmax at ``temperature`` (straight-through,
    arXiv 1611.01144).

    Args:
        latent_dim: Z, >= 1, without the numbers that draw categories.
        num_classes: C, >= 1.
        heads: Output layer of each block of coordinates, as :attr:`TableSchema.heads` has it; together they cover
            0 to D.
        widths: Of the hidden layers.
        temperature: Of the softmax behind the gradient, > 0.

    Attributes:
        noise_dim: Numbers a sample takes: ``latent_dim`` and one for each one-hot coordinate.

    Raises:
        ValueError: An argument lies outside its range.
    """

    def __init__(
        self,
        latent_dim: int,
        num_classes: int,
        heads: Sequence[Head],
        widths: Sequence[int] = (200, 200),
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        check_number("temperature", temperature, above=0)
        edges = [0, *(head.stop for head in heads)]
        if not heads or [head.start for head in heads] != edges[:-1]:
            raise ValueError(f"heads must cover the coordinates from 0 without a gap, got {list(heads)}")
        self.num_classes, self.latent_dim, self.temperature = num_classes, latent_dim, temperature
        self.heads = tuple(heads)
        drawn = sum(head.stop - head.start for head in heads if head.kind == "onehot")
        self.noise_dim = latent_dim + drawn
        self.layers = _mlp(latent_dim + num_classes, widths, edges[-1])

    @classmethod
    def for_schema(cls, schema: TableSchema, latent_dim: int, widths: Sequence[int] = (200, 200)) -> TabularGenerator:
        """Build the generator of a table."""
        return cls(latent_dim, schema.num_classes, schema.heads, widths)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """Map ``z [B, noise_dim]`` and classes ``y [B]`` to coordinates ``[B, D]``."""
        latent, gumbel = z[:, : self.latent_dim], _gumbel(z[:, self.latent_dim :].float())
        values: Tensor = self.layers(_with_class(latent, y, self.num_classes))
        blocks, used = [], 0
        for head in self.heads:
            block = values[:, head.start : head.stop]
            if head.kind == "onehot":
                width = head.stop - head.start
                blocks.append(_drawn(block.float(), gumbel[:, used : used + width], self.temperature))
                used += width
            else:
                blocks.append(_OUTPUTS[head.kind](block.float()))
        return torch.cat(blocks, dim=1)


def _gumbel(normal: Tensor) -> Tensor:
    # -log(-log u) for the u whose normal quantile is given: exact also where u rounds to 1
    return -torch.log(torch.special.log_ndtr(normal).neg().clamp(min=torch.finfo(torch.float32).tiny))


def _drawn(logits: Tensor, gumbel: Tensor, temperature: float) -> Tensor:
    soft = torch.softmax((logits + gumbel) / temperature, dim=1)
    hard = F.one_hot(soft.argmax(dim=1), logits.size(1)).to(soft.dtype)
    return hard + (soft - soft.detach())


def _mlp(inputs: int, widths: Sequence[int], outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in widths:
        check_whole("each of widths", width, least=1)
        layers += [nn.Linear(inputs, width), nn.BatchNorm1d(width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


def _with_class(z: Tensor, y: Tensor, num_classes: int) -> Tensor:
    return torch.cat([z, F.one_hot(y, num_classes).to(z.dtype)], dim=1)


def _image_shape(shape: Sequence[int], multiple: int) -> tuple[int, int, int]:
    if len(shape) != 3 or min(shape) < 1 or shape[1] % multiple or shape[2] % multiple:
        raise ValueError(
            f"expected the shape of an image (channels, height, width) with height and width multiples of {multiple}, "
            f"got {tuple(shape)}"
        )
    return shape[0], shape[1], shape[2]


def _output(output: Output) -> Output:
    check_choice("output", output, _OUTPUTS)
    return output
