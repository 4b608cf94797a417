"""Gradient dominance over a training: when it is recorded, that training does not notice, and that it survives."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from exit_networks import CLASSES
from helpers import run_ddp
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_eff.early_exit.analysis import GradientDominance, gradient_dominance
from lightning_eff.early_exit.module import EarlyExitModule
from lightning_eff.early_exit.training.losses import ExitLosses
from lightning_eff.early_exit.training.phases import Phase

HERE = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files go beside what the trainer logs, here the working directory."""
    monkeypatch.chdir(tmp_path)


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(48, 4, generator=generator), torch.randint(0, CLASSES, (48,), generator=generator)


def loader(shuffle: bool = False) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*data()), batch_size=16, shuffle=shuffle)


def module(regime: Any = "mixed", *, dropout: float = 0.5, **options: Any) -> EarlyExitModule:
    torch.manual_seed(0)
    backbone = nn.Sequential(
        nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU()),
        nn.Sequential(nn.Linear(8, 8), nn.Dropout(dropout), nn.ReLU()),
        nn.Linear(8, CLASSES),
    )
    return EarlyExitModule(backbone, ["0", "1"], CLASSES, regime, example_input=torch.zeros(2, 4), **options)


def trainer(*callbacks: pl.Callback, epochs: int = 4, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        **options,
    )


def fitted(callback: GradientDominance, regime: Any = "mixed", *, epochs: int = 4, **options: Any) -> EarlyExitModule:
    one = module(regime, **options)
    torch.manual_seed(1)
    trainer(callback, epochs=epochs).fit(one, loader(shuffle=True), loader())
    return one


def when(callback: GradientDominance) -> list[tuple[int, int, int, str]]:
    return [(one["epoch"], one["step"], one["phase"], one["train"]) for one in callback.history]


def test_every_epoch_is_recorded_on_its_first_batch() -> None:
    callback = GradientDominance()
    fitted(callback)
    assert when(callback) == [(0, 0, 0, "backbone"), (1, 3, 0, "backbone"), (2, 6, 1, "all"), (3, 9, 1, "all")]
    assert callback.history[0]["groups"] == ["0", "1", "2", "backbone"]
    assert callback.history[0]["outputs"] == ["0", "1", "final"]
    assert callback.report.switches == [2]
    assert {path.name for path in Path("early_exit").iterdir()} == {
        f"gradient_dominance.{suffix}" for suffix in ("md", "csv", "json", "png")
    }


def test_every_nth_epoch_is_recorded_and_the_beginning_of_every_phase() -> None:
    callback = GradientDominance(every_n_epochs=3)
    fitted(callback, epochs=8)
    assert when(callback) == [
        (0, 0, 0, "backbone"),
        (3, 9, 0, "backbone"),
        (4, 12, 1, "all"),
        (6, 18, 1, "all"),
    ]


def test_the_first_record_is_the_measure_on_the_first_batch() -> None:
    callback = GradientDominance(measure="cosine", groups=["1"])
    trainer(callback, epochs=1).fit(module("joint", dropout=0.0), loader(), loader())
    x, y = data()
    network = module("joint", dropout=0.0).network.train()  # batch norms as in training
    expected = gradient_dominance(network, x[:16], y[:16], measure="cosine", groups=["1"])
    assert callback.history[0]["values"] == expected.values.tolist()
    assert callback.history[0]["groups"] == ["1"]
    assert callback.report.results[0].measure == "cosine"


