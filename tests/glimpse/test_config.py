"""Options of exploration: ranges, defaults of the paper, YAML."""

import dataclasses

import pytest
from jsonargparse import ArgumentParser

from lightning_eff.glimpse.config import AgentConfig, GlimpseConfig, ReplayOptions, RewardOptions, TrainingPlan, ViTSize


def test_defaults_are_those_of_the_papers_table():
    agent, plan, camera = AgentConfig(), TrainingPlan(), GlimpseConfig(224)
    assert (agent.hidden, agent.heads, agent.lr, agent.weight_decay) == (256, 8, 5e-4, 1e-2)
    assert (agent.gamma, agent.tau, agent.target_entropy) == (0.99, 0.005, -3)
    assert (agent.replay.buffer_size, agent.replay.batch_size, agent.replay.random_steps) == (10_000, 256, 10_000)
    assert (plan.rl_only_epochs, plan.regime, plan.loss_at) == (10, "alternating", "last")
    assert (camera.patch_size, camera.grid, camera.max_scale) == (16, 2, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "image_size must be a whole number >= 1, got 0"),
        ({"image_size": (96, 0)}, "image_size must be a whole number >= 1, got 0"),
        ({"image_size": (96, 96, 3)}, r"image_size must be a side or \(height, width\), got \(96, 96, 3\)"),
        ({"num_glimpses": 0}, "num_glimpses must be a whole number >= 1, got 0"),
        ({"patch_size": 1.5}, "patch_size must be a whole number >= 1, got 1.5"),
        ({"grid": True}, "grid must be a whole number >= 1, got True"),
        ({"max_scale": 0.0}, r"max_scale must lie in \(0, 1\], got 0.0"),
        ({"max_scale": 1.1}, r"max_scale must lie in \(0, 1\], got 1.1"),
        ({"fixed_scale": -0.1}, r"fixed_scale must lie in \[0, 1\], got -0.1"),
        ({"stop_threshold": 85}, r"stop_threshold must lie in \[0, 1\], got 85"),
        ({"first_glimpse": "random"}, "first_glimpse must be one of policy, full, got 'random'"),
    ],
)
def test_a_camera_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GlimpseConfig(**{"image_size": 96, **options})


def test_a_glimpse_larger_than_the_largest_view_is_refused_with_what_would_fit():
    with pytest.raises(ValueError, match=r"40 px is more .* = 30 px: .* use patch_size <= 15 or grid <= 1"):
        GlimpseConfig((30, 80), patch_size=20, grid=2)
    with pytest.raises(ValueError, match=r"64 px is more .* = 48 px: .* use patch_size <= 24 or grid <= 1"):
        GlimpseConfig(96, patch_size=32, max_scale=0.5)


def test_a_glimpse_as_large_as_the_largest_view_is_legal():
    camera = GlimpseConfig(32, num_glimpses=1, grid=1, patch_size=32)
    assert (camera.camera_size, camera.max_view, camera.patches_per_glimpse, camera.max_patches) == (32, 32, 1, 1)


def test_facts_of_a_camera():
    camera = GlimpseConfig((100, 200), num_glimpses=5, patch_size=8, grid=3, max_scale=0.5)
    assert (camera.scene, camera.camera_size, camera.max_view) == ((100, 200), 24, 50)
    assert (camera.patches_per_glimpse, camera.max_patches) == (9, 45)
    assert camera.pixel_percent(5) == pytest.approx(100 * 5 * 24 * 24 / 20_000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": 60}, "hidden must be a multiple of heads = 8, got 60"),
        ({"hidden": 64, "state_parts": ("patch", "box", "latent")}, "multiple of the 3 state_parts, got 128"),
        ({"heads": 0}, "heads must be a whole number >= 1, got 0"),
        ({"state_parts": ()}, "state_parts must name one part or more, none twice"),
        ({"state_parts": ("box", "box")}, "state_parts must name one part or more, none twice"),
        ({"state_parts": ("box", "class")}, "state_parts must be one of patch, box, importance, latent, got 'class'"),
        ({"lr": 0.0}, "lr must be > 0, got 0.0"),
        ({"lr": float("nan")}, "lr must be > 0, got nan"),
        ({"tau": 1.5}, r"tau must lie in \(0, 1\], got 1.5"),
        ({"gamma": -0.1}, r"gamma must lie in \[0, 1\], got -0.1"),
        ({"weight_decay": -1.0}, "weight_decay must be >= 0, got -1.0"),
        ({"target_entropy": float("inf")}, "target_entropy must be a number"),
        ({"ent_coef": 0.0}, "ent_coef must be > 0, 'auto' or 'auto_<start>', got 0.0"),
        ({"ent_coef": "auto_"}, "ent_coef must be .* got 'auto_'"),
        ({"ent_coef": "autox"}, "ent_coef must be .* got 'autox'"),
        ({"update": "torchrl"}, "update must be one of fused, sb3, got 'torchrl'"),
        ({"gradient_clip": 0.0}, "gradient_clip must be > 0, got 0.0"),
    ],
)
def test_an_agent_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AgentConfig(**options)


