"""Untrained networks whose gradients are the features (DP-NTK, arXiv 2303.01687): dense, convolutional, the paper's.

They are fixed by their arguments and ``seed`` alone, so no data can have entered them; drawn in float32 on the CPU.
``B`` samples, ``D`` numbers of one sample, ``K`` outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

PaperNet = Literal["fc_1l", "fc_2l", "cnn_1l", "cnn_2l"]


class FCFeatureNet(nn.Module):
    """Dense network: hidden layers with ReLU, a layer norm without weights behind the last one, a dense output layer.

    With one width it is the "fc_1l" of the published code. PyTorch's default initialisation, drawn from ``seed``.

    Args:
        in_features: Numbers D of one sample, >= 1; inputs ``(B, ...)`` are flattened to ``(B, D)``.
        widths: Units of each hidden layer, at least one.
        out_features: Outputs K, >= 1; the published code takes the number of classes.
        layer_norm: Whether the last hidden layer is normalised before the output layer.
        activations: Whether a ReLU follows each hidden layer, a bool for all of them or one each.
        seed: Draws the weights; the global generator is left alone.
    """

    def __init__(
        self,
        in_features: int,
        widths: Sequence[int] = (200,),
        out_features: int = 1,
        layer_norm: bool = True,
        activations: bool | Sequence[bool] = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if in_features < 1 or out_features < 1 or not widths or min(widths) < 1:
            raise ValueError(
                "expected in_features >= 1, out_features >= 1 and at least one width >= 1, "
                f"got {in_features}, {out_features} and {tuple(widths)}"
            )
        active = [activations] * len(widths) if isinstance(activations, bool) else list(activations)
        if len(active) != len(widths):
            raise ValueError(f"expected one of activations for each of the {len(widths)} widths, got {len(active)}")
        self.input_shape: tuple[int, ...] = (in_features,)
        layers: list[nn.Module] = []
        with _drawn_from(seed):
            before = in_features
            for width, active_here in zip(widths, active, strict=True):
                layers.append(nn.Linear(before, width))
                if active_here:
                    layers.append(nn.ReLU())
                before = width
            if layer_norm:
                layers.append(nn.LayerNorm(before, elementwise_affine=False))
            layers.append(nn.Linear(before, out_features))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, ...)`` with D numbers a sample to ``(B, K)``."""
        return self.layers(x.flatten(1))  # type: ignore[no-any-return]


