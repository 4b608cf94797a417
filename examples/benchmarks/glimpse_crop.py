"""Glimpses cropped all at once against a loop over patches, and operations of decoding only when asked.

The loop is torchvision's ``resized_crop``, one call a patch, as published code does it. Results are compared first::

    python examples/benchmarks/glimpse_crop.py
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from harness import Headline, compare, entry, main
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import roi_align
from torchvision.transforms.v2.functional import resized_crop

from lightning_eff.glimpse.backbones import ElasticViT, ImageDecoder, Seen
from lightning_eff.glimpse.config import GlimpseConfig
from lightning_eff.glimpse.crop import take_glimpse
from lightning_eff.glimpse.geometry import patch_boxes, views_of
from lightning_eff.reporting import Column, Table

TECHNIQUE = "Active visual exploration"
SCENES = {
    "256 scenes of 64 x 64": (256, GlimpseConfig(64, patch_size=8)),
    "64 scenes of 224 x 224": (64, GlimpseConfig(224)),
    "8 scenes of 1024 x 1024": (8, GlimpseConfig(1024)),
}


def loop(images: Tensor, views: Tensor, config: GlimpseConfig) -> Tensor:
    """Crop patch after patch."""
    size = [config.patch_size, config.patch_size]
    return torch.stack(
        [
            torch.stack(
                [
                    resized_crop(image, y0, x0, y1 - y0, x1 - x0, size, antialias=config.antialias)
                    for y0, x0, y1, x1 in boxes
                ]
            )
            for image, boxes in zip(images, patch_boxes(views, config).int().tolist(), strict=True)
        ]
    )


def regions(images: Tensor, views: Tensor, config: GlimpseConfig) -> Tensor:
    """Crop with torchvision's region pooling, one sample a pixel: no antialiasing."""
    boxes = patch_boxes(views, config)
    which = torch.arange(len(images)).repeat_interleave(config.patches_per_glimpse)
    corners = boxes.flatten(0, 1)[:, [1, 0, 3, 2]]
    rois = torch.cat([which.unsqueeze(1), corners], dim=1)
    patches = roi_align(images, rois, config.patch_size, sampling_ratio=1, aligned=True)
    return patches.unflatten(0, (len(images), -1))


def ours(images: Tensor, views: Tensor, config: GlimpseConfig) -> Tensor:
    return take_glimpse(images, views, config).patches


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0)


def crops(title: str) -> list[Table]:
    count, config = SCENES[title]
    generator = torch.Generator().manual_seed(0)
    height, width = config.scene
    images = torch.rand(count, 3, height, width, generator=generator)
    tables = []
    for antialias in (True, False):
        given = GlimpseConfig(config.image_size, patch_size=config.patch_size, antialias=antialias)
        views = views_of(torch.rand(count, 3, generator=generator), given)
        methods = {"loop": loop, "ours": ours} if antialias else {"loop": loop, "roi_align": regions, "ours": ours}
        contenders: dict[str, Callable[[], Tensor]] = {
            name: partial(method, images, views, given) for name, method in methods.items()
        }
        heading = f"{title}, {'with' if antialias else 'without'} antialiasing"
        tables.append(compare(contenders, reference="loop", check=close, repeats=5, title=heading))
    return tables


def decoding(glimpses: int = 12) -> Table:
    """Operations of reconstructing one scene of 224 x 224 with ViT-B and its decoder; nothing is computed."""
    with torch.device("meta"), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        backbone = ElasticViT(ImageDecoder(), 224, "base", importance="none").eval()
        encoder, decoder = [], []
        for taken in range(1, glimpses + 1):
            patches = 4 * taken
            seen = Seen(torch.zeros(1, taken, 3), torch.zeros(1, patches, 3, 16, 16), torch.zeros(1, patches, 4))
            with FlopCounterMode(display=False) as counter:
                encoded = backbone.encode(seen)
            encoder.append(counter.get_total_flops() / 1e9)
            with FlopCounterMode(display=False) as counter:
                backbone.predict(encoded, seen)
            decoder.append(counter.get_total_flops() / 1e9)
    always = sum(encoder) + sum(decoder)
    rows = [
        ["after every glimpse", sum(encoder), sum(decoder), always, 1.0],
        [
            "after the last",
            sum(encoder),
            decoder[-1],
            sum(encoder) + decoder[-1],
            (sum(encoder) + decoder[-1]) / always,
        ],
    ]
    columns = [
        "decoding",
        *(Column(f"{part} [GFLOP]", ".1f") for part in ("encoder", "decoder", "both")),
        Column("share", ".3f"),
    ]
    return Table(f"ViT-B, {glimpses} glimpses of 32 x 32", columns, rows, "counted; a multiply-add is two operations")


def tables() -> list[Table]:
    return [*(table for title in SCENES for table in crops(title)), decoding()]


def headlines(tables: list[Table]) -> list[Headline]:
    small, large = "256 scenes of 64 x 64", "64 scenes of 224 x 224"
    cases = [
        (f"{small}, without antialiasing", "loop", 10),
        (f"{small}, without antialiasing", "roi_align", None),
        (f"{large}, without antialiasing", "loop", 5),
        (f"{large}, without antialiasing", "roi_align", None),
        (f"{large}, with antialiasing", "loop", 1),
    ]
    peers = {"loop": "torchvision resized_crop, a patch a call", "roi_align": "torchvision roi_align"}
    lines = []
    for title, who, aim in cases:
        ours, theirs = (entry(tables, title, name, "median [s]") for name in ("ours", who))
        aside = (title, who) not in {cases[0][:2], cases[-1][:2]}
        lines.append(Headline(f"glimpses of {title}", ours, theirs, peers[who], target=aim, aside=aside))
    last, always = (entry(tables, "ViT-B", when, "both [GFLOP]") for when in ("after the last", "after every glimpse"))
    work = "one scene of 224 x 224 reconstructed from 12 glimpses, ViT-B, counted"
    return [*lines, Headline(work, last, always, "decoding after every glimpse", "GFLOP", target=2.5, aside=True)]


if __name__ == "__main__":
    main(tables, headlines)
