import math

import numpy as np
import pytest
import torch
import yaml
from helpers import REPOSITORY, run_cli

from lightning_eff.cli import main
from lightning_eff.surgery.state import untouched_generators
from lightning_eff.synthesis import DPNTKGenerator, MLPGenerator

CONF = REPOSITORY / "tests/conf/synthesis.yaml"
PREFIX = "--model.init_args."


@pytest.fixture
def fit(tmp_path, monkeypatch):
    """Runs ``lightning-eff fit`` in this process and in an empty folder, and returns the model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lightning-eff"])

    def run(*args):
        with untouched_generators():
            return main(["fit", *args]).model

    return run


def test_a_run_from_yaml_is_saved_loaded_and_resumed_without_a_second_release(tmp_path, fit, capsys):
    run_cli("fit", "--config", str(CONF), cwd=tmp_path)  # the command itself
    assert (tmp_path / "figures/signal_to_noise.png").exists()
    assert (tmp_path / "figures/samples-00010.png").exists()
    module = DPNTKGenerator.load_from_checkpoint(tmp_path / "last.ckpt")
    assert module.release_options.max_epsilon == 12.0
    assert module.feature_options.seed == 3
    assert module.matching.lr_period == 4
    assert module.generate(10, seed=0).x.shape == (10, 1, 8, 8)

    folder = tmp_path / "made"
    writer = f"{{class_path: SyntheticDataWriter, init_args: {{n: 30, seed: 1, dirpath: {folder}}}}}"
    run_cli(
        "predict", "--config", str(CONF), "--ckpt_path", "last.ckpt", f"--trainer.callbacks+={writer}", cwd=tmp_path
    )
    with np.load(folder / "synthetic.npz") as file:
        assert np.array_equal(file["data"], module.generate(30, seed=1).x.numpy())
    assert (folder / "synthetic.png").exists()
    assert "epsilon = 10 at delta = 1e-05" in (folder / "privacy_report.md").read_text()

    again = fit("--config", str(CONF), "--ckpt_path", "last.ckpt", "--trainer.max_epochs", "3")
    assert "Reading private records" not in capsys.readouterr().out
    assert again.steps_trained == 15
    assert torch.equal(again.embedding.flatten(), module.embedding.flatten())
    assert again.ledger.steps == 1


def test_infinity_a_generator_and_a_table_are_told_in_yaml(tmp_path, fit):
    sexes, incomes = ("Male", "Female"), ("<=50K", ">50K", ">50K")
    rows = ["age,sex,income", *(f"{17 + k % 70},{sexes[k % 2]},{incomes[k % 3]}" for k in range(200))]
    (tmp_path / "rows.csv").write_text("\n".join(rows))
    schema = {
        "label": "income",
        "label_categories": ["<=50K", ">50K"],
        "columns": [
            {"name": "age", "low": 17, "high": 90, "bins": 8},
            {"name": "sex", "categories": ["Male", "Female"]},
        ],
    }
    config = {
        "trainer": yaml.safe_load(CONF.read_text())["trainer"],
        "model": {
            "class_path": "lightning_eff.synthesis.DPNTKGenerator",
            "init_args": {
                "epsilon": 1.0, "delta": 1e-5, "feature_widths": [8], "samples_per_class": 4, "steps_per_epoch": 3,
                "schema": schema, "latent_dim": 5,
            },
        },
        "data": {"class_path": "lightning_eff.synthesis.TabularDataModule", "init_args": {"path": "rows.csv"}},
    }  # fmt: skip
    text = yaml.safe_dump(config).replace("epsilon: 1.0", "epsilon: .inf")
    assert ".inf" in text
    (tmp_path / "table.yaml").write_text(text)
    with pytest.warns(UserWarning, match="NOT PRIVATE"):
        fit("--config", "table.yaml")
    module = DPNTKGenerator.load_from_checkpoint(tmp_path / "last.ckpt")
    assert math.isinf(module.epsilon)
    assert not module.privacy_report().private
    assert set(module.generate(5, seed=0).rows) == {"age", "sex", "income"}


def test_a_checkpoint_holds_the_schema_itself_and_not_the_name_of_its_file(tmp_path, fit, monkeypatch):
    schema = {"columns": [{"name": "age", "low": 17, "high": 90, "bins": 8}]}
    (tmp_path / "schema.yaml").write_text(yaml.safe_dump(schema))
    (tmp_path / "rows.csv").write_text("\n".join(["age", *(str(17 + k % 70) for k in range(200))]))
    model = {"epsilon": 5.0, "schema": "schema.yaml", "feature_widths": [8], "steps_per_epoch": 3}
    config = {
        "seed_everything": 0,
        "trainer": yaml.safe_load(CONF.read_text())["trainer"],
        "model": {"class_path": "lightning_eff.synthesis.DPNTKGenerator", "init_args": model},
        "data": {"class_path": "lightning_eff.synthesis.TabularDataModule", "init_args": {"path": "rows.csv"}},
    }
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(config))
    fit("--config", "table.yaml")
    (tmp_path / "schema.yaml").unlink()
    module = DPNTKGenerator.load_from_checkpoint(tmp_path / "last.ckpt")
    assert module.schema.to_dict() == schema
    assert module.hparams["schema"] == schema
    again = fit("--config", "table.yaml", "--ckpt_path", "last.ckpt", "--trainer.max_epochs", "3")
    assert again.steps_trained == 9
    assert again.ledger.steps == 1


def test_a_generator_of_ones_choice_is_named_in_yaml_and_loaded_from_the_checkpoint(tmp_path, fit):
    arguments = "{latent_dim: 6, num_classes: 10, output_shape: [1, 8, 8], widths: [30]}"
    generator = f"{{class_path: lightning_eff.synthesis.MLPGenerator, init_args: {arguments}}}"
    fit("--config", str(CONF), f"{PREFIX}generator={generator}")
    module = DPNTKGenerator.load_from_checkpoint(tmp_path / "last.ckpt")
    assert isinstance(module.generator, MLPGenerator)
    assert module.noise_dim == 6
    assert module.steps_trained == 10


@pytest.mark.parametrize("epsilon", ["0", "-1"])
def test_a_wrong_epsilon_is_told_by_name(fit, epsilon):
    with pytest.raises(ValueError, match="epsilon must be > 0"):
        fit("--config", str(CONF), f"{PREFIX}epsilon={epsilon}")
