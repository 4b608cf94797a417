"""A finished run leaves one row; an interrupted one leaves none, and resumed the one it would have left."""

import csv
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_eff import __version__
from lightning_eff.data import ByteTextDataModule
from lightning_eff.models import ImageClassifier, SmallCNN
from lightning_eff.moe import FineGrainedMoELaw, MoEScalingModule
from lightning_eff.moe.recorder import RunRecorder
from lightning_eff.moe.scaling.runs import RUN_COLUMNS

MOE = {"expansion_rate": 4, "granularity": 2}
STEPS = 6


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(i * i % 251 for i in range(3000)))
    return str(path)


def module(**options: Any) -> MoEScalingModule:
    torch.manual_seed(0)
    decoder = {"d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 16, "moe": MOE}
    return MoEScalingModule(**{"decoder": decoder, "loss_window": 3, **options})


def fit(text: str, *callbacks: Callback, net: L.LightningModule | None = None, ckpt: Any = None, **options: Any) -> Any:
    names = ("enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger")
    quiet = dict.fromkeys(names, False)
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        **{**quiet, "max_steps": STEPS, "val_check_interval": 2, "limit_val_batches": 1, **options},
    )
    net = net or module()
    trainer.fit(net, ByteTextDataModule(text, seq_len=16, batch_size=4), ckpt_path=ckpt, weights_only=bool(ckpt))
    return trainer, net


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class Losses(Callback):
    """Keeps the loss of every step, and the last of validation."""

    def __init__(self) -> None:
        self.train: list[float] = []
        self.val = 0.0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.train.append(float(trainer.callback_metrics["train/loss"]))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.val = float(trainer.callback_metrics["val/loss"])


class StopAfter(Callback):
    """Ends a run early, politely or not."""

    def __init__(self, steps: int, error: type[BaseException] | None = None) -> None:
        self.steps, self.error = steps, error

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.steps:
            if self.error:
                raise self.error("out of power")
            trainer.should_stop = True


