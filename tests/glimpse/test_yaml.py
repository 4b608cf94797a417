"""Active exploration from a YAML: every option, checkpoints, overrides from the shell."""

from pathlib import Path

import pytest
import torch
import yaml
from helpers import REPOSITORY, run_cli

from lightning_eff import cli
from lightning_eff.data import CanvasDataModule
from lightning_eff.glimpse import (
    AdaGlimpseModule,
    AgentConfig,
    CanvasBackbone,
    ElasticViT,
    GlimpseConfig,
    ImageDecoder,
    ReconstructionTask,
    ReplayOptions,
    RewardOptions,
    TrainingPlan,
)

pytestmark = pytest.mark.usefixtures("in_tmp_path")

CONFIG = str(REPOSITORY / "tests" / "conf" / "glimpse.yaml")
EXAMPLE = str(REPOSITORY / "examples" / "configs" / "glimpse.yaml")
SHORT = ["--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1", "--trainer.max_epochs=1"]


def built(*args):
    """Model and data of a command line, without a run."""
    made = cli.EfficiencyCLI(run=False, args=list(args), save_config_callback=None)
    return made.model, made.datamodule


def test_yaml_trains_and_its_checkpoint_alone_gives_the_module_back():
    done = cli.main(["fit", "--config", CONFIG])
    loaded = AdaGlimpseModule.load_from_checkpoint("last.ckpt", weights_only=True)
    state = done.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    for name in ("glimpse", "agent", "plan", "reward", "baselines"):
        assert getattr(loaded, name) == getattr(done.model, name)
    images = torch.rand(3, 1, 32, 32)
    assert torch.equal(loaded.explore(images).actions, done.model.explore(images).actions)
    other = CanvasBackbone(num_classes=10, widths=(4, 4, 8, 8))
    assert AdaGlimpseModule.load_from_checkpoint("last.ckpt", weights_only=True, backbone=other).backbone is other
    for stage in ("validate", "test", "predict"):
        again = cli.main([stage, "--config", CONFIG, "--ckpt_path", "last.ckpt"])
    assert torch.equal(again.model.explore(images).actions, done.model.explore(images).actions)
    resumed = cli.main(["fit", "--config", CONFIG, "--ckpt_path", "last.ckpt", "--trainer.max_epochs=5"])
    assert resumed.trainer.current_epoch == 5


def test_options_of_the_yaml_arrive():
    model, data = built("--config", CONFIG)
    assert model.glimpse == GlimpseConfig(32, num_glimpses=2, patch_size=4, stop_threshold=0.9)
    replay = ReplayOptions(buffer_size=256, batch_size=32, random_steps=4)
    parts = {"state_parts": ("patch", "box"), "ent_coef": "auto_0.1", "replay": replay}
    assert model.agent == AgentConfig(hidden=16, heads=4, lr=1e-3, **parts)
    assert model.plan == TrainingPlan(pretrain_epochs=1, rl_only_epochs=1, alternate_unit="batch")
    assert model.configure_optimizers()[-1].defaults["lr"] == 3e-3
    assert isinstance(data, CanvasDataModule)
    assert data.canvas == (32, 32)


