"""A language model from a YAML: every option, resume, checkpoints, overrides from the shell."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from helpers import REPOSITORY

from lightning_eff import cli
from lightning_eff.data import ByteTextDataModule
from lightning_eff.moe import DecoderConfig, MoEConfig, MoEScalingModule

CONFIG = str(REPOSITORY / "tests" / "conf" / "moe.yaml")
EXAMPLE = REPOSITORY / "examples" / "configs" / "moe.yaml"


@pytest.fixture(autouse=True)
def text(in_tmp_path: Path) -> None:
    Path("text.txt").write_bytes((REPOSITORY / "LICENSE").read_bytes())


def test_yaml_trains_and_goes_on_from_its_checkpoint() -> None:
    straight = cli.main(["fit", "--config", CONFIG])
    assert straight.trainer.global_step == 12
    assert straight.model.tokens_seen == 12 * 8 * 32
    assert straight.trainer.callback_metrics["val/bits_per_byte"] > 0
    resumed = cli.main(["fit", "--config", CONFIG, "--ckpt_path", "step=6.ckpt"])
    for name, weights in straight.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], weights), name


def test_options_of_the_yaml_arrive() -> None:
    made = cli.main(["fit", "--config", CONFIG, "--trainer.max_steps=1"])
    assert isinstance(made.datamodule, ByteTextDataModule)
    decoder = made.model.decoder
    expected = MoEConfig(expansion_rate=4, granularity=2)
    assert decoder.moe == MoEConfig.of(expected, balance={"method": "bias", "bias_rate": 0.01})
    assert decoder == DecoderConfig(d_model=16, n_layers=2, n_heads=2, max_seq_len=32, moe=decoder.moe)
    assert made.trainer.optimizers[0].defaults["lr"] == 0.01


def test_deep_options_are_overridden_from_the_shell() -> None:
    changes = ["moe.granularity=4", "moe.balance.method=aux", "moe.routing.capacity_factor=1.5", "n_heads=4"]
    args = [f"--model.decoder.{change}" for change in [*changes, "init.scale=0.2", "positions=rope"]]
    decoder = cli.main(["fit", "--config", CONFIG, "--trainer.max_steps=1", *args]).model.decoder
    assert (decoder.moe.granularity, decoder.moe.expansion_rate) == (4, 4)
    assert (decoder.moe.balance.method, decoder.moe.balance.bias_rate) == ("aux", 0.01)
    assert (decoder.moe.routing.capacity_factor, decoder.init.scale) == (1.5, 0.2)
    assert (decoder.n_heads, decoder.positions) == (4, "rope")


def test_dense_twin_is_one_change_away() -> None:
    for change in ("--config=dense.yaml", '--model.decoder={"moe": null}'):
        Path("dense.yaml").write_text("model: {init_args: {decoder: {moe: null}}}")
        decoder = cli.main(["fit", "--config", CONFIG, "--trainer.max_steps=1", change]).model.decoder
        assert (decoder.moe, decoder.d_model, decoder.max_seq_len) == (None, 16, 32)


def test_options_become_null_from_the_shell_and_others_stay() -> None:
    change = '--model.decoder={"d_ff": null, "moe": {"top_k": null, "routing": {"capacity_factor": null}}}'
    given = ["--model.decoder.d_ff=32", "--model.decoder.moe.top_k=4", "--model.decoder.moe.routing.capacity_factor=2"]
    decoder = cli.main(["fit", "--config", CONFIG, "--trainer.max_steps=1", *given, change]).model.decoder
    expected = MoEConfig(expansion_rate=4, granularity=2)
    assert decoder.moe == MoEConfig.of(expected, balance={"method": "bias", "bias_rate": 0.01})
    assert decoder == DecoderConfig(d_model=16, n_layers=2, n_heads=2, max_seq_len=32, moe=decoder.moe)


def test_checkpoint_of_a_yaml_loads_in_python_with_its_optimizer() -> None:
    trained = cli.main(["fit", "--config", CONFIG])
    loaded = MoEScalingModule.load_from_checkpoint("last.ckpt", weights_only=True)
    assert loaded.decoder == trained.model.decoder
    assert loaded.tokens_seen == trained.model.tokens_seen
    assert loaded.optimizer([torch.nn.Parameter(torch.ones(1))]).defaults["lr"] == 0.01
    validated = cli.main(["validate", "--config", CONFIG, "--ckpt_path", "last.ckpt"])
    assert validated.trainer.callback_metrics["val/loss"] == trained.trainer.callback_metrics["val/loss"]


def test_printed_config_runs_again(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["fit", "--config", CONFIG, "--print_config"])
    assert ended.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["model"]["init_args"]["decoder"]["moe"]["balance"]["method"] == "bias"
    Path("again.yaml").write_text(yaml.safe_dump(config))
    assert cli.main(["fit", "--config", "again.yaml", "--trainer.max_steps=1"]).model.decoder.moe.granularity == 2


def test_default_optimizer_is_printed_as_one_that_can_be_changed(capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(["fit", "--model=MoEScalingModule", "--data=ByteTextDataModule", "--data.path=x", "--print_config"])
    optimizer = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["optimizer"]
    assert optimizer["class_path"] == "torch.optim.AdamW"
    assert (optimizer["init_args"]["lr"], optimizer["init_args"]["weight_decay"]) == (2e-4, 0.1)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("moe.granularity=3", "granularity must divide d_ff = 64, got 3"),
        ("moe.granularit=3", "granularit"),
        ("positions=sinus", "positions"),
        ("n_heads=3", "n_heads must divide d_model = 16, got 3"),
    ],
)
def test_wrong_options_are_named(capsys, change: str, told: str) -> None:
    with pytest.raises((SystemExit, ValueError)) as ended:
        cli.main(["fit", "--config", CONFIG, f"--model.decoder.{change}"])
    assert told in str(ended.value) + capsys.readouterr().err
