"""Epsilon as it is logged: at every step, never too small, exact where somebody writes it down."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from private_runs import Classifier, fit, loader, private, trainer_of

from lightning_eff.accounting import PrivacyLedger
from lightning_eff.privacy.metrics import SpentEpsilon
from lightning_eff.privacy.planning import PrivacyPlan
from lightning_eff.privacy.selection.plan import SelectionPlan
from lightning_eff.privacy.selection.selectors import NoisyGradientSelector


class Shown(L.Callback):
    """What the progress bar and callbacks see after each step, beside what was spent."""

    def __init__(self):
        self.seen = []
        self.active = []

    def on_train_batch_end(self, trainer, *args):
        for metrics in (trainer.progress_bar_metrics, trainer.callback_metrics):
            self.seen.append((float(metrics["privacy/epsilon"]), trainer.strategy.epsilon))
        self.active.append(float(trainer.callback_metrics["privacy/drop_rate"]))


def test_every_step_has_an_epsilon_that_is_not_too_small_and_not_far_too_large():
    shown = Shown()
    fit(callbacks=[shown], trainer={"max_epochs": 6, "log_every_n_steps": 50})
    assert len(shown.seen) == 2 * 30
    for told, spent in shown.seen:
        assert spent <= told <= spent * 1.1


def test_the_file_name_of_a_checkpoint_tells_what_was_spent(tmp_path):
    checkpoint = ModelCheckpoint(
        tmp_path, "{step}-{privacy/epsilon:.4f}", auto_insert_metric_name=False, every_n_train_steps=13, save_top_k=-1
    )
    fit(callbacks=[checkpoint], trainer={"enable_checkpointing": True, "max_epochs": 8, "log_every_n_steps": 50})
    files = list(tmp_path.glob("*.ckpt"))
    assert len(files) == 3
    for file in files:
        spent = torch.load(file, weights_only=True)["lightning_eff.dp"]["epsilon"]
        assert file.stem.partition("-")[2] == f"{spent:.4f}"


def test_few_steps_ask_the_accountant():
    ledger = PrivacyLedger(1e-5, accountant="rdp")
    plan = PrivacyPlan.make(10_000, 100, steps=5000, noise_multiplier=1.0, delta=1e-5, accountant="rdp")
    spent, told = SpentEpsilon(), []
    for step in range(1, 5001):
        ledger.record(1.0, 0.01)
        told.append(spent.after_step(ledger, plan, -step % 500))
    assert told == sorted(told)
    assert len(set(told)) < 80
    assert told[-1] == ledger.epsilon()


def test_steps_beside_the_plan_are_counted():
    ledger = PrivacyLedger(1e-5, accountant="rdp")
    ledger.record(2.0, 0.1, 100)
    plan = PrivacyPlan.make(
        1000, 10, steps=40, noise_multiplier=1.0, delta=1e-5, accountant="rdp", history=ledger.history
    )
    spent = SpentEpsilon()
    for _ in range(40):
        ledger.record(1.0, 0.01)
        assert ledger.epsilon() <= spent.after_step(ledger, plan, float("inf")) <= plan.epsilon


def test_the_logged_drop_rate_is_what_the_step_dropped():
    shown, selection = Shown(), SelectionPlan(0.5, NoisyGradientSelector(warmup_steps=7))
    strategy = private(selection=selection)
    trainer_of(strategy, max_epochs=2, callbacks=[shown], log_every_n_steps=1).fit(Classifier(), loader())
    assert shown.active[:7] == [0.0] * 7
    assert shown.active[7:] == pytest.approx([0.5] * 3)


def test_a_warm_up_that_never_ends_is_told():
    with pytest.warns(UserWarning, match="first 20 steps and training has only 5: nothing is ever dropped"):
        fit(drop_rate=0.5, selection="noisy_gradient")
