"""New processes: killed and resumed, two at once, and through the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from helpers import run_and_kill, run_cli, run_ddp, run_python

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
PRELUDE = f"""
import sys; sys.path.insert(0, {str(HERE)!r})
import torch, lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from magnitude import Net, digits, trainer
from lightning_eff.pruning import Calibration, Schedule, ShapleyPruningCallback
from lightning_eff.shapley import PermutationShapley
from lightning_eff.surgery import load_pruned

def callback(**options):
    return ShapleyPruningCallback(
        0.5, schedule=Schedule(start=1, steps=3), estimator=PermutationShapley(walks=2, depth="matched"),
        calibration=Calibration(samples=64), verbose=False, **options)
"""

TRAINING = (
    PRELUDE
    + """
directory, until = sys.argv[1], int(sys.argv[2])
class Tell(pl.Callback):
    def on_train_epoch_end(self, trainer, module):
        print("epoch", trainer.current_epoch, flush=True)
    def on_train_batch_start(self, trainer, module, batch, index):
        if trainer.current_epoch == until and index == 3:
            print("kill me", flush=True)
            import time; time.sleep(60)
resume = sys.argv[3] if len(sys.argv) > 3 else None
model = Net()
run = trainer(callback(), Tell(), ModelCheckpoint(directory, save_last=True), max_epochs=6, enable_checkpointing=True)
run.fit(model, *digits(), ckpt_path=resume)
torch.save(model.state_dict(), directory + "/end.pt")
"""
)


def test_killed_after_the_second_of_three_steps_and_resumed_in_a_new_process(tmp_path: Path) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    run_python(TRAINING, str(straight), "99")
    # Steps run before epochs 1, 2 and 3; the kill comes in epoch 3's neighbour 2, after two of them.
    run_and_kill(TRAINING, "kill me", str(broken), "2")
    assert not (broken / "end.pt").exists()
    run_python(TRAINING, str(broken), "99", str(broken / "last.ckpt"))
    first = torch.load(straight / "end.pt", weights_only=True)
    second = torch.load(broken / "end.pt", weights_only=True)
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
    evaluate = (
        PRELUDE
        + """
path, (_, val) = sys.argv[1], digits()
run = trainer(callback())
print("loss", run.test(Net(), val, ckpt_path=path, verbose=False)[0]["test_loss"])
outputs = run.predict(Net(), val, ckpt_path=path)
assert torch.equal(outputs[0], load_pruned(Net, path).eval()(next(iter(val))[0]))
"""
    )
    lines = [
        run_python(evaluate, str(folder / "last.ckpt")).stdout.split("loss ")[1].split()[0]
        for folder in (straight, broken)
    ]
    assert lines[0] == lines[1]


def test_two_processes_end_with_equal_plans_and_weights(tmp_path: Path) -> None:
    script = (
        PRELUDE
        + """
import os
from pathlib import Path
model = Net()
prune = callback()
run = pl.Trainer(accelerator="cpu", devices=int(os.environ["DEVICES"]), strategy="ddp", max_epochs=5, logger=False,
                 enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[prune])
run.fit(model, *digits())
torch.save({"weights": model.state_dict(), "plan": prune.plan.to_dict(),
            "stages": [s.value for s in prune.report.stages],
            "optimizer": [v["exp_avg"].shape == p.shape for p, v in run.optimizers[0].state.items()]},
           f"rank{run.global_rank}.pt")
"""
    )
    run_ddp(script, tmp_path, fresh=True)  # Lightning itself starts the second one
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["plan"] == second["plan"]
    assert first["stages"] == second["stages"]
    assert all(first["optimizer"])
    assert len(first["plan"]["keep"]["body.0"]) == 4
    for key, value in first["weights"].items():
        if "running" not in key:  # statistics of norms are each process's own in DDP
            assert torch.equal(value, second["weights"][key]), key


def test_scores_under_two_processes_are_those_of_one(tmp_path: Path) -> None:
    script = (
        PRELUDE
        + """
import os
devices = int(sys.argv[1])
prune = ShapleyPruningCallback(0.5, estimator=PermutationShapley(walks=4, depth="matched"),
                               calibration=Calibration(samples=256), verbose=False)
run = pl.Trainer(accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", max_epochs=1,
                 logger=False, limit_train_batches=1, enable_checkpointing=False, enable_progress_bar=False,
                 enable_model_summary=False, callbacks=[prune], num_sanity_val_steps=0)
run.fit(Net(), *digits())
if run.global_rank == 0:
    torch.save({"before": prune.report.stages[0].value, "after": prune.report.stages[1].value}, f"of{devices}.pt")
"""
    )
    run_ddp(script, tmp_path, "2")
    run_ddp(script, tmp_path, "1", processes=1)
    two, one = (torch.load(tmp_path / f"of{n}.pt", weights_only=True) for n in (2, 1))
    assert two["before"] == pytest.approx(one["before"], abs=1e-12)  # the same network on the same 256 images


def test_options_typed_in_the_shell_reach_the_callback(tmp_path: Path) -> None:
    shown = run_cli(
        "fit",
        "--print_config",
        "--model=ImageClassifier",
        "--model.net=LeNet",
        "--data=DigitsDataModule",
        "--trainer.callbacks=ShapleyPruningCallback",
        "--trainer.callbacks.amount=0.3",
        "--trainer.callbacks.allocation.mode=global",
        "--trainer.callbacks.schedule.steps=3",
        "--trainer.callbacks.estimator=PermutationShapley",
        "--trainer.callbacks.estimator.walks=8",
        "--trainer.callbacks.split_batch=lightning_eff.BatchKeys",
        "--trainer.callbacks.value=lightning_eff.pruning.Accuracy",
        "--trainer.callbacks.value.output=logits",
        cwd=tmp_path,
    ).stdout
    config = yaml.safe_load(shown)
    options = config["trainer"]["callbacks"][0]["init_args"]
    assert options["amount"] == 0.3
    assert options["allocation"]["mode"] == "global"
    assert options["schedule"]["steps"] == 3
    assert options["estimator"]["init_args"]["walks"] == 8
    assert options["split_batch"]["class_path"].endswith("BatchKeys")
    assert options["value"]["class_path"].endswith("Accuracy")
    assert options["value"]["init_args"]["output"] == "logits"
