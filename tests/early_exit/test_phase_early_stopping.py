"""PhaseEarlyStopping on scripted accuracies: when phases end, with which weights, and what survives a resume."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from exits_on_digits import EXITS, Diary, backbone, data, same, state, trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_eff.early_exit.callbacks import PhaseEarlyStopping
from lightning_eff.early_exit.module import EarlyExitModule
from lightning_eff.models import ImageClassifier


class Scripted(EarlyExitModule):
    """Logs given accuracies of (exit 0, exit 1, final) at each validation; a phase of the backbone logs the last."""

    def __init__(self, script: list[tuple[float, float, float]], **options: Any) -> None:
        super().__init__(backbone(), EXITS, 10, **options)
        torch.manual_seed(1)
        self.script = script

    def on_validation_epoch_end(self) -> None:
        values = dict(zip(("exit0", "exit1", "final"), self.script[self.current_epoch], strict=True))
        if self.phase.train == "backbone":
            values = {"final": values["final"]}
        self.log_dict({f"val/accuracy_{name}": value for name, value in values.items()})


UP = [(0.1 * i, 0.1 * i, 0.1 * i) for i in range(1, 10)]
FLAT = [(0.5, 0.5, 0.5)] * 20


def fit(script: Any, stopping: PhaseEarlyStopping, *others: pl.Callback, **options: Any) -> tuple[Any, pl.Trainer, str]:
    diary = Diary()
    path, regime = options.pop("path", None), options.pop("regime", "mixed")
    net = Scripted(script, regime=regime)
    running = trainer(*others, stopping, diary, **{"limit_train_batches": 1, "max_epochs": 20, **options})
    running.fit(net, data(), ckpt_path=path)
    return net, running, " ".join(trained for _, trained, *_ in diary.batches)


def test_a_stop_becomes_the_next_phase_and_ends_the_fit_in_the_last_one() -> None:
    _, running, trained = fit(FLAT, PhaseEarlyStopping(patience=2))
    assert trained == "b b b bh bh bh"  # the first of each phase is an improvement, two more are waited for
    assert running.current_epoch == 6


def test_phases_that_improve_last_as_long_as_they_may() -> None:
    _, _, trained = fit(UP, PhaseEarlyStopping(patience=1), max_epochs=6)
    assert trained == "b b b bh bh bh"


def test_epochs_that_an_early_end_saved_are_not_trained_later() -> None:
    _, running, trained = fit([*FLAT[:2], *UP[5:], *UP], PhaseEarlyStopping(patience=1), max_epochs=8)
    assert trained == "b b bh bh bh bh"
    assert running.current_epoch == 6


def test_every_output_has_a_counter_of_its_own() -> None:
    one_at_a_time = [(0.1, 0.1, 0.1), (0.2, 0.1, 0.1), (0.2, 0.2, 0.1), (0.2, 0.2, 0.2)] + [(0.2, 0.2, 0.2)] * 10
    _, _, trained = fit(one_at_a_time, PhaseEarlyStopping(patience=2), regime="joint")
    # the first two have waited longer than two when the last improves, yet all must have run out
    assert trained.count("bh") == 6


def test_phases_without_a_length_last_until_they_run_out() -> None:
    _, running, trained = fit(FLAT, PhaseEarlyStopping(patience=[1, 3]), max_epochs=-1)
    assert trained == "b b bh bh bh bh"
    assert running.current_epoch == 6


class Weights(pl.Callback):
    """Network at the end of every epoch."""

    def __init__(self) -> None:
        self.at: list[dict[str, torch.Tensor]] = []
        self.at_start: list[dict[str, torch.Tensor]] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.at.append(state(pl_module.network))

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        self.at_start.append(state(pl_module.network))


PEAK = [(0.1, 0.1, a) for a in (0.5, 0.9, 0.6, 0.7, 0.8, 0.95, 0.2, 0.1)] + [(0.1, 0.1, 0.1)] * 3


def test_the_best_weights_are_put_back_when_a_phase_has_run_out() -> None:
    weights, stopping = Weights(), PhaseEarlyStopping(patience=2)
    net, _, trained = fit(PEAK, stopping, weights)
    assert trained == "b b b b bh bh bh bh"
    assert same(weights.at_start[4], weights.at[1])
    assert not same(weights.at_start[4], weights.at[3])
    assert same(state(net.network), weights.at[5])
    assert stopping.best_of_phase[0] == {"val/accuracy_final": pytest.approx(0.9)}
    assert stopping.best_of_phase[1]["val/accuracy_final"] == pytest.approx(0.95)


def test_weights_stay_where_they_are_not_to_be_put_back() -> None:
    weights = Weights()
    net, _, trained = fit(PEAK, PhaseEarlyStopping(patience=2, restore_best=False), weights)
    assert trained == "b b b b bh bh bh bh"
    assert same(weights.at_start[4], weights.at[3])
    assert same(state(net.network), weights.at[7])


def test_losses_are_watched_downward_and_small_steps_do_not_count() -> None:
    falling = [(0.9, 0.9, 0.9 - 0.1 * i) for i in range(3)] + [(0.9, 0.9, 0.69)] * 9
    _, _, trained = fit(falling, PhaseEarlyStopping(1, mode="min", min_delta=0.05), regime="mixed", max_epochs=8)
    assert trained.startswith("b b b b bh")


def stopping() -> PhaseEarlyStopping:
    return PhaseEarlyStopping(patience=2)


def test_a_run_resumed_after_any_epoch_ends_its_phases_as_it_would_have(tmp_path: Path) -> None:
    whole, _, trained = fit(PEAK, stopping(), ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1))
    for epoch in range(7):
        resumed, running, rest = fit(PEAK, stopping(), path=tmp_path / f"epoch={epoch}.ckpt")
        assert rest.split() == trained.split()[epoch + 1 :]
        assert same(state(whole), state(resumed))
        assert running.current_epoch == 8


def test_a_run_resumed_from_a_last_batch_still_ends_its_phases(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, every_n_train_steps=1)
    fit(PEAK, stopping(), saving)
    for epoch in (
        2,
        3,
    ):  # the validation behind the batch is left out by Lightning, so one more epoch may be waited for
        _, running, rest = fit(PEAK, stopping(), path=tmp_path / f"epoch={epoch}.ckpt")
        assert rest.split().count("b") <= 2
        assert running.current_epoch < 11
        assert rest.endswith("bh bh bh")


def test_a_run_that_has_ended_stays_so(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole, _, _ = fit(PEAK, PhaseEarlyStopping(patience=2), saving)
    resumed, _, rest = fit(PEAK, PhaseEarlyStopping(patience=2), path=tmp_path / "epoch=7.ckpt")
    assert rest == ""
    assert same(state(whole), state(resumed))


def test_not_a_number_is_never_an_improvement() -> None:
    _, _, trained = fit([(math.nan,) * 3] * 20, PhaseEarlyStopping(patience=2))
    assert trained == "b b bh bh"


def test_it_is_not_mistaken_for_early_stopping_of_the_fit() -> None:
    assert not isinstance(PhaseEarlyStopping(), EarlyStopping)  # which would be warned about


def test_without_validation_it_says_that_it_watches_nothing() -> None:
    with pytest.warns(UserWarning, match="phases will not end early"):
        trainer(PhaseEarlyStopping(), limit_val_batches=0, max_epochs=2, limit_train_batches=1).fit(
            Scripted(FLAT), data()
        )


def test_names_that_nobody_logs_are_told() -> None:
    with pytest.raises(RuntimeError, match="none of val/f1_exit0, val/f1_exit1, val/f1_final among what is logged"):
        fit(FLAT, PhaseEarlyStopping(monitor="val/f1"))


def test_other_modules_are_refused() -> None:
    with pytest.raises(ValueError, match="phases of an EarlyExitModule, got a ImageClassifier"):
        trainer(PhaseEarlyStopping()).fit(ImageClassifier(backbone()), data())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"patience": 0}, "patience of at least one"),
        ({"patience": True}, "patience of at least one"),
        ({"patience": []}, "patience of at least one"),
        ({"mode": "up"}, "mode must be one of max, min, got 'up'"),
        ({"min_delta": -0.1}, "min_delta must be >= 0"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        PhaseEarlyStopping(**options)


def test_patience_for_another_number_of_phases_is_refused() -> None:
    with pytest.raises(ValueError, match="a patience for each of 2 phases"):
        fit(FLAT, PhaseEarlyStopping(patience=[1, 2, 3]))
