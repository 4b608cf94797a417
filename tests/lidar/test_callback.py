"""LidarSaSCallback: lines selected for a network in training, whose run it does not change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from adding import LINES, SEEN, Adding, loader, trainer, values
from helpers import run_ddp
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_eff.lidar.callback import LidarSaSCallback
from lightning_eff.lidar.report import LineSelection
from lightning_eff.lidar.settings import LineGameOptions, Spread
from lightning_eff.lidar.values import EstimationOptions

HERE = Path(__file__).parent


class Training(pl.LightningModule):
    """Trains the offset of an `Adding` network; dropout and BatchNorm would notice a wrong mode."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Adding()
        self.noise = nn.Dropout(0.5)

    def forward(self, rgb: Tensor, sparse: Tensor) -> Tensor:
        depth: Tensor = self.net(rgb, sparse)
        return depth

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert self.net.training
        scale = self.noise(torch.ones(4)).mean() + torch.rand(())
        return scale * (self.net.offset - 1).square() + 0 * self.net.norm(batch["sparse"]).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self(batch["rgb"], batch["sparse"]).mean(), batch_size=len(batch["rgb"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def callback(**options: Any) -> LidarSaSCallback:
    given = {"k": [3, 2], "num_lines": LINES, "estimation": EstimationOptions(budget=40), **options}
    return LidarSaSCallback(**{"game": LineGameOptions(metric="mae"), **given})


def train(*callbacks: pl.Callback, **options: Any) -> tuple[Training, pl.Trainer]:
    pl.seed_everything(0, verbose=False)
    module, run = Training(), trainer(*callbacks, **options)
    run.fit(module, loader(), loader(shuffle=False))
    return module, run


def test_lines_are_selected_at_the_end_of_a_fit() -> None:
    select = callback()
    _, run = train(select)
    assert select.result is not None
    assert select.result.lines == list(range(SEEN))
    torch.testing.assert_close(select.result.values, values(), rtol=1e-5, atol=0)
    assert select.result.selected == {3: [0, 2, 5], 2: [0, 3]}
    logged = run.callback_metrics
    assert float(logged["lidar/v_full"]) == pytest.approx(select.result.error_full)
    assert select.evaluation is not None
    best = select.evaluation.row("region", 2).errors["rmse"]
    assert float(logged["lidar/rmse/region/k2"]) == pytest.approx(best)


def test_training_ends_with_the_same_bits_as_without_it() -> None:
    plain, _ = train()
    watched, _ = train(callback(every_n_epochs=1, spread=Spread("auto")))
    assert all(
        torch.equal(a, b) for a, b in zip(plain.state_dict().values(), watched.state_dict().values(), strict=True)
    )
    assert watched.net.training


def test_lines_are_selected_every_few_epochs_and_not_twice_in_the_last(tmp_path: Path) -> None:
    made: list[int] = []

    class Counting(LidarSaSCallback):
        def _run(self, trainer: pl.Trainer, pl_module: pl.LightningModule, folder: str) -> None:
            made.append(trainer.current_epoch)
            super()._run(trainer, pl_module, folder)

    select = Counting(
        [2],
        LINES,
        every_n_epochs=2,
        estimation=EstimationOptions(budget=40),
        dirpath=tmp_path,
        game=LineGameOptions(metric="mae"),
    )
    _, run = train(select, max_epochs=4)
    assert made == [1, 3]
    assert float(run.callback_metrics["lidar/rank_stability"]) == 1.0
    assert {"lines.json", "errors.md", "errors.png", "values.png"} <= {p.name for p in (tmp_path / "epoch=1").iterdir()}


def test_frames_may_come_from_a_loader_of_its_own() -> None:
    select = callback(calibration=loader(2))
    run = trainer(select, max_epochs=1)
    run.fit(Training(), loader(), loader(shuffle=False))
    assert select.result is not None
    assert set(select.result.per_frame) == {"frame 0", "frame 1"}


def test_no_frames_are_refused_before_training() -> None:
    run = trainer(callback(), limit_val_batches=0)
    with pytest.raises(ValueError, match="calibration="):
        run.fit(Training(), loader(), loader(shuffle=False))
    assert run.global_step == 0


def test_a_checkpoint_carries_the_last_selection(tmp_path: Path) -> None:
    # the callbacks are asked for their state before the checkpoint of the second epoch
    train(callback(every_n_epochs=1), ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1))
    again = callback(every_n_epochs=1)
    again.load_state_dict(
        next(
            state
            for name, state in torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["callbacks"].items()
            if name.startswith("LidarSaSCallback")
        )
    )
    assert again.result is not None
    assert again.result.selected == {3: [0, 2, 5], 2: [0, 3]}


@pytest.mark.parametrize("every", [0, 1.5, True])
def test_epochs_that_cannot_be_counted_are_refused(every: Any) -> None:
    with pytest.raises(ValueError, match="every_n_epochs"):
        callback(every_n_epochs=every)


DDP = f"""
import sys; sys.path.insert(0, {str(HERE)!r})
import os
from test_callback import Training, callback, loader, trainer
import lightning.pytorch as pl
pl.seed_everything(0, verbose=False)
devices = int(os.environ.get("DEVICES", "1"))
select = callback(calibration=loader(3, 1, shuffle=False))
run = trainer(select, strategy="ddp_find_unused_parameters_true", devices=devices, max_epochs=1)
run.fit(Training(), loader(), loader(shuffle=False))
if run.is_global_zero:
    select.result.save(sys.argv[1])
"""


@pytest.mark.slow
def test_two_processes_share_the_frames(tmp_path: Path) -> None:
    run_ddp(DDP, tmp_path, str(tmp_path / "two.json"))
    found = LineSelection.load(tmp_path / "two.json")
    torch.testing.assert_close(found.values, values(3), rtol=1e-5, atol=0)
    assert found.forwards == 3 * 40
