"""Classifiers that read the feature of a layer.

Shapes: ``B`` batch, ``C`` channels, ``H``, ``W`` height and width, ``L`` tokens, ``D`` width of a token. Heads get the
feature with the batch first, whatever the layer returns. Pooled heads: Kaya et al., Shallow-Deep Networks,
arXiv 1810.07052; the others as in the code of arXiv 2407.14320.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_eff.arguments import check_choice, check_whole

HeadBuilder = Callable[[Sequence[int], int], nn.Module]
"""``(shape of one sample's feature, number of classes) -> head``."""

KINDS = ("auto", "linear", "pool", "conv", "token", "mlp")


@dataclass(frozen=True)
class Head:
    """Which classifier stands on a layer.

    Args:
        kind: ``"linear"``: mean over positions, or class token, then one linear layer; ``"pool"``: learnt mix of max
            and average pooling to 4x4 or less, then linear; ``"conv"``: ReLU and 3x3 convolutions before that;
            ``"token"``: class token and ``layers`` linear layers; ``"mlp"``: mean over positions and ``layers`` linear
            layers; ``"auto"`` is ``"linear"``.
        layers: convolutions of ``"conv"`` or linear layers of ``"token"`` and ``"mlp"``, >= 1.
        hidden: width between the linear layers; None takes that of the feature.
        token: the token read of a sequence, ``"first"`` (class token) or ``"mean"``; None lets the network decide.
        channels: position of the channels of an image-like feature, ``"first"`` or ``"last"``; None lets the network
            decide.

    Raises:
        ValueError: an unknown kind, or a number below one.
    """

    kind: Literal["auto", "linear", "pool", "conv", "token", "mlp"] = "auto"
    layers: int = 1
    hidden: int | None = None
    token: Literal["first", "mean"] | None = None
    channels: Literal["first", "last"] | None = None

    def __post_init__(self) -> None:
        """Check choices and ranges."""
        check_choice("the kind of a head", self.kind, KINDS)
        check_whole("layers", self.layers)
        if self.hidden is not None:
            check_whole("hidden", self.hidden)
        for name, value, known in (
            ("token", self.token, ("first", "mean", None)),
            ("channels", self.channels, ("first", "last", None)),
        ):
            check_choice(name, value, known)

    def on(self, backbone: nn.Module, channels: Literal["first", "last"] | None) -> Head:
        """Fill in what the network decides: class token or mean, and where channels are."""
        token: Literal["first"] | None = "first" if class_token(backbone) else None
        return replace(self, token=self.token or token, channels=self.channels or channels)

    def __call__(self, shape: Sequence[int], num_classes: int) -> nn.Module:
        """Build the head for features of ``shape`` (without batch).

        Raises:
            ValueError: this kind cannot read such a feature.
        """
        if self.kind in ("pool", "conv"):
            if len(shape) != 3:
                raise ValueError(f'head "{self.kind}" reads [B, C, H, W], got a feature of shape [B, {_dims(shape)}]')
            return PooledHead(shape, num_classes, self.layers if self.kind == "conv" else 0, self.channels == "last")
        if self.kind == "token" and len(shape) != 2:
            raise ValueError(f'head "token" reads [B, L, D], got a feature of shape [B, {_dims(shape)}]')
        token = "first" if self.kind == "token" and self.token is None else self.token
        first = len(shape) == 2 and token == "first"
        last = len(shape) <= 2 or self.channels == "last"
        width = shape[-1] if last else shape[0]
        layers = self.layers if self.kind in ("token", "mlp") else 1
        return LinearHead(width, num_classes, first, last, [self.hidden or width] * (layers - 1))


class LinearHead(nn.Module):
    """Mean over all positions, or the first token, then linear layers with GELU between them.

    Args:
        width: channels read.
        num_classes: logits.
        first: read the first token instead of the mean.
        channels_last: channels are the last dimension, else dimension 1.
        hidden: widths between the linear layers.
    """

    def __init__(
        self, width: int, num_classes: int, first: bool, channels_last: bool, hidden: Sequence[int] = ()
    ) -> None:
        super().__init__()
        self.first, self.channels_last = first, channels_last
        widths = [width, *hidden, num_classes]
        layers: list[nn.Module] = [nn.Linear(widths[0], widths[1])]
        for i in range(1, len(widths) - 1):
            layers += [nn.GELU(), nn.Linear(widths[i], widths[i + 1])]
        self.layers = layers[0] if len(layers) == 1 else nn.Sequential(*layers)

    def forward(self, feature: Tensor) -> Tensor:
        """Map features ``[B, C, ...]`` or ``[B, ..., C]`` to logits."""
        if self.first:
            feature = feature[:, 0]
        elif feature.ndim > 2:
            feature = feature.flatten(1, -2).mean(1) if self.channels_last else feature.flatten(2).mean(2)
        logits: Tensor = self.layers(feature)
        return logits


class PooledHead(nn.Module):
    """``a * maxpool + (1 - a) * avgpool`` to 4x4 or less, flattened, then one linear layer; ``a`` is learnt.

    Args:
        shape: of one sample's feature.
        num_classes: logits.
        convolutions: ReLU and 3x3 convolution before pooling, so many times.
        channels_last: the feature is ``[B, H, W, C]``; it is pooled to one position.
    """

    def __init__(self, shape: Sequence[int], num_classes: int, convolutions: int = 0, channels_last: bool = False):
        super().__init__()
        width, height, breadth = (shape[2], shape[0], shape[1]) if channels_last else shape
        self.channels_last = channels_last
        self.size = (1, 1) if channels_last else (min(4, height), min(4, breadth))
        layers = [m for _ in range(convolutions) for m in (nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))]
        self.before = nn.Sequential(*layers)
        self.mix = nn.Parameter(torch.rand(()))
        self.linear = nn.Linear(width * self.size[0] * self.size[1], num_classes)

    def forward(self, feature: Tensor) -> Tensor:
        """Map features ``[B, C, H, W]`` to logits."""
        if self.channels_last:
            feature = feature.permute(0, 3, 1, 2)
        feature = self.before(feature)
        most, mean = F.adaptive_max_pool2d(feature, self.size), F.adaptive_avg_pool2d(feature, self.size)
        logits: Tensor = self.linear((self.mix * most + (1 - self.mix) * mean).flatten(1))
        return logits


