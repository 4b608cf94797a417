"""Look where a decoder's attention is most undecided: what active exploration did before it was learnt.

Attention maps as a guide: A. Pardyl et al., arXiv 2303.13594; on a quadtree: section 4 of arXiv 2404.03482.

Letters: A active images, N cells that can be looked at, R x S places of the decoder's map.
"""

from __future__ import annotations

import itertools
from typing import ClassVar

import torch
from torch import Tensor

from lightning_eff.glimpse.backbones.heads import ImageDecoder
from lightning_eff.glimpse.config import GlimpseConfig
from lightning_eff.glimpse.geometry import views_of
from lightning_eff.glimpse.observation import Observation
from lightning_eff.glimpse.policies.base import Policy
from lightning_eff.glimpse.policies.plain import quadtree_levels, tile_actions
from lightning_eff.glimpse.world import GlimpseWorld, evaluating


class EntropyPolicy(Policy):
    """Look at the cell with the largest sum of entropy that has not been looked at and whose parent has been.

    Args:
        config: Camera and scene.
        actions: Of the cells [N, 3].
        parents: Number of each cell's parent [N], -1 for those without one.
        first: Cells looked at before anything else, in turn.
    """

    def __init__(self, config: GlimpseConfig, actions: Tensor, parents: Tensor, first: int) -> None:
        super().__init__(config)
        self.actions, self.parents, self.first = actions, parents, first
        self._visited = torch.zeros(0, len(actions), dtype=torch.bool)

    def begin(self, world: GlimpseWorld) -> None:
        """Forget what was looked at.

        Raises:
            ValueError: The backbone has no decoder with attention.
        """
        super().begin(world)
        if not isinstance(getattr(world.backbone, "head", None), ImageDecoder):
            raise ValueError(
                f"{self.name} follows the attention of a decoder, which {type(world.backbone).__name__} lacks: use an "
                "ElasticViT with an ImageDecoder or a SegmentationHead"
            )
        self._visited = torch.zeros(len(world.images), len(self.actions), dtype=torch.bool, device=world.images.device)

    def __call__(self, observation: Observation) -> Tensor:
        """Return actions [A, 3]."""
        world, taken = self.shown, self.taken(observation)
        visited = self._visited[world.rows]
        if taken < self.first:
            chosen = torch.full_like(world.rows, taken)
        else:
            # an orphan's parent, -1, is the column behind the last: always open
            reached = torch.cat([visited, torch.ones_like(visited[:, :1])], 1)[:, self.parents]
            worth, eligible = self._worth(world), reached & ~visited
            # where all has been looked at, anything may be looked at again
            eligible |= ~eligible.any(1, keepdim=True)
            worth = worth.masked_fill(~eligible, -torch.inf)
            chosen = worth.argmax(1)
        self._visited[world.rows, chosen] = True
        return self.actions.to(chosen.device)[chosen]

    @torch.no_grad()
    def _worth(self, world: GlimpseWorld) -> Tensor:
        """Return the sum of entropy in each cell [A, N]."""
        decoder = world.backbone.head
        assert isinstance(decoder, ImageDecoder)
        with evaluating(world.backbone):
            encoded = world.backbone.encode(world.seen)
            assert encoded.latents is not None
            entropy = decoder.cell_entropy(encoded.pooled, encoded.latents, world.seen.boxes)
        views = views_of(self.actions, self.config).to(entropy)
        down = _overlap(views[:, 0], views[:, 2], entropy.shape[1], self.config.patch_size)
        across = _overlap(views[:, 1], views[:, 2], entropy.shape[2], self.config.patch_size)
        return torch.einsum("nr,ars,ns->an", down, entropy, across)


class AttentionEntropy(EntropyPolicy):
    """The whole scene, then cells of one size where attention is most undecided.

    Args:
        config: Camera and scene.
        view: Side of cells in pixels; None takes those of native resolution.

    Raises:
        ValueError: ``view`` is smaller than the camera or larger than the largest view.
    """

    name: ClassVar[str] = "attention_entropy"

    def __init__(self, config: GlimpseConfig, view: float | None = None) -> None:
        view = config.camera_size if view is None else view
        if not config.camera_size <= view <= config.max_view:
            raise ValueError(f"view must lie between {config.camera_size} and {config.max_view} pixels, got {view}")
        whole, cells = tile_actions(config, config.max_view), tile_actions(config, view)
        actions = torch.cat([whole, cells])
        super().__init__(config, actions, torch.full((len(actions),), -1), first=len(whole))


class QuadtreeEntropy(EntropyPolicy):
    """The whole scene, then always that quarter of a cell seen before where attention is most undecided.

    Args:
        config: Camera and scene.
    """

    name: ClassVar[str] = "quadtree_entropy"

    def __init__(self, config: GlimpseConfig) -> None:
        levels = [tile_actions(config, view) for view in quadtree_levels(config)]
        parents, start = [torch.full((len(levels[0]),), -1)], 0
        for above, level in itertools.pairwise(levels):
            parents.append(start + torch.cdist(_centres(level, config), _centres(above, config)).argmin(1))
            start += len(above)
        super().__init__(config, torch.cat(levels), torch.cat(parents), first=len(levels[0]))


def _centres(actions: Tensor, config: GlimpseConfig) -> Tensor:
    views = views_of(actions, config)
    return views[:, :2] + views[:, 2:] / 2


def _overlap(start: Tensor, side: Tensor, count: int, size: int) -> Tensor:
    """Return which share of each of ``count`` places of ``size`` pixels lies in each cell [N, count]."""
    edges = torch.arange(count + 1, device=start.device, dtype=start.dtype) * size
    end = (start + side).unsqueeze(1)
    inside = edges[1:].minimum(end) - edges[:-1].maximum(start.unsqueeze(1))
    return inside.clamp(min=0) / size