def test_row_tells_what_was_trained_and_how_it_ended(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    seen, path = Losses(), tmp_path / "made" / "runs.csv"
    _, net = fit(text, seen, RunRecorder(path, "mine"), log_every_n_steps=1)
    (row,) = rows(path)
    assert tuple(row) == RUN_COLUMNS
    d, layers, rate, tokens = 16, 2, 4, STEPS * 4 * 16
    assert int(row["n_total"]) == net.model.n_total == (8 * rate + 4) * d * d * layers
    assert int(row["n_active"]) == net.model.n_active == 12 * d * d * layers
    assert int(row["n_tokens"]) == tokens
    assert int(row["flops"]) == net.model.flops_per_token * tokens
    assert float(row["loss"]) == pytest.approx(sum(seen.train[-3:]) / 3, rel=1e-6)
    assert float(row["loss_val"]) == pytest.approx(seen.val, rel=1e-6)
    assert float(row["seconds"]) > 0
    told = {"run_name": "mine", "granularity": "2", "expansion_rate": "4", "d_model": "16", "n_layers": "2"}
    told |= {"steps": str(STEPS), "router": "token_choice", "seed": "7", "version": __version__}
    assert {name: row[name] for name in told} == told


def test_dense_run_has_no_router_and_a_name_is_made_for_it(text: str, tmp_path: Path) -> None:
    fit(text, RunRecorder(tmp_path / "runs.csv"), net=module(decoder={**module().decoder.dense_twin().to_dict()}))
    (row,) = rows(tmp_path / "runs.csv")
    assert row["run_name"] == "d16-l2-dense-6steps"
    assert (row["router"], row["expansion_rate"], row["granularity"]) == ("dense", "1", "1")
    assert row["n_total"] == row["n_active"]


def test_resumed_run_leaves_the_row_of_an_uninterrupted_one(text: str, tmp_path: Path) -> None:
    # the last validation is before the checkpoint
    fit(text, RunRecorder(tmp_path / "runs.csv", "whole"), val_check_interval=3)
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    killed = StopAfter(5, OSError)
    with pytest.raises(OSError, match="out of power"):
        fit(
            text, RunRecorder(tmp_path / "runs.csv", "resumed"), saver, killed,
            val_check_interval=3, enable_checkpointing=True,
        )  # fmt: skip
    assert [row["run_name"] for row in rows(tmp_path / "runs.csv")] == ["whole"]
    resumed = RunRecorder(tmp_path / "runs.csv", "resumed")
    fit(text, resumed, ckpt=tmp_path / "step=4.ckpt", val_check_interval=3)
    whole, again = rows(tmp_path / "runs.csv")
    assert {**again, "run_name": "", "seconds": ""} == {**whole, "run_name": "", "seconds": ""}
    assert float(again["seconds"]) > 0


def test_run_killed_between_its_last_checkpoint_and_its_row_leaves_it_when_resumed(text: str, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=STEPS, save_top_k=-1, filename="{step}")
    # after the last checkpoint nothing is validated any more
    fit(text, RunRecorder(tmp_path / "whole.csv", "a"), saver, enable_checkpointing=True, val_check_interval=4)
    fit(text, RunRecorder(tmp_path / "late.csv", "a"), ckpt=tmp_path / f"step={STEPS}.ckpt", val_check_interval=4)
    whole, late = rows(tmp_path / "whole.csv") + rows(tmp_path / "late.csv")
    assert {**late, "seconds": "", "seed": ""} == {**whole, "seconds": "", "seed": ""}


def test_run_that_stops_early_leaves_no_row_and_says_so(text: str, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=f"stopped after 4 of {STEPS} steps: .*runs.csv gets no row"):
        fit(text, RunRecorder(tmp_path / "runs.csv"), StopAfter(4))
    assert not (tmp_path / "runs.csv").exists()


def test_dry_run_leaves_no_row(text: str, tmp_path: Path) -> None:
    fit(text, RunRecorder(tmp_path / "runs.csv"), fast_dev_run=2, max_steps=-1, max_epochs=1)
    assert not (tmp_path / "runs.csv").exists()


def test_law_is_compared_with_the_run(text: str, tmp_path: Path) -> None:
    law = FineGrainedMoELaw(a=10.0, alpha=0.2, b=20.0, beta=0.2, g=1.0, gamma=0.5, c=0.5, expansion_rate=4)
    law.save(tmp_path / "law.json")
    logger = CSVLogger(tmp_path)
    trainer, net = fit(
        text, RunRecorder(tmp_path / "runs.csv", law=str(tmp_path / "law.json")), logger=logger, log_every_n_steps=1
    )
    (row,) = rows(tmp_path / "runs.csv")
    predicted = law(net.model.n_total, STEPS * 4 * 16, 2)
    assert trainer.callback_metrics["moe/predicted_loss"].item() == pytest.approx(predicted)
    assert trainer.callback_metrics["moe/loss_gap"].item() == pytest.approx(float(row["loss"]) - predicted, abs=1e-6)
    logged = [line["moe/loss_gap"] for line in rows(Path(logger.log_dir) / "metrics.csv") if line.get("moe/loss_gap")]
    assert float(logged[-1]) == pytest.approx(float(row["loss"]) - predicted, abs=1e-6)


def test_law_of_another_expansion_rate_is_warned_about(text: str, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="fitted at expansion rate 64 .* this run has 4"):
        fit(text, RunRecorder(tmp_path / "runs.csv", law="moe64"))


def test_law_nobody_knows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a file or one of moe64"):
        RunRecorder(tmp_path / "runs.csv", law="moe65")


def test_empty_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run_name that is not empty"):
        RunRecorder(tmp_path / "runs.csv", "")


def test_file_that_is_no_table_of_runs_is_refused_before_training(text: str, tmp_path: Path) -> None:
    (tmp_path / "runs.csv").write_text("a,b\n1,2\n")
    net = module()
    with pytest.raises(ValueError, match="is no table of runs"):
        fit(text, RunRecorder(tmp_path / "runs.csv"), net=net)
    assert net.tokens_seen == 0


def test_other_modules_are_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="RunRecorder records runs of a MoEScalingModule, got a ImageClassifier"):
        fit(text, RunRecorder(tmp_path / "runs.csv"), net=ImageClassifier(SmallCNN()))


def test_module_that_counts_nothing_leaves_no_row(text: str, tmp_path: Path) -> None:
    class Own(MoEScalingModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self(batch[0]).square().mean()

    with pytest.warns(UserWarning, match=r"Own has counted no tokens .*runs.csv gets no row"):
        fit(text, RunRecorder(tmp_path / "runs.csv"), net=Own(module().decoder))
    assert not (tmp_path / "runs.csv").exists()


def test_second_fit_of_a_module_is_told_from_a_resumed_one(text: str, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    _, net = fit(text, saver, RunRecorder(tmp_path / "runs.csv", "first"), enable_checkpointing=True)
    fit(text, RunRecorder(tmp_path / "runs.csv", "resumed"), ckpt=tmp_path / "step=4.ckpt")
    with pytest.warns(UserWarning, match=f"has been trained on {STEPS * 4 * 16} tokens before this fit"):
        fit(text, RunRecorder(tmp_path / "runs.csv", "second"), net=net)
    tokens = [int(row["n_tokens"]) / (STEPS * 4 * 16) for row in rows(tmp_path / "runs.csv")]
    assert tokens == [1, 1, 2]


def test_recorder_used_twice_begins_anew(text: str, tmp_path: Path) -> None:
    recorder = RunRecorder(tmp_path / "runs.csv", "a")
    fit(text, recorder)
    fit(text, recorder, limit_val_batches=0)
    (row,) = rows(tmp_path / "runs.csv")
    assert row["loss_val"] == ""
