"""The command line: any model, any data, known classes by short name."""

import sysconfig
from pathlib import Path

import pytest
import torch
import yaml
from helpers import run_cli, run_python
from torchvision.models import ResNet

from lightning_eff import cli
from lightning_eff.data import DigitsDataModule
from lightning_eff.models import ImageClassifier, LeNet, SmallCNN

pytestmark = pytest.mark.usefixtures("in_tmp_path")

DIGITS = str(Path(__file__).parent / "conf" / "digits.yaml")
QUICK = ["--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1", "--trainer.max_epochs=1"]


def checkpoint(trained):
    return trained.trainer.checkpoint_callback.best_model_path


def printed_config(capsys, *args):
    with pytest.raises(SystemExit) as ended:
        cli.main([*args, "--print_config"])
    assert ended.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_yaml_trains_from_the_shell(tmp_path):
    output = run_cli(
        "fit", "--config", DIGITS, *QUICK, "--trainer.default_root_dir", str(tmp_path), cwd=tmp_path
    ).stdout
    assert "Seed set to 1" in output
    assert len(list(tmp_path.rglob("*.ckpt"))) == 1
    assert len(list(tmp_path.rglob("config.yaml"))) == 1


def test_checkpoint_of_a_yaml_is_validated_tested_and_used_by_the_same_yaml():
    path = checkpoint(cli.main(["fit", "--config", DIGITS]))
    for task, stage in (("validate", "val"), ("test", "test")):
        done = cli.main([task, "--config", DIGITS, "--ckpt_path", path])
        assert done.trainer.callback_metrics[f"{stage}/accuracy"] > 0.5  # chance is 0.1
    cli.main(["predict", "--config", DIGITS, "--ckpt_path", path])


def test_values_typed_in_the_shell_override_the_yaml():
    trained = cli.main(["fit", "--config", DIGITS, *QUICK, "--model.net.width=5", "--data.batch_size=16"])
    assert trained.model.net.layers.conv1.out_channels == 5
    assert trained.datamodule.batch_size == 16


def test_classes_are_known_by_short_name(capsys):
    args = ["fit", "--model=ImageClassifier", "--model.net=LeNet", "--data=DigitsDataModule", "--data.batch_size=8"]
    config = printed_config(capsys, *args)
    assert config["model"]["class_path"].endswith(".ImageClassifier")
    assert config["model"]["init_args"]["net"]["class_path"].endswith(".LeNet")
    assert config["data"]["init_args"]["batch_size"] == 8


def test_printed_config_can_be_run_again(capsys):
    config = printed_config(capsys, "fit", "--config", DIGITS, *QUICK)
    Path("again.yaml").write_text(yaml.safe_dump(config))
    trained = cli.main(["fit", "--config", "again.yaml"])
    assert isinstance(trained.model, ImageClassifier)
    assert isinstance(trained.model.net, SmallCNN)
    assert isinstance(trained.datamodule, DigitsDataModule)


def test_modules_of_the_current_folder_are_known_by_class_path(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    def __init__(self, width: int = 4):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(64, width), nn.Linear(width, 10))\n"
    )
    args = ["fit", "--config", DIGITS, "--model.net=mine.Net", "--model.net.width=7", "--print_config"]
    # the installed command: python -m would look in the current folder anyway
    printed = run_python(Path(sysconfig.get_path("scripts"), "lightning-eff"), *args, cwd=tmp_path).stdout
    assert "class_path: mine.Net" in printed
    assert "width: 7" in printed


def test_function_that_builds_a_network_can_stand_where_a_class_is_expected():
    net = "{class_path: torchvision.models.resnet18, init_args: {num_classes: 10}}"
    data = ["--data.image_size=32", "--data.channels=3", "--data.train_size=8", "--data.batch_size=4"]
    args = ["--model=ImageClassifier", f"--model.net={net}", "--data=FashionMNISTDataModule", *data]
    made = cli.EfficiencyCLI(run=False, args=args, save_config_callback=None)
    assert isinstance(made.model.net, ResNet)
    assert made.model.net.fc.out_features == 10


def test_network_of_a_yaml_is_restored_by_the_checkpoint_alone():
    trained = cli.main(["fit", "--config", DIGITS, *QUICK, "--model.net.width=5"])
    loaded = ImageClassifier.load_from_checkpoint(checkpoint(trained), weights_only=True)
    assert loaded.net.layers.conv1.out_channels == 5
    left, right = loaded.state_dict(), trained.model.state_dict()
    assert all(torch.equal(left[name], right[name]) for name in right)


def test_network_of_a_yaml_can_still_be_replaced_on_loading():
    trained = cli.main(["fit", "--config", DIGITS, *QUICK])
    net = SmallCNN(width=8)
    loaded = ImageClassifier.load_from_checkpoint(checkpoint(trained), net=net, weights_only=True)
    assert loaded.net is net


def test_model_that_brings_its_own_data_needs_none():
    args = ["--model=ImageClassifier", "--model.net=LeNet"]
    made = cli.EfficiencyCLI(run=False, args=args, save_config_callback=None)
    assert isinstance(made.model.net, LeNet)
    assert made.datamodule is None


def test_wrong_option_is_refused_by_name(capsys):
    with pytest.raises(SystemExit):
        cli.main(["fit", "--config", DIGITS, "--model.net.widht=5"])
    assert "widht" in capsys.readouterr().err


@pytest.mark.parametrize("args", [["--help"], ["fit", "--help"]])
def test_help_names_the_program(capsys, args):
    with pytest.raises(SystemExit) as ended:
        cli.main(args)
    assert ended.value.code == 0
    assert "usage: lightning-eff" in capsys.readouterr().out


def test_console_command_ends_with_success(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lightning-eff", "fit", "--config", DIGITS, *QUICK, "--model.net.width=5"])
    assert cli.command() is None  # what it returns is the exit status
