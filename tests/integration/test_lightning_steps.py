"""Every technique with several batches a step, clipped gradients, and schedules that need the number of steps."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler, LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from lightning_cases import CASES, NOISE, PRIVATE_CASES, PRUNING_CASES, Convolutional
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from lightning_eff.early_exit import EarlyExitModule
from lightning_eff.steps import planned_steps

MANUAL = ["AdaGlimpseModule", "LidarSaSSelector"]
pytestmark = [
    *NOISE,
    pytest.mark.filterwarnings("ignore:When using `Trainer.accumulate_grad_batches != 1.` and overriding"),
]


@pytest.mark.parametrize("name", [*PRUNING_CASES, "LidarSaSCallback"])
def test_accumulated_batches_equal_large_ones(name: str) -> None:
    case = CASES[name]
    size = case.batch_size
    large, _ = case.fit(loader=case.loader(batch_size=size))
    small, trainer = case.fit(loader=case.loader(batch_size=size // 2), accumulate_grad_batches=2)
    assert case.done(small, trainer)
    torch.testing.assert_close(case.answer(small, case.batch()), case.answer(large, case.batch()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [*PRUNING_CASES, "LidarSaSCallback"])
def test_a_schedule_of_accumulation_equals_a_growing_batch(name: str) -> None:
    class Growing(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            size = case.batch_size // 2
            return case.loader(batch_size=size if self.trainer.current_epoch == 0 else 2 * size)

        def val_dataloader(self) -> Any:
            return case.loader()

    case = CASES[name]
    grown = case.module()
    case.trainer(reload_dataloaders_every_n_epochs=1).fit(grown, datamodule=Growing())
    scheduled, trainer = case.fit(
        GradientAccumulationScheduler({1: 2}), loader=case.loader(batch_size=case.batch_size // 2)
    )
    assert case.done(scheduled, trainer)
    torch.testing.assert_close(
        case.answer(scheduled, case.batch()), case.answer(grown, case.batch()), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", [*PRIVATE_CASES, *MANUAL])
@pytest.mark.parametrize("scheduled", [False, True])
def test_accumulation_is_refused_where_somebody_else_makes_the_steps(name: str, scheduled: bool) -> None:
    private = r"take the batch size you want to train with and max_physical_batch_size="
    message = private if name in PRIVATE_CASES else r"not supported for\s+manual optimization"
    options = {} if scheduled else {"accumulate_grad_batches": 2}
    callbacks = [GradientAccumulationScheduler({0: 2})] if scheduled else []
    with pytest.raises((ValueError, RuntimeError, MisconfigurationException), match=message):
        CASES[name].fit(*callbacks, **options)


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize(("name", "end"), [("MoEScalingModule", 0.05 * 0.1), ("DPNTKGenerator", 0.0)])
def test_a_cosine_ends_with_the_last_of_the_steps_of_accumulated_batches(
    name: str, end: float, scheduled: bool
) -> None:
    options = {} if scheduled else {"accumulate_grad_batches": 2}
    callbacks = [GradientAccumulationScheduler({1: 2})] if scheduled else []
    _, trainer = CASES[name].fit(*callbacks, **options)
    assert trainer.global_step == (6 if scheduled else 4)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(end, abs=1e-9)


def test_a_schedule_of_a_phase_counts_the_steps_of_a_schedule_of_accumulation() -> None:
    made: list[int] = []

    def one_cycle(optimizer: torch.optim.Optimizer, total_steps: int) -> OneCycleLR:
        made.append(total_steps)
        return OneCycleLR(optimizer, 0.1, total_steps)

    module = EarlyExitModule(
        Convolutional().net, ["1"], 3, regime="mixed", lr_scheduler=partial(one_cycle, total_steps=None)
    )
    case = CASES["EarlyExitModule"]
    _, trainer = case.fit(GradientAccumulationScheduler({1: 2, 3: 4}), module=module, max_epochs=5)
    assert made == [4 + 2, 2 + 1 + 1] or made == [4 + 2 + 2, 1 + 1]
    assert trainer.global_step == sum(made)


def test_steps_are_counted_up_to_the_limits_of_the_trainer() -> None:
    case = CASES["MoEScalingModule"]
    found = {}
    for limits in ({}, {"max_steps": 5}, {"max_epochs": -1, "max_steps": 5}, {"limit_train_batches": 3}):
        trainer = case.trainer(GradientAccumulationScheduler({1: 2}), **{"max_epochs": 3, **limits})
        trainer.strategy.connect(case.module())
        trainer._data_connector.attach_data(case.module(), case.loader())
        trainer.training = True
        found[str(limits)] = planned_steps(trainer)
    assert list(found.values()) == [8, 5, 5, 3 + 2 + 2]


class Norms(pl.Callback):
    """Of the gradient that every step took."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        grads = [one.grad for one in pl_module.parameters() if one.grad is not None]
        self.seen.append(float(nn.utils.get_total_norm(grads)))


@pytest.mark.parametrize("name", [name for name in CASES if name not in MANUAL])
def test_gradients_are_clipped_also_after_what_changes_parameters(name: str) -> None:
    case, norms = CASES[name], Norms()
    module, trainer = case.fit(norms, gradient_clip_val=1e-3)
    assert case.done(module, trainer)
    assert norms.seen == pytest.approx([1e-3] * trainer.global_step, rel=1e-2)


@pytest.mark.parametrize("name", MANUAL)
def test_gradients_that_the_trainer_never_sees_are_not_clipped_by_it(name: str) -> None:
    with pytest.raises(MisconfigurationException, match="gradient clipping is not supported for manual optimization"):
        CASES[name].fit(gradient_clip_val=1e-3)


@pytest.mark.parametrize("name", [name for name in CASES if name != "LidarSaSSelector"])
def test_learning_rates_are_monitored_at_every_step(name: str, tmp_path: Path) -> None:
    case, logger = CASES[name], CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    module, trainer = case.fit(LearningRateMonitor("step"), logger=logger, log_every_n_steps=1)
    assert case.done(module, trainer)
    header, *rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    [column, *_] = [place for place, key in enumerate(header.split(",")) if key.startswith("lr-")]
    logged = [row.split(",")[column] for row in rows]
    batches = trainer.fit_loop.epoch_loop.total_batch_idx + 1
    assert sum(map(bool, logged)) == batches
