"""Every technique with what a Trainer does besides training: looking on, limits, bare runs, runs without a fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import RichModelSummary, RichProgressBar, Timer
from lightning.pytorch.loggers import CSVLogger
from lightning_cases import CASES, NOISE, QUIET, FeedForward, Filling

pytestmark = [
    *NOISE,
    pytest.mark.filterwarnings("ignore:You are trying to `self.log..` but"),
    pytest.mark.filterwarnings("ignore:.*steps ran; the next one is due"),
    pytest.mark.filterwarnings("ignore:max_epochs=1 is too few for the phases"),
]


@pytest.mark.parametrize("name", CASES)
def test_callbacks_that_look_on_change_no_bit(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    watched, trainer = case.fit(
        RichProgressBar(refresh_rate=1),
        RichModelSummary(max_depth=2),
        Timer(),
        enable_progress_bar=True,
        enable_model_summary=True,
        logger=CSVLogger(tmp_path),
        log_every_n_steps=1,
    )
    assert case.done(watched, trainer)
    plain, _ = case.fit()
    assert torch.equal(case.answer(watched, case.batch()), case.answer(plain, case.batch()))


@pytest.mark.parametrize("name", CASES)
def test_a_bare_run_ends_with_the_same_bits(name: str) -> None:
    case = CASES[name]
    bare = case.module()
    kept = {key: value for key, value in QUIET.items() if key in ("accelerator", "devices")}
    trainer = pl.Trainer(
        barebones=True, max_epochs=case.epochs, strategy=case.strategy(), callbacks=case.callbacks(), **kept
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        trainer.fit(bare, case.loader(), case.loader() if case.validates else None)
    assert case.done(bare, trainer)
    plain, _ = case.fit()
    assert torch.equal(case.answer(bare, case.batch()), case.answer(plain, case.batch()))


@pytest.mark.parametrize("name", CASES)
def test_one_batch_of_everything_runs_and_leaves_no_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _, trainer = CASES[name].fit(fast_dev_run=True)
    assert trainer.global_step == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", CASES)
def test_limits_of_batches_are_kept_and_the_work_is_done(name: str) -> None:
    case = CASES[name]
    module, trainer = case.fit(limit_train_batches=2, limit_val_batches=1)
    assert case.done(module, trainer)
    assert trainer.fit_loop.epoch_loop.total_batch_idx + 1 == 2 * 2


def test_no_frames_of_validation_are_told_before_training() -> None:
    with pytest.raises(ValueError, match="has no frames to select lines on: give it calibration="):
        CASES["LidarSaSCallback"].fit(limit_val_batches=0)


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("DPNTKGenerator", "LidarSaSSelector")])
def test_without_a_fit_the_module_is_evaluated_as_it_is(name: str) -> None:
    case, module = CASES[name], CASES[name].module()
    expected = None if name == "ReplaceFFN" else case.answer(module, case.batch())
    assert case.trainer().validate(module, case.loader(), verbose=False)[0]
    assert case.trainer().test(module, case.loader(), verbose=False)[0]
    predicted = case.trainer().predict(module, case.loader())
    assert predicted is not None
    assert len(predicted) == len(case.loader())
    if expected is not None:
        assert torch.equal(case.answer(module, case.batch()), expected)


def test_experts_stand_in_a_module_that_is_only_evaluated() -> None:
    case, module = CASES["ReplaceFFN"], FeedForward()
    [first, *_] = case.trainer().predict(module, case.loader()) or []
    assert case.done(module, case.trainer())
    assert torch.equal(first, case.answer(module, case.batch()))


def test_a_generator_is_asked_for_records_without_data() -> None:
    case, module = CASES["DPNTKGenerator"], CASES["DPNTKGenerator"].module()
    assert case.trainer().predict(module) == [[]]
    with pytest.raises(RuntimeError, match=r"leave dataloaders out of trainer.predict"):
        case.trainer().predict(module, case.loader())
    with pytest.raises(RuntimeError, match="validation got private records"):
        case.trainer().validate(module, case.loader(), verbose=False)


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_lines_are_measured_after_a_fit_or_from_a_checkpoint(verb: str, tmp_path: Path) -> None:
    case = CASES["LidarSaSSelector"]
    with pytest.raises(RuntimeError, match=r"no lines are selected yet: call trainer.fit first, or give ckpt_path"):
        getattr(case.trainer(), verb)(case.module(), case.loader())
    _, trainer = case.fit()
    trainer.save_checkpoint(tmp_path / "lines.ckpt")
    found: Any = getattr(case.trainer(), verb)(case.module(), case.loader(), ckpt_path=tmp_path / "lines.ckpt")
    if verb == "predict":
        kept = case.load(tmp_path / "lines.ckpt").mask(case.batch(), 2)
        assert torch.allclose(found[0], Filling()(kept["rgb"], kept["sparse"]))
    else:
        assert any("rmse/region/k2" in key for key in found[0])
