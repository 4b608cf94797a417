"""Lines selected from YAML."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_eff import cli
from lightning_eff.lidar import DepthCompletionModule, LidarSaSSelector, LightDepthCompletionNet, PullPushCompletion
from lightning_eff.lidar.settings import Dynamic, LineGameOptions, Spread
from lightning_eff.lidar.values import EstimationOptions

pytestmark = pytest.mark.usefixtures("in_tmp_path")

ROOT = Path(__file__).parents[2]
CONF = str(ROOT / "tests" / "conf" / "lidar.yaml")


def test_a_yaml_selects_measures_and_predicts() -> None:
    done = cli.main(["fit", "--config", CONF])
    made = done.model
    assert isinstance(made, LidarSaSSelector)
    assert isinstance(made.model, PullPushCompletion)
    settings = made.study.settings
    assert settings.game == LineGameOptions("mae", "mean_depth")
    assert settings.estimation == EstimationOptions("regression", 120, 2)
    assert settings.spread == Spread("separation", {"gap": 2})
    assert {k: len(lines) for k, lines in made.result.selected.items()} == {8: 8, 4: 4}
    tested = cli.main(["test", "--config", CONF, "--ckpt_path", "last.ckpt"])
    assert tested.model.result.to_dict() == made.result.to_dict()
    assert float(tested.trainer.callback_metrics["test/rmse/separation/k4"]) > 0
    cli.main(["predict", "--config", CONF, "--ckpt_path", "last.ckpt"])
    # the checkpoint alone knows the network and all settings
    loaded = LidarSaSSelector.load_from_checkpoint("last.ckpt", weights_only=True)
    assert loaded.study.settings == settings
    assert loaded.result.to_dict() == made.result.to_dict()


def test_every_option_can_be_typed(capsys: pytest.CaptureFixture[str]) -> None:
    args = [
        "--model.model=LightDepthCompletionNet",
        "--model.dynamic.source=predictor",
        "--model.spread.elevations=kitti",
        "--model.spread.distance=angle",
        "--model.spread.options={}",
        "--model.game.candidates=[1,2,3]",
        "--model.estimation.estimator={class_path: lightning_eff.shapley.PermutationShapley, init_args: {walks: 4}}",
        "--model.split_batch={class_path: lightning_eff.lidar.LidarKeys, init_args: {rgb: image}}",
        "--model.seed=5",
    ]
    made: Any = cli.EfficiencyCLI(run=False, args=["--config", str(strip(CONF)), *args], save_config_callback=None)
    settings = made.model.study.settings
    assert isinstance(made.model.model, LightDepthCompletionNet)
    assert settings.dynamic == Dynamic("predictor")
    assert settings.game.candidates == [1, 2, 3]
    assert settings.estimation.seed == 5
    assert settings.estimation.estimator.walks == 4
    assert made.model.split_batch.rgb == "image"


def strip(path: str) -> Path:
    """A copy without what `fit` alone understands."""
    config = yaml.safe_load(Path(path).read_text())
    config["trainer"].pop("callbacks")
    copy = Path("config.yaml")
    copy.write_text(yaml.safe_dump(config))
    return copy


def test_a_callback_of_a_yaml_selects_for_a_network_in_training() -> None:
    config = {
        "seed_everything": 0,
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [
                {"class_path": "LineDropout", "init_args": {"p": 0.5}},
                {
                    "class_path": "LidarSaSCallback",
                    "init_args": {"k": [8], "estimation": {"budget": 110}, "dirpath": "lines"},
                },
            ],
        },
        "model": {
            "class_path": "DepthCompletionModule",
            "init_args": {"net": {"class_path": "LightDepthCompletionNet", "init_args": {"width": 4}}},
        },
        "data": {
            "class_path": "SyntheticLidarDataModule",
            "init_args": {"train_size": 2, "val_size": 1, "test_size": 1, "batch_size": 1, "scale": 16},
        },
    }
    Path("train.yaml").write_text(yaml.safe_dump(config))
    done = cli.main(["fit", "--config", "train.yaml"])
    assert isinstance(done.model, DepthCompletionModule)
    assert len(dict(json.loads(Path("lines/lines.json").read_text())["selected"])[8]) == 8
