"""The world that an agent looks at: rewards, ends, and what is left undone because nobody asks for it."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torchmetrics import MeanMetric, MetricCollection

from lightning_eff.glimpse.backbones.base import Encoded, GlimpseBackbone
from lightning_eff.glimpse.config import GlimpseConfig, RewardOptions
from lightning_eff.glimpse.tasks.base import Task
from lightning_eff.glimpse.world import FULL_VIEW, GlimpseWorld

CONFIG = GlimpseConfig(image_size=16, num_glimpses=4, patch_size=4, grid=2)


class Mean(GlimpseBackbone):
    """Predicts two numbers of the patches; counts how often it was asked."""

    channels, latent_dim, has_importance = 1, 3, True

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.out = nn.Linear(4, 2)
        self.encoded = self.predicted = 0

    def encode(self, seen, importance=False):
        self.encoded += 1
        images, n = seen.boxes.shape[:2]
        numbers = torch.cat([seen.patches.sum((2, 3, 4)).unsqueeze(2), seen.boxes[..., :3]], 2)
        importance = torch.full((images, n, 1), 1 / max(n, 1)) if importance else None
        return Encoded(self.norm(numbers.sum(1)), numbers[..., 1:] / 16, importance)

    def predict(self, encoded, seen):
        self.predicted += 1
        return self.out(encoded.pooled)


class Sum(Task):
    def loss(self, prediction, images, target, teacher=None):
        return (prediction.sum(1) - target).square().mean()

    def score(self, prediction, images, target, teacher=None):
        return -(prediction.sum(1) - target).abs()

    def metrics(self):
        return MetricCollection({"error": MeanMetric()})

    def metric_inputs(self, prediction, images, target):
        return prediction.sum(1), target


class SumOrEarlier(Sum):
    def confidence(self, prediction):
        return prediction[:, 0].sigmoid()


@pytest.fixture
def world():
    return make_world()


def make_world(task=None, config=CONFIG, **options):
    torch.manual_seed(0)
    backbone = Mean()
    with torch.no_grad():
        backbone.out.weight.mul_(0.1)
    return GlimpseWorld(backbone, task or Sum(), config, **options)


def scenes(count=5):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 1, 16, 16, generator=generator), torch.arange(count, dtype=torch.float32)


def actions(count=5, glimpses=4):
    return torch.rand(glimpses, count, 3, generator=torch.Generator().manual_seed(2))


def episode(world, given=None, **options):
    images, target = scenes()
    world.reset(images, target, **options)
    given = actions() if given is None else given
    steps = []
    while world.active:
        steps.append(world.step(given[world.taken][world.rows]))
    return steps


def test_rewards_sum_to_the_rise_of_the_score(world):
    images, target = scenes()
    world.reset(images, target)
    start = world.score
    steps = [world.step(one) for one in actions()]
    assert torch.allclose(sum(step.reward for step in steps), steps[-1].score - start, atol=1e-5)
    assert steps[-1].reward.abs().max() > 0


def test_scale_penalty_is_that_of_the_glimpse_itself():
    free, dear = (episode(make_world(reward=RewardOptions(scale=3.0, scale_penalty=c))) for c in (0.0, 0.5))
    for step, without, given in zip(dear, free, actions(), strict=True):
        assert torch.allclose(without.reward - step.reward, 0.5 * given[:, 2], atol=1e-5)


def test_reward_is_scaled_or_the_score_itself_or_normalised_over_the_batch():
    difference, scaled, score, normal = (
        episode(make_world(reward=RewardOptions(kind=kind, scale=scale)))
        for kind, scale in (("difference", 1), ("difference", 4), ("score", 1), ("score_normalized", 1))
    )
    assert torch.allclose(scaled[1].reward, 4 * difference[1].reward)
    assert torch.equal(score[1].reward, score[1].score)
    assert normal[1].reward.mean().abs() < 1e-5
    assert normal[1].reward.std(correction=0) == pytest.approx(1, abs=1e-4)


def test_normalised_reward_of_equal_scores_is_zero():
    images, target = scenes(1)
    world = make_world(reward=RewardOptions(kind="score_normalized"))
    world.reset(images, target)
    assert world.step(actions(1)[0]).reward.tolist() == [0]


def test_episode_ends_after_the_last_glimpse_and_not_before(world):
    steps = episode(world)
    assert [bool(step.done.all()) for step in steps] == [False, False, False, True]
    assert world.active == 0
    assert len(world.observation.lengths) == 0
    with pytest.raises(ValueError, match="no image takes another glimpse"):
        world.step(actions()[0])


def test_observation_has_a_token_for_each_patch_and_none_before_the_first(world):
    images, target = scenes()
    world = make_world(state_parts=("patch", "box", "importance", "latent"))
    first = world.reset(images, target)
    assert first.lengths.tolist() == [0] * 5
    assert first.patches.shape == (0, 1, 4, 4)
    step = world.step(actions()[0])
    assert world.observation is step.observation
    assert step.observation.lengths.tolist() == [4] * 5
    assert step.observation.boxes.shape == (20, 4)
    assert step.observation.boxes.abs().max() <= 1
    assert torch.equal(step.observation.patches, step.glimpse.patches.flatten(0, 1))
    assert step.observation.importance.sum().item() == pytest.approx(5)
    assert step.observation.latents.shape == (20, 3)


def test_observation_tells_only_the_parts_that_are_asked_for():
    images, target = scenes()
    told = make_world(state_parts=("box",)).reset(images, target)
    assert told.patches is told.importance is told.latents is None


def middle_confidence():
    """The threshold that three of five images reach before the last of four glimpses."""
    steps = episode(make_world(SumOrEarlier()))
    return torch.stack([step.prediction[:, 0].sigmoid() for step in steps[:3]]).amax(0).median().item()


def test_images_that_stop_leave_and_the_others_go_on_as_if_nobody_had_stopped():
    threshold = middle_confidence()
    whole = episode(make_world(SumOrEarlier()))
    stopping = episode(make_world(SumOrEarlier(), replace(CONFIG, stop_threshold=threshold)))
    left = [len(step.rows) for step in stopping]
    assert left[0] == 5
    assert 0 < left[-1] < 5, "the threshold is to stop some and not all"
    for short, full in zip(stopping, whole, strict=False):
        assert torch.allclose(short.prediction, full.prediction[short.rows], atol=1e-6)
        assert torch.allclose(short.reward, full.reward[short.rows], atol=1e-5)
        assert torch.equal(short.done, short.prediction[:, 0].sigmoid() >= threshold) or short.done.all()


def test_states_of_images_that_stop_are_told_and_then_left_out():
    world = make_world(
        SumOrEarlier(), replace(CONFIG, stop_threshold=middle_confidence()), state_parts=("patch", "box", "latent")
    )
    images, target = scenes()
    world.reset(images, target)
    given = actions()
    step = world.step(given[0])
    while not step.done.any():
        step = world.step(given[world.taken])
    assert len(step.observation.lengths) == 5
    goes_on = ~step.done
    assert world.rows.tolist() == step.rows[goes_on].tolist()
    assert torch.equal(world.target, target[goes_on])
    for name in ("boxes", "patches", "latents"):
        whole = getattr(step.observation, name).unflatten(0, (5, -1))
        assert torch.equal(getattr(world.observation, name), whole[goes_on].flatten(0, 1))
    assert torch.equal(world.seen.boxes, step.seen.boxes[goes_on])


def test_world_ends_when_every_image_has_stopped():
    images, target = scenes()
    world = make_world(SumOrEarlier(), replace(CONFIG, stop_threshold=0.0))
    world.reset(images, target)
    assert world.step(actions()[0]).done.all()
    assert world.active == 0


def test_nothing_is_encoded_or_predicted_that_nobody_needs(world):
    backbone = world.backbone
    steps = episode(world, scored=False)
    assert (backbone.encoded, backbone.predicted) == (0, 0)
    assert steps[-1].prediction is steps[-1].score is steps[-1].reward is None
    lazy = make_world(state_parts=("box", "latent"))
    episode(lazy, scored=False)
    assert (lazy.backbone.encoded, lazy.backbone.predicted) == (5, 0)
    scored = make_world()
    episode(scored)
    assert (scored.backbone.encoded, scored.backbone.predicted) == (5, 5)


def test_prediction_at_the_end_alone_is_the_same_as_after_every_glimpse():
    images, target = scenes()
    world = make_world()
    world.reset(images, target, scored=False)
    for given in actions()[:3]:
        world.step(given)
    last = world.step(actions()[3], predict=True)
    assert torch.equal(last.prediction, episode(make_world())[-1].prediction)


def test_looking_ahead_takes_no_glimpse(world):
    images, target = scenes()
    world.reset(images, target)
    before, seen = world.observation, world.seen
    ahead = world.look(actions()[0])
    assert (world.taken, world.observation, world.seen) == (0, before, seen)
    taken = world.step(actions()[0])
    assert torch.equal(ahead.reward, taken.reward)


def test_prediction_can_be_asked_for_before_the_first_glimpse(world):
    images, target = scenes()
    world.reset(images, target)
    assert torch.allclose(world.score, -(world.predict().sum(1) - target).abs())


def test_first_glimpse_and_zoom_may_be_given():
    steps = episode(make_world(config=replace(CONFIG, first_glimpse="full", fixed_scale=0.25)))
    assert steps[0].actions.tolist() == [list(FULL_VIEW)] * 5
    assert steps[0].glimpse.view.tolist() == [[0, 0, 16]] * 5
    assert torch.equal(steps[1].actions[:, :2], actions()[1][:, :2])
    assert set(steps[1].actions[:, 2].tolist()) == {0.25}
    assert set(steps[1].glimpse.view[:, 2].tolist()) == {10}


def test_backbone_is_asked_in_evaluation_mode_and_given_back_in_its_own(world):
    world.backbone.train()
    world.backbone.out.eval()
    episode(world)
    assert world.backbone.training
    assert not world.backbone.out.training
    assert world.backbone.norm.num_batches_tracked == 0
    assert not any(parameter.grad_fn for parameter in (world.backbone.out.weight,))


def test_mode_is_given_back_after_an_error(world):
    world.backbone.train()
    world.backbone.predict = None
    with pytest.raises(TypeError):
        world.reset(*scenes())
    assert world.backbone.training
    assert world.backbone.norm.training


def test_score_that_is_no_number_is_told_with_its_images(world):
    images, target = scenes()
    target[[1, 3]] = torch.nan
    with pytest.raises(FloatingPointError, match=r"images \[1, 3\] of the batch after glimpse 0"):
        world.reset(images, target)
    world.reset(*scenes())
    world.target[2] = torch.inf
    with pytest.raises(FloatingPointError, match=r"images \[2\] of the batch after glimpse 1"):
        world.step(actions()[0])


def test_bytes_are_scenes_too(world):
    images, target = scenes()
    stored = (images * 255).round().to(torch.uint8)
    world.reset(stored, target)
    assert torch.equal(world.images, stored.float() / 255)


@pytest.mark.parametrize("channels", [1, 4])
def test_scene_need_not_be_square_nor_grey(channels):
    config = GlimpseConfig(image_size=(16, 24), num_glimpses=1, patch_size=8, grid=1)
    world = make_world(config=config)
    world.reset(torch.rand(3, channels, 16, 24), torch.zeros(3))
    step = world.step(actions(3)[0])
    assert step.done.all()
    assert step.glimpse.patches.shape == (3, 1, channels, 8, 8)


def test_scene_of_another_size_is_refused_with_both_sizes(world):
    with pytest.raises(ValueError, match=r"16, 16.*\[5, 1, 12, 16\]"):
        world.reset(torch.rand(5, 1, 12, 16), torch.zeros(5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda given: given[:3], r"expected actions \[5, 3\].*\[3, 3\]"),
        (lambda given: given + torch.tensor([0, 0, 1.0]), "in row 0"),
        (lambda given: torch.where(torch.arange(5)[:, None] == 2, torch.nan, given), "in row 2"),
    ],
)
def test_actions_that_cannot_be_meant_are_refused(world, change, message):
    world.reset(*scenes())
    with pytest.raises(ValueError, match=message):
        world.step(change(actions()[0]))


def test_stop_threshold_needs_a_task_that_tells_its_confidence():
    with pytest.raises(ValueError, match=r"stop_threshold = 0\.5 .*Sum cannot"):
        make_world(config=replace(CONFIG, stop_threshold=0.5))


def test_state_cannot_tell_what_the_backbone_does_not_have(monkeypatch):
    monkeypatch.setattr(Mean, "latent_dim", 0)
    with pytest.raises(ValueError, match=r"'latent', and Mean tells no latent.*\('box', 'importance'\)"):
        make_world(state_parts=("box", "importance", "latent"))
