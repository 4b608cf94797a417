"""EarlyExitModule on two processes and through the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import run_cli, run_ddp, run_python
from lightning.pytorch.cli import LRSchedulerTypeUnion

from lightning_eff import cli
from lightning_eff.early_exit.module import EarlyExitModule
from lightning_eff.models import SmallCNN

HERE = Path(__file__).parent
CONF = HERE.parent / "conf" / "early_exit.yaml"

TWO = f"""
import sys; sys.path.insert(0, {str(HERE)!r})
import os, torch, lightning.pytorch as pl, torch.distributed as dist
from exits_on_digits import Diary, data, module, state, trainer
from lightning_eff.early_exit.callbacks import PhaseEarlyStopping
from lightning_eff.early_exit.training.losses import ExitLosses

class Apart(pl.Callback):
    "Processes begin with different weights, and see different data."
    def setup(self, trainer, pl_module, stage):
        torch.manual_seed(trainer.global_rank)
        with torch.no_grad():
            for parameter in pl_module.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))

def fit(net, *callbacks, **options):
    run = trainer(Apart(), *callbacks, strategy="ddp", devices=2, **options)
    run.fit(net, data(batch_size=32))
    return run

def check_equal(net):
    for name, tensor in state(net.network).items():
        first = tensor.clone()
        dist.broadcast(first, 0)
        assert "running" in name or "num_batches" in name or torch.equal(first, tensor), name
"""

TRAINING = (
    TWO
    + """
for regime in sys.argv[1:]:
    trained = "h" if regime == "disjoint" else "bh"
    for losses in (ExitLosses(), ExitLosses([0.0, 1.0, 1.0], "equilibrium", distill="last")):
        net, diary = module(regime=regime, losses=losses), Diary()
        fit(net, diary)
        check_equal(net)
        first = "b" if regime != "joint" else "bh"
        assert [part for _, part, *_ in diary.batches] == [first] * 6 + [trained] * 6, diary.batches
        before, after = diary.states[2], state(net.network)
        moved = {name for name in after if name.endswith("weight") and not torch.equal(before[name], after[name])}
        assert any(name.startswith("heads") for name in moved)
        assert any(name.startswith("backbone") for name in moved) == (regime != "disjoint")
print("equal")
"""
)

STOPPING = (
    TWO
    + """
net = module(cost="latency")
stopping = PhaseEarlyStopping(patience=1)
run = fit(net, stopping, max_epochs=40)
check_equal(net)
assert net.is_last_phase
epochs = torch.tensor([run.current_epoch, net._clock.began["epoch"]])
first = epochs.clone()
dist.broadcast(first, 0)
assert torch.equal(first, epochs) and run.current_epoch < 40
assert dist.get_rank() == 0 or net.network.costs.unit == "s"

run = trainer(strategy="ddp", devices=2, limit_test_batches=1.0)
source = data(batch_size=32)
net.network.set_thresholds([0.12, None])
logged = run.test(net, source, verbose=False)[0]
x = torch.stack([source.test_set[i][0] for i in range(len(source.test_set))])
y = torch.stack([source.test_set[i][1] for i in range(len(source.test_set))])
net.eval()
answer = net.network.predict(x)
expected = (answer.logits.argmax(1) == y).float().mean().item()
assert abs(logged["test/accuracy"] - expected) < 1e-6, (logged, expected)
with torch.no_grad():
    curve = [(z.argmax(1) == y).float().mean().item() for z in net(x)]
assert all(abs(a - b) < 1e-6 for a, b in zip(curve, net.curves["test"].head_accuracy))
print("equal")
"""
)


@pytest.mark.parametrize("regimes", [["mixed"], pytest.param(["disjoint", "joint"], marks=pytest.mark.slow)])
def test_two_processes_have_equal_weights_after_every_regime(regimes: list[str], tmp_path: Path) -> None:
    assert run_ddp(TRAINING, tmp_path, *regimes).stdout.count("equal") == 2


@pytest.mark.slow
def test_two_processes_end_phases_together_and_judge_by_all_samples(tmp_path: Path) -> None:
    assert run_ddp(STOPPING, tmp_path).stdout.count("equal") == 2


SPAWN = f"""
import sys; sys.path.insert(0, {str(HERE)!r})
from exits_on_digits import data, images, module, trainer
if __name__ == "__main__":
    built = module(example_input=images())
    trainer(strategy="ddp_spawn", devices=2, max_epochs=2).fit(built, data())
    try:
        trainer(strategy="ddp_spawn", devices=2).fit(module(), data())
    except Exception as error:
        assert "give the module example_input" in str(error)
        print("refused")
