"""Real text: what experts are worth at equal tokens, and that a killed run ends where it would have ended."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from helpers import EXAMPLES, import_script, run_and_kill

from lightning_eff.moe import ExpertLoadMonitor

SCRIPT = EXAMPLES / "shakespeare_experts.py"
TEXT = Path(os.environ.get("LIGHTNING_EFF_DATA", "")) / "moe_scaling" / "tinyshakespeare.txt"
STEPS, LR = 350, 3e-3
needs_text = pytest.mark.skipif(
    not TEXT.is_file(), reason="LIGHTNING_EFF_DATA holds no moe_scaling/tinyshakespeare.txt"
)


def example() -> ModuleType:
    return import_script(SCRIPT)


def quiet(**options: Any) -> dict[str, Any]:
    return {"enable_progress_bar": False, **options}


# prints the validation losses, saves at step 175, and is killed when it has printed the one of step 200
KILLED = f"""
import importlib.util, sys
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
spec = importlib.util.spec_from_file_location("shakespeare_experts", {str(SCRIPT)!r})
example = sys.modules["shakespeare_experts"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)

class Print(Callback):
    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            print("step", trainer.global_step, float(trainer.callback_metrics["val/loss"]), flush=True)

example.train(
    example.decoders(128, 4)["G = 4"], sys.argv[2:], {STEPS}, {LR},
    callbacks=(Print(), ModelCheckpoint(sys.argv[1], every_n_train_steps=175, filename="half")),
    enable_checkpointing=True, enable_progress_bar=False,
)
"""


@pytest.mark.slow
@needs_text
def test_fine_experts_beat_the_dense_twin_at_equal_tokens_and_a_kill_changes_nothing(tmp_path: Path) -> None:
    script, text = example(), [str(TEXT)]
    networks = script.decoders(128, 4)
    dense, _, _ = script.train(networks["dense"], text, STEPS, LR, **quiet())
    monitor = ExpertLoadMonitor(every_n_steps=100)
    fine, trainer, curve = script.train(networks["G = 4"], text, STEPS, LR, callbacks=(monitor,), **quiet())
    losses = dict(curve.points)
    assert min(loss for step, loss in losses.items() if step <= 200) < 2.45
    assert trainer.callback_metrics["moe/dead_experts"] == 0
    assert trainer.callback_metrics["moe/load_max_over_mean"] < 3
    dense_loss, fine_loss = script.evaluate(dense, text), script.evaluate(fine, text)
    assert fine_loss < 1.90
    assert fine_loss < dense_loss - 0.02

    printed = run_and_kill(KILLED, "step 200 ", str(tmp_path), *text, timeout=1800)
    lines = [line.split() for line in printed.splitlines() if line.startswith("step ")]
    again = {int(step): float(loss) for _, step, loss in lines}
    assert again == {step: pytest.approx(losses[step], abs=1e-6) for step in again}
    assert 175 in again
    resumed, _, _ = script.train(networks["G = 4"], text, STEPS, LR, ckpt_path=str(tmp_path / "half.ckpt"), **quiet())
    assert resumed.tokens_seen == fine.tokens_seen
    assert script.evaluate(resumed, text) == pytest.approx(fine_loss, abs=1e-5)
    assert resumed.smoothed_loss() == pytest.approx(fine.smoothed_loss(), abs=1e-5)
