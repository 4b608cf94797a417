"""What exploring costs: images that stop leave the batch, and scenes are decoded only when asked.

Published code keeps stopped images in the batch, masked, and decodes after every glimpse. Here images stop after 2 to
14 glimpses, as many after each, 8 on average; predictions are compared first::

    python examples/benchmarks/glimpse_explore.py
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from harness import Headline, compare, main
from torch import Tensor

from lightning_eff.glimpse.backbones import ElasticViT, Encoded, ImageDecoder, Seen
from lightning_eff.glimpse.config import GlimpseConfig, ViTSize
from lightning_eff.glimpse.exploration import explore
from lightning_eff.glimpse.policies import RandomPolicy
from lightning_eff.glimpse.tasks import ClassificationTask, ReconstructionTask
from lightning_eff.glimpse.world import GlimpseWorld
from lightning_eff.reporting import Table

TECHNIQUE = "Active visual exploration"
IMAGES, FIRST_STOP = 26, 2
CONFIG = GlimpseConfig(224, num_glimpses=14)
TINY = ViTSize(192, 12, 3)


class Scheduled(ElasticViT):
    """Tells beside its logits whether an image is to stop: image i after 2 + i mod 13 glimpses."""

    def begin(self, images: Tensor, patch_size: int) -> Seen:
        nothing = super().begin(images, patch_size)
        stops = FIRST_STOP + torch.arange(len(images)) % (CONFIG.num_glimpses - FIRST_STOP + 1)
        return Seen(nothing.views, nothing.patches, nothing.boxes, stops)

    def predict(self, encoded: Encoded, seen: Seen) -> Tensor:
        assert seen.memory is not None
        sure = (seen.views.shape[1] >= seen.memory).float().unsqueeze(1)
        return torch.cat([super().predict(encoded, seen), sure], 1)


class Told(ClassificationTask):
    """Is as confident as the schedule says."""

    def confidence(self, prediction: Tensor) -> Tensor:
        return prediction[:, -1]


def glimpses() -> Tensor:
    return torch.rand(CONFIG.num_glimpses, IMAGES, 3, generator=torch.Generator().manual_seed(0))


def look(world: GlimpseWorld, images: Tensor, everybody: bool) -> Tensor:
    """Each image's prediction when it stopped; ``everybody`` keeps stopped ones in the batch."""
    given, last = glimpses(), torch.empty(0)
    world.reset(images, scored=False)
    goes_on = torch.ones(len(images), dtype=torch.bool)
    with torch.no_grad():
        while world.active:
            step = world.step(given[world.taken][world.rows], predict=True)
            prediction = step.prediction
            assert prediction is not None
            if not len(last):
                last = prediction.clone()
            news = goes_on[step.rows]
            last[step.rows[news]] = prediction[news]
            goes_on[step.rows[prediction[:, -1] > 0]] = False
            if everybody and not goes_on.any():
                break
    return last


def stopping(images: Tensor) -> Table:
    torch.manual_seed(0)
    backbone, task = Scheduled(10, 224, TINY, importance="none"), Told(10)
    whole = GlimpseWorld(backbone, task, CONFIG)
    leaving = GlimpseWorld(backbone, task, replace(CONFIG, stop_threshold=0.5))

    def all_glimpses() -> Tensor:
        return look(whole, images, everybody=True)

    contenders = {
        "14 glimpses each, or stopped and masked": all_glimpses,
        "stopped images leave": partial(look, leaving, images, everybody=False),
    }
    title = f"ViT of {TINY.dim} x {TINY.depth}, {IMAGES} scenes of 224 x 224, 8 of 14 glimpses on average"
    return compare(contenders, reference=next(iter(contenders)), check=close, repeats=3, title=title)


def decoding(images: Tensor) -> Table:
    torch.manual_seed(0)
    decoder = ImageDecoder(ViTSize(128, 8, 4))
    world = GlimpseWorld(ElasticViT(decoder, 224, TINY, importance="none"), ReconstructionTask(), CONFIG)

    def last(predictions: str) -> Tensor:
        told = explore(world, images, RandomPolicy(CONFIG), predictions=predictions)  # type: ignore[arg-type]
        assert told.prediction is not None
        return told.prediction

    contenders = {"after every glimpse": partial(last, "all"), "after the last": partial(last, "last")}
    title = f"Decoding {len(images)} scenes of 224 x 224, encoder {TINY.dim} x {TINY.depth}, decoder 128 x 8"
    return compare(contenders, reference="after every glimpse", check=close, repeats=3, title=title)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def tables() -> list[Table]:
    images = torch.rand(IMAGES, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    return [stopping(images), decoding(images[:4])]


def headlines(tables: list[Table]) -> list[Headline]:
    lines = []
    for table, aim in zip(tables, (1 / 0.6, None), strict=True):
        (who, theirs, *_), (what, ours, *_) = table.rows
        lines.append(Headline(f"{table.title}, {what}", ours, theirs, who, target=aim, aside=aim is None))
    return lines


if __name__ == "__main__":
    main(tables, headlines)
