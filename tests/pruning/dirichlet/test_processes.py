"""Dirichlet pruning on two processes, from YAML and the shell, and its example."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from helpers import run_cli, run_ddp, run_python

HERE = Path(__file__).parents[1]
REPOSITORY = HERE.parents[1]
FASHION = Path("/usr/share/datasets/fashion-mnist")

SCRIPT = f"""
import os, sys; sys.path.insert(0, {str(HERE)!r})
import torch, lightning.pytorch as pl
from magnitude import Net, digits
from lightning_eff.pruning import DirichletOptions, DirichletPruneCallback, Schedule
devices, samples = int(os.environ["DEVICES"]), int(sys.argv[1])
model, prune = Net(), DirichletPruneCallback(
    0.5, schedule=Schedule(start=1), switches=DirichletOptions(lr=0.1), verbose=False, dirpath="out" + sys.argv[1])
train, val = digits(samples)
run = pl.Trainer(accelerator="cpu", devices=devices, strategy="ddp", max_epochs=3, logger=False,
                 enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[prune])
run.fit(model, train, val)
torch.save({{"weights": model.state_dict(), "plan": prune.plan.to_dict(),
            "phi": {{name: one.concentration for name, one in prune.posterior.items()}}}},
           f"rank{{run.global_rank}}.pt")
"""


@pytest.mark.parametrize("samples", [512, 450])  # 450: the last batch is a small one
def test_two_processes_learn_the_same_switches_and_cut_the_same_channels(samples: int, tmp_path: Path) -> None:
    run_ddp(SCRIPT, tmp_path, str(samples))
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["plan"] == second["plan"]
    assert len(first["plan"]["keep"]["body.0"]) == 4
    for name, phi in first["phi"].items():
        assert torch.equal(phi, second["phi"][name])
    for key, value in first["weights"].items():
        if "running" not in key:  # statistics of norms are each process's own in DDP
            assert torch.equal(value, second["weights"][key]), key
    assert json.loads((tmp_path / f"out{samples}" / "scores.json").read_text()).keys() == first["phi"].keys()


UNEVEN = f"""
import os, sys; sys.path.insert(0, {str(HERE)!r})
import torch, lightning.pytorch as pl
from torch.nn import functional as F
from magnitude import Net, digits
from lightning_eff.pruning import Calibration, DirichletOptions, DirichletPruneCallback, Prior
model = Net()
class Some(torch.utils.data.IterableDataset):
    def __iter__(self):
        rank = torch.distributed.get_rank()
        return iter([digits()[0].dataset[i] for i in range(64 * rank, 64 * (2 + 2 * rank))])
prune = DirichletPruneCallback(
    0.5, switches=DirichletOptions(lr=0.1, prior=Prior(dataset_size=512)), verbose=False,
    calibration=Calibration(loader=torch.utils.data.DataLoader(Some(), 64)))
with torch.no_grad():
    model.head.weight *= 20  # not a network that guesses
run = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, logger=False, limit_train_batches=1,
                 enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[prune])
run.fit(model, *digits())
torch.save(prune.posterior["body.4"].concentration, f"rank{{run.global_rank}}.pt")
"""


@pytest.mark.slow
def test_processes_with_unequal_numbers_of_batches_do_not_wait_for_each_other(tmp_path: Path) -> None:
    run_ddp(UNEVEN, tmp_path)
    assert torch.equal(*(torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)))


def test_options_typed_in_the_shell_reach_the_callback(tmp_path: Path) -> None:
    shown = run_cli(
        "fit",
        "--print_config",
        "--model=ImageClassifier",
        "--model.net=LeNet",
        "--data=DigitsDataModule",
        "--trainer.callbacks=DirichletPruneCallback",
        "--trainer.callbacks.allocation.mode=mass",
        "--trainer.callbacks.switches.estimator=sample",
        "--trainer.callbacks.switches.gate.scale=dim",
        "--trainer.callbacks.switches.max_batches=0.5",
        "--trainer.callbacks.loss_fn=torch.nn.functional.cross_entropy",
        cwd=tmp_path,
    ).stdout
    options = yaml.safe_load(shown)["trainer"]["callbacks"][0]["init_args"]
    assert options["allocation"]["mode"] == "mass"
    switches = options["switches"]
    assert (switches["estimator"], switches["gate"]["scale"], switches["max_batches"]) == ("sample", "dim", 0.5)
    assert options["loss_fn"] == "torch.nn.functional.cross_entropy"


@pytest.mark.slow
@pytest.mark.skipif(not FASHION.is_dir(), reason="Fashion-MNIST is not at hand")
def test_half_of_every_layer_of_lenet_may_go_where_other_rankings_fail(tmp_path: Path) -> None:
    script = REPOSITORY / "examples" / "fashion_lenet_dirichlet.py"
    run_python(script, "--few", "--out", str(tmp_path), cwd=tmp_path, timeout=1800)
    rows = {row["ranking"]: row for row in json.loads((tmp_path / "accuracy.json").read_text())}
    half = rows["Dirichlet"]["keep 50%"]
    assert half >= 0.75
    assert half > rows["chance, five drawings"]["most of 50%"]
    assert half > rows["L1 norm"]["keep 50%"] + 0.1
    assert half > rows["Dirichlet, scale dim"]["keep 50%"] + 0.1
