"""Every technique with what writes checkpoints and what ends a fit early: answers come back bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, OnExceptionCheckpoint, Timer
from lightning_cases import CASES, NOISE, PRIVATE_CASES, PRUNING_CASES, Case
from torch import Tensor

pytestmark = NOISE


class Answers(pl.Callback):
    """What the module answers whenever a checkpoint is written, by step."""

    def __init__(self, case: Case) -> None:
        self.case, self.at = case, dict[int, Tensor]()

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self.at[checkpoint["global_step"]] = self.case.answer(pl_module, self.case.batch())

    def check(self, path: str | Path) -> int:
        """Load a checkpoint and compare its answers; return its step."""
        step = int(torch.load(path, weights_only=True)["global_step"])
        assert torch.equal(self.case.answer(self.case.load(path), self.case.batch()), self.at[step])
        return step


@pytest.mark.parametrize("name", CASES)
def test_the_best_and_the_last_checkpoint_give_the_answers_of_their_time(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    saving, answers = ModelCheckpoint(tmp_path, monitor=case.monitor, save_last=True), Answers(case)
    module, trainer = case.fit(saving, answers, enable_checkpointing=True, max_epochs=3)
    assert case.done(module, trainer)
    answers.check(saving.best_model_path)
    assert answers.check(saving.last_model_path) == max(answers.at)  # of those that were worth keeping
    assert saving.best_model_score is not None


@pytest.mark.parametrize("name", CASES)
def test_what_is_saved_by_hand_after_a_fit_gives_the_same_answers(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    module, trainer = case.fit()
    expected = case.answer(module, case.batch())
    for weights_only in (False, True):
        path = tmp_path / f"{weights_only}.ckpt"
        trainer.save_checkpoint(path, weights_only=weights_only)
        assert torch.equal(case.answer(case.load(path), case.batch()), expected)


class Breaks(pl.Callback):
    """Ends the second epoch by an exception."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 1 and batch_idx == 1:
            raise ArithmeticError("of the user")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_run_that_breaks_leaves_a_checkpoint_that_goes_on(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    answers, saving = Answers(case), OnExceptionCheckpoint(tmp_path, "broken")
    with pytest.raises(ArithmeticError, match="of the user"):
        case.fit(answers, saving, Breaks(), enable_checkpointing=True, max_epochs=3)
    broken = tmp_path / "broken.ckpt"
    at = answers.check(broken)
    module, trainer = case.fit(ckpt_path=broken, max_epochs=3)
    _, straight = case.fit(max_epochs=3)
    assert case.done(module, trainer)
    assert at <= trainer.global_step
    assert trainer.current_epoch == straight.current_epoch


@pytest.mark.parametrize("name", [*PRUNING_CASES, *PRIVATE_CASES, "ReplaceFFN", "LidarSaSCallback"])
def test_a_fit_that_is_stopped_early_ends_like_one_of_so_many_epochs(name: str) -> None:
    case = CASES[name]
    stopping = EarlyStopping(case.monitor, stopping_threshold=float("inf"))
    stopped, trainer = case.fit(stopping, min_epochs=2, max_epochs=9)
    assert trainer.current_epoch == 2
    assert case.done(stopped, trainer)
    plain, _ = case.fit(max_epochs=2)
    assert torch.equal(case.answer(stopped, case.batch()), case.answer(plain, case.batch()))


@pytest.mark.parametrize("name", ["EarlyExitModule", "DPNTKGenerator", "MoEScalingModule", "AdaGlimpseModule"])
@pytest.mark.filterwarnings("ignore:EarlyStopping ends the whole fit")
def test_a_fit_whose_course_depends_on_its_length_stops_early_too(name: str) -> None:
    case = CASES[name]
    stopping = EarlyStopping(case.monitor, stopping_threshold=float("inf"))
    module, trainer = case.fit(stopping, min_epochs=3, max_epochs=4)
    assert trainer.current_epoch == 3
    assert case.done(module, trainer)


@pytest.mark.parametrize("name", CASES)
def test_a_timer_goes_on_in_a_resumed_run(name: str, tmp_path: Path) -> None:
    case, first, second = CASES[name], Timer("00:01:00:00"), Timer("00:01:00:00")
    _, trainer = case.fit(first, max_epochs=3, limit_train_batches=1, min_epochs=1)
    trainer.save_checkpoint(tmp_path / "timed.ckpt")
    before = first.time_elapsed()
    case.fit(second, ckpt_path=tmp_path / "timed.ckpt", max_epochs=4, limit_train_batches=1)
    assert second.time_elapsed() > before > 0
