"""Every technique fits on a GPU from YAML, and what it leaves is finite and loads on a CPU."""

from pathlib import Path

import pytest
import torch
from torch.utils import _pytree as pytree

from lightning_eff import cli

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
ACCELERATOR = "cuda"
REPOSITORY = Path(__file__).resolve().parents[2]
SHORT = ["--trainer.max_epochs=2", "--trainer.callbacks.schedule.start=1", "--trainer.callbacks.calibration.samples=64"]
RUNS = {
    "tests/conf/digits.yaml": [],
    "tests/conf/early_exit.yaml": [],
    "tests/conf/glimpse.yaml": [],
    "tests/conf/lidar.yaml": [],
    "tests/conf/moe.yaml": [],
    "tests/conf/private.yaml": [],
    "tests/conf/synthesis.yaml": [],
    "examples/configs/quickstart.yaml": SHORT,
    "examples/configs/dirichlet.yaml": SHORT,
    "examples/configs/random_channel.yaml": [*SHORT, "--trainer.callbacks.search.candidates=4"],
}


def test_every_small_configuration_runs_here():
    known = {f"tests/conf/{path.name}" for path in (REPOSITORY / "tests" / "conf").glob("*.yaml")}
    assert known <= set(RUNS)


@pytest.mark.parametrize("config", RUNS)
def test_fit_from_yaml_on_a_gpu_leaves_finite_weights_that_load_on_a_cpu(config, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["lightning-eff"])  # or the command line takes pytest's for its own
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(REPOSITORY / "tests" / "early_exit")  # data that a configuration names
    monkeypatch.syspath_prepend(REPOSITORY / "tests" / "synthesis")
    Path("text.txt").write_text("to be, or not to be, that is the question. " * 200)
    chosen = [f"--trainer.accelerator={ACCELERATOR}", "--trainer.devices=1"]
    done = cli.main(["fit", "--config", str(REPOSITORY / config), *chosen, *RUNS[config]])
    assert done.trainer.strategy.root_device.type == ACCELERATOR
    done.trainer.save_checkpoint("end.ckpt", weights_only=False)
    state = torch.load("end.ckpt", map_location="cpu", weights_only=True)["state_dict"]
    tensors = [leaf for leaf in pytree.tree_leaves(state) if isinstance(leaf, torch.Tensor)]
    assert all(leaf.device.type == "cpu" for leaf in tensors)
    assert all(bool(parameter.isfinite().all()) for parameter in done.model.parameters())
