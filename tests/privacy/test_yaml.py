"""Private training from YAML, from the shell's flags and by name."""

from pathlib import Path

import lightning as L
import pytest
import torch
import yaml

from lightning_eff import cli
from lightning_eff.data import DigitsDataModule
from lightning_eff.models import ImageClassifier
from lightning_eff.privacy import (
    DPGradientDropDDPStrategy,
    DPGradientDropStrategy,
    MagnitudeSelector,
    PrivateTrainingOptions,
    RateSchedule,
    TanhCNN,
    TanhMLP,
)
from lightning_eff.privacy.training import CHECKPOINT_KEY

pytestmark = pytest.mark.usefixtures("in_tmp_path")

TESTS = Path(__file__).parents[1]
PRIVATE = str(TESTS / "conf/private.yaml")
EXAMPLE = str(TESTS.parent / "examples/configs/private_training.yaml")


def test_every_option_is_reached_from_yaml_and_the_checkpoint_tells_epsilon():
    trained = cli.main(["fit", "--config", PRIVATE])
    strategy = trained.trainer.strategy
    assert isinstance(strategy._plan.selector, MagnitudeSelector)
    assert strategy._plan.drop_rate == RateSchedule(final=0.9)
    assert strategy.options == PrivateTrainingOptions(accountant="rdp", isolation_check="warn")
    assert strategy.ledger.steps == trained.trainer.global_step == 10
    assert strategy.epsilon == pytest.approx(3.0, rel=2e-3)
    assert float((trained.model.net.layers[1].weight == 0).float().mean()) == pytest.approx(0.5, abs=0.01)
    path = trained.trainer.checkpoint_callback.best_model_path
    assert torch.load(path, weights_only=True)[CHECKPOINT_KEY]["epsilon"] == strategy.epsilon
    tested = cli.main(["test", "--config", PRIVATE, "--ckpt_path", path])
    assert tested.trainer.callback_metrics["test/accuracy"] > 0.2  # chance is 0.1


def test_flags_in_the_shell_override_the_yaml():
    trained = cli.main(
        [
            "fit",
            "--config",
            EXAMPLE,
            "--trainer.max_steps=3",
            "--trainer.limit_val_batches=1",
            "--trainer.strategy.drop_rate=0.9",
            "--trainer.strategy.granularity=element",
            "--trainer.strategy.options.accountant=rdp",
        ]
    )
    strategy = trained.trainer.strategy
    assert strategy.ledger.steps == 3
    assert trained.trainer.callback_metrics["privacy/drop_rate"] == pytest.approx(0.9, abs=1e-3)  # of whole units


@pytest.mark.slow
def test_the_example_learns_within_its_budget():
    trained = cli.main(["fit", "--config", EXAMPLE, "--trainer.enable_progress_bar=false"])
    assert trained.trainer.callback_metrics["privacy/epsilon"] == pytest.approx(3.0, rel=2e-3)
    assert trained.trainer.callback_metrics["val/accuracy"] > 0.8


def test_a_printed_config_can_be_read_again(capsys):
    with pytest.raises(SystemExit):
        cli.main(["fit", "--config", EXAMPLE, "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    arguments = printed["trainer"]["strategy"]["init_args"]
    assert arguments["target_epsilon"] == 3.0
    assert arguments["clipping"] == "flat"
    Path("again.yaml").write_text(yaml.safe_dump(printed))
    again = cli.main(["fit", "--config", "again.yaml", "--trainer.max_steps=1", "--trainer.limit_val_batches=0"])
    assert again.trainer.strategy.ledger.steps == 1


@pytest.mark.parametrize(
    ("name", "kind", "devices"),
    [
        ("dp_gradient_drop", DPGradientDropStrategy, 1),
        ("dp_gradient_drop_ddp", DPGradientDropDDPStrategy, 2),
        ("dp_gradient_drop_ddp_spawn", DPGradientDropDDPStrategy, 2),
    ],
)
def test_strategies_are_known_by_name_and_say_what_a_fit_wants(name, kind, devices):
    trainer = L.Trainer(max_epochs=1, strategy=name, accelerator="cpu", devices=devices, logger=False)
    assert type(trainer.strategy) is kind
    assert trainer.num_devices == devices
    if devices == 1:
        with pytest.raises(ValueError, match="exactly one of noise_multiplier and target_epsilon"):
            trainer.fit(ImageClassifier(TanhMLP(64, [])), DigitsDataModule())


def test_networks_have_the_sizes_their_names_stand_for():
    def count(net):
        return sum(parameter.numel() for parameter in net.parameters())

    assert count(TanhCNN()) == 26_010
    assert count(TanhMLP()) == 669_706
    assert TanhCNN(3, 5, 32)(torch.zeros(2, 3, 32, 32)).shape == (2, 5)
    assert TanhMLP(12, (), 4)(torch.zeros(2, 3, 4)).shape == (2, 4)


@pytest.mark.parametrize("make", [lambda: TanhCNN(image_size=8), lambda: TanhCNN(0), lambda: TanhMLP(hidden=[0])])
def test_networks_of_no_size_are_refused(make):
    with pytest.raises(ValueError, match=">= 1"):
        make()
