"""Policies that a learned one is compared with."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightning_eff.glimpse.backbones.canvas import CanvasBackbone
from lightning_eff.glimpse.backbones.heads import ImageDecoder
from lightning_eff.glimpse.backbones.vit import ElasticViT
from lightning_eff.glimpse.config import GlimpseConfig, ViTSize
from lightning_eff.glimpse.exploration import explore
from lightning_eff.glimpse.figures.statistics import coverage
from lightning_eff.glimpse.geometry import views_of
from lightning_eff.glimpse.observation import Observation
from lightning_eff.glimpse.policies import (
    POLICY_NAMES,
    AttentionEntropy,
    BestFixedSequence,
    FineToCoarse,
    FixedGrid,
    FixedSequence,
    FullThenRandom,
    GreedyLookahead,
    Oracle,
    QuadtreeEntropy,
    RandomPolicy,
    UniformLowRes,
    make_policy,
)
from lightning_eff.glimpse.policies.fitted import sequence_scores
from lightning_eff.glimpse.policies.informed import view_actions
from lightning_eff.glimpse.policies.plain import quadtree_levels, tile_actions
from lightning_eff.glimpse.tasks.classification import ClassificationTask
from lightning_eff.glimpse.tasks.reconstruction import ReconstructionTask
from lightning_eff.glimpse.world import GlimpseWorld

CONFIG = GlimpseConfig(image_size=64, num_glimpses=3, patch_size=8)


def states(count: int, taken: int, config: GlimpseConfig = CONFIG) -> Observation:
    return Observation.of_equal_lengths(torch.zeros(count, taken * config.patches_per_glimpse, 4))


def spot(place: tuple[int, int], side: int = 12, count: int = 4) -> Tensor:
    """Black scenes with one bright, finely striped square."""
    images = torch.zeros(count, 1, 64, 64)
    y, x = place
    images[:, :, y : y + side, x : x + side : 2] = 1
    return images


def world(config: GlimpseConfig = CONFIG) -> GlimpseWorld:
    return GlimpseWorld(CanvasBackbone(1), ReconstructionTask(), config)


def test_random_zoom_is_even_or_falls_with_the_area() -> None:
    even = RandomPolicy(CONFIG)(states(20_000, 0))[:, 2]
    area = RandomPolicy(CONFIG, scale="area")(states(20_000, 0))[:, 2]
    # P(z < 1/2) of a density 2 (1 - z) is 3/4; four standard errors are 0.014
    assert float((even < 0.5).float().mean()) == pytest.approx(0.5, abs=0.014)
    assert float((area < 0.5).float().mean()) == pytest.approx(0.75, abs=0.014)
    with pytest.raises(ValueError, match="scale must be 'uniform' or 'area', got 'small'"):
        RandomPolicy(CONFIG, scale="small")  # type: ignore[arg-type]


def test_random_policies_draw_from_a_generator_of_their_own_and_can_begin_again() -> None:
    before = torch.get_rng_state()
    policy = RandomPolicy(CONFIG, seed=3)
    first, second = policy(states(5, 0)), policy(states(5, 1))
    assert not torch.equal(first, second)
    policy.restart()
    assert torch.equal(policy(states(5, 0)), first)
    assert not torch.equal(RandomPolicy(CONFIG, seed=4)(states(5, 0)), first)
    assert torch.equal(torch.get_rng_state(), before)


def test_full_then_random_sees_the_whole_scene_first_and_only_then() -> None:
    policy = FullThenRandom(CONFIG)
    assert policy(states(3, 0)).tolist() == [[0.5, 0.5, 1.0]] * 3
    assert len(policy(states(50, 1))[:, 2].unique()) == 50


def test_fixed_grid_goes_from_the_scene_to_its_quadrants_row_by_row() -> None:
    config = GlimpseConfig(image_size=64, num_glimpses=6, patch_size=8)
    views = views_of(FixedGrid(config).actions, config)
    quadrants = [[0, 0, 32], [0, 32, 32], [32, 0, 32], [32, 32, 32]]
    assert views.tolist() == [[0, 0, 64], *quadrants, [0, 0, 16]]
    assert torch.equal(FineToCoarse(config).actions, FixedGrid(config).actions.flip(0))


@pytest.mark.parametrize("scene", [(64, 64), (96, 250), (250, 96)])
def test_every_level_of_the_grid_covers_the_whole_scene(scene: tuple[int, int]) -> None:
    config = GlimpseConfig(image_size=scene, num_glimpses=6, patch_size=8, quantize=False)
    levels = quadtree_levels(config)
    assert levels[0] == min(scene)
    assert levels[-1] == config.camera_size
    for view in levels:
        tiles = views_of(tile_actions(config, view), config)
        assert bool((coverage(tiles, scene) > 0).all())
        assert len(tiles) * view**2 < 2.5 * scene[0] * scene[1]  # and hardly more than once


def test_a_sequence_begins_again_after_its_end_and_must_be_legal() -> None:
    policy = FixedSequence(CONFIG, [[0, 0, 0], [1, 1, 1]])
    assert [policy(states(2, t))[1, 0].item() for t in range(4)] == [0, 1, 0, 1]
    with pytest.raises(ValueError, match=r"expected actions \[t, 3\] with t >= 1, got \[2\]"):
        FixedSequence(CONFIG, torch.zeros(2))
    with pytest.raises(ValueError, match=r"actions must lie in \[0, 1\]"):
        FixedSequence(CONFIG, [[0, 0, float("nan")]])


def test_one_even_view_has_the_pixels_of_all_glimpses() -> None:
    reference = UniformLowRes(CONFIG)
    assert reference.size == (27, 27)  # 27^2 = 729 <= 3 * 16^2 = 768 < 28^2
    assert UniformLowRes(CONFIG, glimpses=100).size == (64, 64)
    flat = torch.full((2, 1, 64, 64), 0.3)
    torch.testing.assert_close(reference.reconstruct(flat), flat)
    stripes = spot((20, 20))
    assert float((reference.reconstruct(stripes) - stripes).abs().max()) > 0.3
    with pytest.raises(ValueError, match="glimpses must be a whole number >= 1, got 0"):
        UniformLowRes(CONFIG, glimpses=0)


def test_best_fixed_sequence_finds_what_always_lies_at_the_same_place() -> None:
    images, task, backbone = spot((41, 9)), ReconstructionTask(), CanvasBackbone(1).train()
    before = torch.get_rng_state()
    found = BestFixedSequence.fit(backbone, task, CONFIG, images, rounds=12, population=16, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert backbone.training
    reached = {
        name: float(explore(world(), images, policy, scored=True).scores[:, -1].mean())  # type: ignore[index]
        for name, policy in {"found": found, "grid": FixedGrid(CONFIG)}.items()
    }
    assert reached["found"] > 0.3 * reached["grid"]  # scores are negative errors
    again = BestFixedSequence.fit(backbone, task, CONFIG, images, rounds=12, population=16, seed=1)
    assert torch.equal(found.actions, again.actions)
    with pytest.raises(ValueError, match="rounds >= 1 and population >= 5, got 0 and 40"):
        BestFixedSequence.fit(backbone, task, CONFIG, images, rounds=0)


def test_best_fixed_sequence_is_fitted_to_what_the_world_will_show() -> None:
    images = (spot((41, 9)) * 255).to(torch.uint8)
    decoder = ElasticViT(ImageDecoder(ViTSize(16, 1, 2)), 64, ViTSize(16, 1, 2), patch_size=8, channels=1)
    config = replace(CONFIG, first_glimpse="full")
    for backbone in (CanvasBackbone(1), decoder):
        fitted = BestFixedSequence.fit(backbone, ReconstructionTask(), config, images, rounds=1, population=5)
        world = GlimpseWorld(backbone, ReconstructionTask(), config)
        shown = explore(world, images, fitted, scored=True).scores
        with torch.no_grad():
            told = sequence_scores(backbone, ReconstructionTask(), config, images, None, fitted.actions)
        assert torch.allclose(told, shown[:, -1], atol=1e-3)  # type: ignore[index]


def test_looking_ahead_pays_and_needs_scores() -> None:
    images = spot((30, 30))
    scores = [
        float(explore(world(), images, GreedyLookahead(CONFIG, tries=tries), scored=True).scores[:, -1].mean())  # type: ignore[index]
        for tries in (1, 30)
    ]
    assert scores[1] > scores[0]
    policy, blind = GreedyLookahead(CONFIG), world()
    with pytest.raises(RuntimeError, match=r"call policy\.begin"):
        policy(states(4, 0))
    policy.begin(blind)
    with pytest.raises(RuntimeError, match="greedy_lookahead needs scores"):
        policy(blind.reset(images, scored=False))
    with pytest.raises(ValueError, match="tries must be a whole number >= 1, got 0"):
        GreedyLookahead(CONFIG, tries=0)


def test_the_oracle_sees_every_object_whole_and_then_its_middle_batch_by_batch() -> None:
    corners = torch.tensor([[0.0, 0.0], [10.0, 36.0], [36.0, 36.0], [5.0, 5.0], [20.0, 1.0]])
    boxes = torch.cat([corners, corners + 28], 1)
    policy = Oracle(CONFIG, boxes)
    seen = explore(world(), torch.zeros(5, 1, 64, 64), policy, batch_size=2)
    assert seen.views[:, 0].tolist() == [[0, 0, 64]] * 5
    torch.testing.assert_close(seen.views[:, 1], torch.cat([corners, torch.full((5, 1), 28.0)], 1))
    assert seen.views[:, 2, 2].tolist() == [16] * 5  # half of 28 is less than the camera has pixels
    torch.testing.assert_close(seen.views[:, 2, :2], corners + 6)
    policy.restart()
    torch.testing.assert_close(explore(world(), torch.zeros(5, 1, 64, 64), policy).views, seen.views)
    with pytest.raises(ValueError, match=r"expected a box an image \[N, 4\], got \[4\]"):
        Oracle(CONFIG, torch.zeros(4))


def test_the_oracle_keeps_boxes_and_images_together_when_some_stop() -> None:
    class StopsWhereBright(ClassificationTask):
        def confidence(self, prediction: Tensor) -> Tensor:
            return prediction[:, 0]

    class Mean(CanvasBackbone):
        def predict(self, encoded: object, seen: object) -> Tensor:
            brightness: Tensor = seen.memory[:, 0].mean((1, 2))  # type: ignore[attr-defined]
            return torch.stack([brightness, 1 - brightness], 1)

    images = torch.tensor([1.0, 0, 1, 0])[:, None, None, None].expand(-1, 1, 64, 64)
    corners = torch.tensor([[0.0, 0], [8, 8], [16, 16], [24, 24]])
    config = GlimpseConfig(image_size=64, num_glimpses=3, patch_size=8, stop_threshold=0.9)
    scenes = GlimpseWorld(Mean(1), StopsWhereBright(2), config)
    seen = explore(scenes, images, Oracle(config, torch.cat([corners, corners + 20], 1)))
    assert seen.taken.tolist() == [1, 3, 1, 3]
    assert seen.views[[1, 3], 1, :2].tolist() == [[8, 8], [24, 24]]


def test_views_beyond_the_scene_are_pushed_into_it() -> None:
    config = GlimpseConfig(image_size=(40, 100), patch_size=8)
    actions = view_actions(torch.tensor([[0.0, 99.0], [20.0, 50.0]]), torch.tensor([20.0, 40.0]), config)
    assert views_of(actions, config).tolist() == [[0, 80, 20], [0, 30, 40]]


def transformer_world(config: GlimpseConfig) -> GlimpseWorld:
    torch.manual_seed(0)
    size = ViTSize(16, 1, 2)
    vit = ElasticViT(ImageDecoder(size), config.scene, size, patch_size=config.patch_size, channels=1)
    return GlimpseWorld(vit, ReconstructionTask(), config)


@pytest.mark.parametrize("kind", [AttentionEntropy, QuadtreeEntropy])
def test_entropy_policies_look_at_the_whole_scene_then_where_attention_is_undecided(
    kind: type[AttentionEntropy] | type[QuadtreeEntropy], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = GlimpseConfig(image_size=64, num_glimpses=4, patch_size=8)
    scenes = transformer_world(config)
    entropy = torch.full((2, 8, 8), 0.1)
    entropy[0, 2, 7], entropy[1, 6, 1] = 9.0, 9.0  # at pixels (16..24, 56..64) and (48..56, 8..16)
    monkeypatch.setattr(ImageDecoder, "cell_entropy", lambda *_: entropy)
    views = explore(scenes, torch.rand(2, 1, 64, 64), kind(config)).views
    assert views[:, 0].tolist() == [[0, 0, 64]] * 2
    second = [[16, 48, 16], [48, 0, 16]] if kind is AttentionEntropy else [[0, 32, 32], [32, 0, 32]]
    assert views[:, 1].tolist() == second
    assert len(views[0].unique(dim=0)) == 4  # never the same again
    if kind is QuadtreeEntropy:
        assert views[:, 2].tolist() == [[16, 48, 16], [48, 0, 16]]  # a quarter of what was seen before


def test_entropy_policies_use_the_decoder_and_refuse_what_has_none() -> None:
    config = GlimpseConfig(image_size=64, num_glimpses=30, patch_size=8)
    views = explore(transformer_world(config), torch.rand(1, 1, 64, 64), QuadtreeEntropy(config)).views
    assert len(views[0].unique(dim=0)) == 21  # 1 + 4 + 16 cells, then again
    with pytest.raises(ValueError, match="attention of a decoder, which CanvasBackbone lacks"):
        explore(world(), torch.zeros(1, 1, 64, 64), AttentionEntropy(CONFIG))
    with pytest.raises(ValueError, match=r"view must lie between 16 and 64.0 pixels, got 8"):
        AttentionEntropy(CONFIG, view=8)


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_every_named_policy_drives_a_world(name: str) -> None:
    config = GlimpseConfig(image_size=(40, 64), num_glimpses=3, patch_size=8)
    scenes = transformer_world(config) if "entropy" in name else world(config)
    policy = make_policy(name, config, seed=1)
    seen = explore(scenes, torch.rand(3, 1, 40, 64), policy)
    assert policy.name == name or name == "random_area"
    assert bool(torch.isfinite(seen.views).all())


def test_a_policy_that_needs_data_or_does_not_exist_says_so() -> None:
    for name, how in {
        "oracle": r"Oracle\(config, boxes\)",
        "best_fixed_sequence": "fit",
        "uniform_low_res": "UniformL",
    }.items():
        with pytest.raises(ValueError, match=how):
            make_policy(name, CONFIG)
    with pytest.raises(ValueError, match=r"policy must be one of random, .*, got 'clever'"):
        make_policy("clever", CONFIG)


def test_one_even_view_of_bytes_is_that_of_the_same_scenes_and_scored_alike() -> None:
    scenes = (torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
    reference, task = UniformLowRes(CONFIG), ReconstructionTask()
    shown = reference.reconstruct(scenes)
    torch.testing.assert_close(shown, reference.reconstruct(scenes.float() / 255))
    torch.testing.assert_close(task.score(shown, scenes), task.score(shown, scenes.float() / 255))