"""


@pytest.mark.slow
def test_spawned_processes_cannot_build_exits_for_their_parent(tmp_path: Path) -> None:
    script = tmp_path / "spawn.py"  # what is spawned reads it again
    script.write_text(SPAWN)
    assert "refused" in run_python(script, fresh=True).stdout


# The command line


def schedule_of(done: Any) -> LRSchedulerTypeUnion:
    return done.trainer.lr_scheduler_configs[0].scheduler


def test_a_yaml_fits_and_what_it_saved_fits_again(in_tmp_path: Path) -> None:
    done = cli.main(["fit", "--config", str(CONF)])
    assert done.trainer.current_epoch == 3
    assert [phase.train for phase in done.model.phases] == ["backbone", "all"]
    assert schedule_of(done).T_max == 2
    assert done.model.network.gradient_scaling == "equilibrium"
    assert "val/accuracy@50" in done.trainer.callback_metrics
    saved = next(in_tmp_path.rglob("config.yaml"))
    again = cli.main(["fit", "--config", str(saved), "--trainer.max_epochs=3"])
    assert yaml.safe_load(saved.read_text())["model"]["init_args"]["regime"][1]["lr_scheduler"] == {
        "class_path": "torch.optim.lr_scheduler.CosineAnnealingLR",
        "init_args": {"T_max": None},
    }
    assert all(torch.equal(a, b) for a, b in zip(done.model.parameters(), again.model.parameters(), strict=True))


@pytest.mark.slow
def test_a_checkpoint_of_a_yaml_needs_nothing_else(in_tmp_path: Path) -> None:
    done = cli.main(["fit", "--config", str(CONF)])
    path = done.trainer.checkpoint_callback.best_model_path
    assert torch.load(path, weights_only=True)["hyper_parameters"]["num_classes"] == 10
    loaded = EarlyExitModule.load_from_checkpoint(path)
    assert all(torch.equal(a, b) for a, b in zip(done.model.parameters(), loaded.parameters(), strict=True))
    assert loaded.phases[1].loss_weights == [1.0, 1.0, 1.0, 1.0]
    cli.main(["test", "--config", str(CONF), "--ckpt_path", path])
    cli.main(["predict", "--config", str(CONF), "--ckpt_path", path, "--trainer.limit_predict_batches=1"])


@pytest.mark.slow
def test_short_names_and_options_of_the_shell(in_tmp_path: Path) -> None:
    output = run_cli(
        "fit",
        "--model=EarlyExitModule",
        "--model.backbone=SmallCNN",
        "--model.exits=[layers.pool2]",
        "--model.num_classes=10",
        "--model.regime=disjoint",
        "--model.losses.distill=last",
        "--model.optimizer=torch.optim.SGD",
        "--model.optimizer.lr=0.1",
        "--data=DigitsDataModule",
        "--trainer.max_epochs=2",
        "--trainer.limit_train_batches=2",
        "--trainer.limit_val_batches=1",
        "--trainer.accelerator=cpu",
        "--trainer.callbacks+=PhaseEarlyStopping",
        "--trainer.callbacks.patience=5",
        cwd=in_tmp_path,
    ).stdout
    assert "Phase 2/2 trains 'heads' for 1 epoch" in output
    loaded = EarlyExitModule.load_from_checkpoint(next(in_tmp_path.rglob("*.ckpt")))
    assert isinstance(loaded.network.backbone, SmallCNN)
    assert loaded.losses.distill == "last"


def test_rare_options_of_the_network_are_at_hand_in_yaml(in_tmp_path: Path) -> None:
    config = {
        "trainer": {"fast_dev_run": True, "accelerator": "cpu", "enable_progress_bar": False},
        "model": {
            "class_path": "EarlyExitModule",
            "init_args": {
                "backbone": {"class_path": "SmallCNN"},
                "exits": ["layers.pool2"],
                "num_classes": 10,
                "regime": "joint",
                "network_options": {"clone_features": True, "compact_min_fraction": 0.5, "output_fn": "torch.neg"},
            },
        },
        "data": {"class_path": "DigitsDataModule"},
    }
    Path("run.yaml").write_text(yaml.safe_dump(config))
    network = cli.main(["fit", "--config", "run.yaml"]).model.network
    assert (network._clone, network.compact_min_fraction, network.output_of) == ({0}, 0.5, torch.neg)


@pytest.mark.parametrize(
    "exits",
    [
        "3",
        "[0.3, 0.6]",
        "[layers.pool2, layers.pool4]",
        "{layers.pool2: mlp}",
        "{layers.pool2: {class_path: Head, init_args: {kind: mlp, layers: 2}}}",
    ],
)
def test_all_ways_to_say_where_exits_are(exits: str, in_tmp_path: Path) -> None:
    config = {
        "trainer": {"fast_dev_run": True, "accelerator": "cpu", "enable_progress_bar": False},
        "model": {
            "class_path": "EarlyExitModule",
            "init_args": {
                "backbone": {"class_path": "SmallCNN"},
                "exits": yaml.safe_load(exits),
                "num_classes": 10,
                "regime": "joint",
            },
        },
        "data": {"class_path": "DigitsDataModule"},
    }
    Path("run.yaml").write_text(yaml.safe_dump(config))
    done = cli.main(["fit", "--config", "run.yaml"])
    assert done.model.network.num_exits == {"3": 3, "{": 1}.get(exits[0], 2)