@pytest.mark.parametrize("start", ["auto", "auto_0.1", 0.2])
def test_a_temperature_may_be_a_number_or_be_learnt_from_one(start):
    assert AgentConfig(ent_coef=start).ent_coef == start


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"buffer_size": 100}, "buffer_size must be >= batch_size = 256, got 100"),
        ({"batch_size": 0}, "batch_size must be a whole number >= 1, got 0"),
        ({"updates_per_step": 0}, "updates_per_step must be a whole number >= 1, got 0"),
        ({"random_steps": -1}, "random_steps must be a whole number >= 0, got -1"),
        ({"latent_dtype": "bfloat16"}, "latent_dtype must be one of float32, float16, got 'bfloat16'"),
    ],
)
def test_a_replay_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ReplayOptions(**options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RewardOptions(kind="rise"), "kind must be one of difference, score, score_normalized, got 'rise'"),
        (lambda: RewardOptions(scale=0.0), "scale must be > 0, got 0.0"),
        (lambda: RewardOptions(scale_penalty=-1.0), "scale_penalty must be >= 0, got -1.0"),
        (lambda: TrainingPlan(pretrain_epochs=-1), "pretrain_epochs must be a whole number >= 0, got -1"),
        (lambda: TrainingPlan(rl_only_epochs=-1), "rl_only_epochs must be a whole number >= 0, got -1"),
        (lambda: TrainingPlan(alternate_every=0), "alternate_every must be a whole number >= 1, got 0"),
        (lambda: TrainingPlan(regime="both"), "regime must be one of alternating, .*, got 'both'"),
        (lambda: TrainingPlan(alternate_unit="step"), "alternate_unit must be one of epoch, batch, got 'step'"),
        (lambda: TrainingPlan(loss_at="first"), "loss_at must be one of last, all, random, got 'first'"),
        (lambda: TrainingPlan(warmup_fraction=1.0), r"warmup_fraction must lie in \[0, 1\), got 1.0"),
        (lambda: ViTSize(60, 2, 2), "dim must be a multiple of 8 and of heads = 2, got 60"),
        (lambda: ViTSize(64, 2, 3), "dim must be a multiple of 8 and of heads = 3, got 64"),
        (lambda: ViTSize(64, 0, 2), "depth must be a whole number >= 1, got 0"),
    ],
)
def test_other_options_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "options", [GlimpseConfig(96), AgentConfig(), ReplayOptions(), RewardOptions(), TrainingPlan()]
)
def test_options_cannot_be_changed(options):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(options, dataclasses.fields(options)[0].name, 1)


# newer versions of jsonargparse have another name for it, older ones this one alone
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_yaml_reaches_every_option():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--glimpse", type=GlimpseConfig)
    parser.add_argument("--agent", type=AgentConfig)
    parser.add_argument("--reward", type=RewardOptions)
    parser.add_argument("--plan", type=TrainingPlan)
    text = """
glimpse: {image_size: [96, 128], num_glimpses: 3, patch_size: 8, fixed_scale: null, stop_threshold: 0.9}
agent: {hidden: 64, state_parts: [patch, box], ent_coef: auto_0.1, gradient_clip: 1.0, replay: {batch_size: 128}}
reward: {kind: score, scale: 20}
plan: {regime: constant, loss_at: all}
"""
    built = parser.instantiate_classes(parser.parse_string(text))
    assert built.glimpse == GlimpseConfig((96, 128), 3, 8, stop_threshold=0.9)
    expected = {"state_parts": ("patch", "box"), "ent_coef": "auto_0.1", "gradient_clip": 1.0}
    assert built.agent == AgentConfig(hidden=64, replay=ReplayOptions(batch_size=128), **expected)
    assert built.reward == RewardOptions("score", 20)
    assert parser.parse_args(["--glimpse.image_size=96", "--agent.ent_coef=0.2"]).agent.ent_coef == 0.2
    assert built.plan == TrainingPlan(regime="constant", loss_at="all")
