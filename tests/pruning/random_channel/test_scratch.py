"""Narrow networks are built with fresh weights, trained for a while, and the best goes on."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_eff.data import DigitsDataModule
from lightning_eff.models import ImageClassifier, SmallCNN
from lightning_eff.pruning.random_channel import ScratchResult, config_of, sample_configs, search_from_scratch
from lightning_eff.pruning.random_channel.journal import Journal
from lightning_eff.pruning.random_channel.scratch import _rungs
from lightning_eff.pruning.settings import Layers
from lightning_eff.surgery import ChannelGraph

QUICK: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "limit_train_batches": 3, "limit_val_batches": 2}


def whole() -> ImageClassifier:
    return ImageClassifier(SmallCNN(width=8), lr=0.01, example_input_shape=[1, 8, 8])


def run(**options: Any) -> ScratchResult:
    given = {"monitor": "val/loss", "amount": 0.5, "n": 3, "trainer_kwargs": QUICK, "progress": False}
    return search_from_scratch(whole, DigitsDataModule(), **{**given, **options})


class Watch(Callback):
    """Notes what every training begins with, in all copies of itself."""

    starts: list[dict[str, Any]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        first = pl_module.get_submodule("net.layers.conv1")
        self.starts.append(
            {
                "epoch": trainer.current_epoch,
                "step": trainer.global_step,
                "until": trainer.max_epochs,
                "sizes": [m.out_channels for m in pl_module.modules() if isinstance(m, nn.Conv2d)],
                "state": {name: tensor.clone() for name, tensor in pl_module.state_dict().items()},
                "width": first.out_channels,
            }
        )


@pytest.fixture
def watch() -> Watch:
    Watch.starts = []
    return Watch()


def test_every_candidate_starts_narrow_with_fresh_weights(watch: Watch) -> None:
    graph = ChannelGraph.from_model(whole(), torch.zeros(2, 1, 8, 8))
    configs = sample_configs(graph, 3, 0.5)
    found = run(amount=None, configs=configs, trainer_kwargs={**QUICK, "callbacks": [watch]})
    assert [start["sizes"] for start in Watch.starts] == [list(config_of(graph, row).values()) for row in configs]
    for start in Watch.starts:
        bound = 1 / math.sqrt(9 * start["sizes"][0])  # of weights that torch draws for the inputs of a convolution
        weight = start["state"]["net.layers.conv2.weight"]
        assert weight.abs().max() <= bound
        assert weight.abs().max() > 0.9 * bound
        assert not start["state"]["net.layers.norm2.running_mean"].any()
    assert [c.config for c in found.candidates] == [config_of(graph, row) for row in configs]
    assert [c.macs for c in found.candidates] == graph.macs(configs).tolist()


def test_the_best_candidate_comes_back_trained_and_can_be_trained_on(tmp_path: Path) -> None:
    found = run(dirpath=tmp_path)
    assert found.best.score == min(c.score for c in found.candidates)
    assert found.checkpoint == tmp_path / f"candidate-{found.best.number}.ckpt"
    assert {path.name for path in tmp_path.iterdir()} == {
        "candidates.csv",
        "candidates.fingerprint.json",
        found.checkpoint.name,
    }
    model, data = found.model, DigitsDataModule()
    assert isinstance(model, ImageClassifier)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    (scores,) = Trainer(**QUICK, **quiet).validate(model, data, verbose=False)
    assert scores["val/loss"] == pytest.approx(found.best.score, rel=1e-5)
    trainer = Trainer(max_epochs=2, **QUICK, **quiet, enable_checkpointing=False)
    trainer.fit(model, datamodule=data, ckpt_path=found.checkpoint)
    assert trainer.global_step == 6


def test_halving_trains_fewer_and_fewer_for_longer_and_longer(watch: Watch) -> None:
    found = run(n=5, eta=2, trainer_kwargs={**QUICK, "callbacks": [watch]})
    assert [(start["epoch"], start["step"], start["until"]) for start in Watch.starts] == [
        *[(0, 0, 1)] * 5,
        *[(1, 3, 2)] * 3,
        *[(2, 6, 4)] * 2,
        (4, 12, 8),
    ]
    assert found.stages == ["rung 0", "rung 1", "rung 2", "rung 3"]
    assert {c.number for c in found.candidates if c.stage == "rung 1"} == {c.number for c in found.top(3, "rung 0")}
    assert found.best is found.candidates[-1]
    assert found.epochs == 8
    assert found.checkpoint is None


def test_trainers_are_quiet_and_lightning_speaks_again_afterwards(caplog: pytest.LogCaptureFixture) -> None:
    level = logging.getLogger("lightning.pytorch").level
    run(n=1)
    assert not caplog.records
    assert logging.getLogger("lightning.pytorch").level == level


def test_rungs_end_with_one() -> None:
    assert _rungs(9, 3) == [9, 3, 1]
    assert _rungs(10, 3) == [10, 4, 2, 1]
    assert _rungs(7, None) == [7]
    assert _rungs(1, 2) == [1]


def test_same_seed_same_search_and_the_global_generators_are_left_alone() -> None:
    state = torch.get_rng_state()
    first, again = run(), run()
    assert [c.score for c in first.candidates] == [c.score for c in again.candidates]
    assert torch.equal(torch.get_rng_state(), state)


class Carefree(LightningDataModule):
    """Splits anew whenever it is set up, with whatever the global generator gives, and notes what was read."""

    def __init__(self) -> None:
        super().__init__()
        self.images = TensorDataset(torch.arange(100), torch.randn(100, 1, 8, 8), torch.randint(0, 10, (100,)))
        self.reads: list[dict[str, list[int]]] = []

    def setup(self, stage: str) -> None:
        self.train, self.val = random_split(self.images, [60, 40])
        self.reads.append({"train": [], "val": []})

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        part = "train" if self.trainer.training else "val"
        self.reads[-1][part] += batch[0].tolist()
        return batch[1:]

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, 20, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, 20)


def test_all_trainings_share_one_split_though_the_data_module_draws_it_without_a_seed() -> None:
    data = Carefree()
    quick = {"accelerator": "cpu", "devices": 1, "num_sanity_val_steps": 0}
    search_from_scratch(whole, data, monitor="val/loss", amount=0.5, n=2, eta=2, trainer_kwargs=quick, progress=False)
    assert len(data.reads) == 3
    assert len({tuple(read["val"]) for read in data.reads}) == 1
    trained = [sample for read in data.reads for sample in read["train"]]
    assert not set(trained) & set(data.reads[0]["val"])
    first, second, later = (read["train"][:60] for read in data.reads)
    assert first == second  # the same order for every candidate,
    assert later != first  # and another one in the next rung
    assert sorted(later) == sorted(first)


def facts(found: ScratchResult) -> list[Any]:
    """All that two runs of one search have in common."""
    return [[(c.number, c.stage, c.config, c.score) for c in found.candidates], found.epochs]


class Broken(Exception):
    """The search was broken off."""


@pytest.mark.parametrize(
    ("place", "trainings"),
    [
        ("in a training", 2),
        ("in a training", 5),
        ("behind a checkpoint", 0),
        ("behind a checkpoint", 4),
        ("behind a checkpoint", 6),
    ],
)
def test_search_that_broke_off_goes_on_and_ends_as_if_it_had_not(
    place: str, trainings: int, tmp_path: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"n": 4, "eta": 2, "trainer_kwargs": {**QUICK, "callbacks": [watch]}}
    whole_search = run(dirpath=tmp_path / "whole", **options)
    target, name = (ImageClassifier, "on_train_end") if place == "in a training" else (Journal, "add")
    original = getattr(target, name)
    calls = []

    def breaking(*args: Any) -> None:
        calls.append(1)
        if len(calls) > trainings:
            raise Broken
        original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(target, name, breaking)
        with pytest.raises(Broken):
            run(dirpath=tmp_path / "broken", **options)
    Watch.starts.clear()
    found = run(dirpath=tmp_path / "broken", **options)
    assert len(Watch.starts) == 4 + 2 + 1 - trainings
    assert facts(found) == facts(whole_search)
    assert found.notes == ([f"{trainings} trainings were found in {tmp_path / 'broken'}."] if trainings else [])
    for name, value in whole_search.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], value)
    assert {path.name for path in (tmp_path / "broken").iterdir()} == {
        path.name for path in (tmp_path / "whole").iterdir()
    }


def test_search_that_is_done_is_not_done_again(tmp_path: Path, watch: Watch) -> None:
    options = {"dirpath": tmp_path, "trainer_kwargs": {**QUICK, "callbacks": [watch]}}
    first = run(**options)
    Watch.starts.clear()
    again = run(**options)
    assert not Watch.starts
    assert facts(again) == facts(first)
    assert again.checkpoint == first.checkpoint
    assert again.checkpoint.exists()


@pytest.mark.parametrize("other", ["seed", "network", "data", "trainer", "older folder"])
def test_folder_of_another_search_is_refused_and_left_as_it_is(other: str, tmp_path: Path, watch: Watch) -> None:
    first = run(dirpath=tmp_path)
    if other == "older folder":
        (tmp_path / "candidates.csv").unlink()
        (tmp_path / "candidates.fingerprint.json").unlink()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert first.checkpoint.name in before
    lr = 0.02 if other == "network" else 0.01
    with pytest.raises(FileExistsError, match=r"of another search .* pass another folder, or delete what is in it"):
        search_from_scratch(
            lambda: ImageClassifier(SmallCNN(width=8), lr=lr, example_input_shape=[1, 8, 8]),
            DigitsDataModule(batch_size=32 if other == "data" else 64),
            monitor="val/loss",
            amount=0.5,
            n=3,
            seed=1 if other == "seed" else 0,
            trainer_kwargs={**QUICK, "callbacks": [watch], "limit_train_batches": 2 if other == "trainer" else 3},
            dirpath=tmp_path,
            progress=False,
        )
    assert not Watch.starts
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_only_a_part_of_the_module_is_narrower_where_layers_say_so(watch: Watch) -> None:
    run(layers=Layers(submodule="net", exclude=["layers.conv1"]), trainer_kwargs={**QUICK, "callbacks": [watch]})
    assert all(start["width"] == 8 for start in Watch.starts)
    assert all(sum(start["sizes"]) < 8 + 8 + 16 + 16 + 32 for start in Watch.starts)


def test_weights_may_be_drawn_by_a_function_of_ones_own(watch: Watch) -> None:
    run(
        n=1,
        initialise=lambda model: nn.init.constant_(model.get_submodule("net.layers.conv1").weight, 0.25),
        trainer_kwargs={**QUICK, "callbacks": [watch]},
    )
    assert (Watch.starts[0]["state"]["net.layers.conv1.weight"] == 0.25).all()


def test_without_an_example_the_first_training_batch_is_traced() -> None:
    found = search_from_scratch(
        lambda: ImageClassifier(SmallCNN(width=8)),
        DigitsDataModule(),
        monitor="val/accuracy",
        mode="max",
        amount=0.5,
        n=1,
        trainer_kwargs=QUICK,
        progress=False,
    )
    assert 0 < found.best.score < 1


def test_a_monitor_that_is_not_logged_is_told_with_those_that_are() -> None:
    with pytest.raises(ValueError, match=r"monitor='val_acc' was not logged: .*train/loss, val/accuracy, val/loss"):
        run(monitor="val_acc")


def test_scores_that_are_no_numbers_are_told() -> None:
    with pytest.raises(RuntimeError, match="not a single candidate has a val/loss that is a number"):
        run(initialise=lambda model: nn.init.constant_(model.get_submodule("net.layers.out").weight, math.nan))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"amount": None}, ValueError, "either amount, a fraction to remove, or configs"),
        ({"n": 0}, ValueError, "n must be a whole number >= 1, got 0"),
        ({"warm_epochs": 0}, ValueError, "warm_epochs must be a whole number >= 1, got 0"),
        ({"eta": 1}, ValueError, "eta must be a whole number >= 2, got 1"),
        ({"mode": "best"}, ValueError, "mode must be one of max, min, got 'best'"),
        ({"monitor": ""}, ValueError, "monitor must be the name of a logged quantity"),
        ({"trainer_kwargs": {"max_epochs": 3}}, ValueError, "must not set max_epochs: pass warm_epochs"),
        (
            {"trainer_kwargs": {"accelerator": "cpu", "devices": 2, "strategy": "ddp"}},
            MisconfigurationException,
            "in one process, this Trainer has 2",
        ),
    ],
)
def test_bad_arguments_are_told_before_any_work(
    options: dict[str, Any], error: type[Exception], message: str, watch: Watch
) -> None:
    with pytest.raises(error, match=message):
        run(**options)
    assert not Watch.starts
