"""A backbone that paints what it sees into a canvas of the scene's size and looks at that.

Small enough to be trained on a CPU in minutes, and a strong baseline. Letters: B images, C channels, H x W scene,
g grid, p patch side, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_eff.arguments import check_number, check_whole
from lightning_eff.glimpse.backbones.base import Encoded, Glimpse, GlimpseBackbone, Seen

# what the network is told of places that nobody has looked at: a scale of 2^4
_UNSEEN = 4.0


class CanvasBackbone(GlimpseBackbone):
    """Paint glimpses into a canvas, finer ones over coarser ones; classify or just show the canvas.

    The canvas remembers the scale of what it shows, side of the field of view over pixels of the camera: a glimpse
    is painted where nothing finer has been, the newer one of two that are equally fine. To classify, a small
    convolutional network sees the canvas and log2(scale) / 4. The canvas has no latents: an agent on it looks at
    patches and boxes.

    Args:
        channels: C of the images, >= 1.
        num_classes: K >= 2; None predicts the canvas itself, without any weights.
        widths: Channels of the four convolutions.
        fill: Pixel of the canvas where nobody has looked; that of the mean is 0 in normalised images.

    Raises:
        ValueError: An argument lies outside its range.
    """

    least_glimpses = 1  # statistics of an empty canvas would spoil those of BatchNorm

    def __init__(
        self,
        channels: int = 1,
        num_classes: int | None = None,
        widths: tuple[int, int, int, int] = (16, 32, 64, 128),
        fill: float = 0.0,
    ) -> None:
        super().__init__()
        check_whole("channels", channels)
        for width in widths:
            check_whole("each of widths", width)
        if num_classes is not None:
            check_whole("num_classes", num_classes, 2)
        check_number("fill", fill)
        self.channels, self.num_classes, self.fill = channels, num_classes, fill
        if num_classes is not None:
            layers: list[nn.Module] = []
            before = channels + 1
            for width in widths:
                layers += [_block(before, width, shrink=len(layers) < len(widths) - 1)]
                before = width
            self.features = nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten())
            # borders of views are strong edges in the scale: unless it counts nothing at first, they drown the picture
            # and learning starts late or not at all
            with torch.no_grad():
                next(self.features.parameters())[:, -1] = 0
            self.head = nn.Linear(before, num_classes)

    def begin(self, images: Tensor, patch_size: int) -> Seen:
        """Return an empty canvas; the first C channels of ``memory`` [B, C + 1, H, W] are it, the last is log2(scale).

        Raises:
            ValueError: Images do not have the channels that the backbone was made for.
        """
        if images.shape[1] != self.channels:
            raise ValueError(f"CanvasBackbone was made for {self.channels} channels, got images {list(images.shape)}")
        canvas = torch.full_like(images, self.fill)
        scale = torch.full_like(images[:, :1], torch.inf)
        nothing = super().begin(images, patch_size)
        return Seen(nothing.views, nothing.patches, nothing.boxes, torch.cat([canvas, scale], dim=1))

    def observe(self, seen: Seen, glimpse: Glimpse) -> Seen:
        """Paint one more glimpse of each image."""
        more = super().observe(seen, glimpse)
        assert seen.memory is not None
        return Seen(more.views, more.patches, more.boxes, paint(seen.memory, glimpse))

    def encode(self, seen: Seen, importance: bool = False) -> Encoded:
        """Return features of the canvas [B, widths[-1]], or the canvas [B, C, H, W]."""
        assert seen.memory is not None
        if self.num_classes is None:
            return Encoded(seen.memory[:, : self.channels])
        if not seen.views.shape[1]:  # nothing to look at: predict does not read them
            return Encoded(seen.memory.new_zeros(len(seen.memory), self.head.in_features))
        canvas, scale = seen.memory[:, :-1], seen.memory[:, -1:].clamp(max=_UNSEEN)
        shown = torch.cat([canvas, scale / 4], dim=1)
        # convolutions on a CPU are half again as fast on this layout
        return Encoded(self.features(shown.contiguous(memory_format=torch.channels_last)))

    def predict(self, encoded: Encoded, seen: Seen) -> Tensor:
        """Return logits [B, K], or the canvas [B, C, H, W]; before the first glimpse all classes are as likely."""
        if self.num_classes is None:
            return encoded.pooled
        logits: Tensor = self.head(encoded.pooled)
        return logits if seen.views.shape[1] else torch.zeros_like(logits)


def paint(memory: Tensor, glimpse: Glimpse) -> Tensor:
    """Return ``memory`` [B, C + 1, H, W] with ``glimpse`` painted where nothing finer has been.

    The last channel is log2 of the scale shown, inf where there is nothing.
    """
    height, width = memory.shape[2:]
    picture, rows, columns = assembled(glimpse)
    camera = picture.shape[-1]
    down, inside_y = _enlarging_weights(rows, camera, height)
    across, inside_x = _enlarging_weights(columns, camera, width)
    # autocast would multiply pixels in half precision
    with torch.autocast(memory.device.type, enabled=False):
        enlarged = (
            down.to(memory.dtype).unsqueeze(1) @ picture.to(memory.dtype) @ across.to(memory.dtype).unsqueeze(1).mT
        )
    scale = (glimpse.view[:, 2] / camera).log2().to(memory.dtype)[:, None, None, None]
    visible = (inside_y.unsqueeze(2) & inside_x.unsqueeze(1)).unsqueeze(1) & (scale <= memory[:, -1:])
    painted = memory.clone()
    painted[:, :-1] = torch.where(visible, enlarged, memory[:, :-1])
    painted[:, -1:] = torch.where(visible, scale, memory[:, -1:])
    return painted


def assembled(glimpse: Glimpse) -> tuple[Tensor, Tensor, Tensor]:
    """Put a glimpse's patches together.

    Returns:
        The picture [B, C, g p, g p], and the rows and columns of the scene between which its patches lie, [B, g + 1]
        each.
    """
    grid = round(glimpse.patches.shape[1] ** 0.5)
    batch, _, channels, side, _ = glimpse.patches.shape
    patches = glimpse.patches.view(batch, grid, grid, channels, side, side)
    picture = patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, grid * side, grid * side)
    boxes = glimpse.boxes
    rows = torch.cat([boxes[:, ::grid, 0], boxes[:, -1:, 2]], dim=1)
    columns = torch.cat([boxes[:, :grid, 1], boxes[:, -1:, 3]], dim=1)
    return picture, rows, columns


def _enlarging_weights(edges: Tensor, camera: int, length: int) -> tuple[Tensor, Tensor]:
    """How the pixels of an axis are mixed of the camera's.

    Args:
        edges: Between which patches lie [B, g + 1], pixels of the scene.
        camera: Pixels a side of the camera's picture.
        length: Pixels of the scene's axis.

    Returns:
        Bilinear weights [B, length, camera], and which pixels have their centre between the first and the last edge
        [B, length].
    """
    pixels = (torch.arange(length, dtype=edges.dtype, device=edges.device) + 0.5).expand(len(edges), -1).contiguous()
    patches = edges.shape[1] - 1
    patch = torch.searchsorted(edges[:, 1:-1].contiguous(), pixels, right=True)
    start, size = edges.gather(1, patch), edges.diff(dim=1).gather(1, patch)
    place = (patch + (pixels - start) / size) * (camera / patches) - 0.5
    distance = place.clamp(0, camera - 1).unsqueeze(2) - torch.arange(camera, dtype=edges.dtype, device=edges.device)
    return (1 - distance.abs()).clamp(min=0), (pixels >= edges[:, :1]) & (pixels < edges[:, -1:])


def _block(before: int, after: int, shrink: bool) -> nn.Sequential:
    stride = 2 if shrink else 1
    return nn.Sequential(nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.GELU())