@pytest.mark.parametrize("regime", ["mixed", "disjoint"])
def test_training_does_not_notice(regime: str) -> None:
    plain = module(regime)
    torch.manual_seed(1)
    trainer().fit(plain, loader(shuffle=True), loader())
    watched = fitted(GradientDominance(), regime)
    for (name, one), other in zip(plain.state_dict().items(), watched.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_weights_are_those_of_the_phase_where_it_trains_everything() -> None:
    weights = [0.0, 1.0, 3.0]
    regime = [Phase("backbone", 1), Phase("all", 1, loss_weights=weights), Phase("heads", 1)]
    callback, equal = GradientDominance(), GradientDominance(weights=[1, 1, 1])
    fitted(callback, regime, epochs=3)
    fitted(equal, regime, epochs=3)
    assert when(callback) == [(0, 0, 0, "backbone"), (1, 3, 1, "all"), (2, 6, 2, "heads")]
    assert callback.history[1]["values"][0][0] == 0
    assert equal.history[1]["values"][0][0] != 0
    for place in (0, 2):  # elsewhere they are all the same
        torch.testing.assert_close(*(torch.tensor(c.history[place]["values"]) for c in (callback, equal)))


def test_the_criterion_is_that_of_the_module() -> None:
    class Nothing(nn.Module):
        def forward(self, logits: Tensor, target: Tensor) -> Tensor:
            return 0 * logits.sum()

    callback = GradientDominance()
    fitted(callback, "joint", epochs=1, losses=ExitLosses(criterion=Nothing()))
    assert all(math.isnan(value) for row in callback.history[0]["values"] for value in row)


@pytest.mark.parametrize("last", [0, 1, 2])
def test_a_resumed_run_has_the_history_of_one_that_went_through(last: int, tmp_path: Path) -> None:
    whole = GradientDominance()
    save = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    torch.manual_seed(1)
    trainer(whole, save).fit(module(), loader(), loader())
    resumed = GradientDominance()
    trainer(resumed).fit(module(), loader(), loader(), ckpt_path=tmp_path / f"epoch={last}.ckpt")
    assert when(resumed) == when(whole)
    for one, other in zip(resumed.history[: last + 1], whole.history, strict=False):
        assert one == other


def test_a_run_that_goes_on_from_the_last_batch_of_a_phase_is_told_the_new_phase(tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    trainer(GradientDominance(every_n_epochs=2), save).fit(module(), loader(), loader())
    resumed = GradientDominance(every_n_epochs=2)
    trainer(resumed).fit(module(), loader(), loader(), ckpt_path=tmp_path / "step=6.ckpt")
    assert when(resumed) == [(0, 0, 0, "backbone"), (2, 6, 1, "all")]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_an_epoch_is_not_recorded_twice_by_a_run_that_goes_on_inside_of_it(tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    trainer(GradientDominance(), save).fit(module(), loader(), loader())
    resumed = GradientDominance()
    trainer(resumed).fit(module(), loader(), loader(), ckpt_path=tmp_path / "step=4.ckpt")
    assert [epoch for epoch, *_ in when(resumed)] == [0, 1, 2, 3]


def test_a_new_fit_begins_a_new_history() -> None:
    callback = GradientDominance()
    fitted(callback, "joint", epochs=3)
    fitted(callback, "joint", epochs=2)
    assert [epoch for epoch, *_ in when(callback)] == [0, 1]


def test_table_and_figure_are_written(tmp_path: Path) -> None:
    callback = GradientDominance(dirpath=tmp_path / "new")
    fitted(callback)
    with (tmp_path / "new" / "gradient_dominance.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 4
    assert list(rows[0]) == ["epoch", "step", "phase", "phase trains", "gradient of", "by 0", "by 1", "by final"]
    assert float(rows[9]["by 1"]) == callback.history[2]["values"][1][1]
    assert (tmp_path / "new" / "gradient_dominance.png").stat().st_size > 5_000


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_other_precisions_are_measured(precision: str) -> None:
    callback = GradientDominance()
    one = module("joint")
    trainer(callback, epochs=1, precision=precision).fit(one, loader(), loader())
    values = torch.tensor(callback.history[0]["values"])
    torch.testing.assert_close(values.sum(1), torch.ones(4), rtol=0, atol=1e-6)


def test_other_modules_and_arguments_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match="outputs of an EarlyExitModule, got a BoringModel"):
        trainer(GradientDominance()).fit(BoringModel())
    with pytest.raises(ValueError, match="every_n_epochs must be a whole number >= 1, got 0"):
        GradientDominance(0)
    with pytest.raises(ValueError, match="measure must be one of share, cosine, norm, got 'angle'"):
        GradientDominance(measure="angle")
    with pytest.raises(ValueError, match="expected 3 finite weights >= 0, one an output"):
        trainer(GradientDominance(weights=[1.0, math.nan, 1.0])).fit(module(), [], loader())  # no batch is asked for


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of jsonargparse, about names that Lightning uses too
def test_it_is_built_from_plain_data() -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(pl.Callback, "callback")
    config = {"every_n_epochs": 2, "dirpath": "out", "groups": ["layer1"], "weights": [1, 2]}
    path = "lightning_eff.early_exit.analysis.GradientDominance"
    callback = parser.instantiate_classes(
        parser.parse_object({"callback": {"class_path": path, "init_args": config}})
    ).callback
    assert isinstance(callback, GradientDominance)
    assert (callback.every_n_epochs, callback.groups, callback.weights) == (2, ["layer1"], [1, 2])


SCRIPT = f"""
import os, sys; sys.path[:0] = [{str(HERE)!r}, {str(HERE / "analysis")!r}]
import torch, lightning.pytorch as pl
from test_callback import *
callback, one = GradientDominance(every_n_epochs=2, dirpath="out"), module()
run = trainer(callback, devices=int(os.environ["DEVICES"]), strategy="ddp")
run.fit(one, loader(shuffle=True), loader())
torch.save({{"weights": {{n: p.detach() for n, p in one.named_parameters()}}, "when": when(callback)}},
           f"rank{{run.global_rank}}.pt")
"""


def test_two_processes_keep_in_step(tmp_path: Path) -> None:
    run_ddp(SCRIPT, tmp_path)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["when"] == second["when"] == [(0, 0, 0, "backbone"), (2, 4, 1, "all")]
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name]), name
    assert (tmp_path / "out" / "gradient_dominance.png").exists()
