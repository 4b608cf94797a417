"""Every technique under the tuners: a fit after a search is the fit with what was found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner, batch_size_scaling
from lightning_cases import CASES, NOISE, PRIVATE_CASES, Case

pytestmark = NOISE

WITH_RATE = ["ShapleyPruningCallback", "DirichletPruneCallback", "RandomChannelPruningCallback", "ReplaceFFN",
             "LidarSaSCallback"]  # fmt: skip
WITHOUT_RATE = ["EarlyExitModule", "MoEScalingModule", "AdaGlimpseModule", "LidarSaSSelector"]


@pytest.fixture(autouse=True)
def _no_collecting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_size_scaling, "garbage_collection_cuda", lambda: None)  # takes seconds on any machine


class Data(pl.LightningDataModule):
    """Data whose batch size can be set."""

    def __init__(self, case: Case, batch_size: int) -> None:
        super().__init__()
        self.case, self.batch_size = case, batch_size

    def train_dataloader(self) -> Any:
        return self.case.loader(batch_size=self.batch_size)

    def val_dataloader(self) -> Any:
        return self.case.loader()


def same(case: Case, one: Any, other: Any) -> bool:
    return torch.equal(case.answer(one, case.batch()), case.answer(other, case.batch()))


@pytest.mark.parametrize("name", [name for name in CASES if name not in (*PRIVATE_CASES, "DPNTKGenerator")])
def test_a_fit_whose_batch_size_was_searched_is_the_fit_of_that_batch_size(name: str, tmp_path: Path) -> None:
    case, finder = CASES[name], BatchSizeFinder(max_trials=2, steps_per_trial=2)
    searched, data = case.module(), Data(case, batch_size=1)
    trainer = case.trainer(finder, first=True, default_root_dir=tmp_path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        trainer.fit(searched, datamodule=data)
    assert data.batch_size == finder.optimal_batch_size == 4
    assert case.done(searched, trainer)
    plain, _ = case.fit(loader=case.loader(batch_size=4))
    assert same(case, searched, plain)


@pytest.mark.parametrize("name", WITH_RATE)
def test_a_fit_whose_learning_rate_was_searched_is_the_fit_of_that_learning_rate(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    finder = LearningRateFinder(1e-4, 1e-1, num_training_steps=20, early_stop_threshold=None)
    several = {"loader": case.loader(batch_size=case.batch_size // 2), "max_epochs": 6}  # for so many steps
    searched, trainer = case.fit(finder, first=True, default_root_dir=tmp_path, **several)
    assert case.done(searched, trainer)
    found = finder.optimal_lr.suggestion()
    assert searched.lr == found
    plain = case.module()
    plain.lr = found
    case.fit(module=plain, **several)
    assert same(case, searched, plain)


@pytest.mark.parametrize("name", PRIVATE_CASES)
@pytest.mark.parametrize("finder", [BatchSizeFinder, LearningRateFinder])
def test_searches_that_no_epsilon_covers_are_refused(name: str, finder: Any) -> None:
    with pytest.raises(ValueError, match="a tuner chooses by training losses that epsilon does not cover"):
        CASES[name].trainer(finder()).fit(CASES[name].module(), datamodule=Data(CASES[name], 8))


@pytest.mark.parametrize("name", WITHOUT_RATE)
def test_a_search_names_the_learning_rate_that_is_missing(name: str) -> None:
    case = CASES[name]
    with pytest.raises(AttributeError, match=r"should have one of these fields: .'lr', 'learning_rate'"):
        Tuner(case.trainer()).lr_find(case.module(), case.loader(), case.loader())


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
def test_a_generator_is_searched_for_after_its_release(tmp_path: Path) -> None:
    case = CASES["DPNTKGenerator"]
    with pytest.raises(RuntimeError, match=r"needs model.release.data. beforehand"):
        Tuner(case.trainer()).lr_find(case.module(), case.loader())
    module = case.module()
    module.release(case.data())
    before = {name: one.clone() for name, one in module.state_dict().items()}
    found = Tuner(case.trainer(default_root_dir=tmp_path, max_epochs=10)).lr_find(
        module, num_training=40, early_stop_threshold=None, min_lr=1e-4, max_lr=1e-1
    )
    assert module.lr == found.suggestion()
    assert all(torch.equal(one, before[name]) for name, one in module.state_dict().items())