class ConvFeatureNet(nn.Module):
    """Convolutions with ReLU, then dense layers with ReLU between, for images, signals or rows of a table.

    Args:
        input_shape: Shape of one sample: ``(channels, height, width)``, ``(channels, length)``; ``(D,)`` is a table's
            row and read as ``(1, D)``. Inputs may also come flattened.
        channels: Channels of each convolution, at least one.
        widths: Units of dense layers between convolutions and output; may be empty.
        out_features: Outputs K, >= 1.
        kernel_size: Odd size of every kernel; the length or image size stays (padding ``kernel_size // 2``).
        pool: Whether each convolution but the last is followed by max pooling by 2.
        layer_norm: Whether what enters the output layer is normalised, without weights.
        seed: Draws the weights (PyTorch's default initialisation); the global generator is left alone.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        channels: Sequence[int] = (16, 32),
        widths: Sequence[int] = (),
        out_features: int = 1,
        kernel_size: int = 3,
        pool: bool = True,
        layer_norm: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        shape = tuple(input_shape) if len(input_shape) > 1 else (1, *input_shape)
        if len(shape) not in (2, 3) or min(shape) < 1:
            raise ValueError(
                f"expected input_shape (D,), (channels, length) or (channels, height, width), got {tuple(input_shape)}"
            )
        if not channels or min(channels) < 1 or out_features < 1 or (widths and min(widths) < 1):
            raise ValueError(
                "expected at least one of channels >= 1, widths >= 1 and out_features >= 1, "
                f"got {tuple(channels)}, {tuple(widths)} and {out_features}"
            )
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"expected an odd kernel_size >= 1, got {kernel_size}")
        self.input_shape: tuple[int, ...] = shape
        two_d = len(shape) == 3
        convolution: type[nn.Conv1d] | type[nn.Conv2d] = nn.Conv2d if two_d else nn.Conv1d
        space = list(shape[1:])
        layers: list[nn.Module] = []
        with _drawn_from(seed):
            before = shape[0]
            for index, width in enumerate(channels):
                layers.append(convolution(before, width, kernel_size, padding=kernel_size // 2))
                if pool and index < len(channels) - 1:
                    if min(space) < 2:
                        raise ValueError(
                            f"expected an input large enough for {len(channels) - 1} poolings by 2, got {shape}; "
                            "pass pool=False"
                        )
                    # before the ReLU, with which a maximum commutes: a quarter of the work for the same result
                    layers.append(nn.MaxPool2d(2) if two_d else nn.MaxPool1d(2))
                    space = [size // 2 for size in space]
                layers.append(nn.ReLU())
                before = width
            layers.append(nn.Flatten())
            size = before * math.prod(space)
            for width in widths:
                layers += [nn.Linear(size, width), nn.ReLU()]
                size = width
            if layer_norm:
                layers.append(nn.LayerNorm(size, elementwise_affine=False))
            layers.append(nn.Linear(size, out_features))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, *input_shape)``, or the same flattened, to ``(B, K)``."""
        return self.layers(x.reshape(len(x), *self.input_shape))  # type: ignore[no-any-return]


def paper_feature_net(
    name: PaperNet,
    input_shape: Sequence[int],
    widths: Sequence[int] | None = None,
    out_features: int = 1,
    seed: int = 0,
) -> nn.Module:
    """Build a feature network of the published code by its name there.

    ``"fc_1l"``: dense, ReLU, layer norm, dense. ``"fc_2l"``: dense, ReLU, dense, layer norm, dense. ``"cnn_1l"``:
    convolution over the columns (kernel 3), ReLU, dense. ``"cnn_2l"``: convolution over the columns (kernel 1), ReLU,
    dense, ReLU, dense.

    Args:
        name: One of the four above; the last two take the sample as one channel of numbers.
        input_shape: Shape of one sample.
        widths: Units of the hidden layers, one or two as the name says; by default what the code takes most:
            800, (3000, 200), 30 and (30, 200).
        out_features: Outputs K; there the number of classes.
        seed: Draws the weights.
    """
    defaults: dict[str, tuple[int, ...]] = {"fc_1l": (800,), "fc_2l": (3000, 200), "cnn_1l": (30,), "cnn_2l": (30, 200)}
    if name not in defaults:
        raise ValueError(f"expected one of {list(defaults)}, got {name!r}")
    sizes = tuple(widths) if widths is not None else defaults[name]
    if len(sizes) != len(defaults[name]):
        raise ValueError(f"expected {len(defaults[name])} widths for {name}, got {sizes}")
    numbers = math.prod(input_shape)
    if name == "fc_1l":
        return FCFeatureNet(numbers, sizes, out_features, seed=seed)
    if name == "fc_2l":
        return FCFeatureNet(numbers, sizes, out_features, activations=(True, False), seed=seed)
    kernel = 3 if name == "cnn_1l" else 1
    return ConvFeatureNet((1, numbers), sizes[:1], sizes[1:], out_features, kernel_size=kernel, seed=seed)


@contextmanager
def _drawn_from(seed: int) -> Iterator[None]:
    # in float32 on the CPU whatever the default is: the same seed gives the same network everywhere; only the CPU's
    # generator is seeded, and it is put back
    default = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.set_default_dtype(torch.float32)
        try:
            torch.default_generator.manual_seed(seed)
            yield
        finally:
            torch.set_default_dtype(default)