def test_every_option_can_be_changed_from_the_shell():
    changes = [
        "glimpse.image_size=[32, 48]",
        "glimpse.stop_threshold=0.5",
        "glimpse.fixed_scale=0.5",
        "glimpse.first_glimpse=full",
        "agent.state_parts=[box]",
        "agent.ent_coef=0.2",
        "agent.update=sb3",
        "agent.replay.latent_dtype=float16",
        "agent.replay.resume_buffer=false",
        "plan.regime=constant",
        "plan.learning_rates=constant",
        "reward.kind=score",
        "reward.scale_penalty=0.1",
        "baselines=[fixed_grid]",
        "every_glimpse=false",
        "split_batch={class_path: lightning_eff.BatchKeys, init_args: {inputs: image}}",
        "teacher={class_path: torch.nn.Flatten}",
    ]
    model, _ = built("--config", CONFIG, *[f"--model.{change}" for change in changes])
    assert (model.glimpse.image_size, model.glimpse.stop_threshold, model.glimpse.fixed_scale) == ((32, 48), 0.5, 0.5)
    assert model.glimpse.first_glimpse == "full"
    assert (model.agent.state_parts, model.agent.ent_coef, model.agent.update) == (("box",), 0.2, "sb3")
    assert (model.agent.replay.latent_dtype, model.agent.replay.resume_buffer) == ("float16", False)
    assert model.agent.replay.batch_size == 32
    assert (model.plan.regime, model.plan.learning_rates, model.plan.pretrain_epochs) == ("constant", "constant", 1)
    assert model.reward == RewardOptions("score", scale_penalty=0.1)
    assert (model.baselines, model.every_glimpse) == (("fixed_grid",), False)
    assert model._split.inputs == "image"
    assert isinstance(model.teacher, torch.nn.Flatten)


def test_early_stopping_is_turned_off_by_null():
    Path("never.yaml").write_text("model: {init_args: {glimpse: {stop_threshold: null}}}")
    for change in (("--config", "never.yaml"), ("--model.glimpse", '{"stop_threshold": null}')):
        model, _ = built("--config", CONFIG, *change)
        assert model.glimpse == GlimpseConfig(32, num_glimpses=2, patch_size=4)


def test_other_backbones_and_tasks_are_known_by_their_short_names():
    decoder = "{class_path: ImageDecoder, init_args: {size: {dim: 16, depth: 1, heads: 2}}}"
    model, _ = built(
        "--model=AdaGlimpseModule",
        "--model.backbone=ElasticViT",
        f"--model.backbone.head={decoder}",
        "--model.backbone.image_size=32",
        "--model.backbone.size={dim: 16, depth: 1, heads: 2}",
        "--model.task=ReconstructionTask",
        "--model.task.mean=0.5",
        "--model.glimpse.image_size=32",
        "--model.glimpse.num_glimpses=2",
    )
    assert isinstance(model.backbone, ElasticViT)
    assert isinstance(model.backbone.head, ImageDecoder)
    assert isinstance(model.task, ReconstructionTask)
    assert model.agent == AgentConfig()


def test_printed_configuration_can_be_run_again(capsys):
    with pytest.raises(SystemExit):
        cli.main(["fit", "--config", CONFIG, *SHORT, "--print_config"])
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["model"]["init_args"]["plan"]["loss_at"] == "last"
    Path("again.yaml").write_text(printed)
    assert built("--config", CONFIG)[0].agent == cli.main(["fit", "--config", "again.yaml"]).model.agent


def test_default_optimizer_survives_printing(capsys):
    with pytest.raises(SystemExit):
        cli.main(["fit", "--model=AdaGlimpseModule", "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)
    told = config["model"]["init_args"]["backbone_optimizer"]
    model, _ = built("--config", CONFIG, f"--model.backbone_optimizer={told}")
    assert model.configure_optimizers()[-1].defaults["lr"] == 1e-5


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("glimpse.grid=9", "patch_size * grid = 36 px"),
        ("agent.hidden=15", "hidden must be a multiple of heads"),
        ("plan.regime=sometimes", "sometimes"),
        ("agent.replay.buffer_sise=3", "buffer_sise"),
    ],
)
def test_options_that_cannot_be_meant_are_refused_by_name(capsys, change, told):
    with pytest.raises((SystemExit, ValueError)) as refused:
        built("--config", CONFIG, f"--model.{change}")
    assert told in capsys.readouterr().err + str(refused.value)


@pytest.mark.slow
def test_yaml_trains_from_the_shell(tmp_path):
    run_cli("fit", "--config", CONFIG, cwd=tmp_path)
    assert (tmp_path / "last.ckpt").is_file()
