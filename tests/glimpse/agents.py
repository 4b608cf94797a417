"""What tests of the agent share: a small one, states of random tokens, and a world whose best action is known."""

from dataclasses import replace

import torch
from torchmetrics import MeanMetric, MetricCollection

from lightning_eff.glimpse.agent import make_sac
from lightning_eff.glimpse.backbones.base import Encoded, GlimpseBackbone
from lightning_eff.glimpse.config import AgentConfig, GlimpseConfig, ReplayOptions
from lightning_eff.glimpse.observation import Observation
from lightning_eff.glimpse.tasks.base import Task

CAMERA = GlimpseConfig(image_size=32, num_glimpses=3, patch_size=8, grid=2)
AGENT = AgentConfig(hidden=32, lr=1e-3, ent_coef="auto_0.1", replay=ReplayOptions(buffer_size=96, batch_size=16))


class Blind(GlimpseBackbone):
    """Has latents and importance to show, and predicts nothing."""

    channels, latent_dim, has_importance = 1, 8, True

    def encode(self, seen, importance=False):
        images, n = seen.boxes.shape[:2]
        share = torch.full((images, n, 1), 1 / max(n, 1)) if importance else None
        return Encoded(seen.views, seen.boxes.repeat(1, 1, 2) / 32, share)

    def predict(self, encoded, seen):
        return encoded.pooled


class Aim(Task):
    """Scores the last action by its squared distance from a target: the view (y0, x0, side) of 32 x 32 tells it."""

    def __init__(self, aim=(0.3, 0.7, 0.2)):
        super().__init__()
        self.register_buffer("aim", torch.tensor(aim))

    def score(self, prediction, images, target, teacher=None):
        if not prediction.size(1):
            return torch.zeros(len(prediction))
        side = prediction[:, -1, 2:]
        room = (32 - side).clamp(min=1e-6)
        actions = torch.cat([prediction[:, -1, :2] / room, (side - 16) / 16], 1)
        return -(actions - self.aim).square().sum(1)

    def loss(self, prediction, images, target, teacher=None):
        return -self.score(prediction, images, target).mean()

    def metrics(self):
        return MetricCollection({"score": MeanMetric()})

    def metric_inputs(self, prediction, images, target):
        return self.score(prediction, images, target), target


class Surer(Aim):
    """Stops images whose target is as many glimpses as have been taken."""

    def confidence(self, prediction):
        return torch.full((len(prediction),), prediction.size(1) / 4)


def tokens(states, n, seed=0, side=8):
    """States of n random tokens each, every part of them."""
    random = torch.Generator().manual_seed(seed)
    return Observation.of_equal_lengths(
        torch.rand(states, n, 4, generator=random) * 2 - 1,
        torch.randn(states, n, 1, side, side, generator=random),
        torch.rand(states, n, 1, generator=random),
        torch.randn(states, n, 8, generator=random),
    )


def ragged(lengths, seed=0):
    """States of random tokens with these lengths."""
    whole = tokens(1, sum(lengths), seed)
    return replace(whole, lengths=torch.tensor(lengths))


def small_sac(seed=0, camera=CAMERA, backbone=None, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make_sac(replace(AGENT, **options), camera, backbone or Blind())


def fill(buffer, batches=4, images=8, seed=0):
    """Episodes that could have been: each state begins with the tokens of the one before; latents change."""
    random = torch.Generator().manual_seed(seed)
    k = buffer.patches_per_glimpse
    for batch in range(batches):
        whole = tokens(images, k * buffer.num_glimpses, seed=100 * seed + batch)
        parts = {name: getattr(whole, name) for name in ("boxes", "patches", "importance")}
        for t in range(1, buffer.num_glimpses + 1):
            first = {name: part.view(images, -1, *part.shape[1:])[:, : k * t] for name, part in parts.items()}
            latents = torch.randn(images, k * t, 8, generator=random)
            buffer.add_step(
                Observation.of_equal_lengths(**first, latents=latents),
                torch.rand(images, 3, generator=random),
                torch.randn(images, generator=random),
                torch.full((images,), t == buffer.num_glimpses),
            )
    return buffer