def head_from(head: Any) -> Head | HeadBuilder | nn.Module:
    """Return what builds a head, or the head itself.

    Raises:
        ValueError: a name that is none.
        TypeError: neither a name, a :class:`Head`, a module nor a callable.
    """
    if isinstance(head, str):
        return Head(head)  # type: ignore[arg-type]
    if callable(head):  # modules are
        built: HeadBuilder | nn.Module = head
        return built
    raise TypeError(f"expected a head to be a name, a Head, a module or a callable, got {type(head).__name__}")


def class_token(backbone: nn.Module) -> bool:
    """Whether a parameter of the backbone is named as class tokens are."""
    names = ("class_token", "cls_token", "class_embedding")
    return any(name.rsplit(".", 1)[-1] in names for name, _ in backbone.named_parameters())


def channels_of(layer: nn.Module, shape: Sequence[int]) -> Literal["first", "last"]:
    """Where the channels of an image-like feature are: the dimension that is as long as a width of the layer."""
    widths = set()
    for module in layer.modules():
        for name in ("out_channels", "num_features", "out_features", "num_channels"):
            if isinstance(width := getattr(module, name, None), int):
                widths.add(width)
        if isinstance(module, nn.LayerNorm):
            widths.add(module.normalized_shape[-1])
    return "last" if shape[0] not in widths and shape[-1] in widths else "first"


def _dims(shape: Sequence[int]) -> str:
    return ", ".join(map(str, shape))
