"""EarlyExitModule with other parts of Lightning: precision, compilation, averaged weights, accumulation, monitors."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from exits_on_digits import Diary, data, fixed_loader, images, module, same, state, trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateMonitor, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from lightning_eff.early_exit.training.phases import Phase

SHARDING = "ignore:You're using the WeightAveraging callback:UserWarning"


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("regime", ["mixed", "disjoint"])
def test_other_precisions_go_through_both_phases(precision: Any, regime: str) -> None:
    net, diary = module(regime=regime, thresholds=0.2), Diary()
    running = trainer(diary, precision=precision, max_epochs=2)
    running.fit(net, data())
    assert [part for _, part, *_ in diary.batches] == ["b"] * 3 + [{"mixed": "bh", "disjoint": "h"}[regime]] * 3
    assert running.callback_metrics["val/loss"].isfinite()
    answers = running.predict(net, data())
    assert all(one.confidence.dtype == torch.float32 for one in answers)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler looks at it
@pytest.mark.parametrize("regime", ["mixed", "disjoint"])
def test_a_compiled_module_trains_like_any_other(regime: str) -> None:
    nets = [module(regime=regime, example_input=images()) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    loader = fixed_loader()
    for net in (nets[0], torch.compile(nets[1], backend="aot_eager")):
        trainer(max_epochs=2).fit(net, loader, loader)
    one, other = state(nets[0].network), state(nets[1].network)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings(SHARDING)
@pytest.mark.parametrize("example", [True, False])
def test_averaged_weights_cover_exits_and_backbone(example: bool) -> None:
    class Keep(pl.Callback):
        steps: list[dict[str, torch.Tensor]] = []

        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            self.steps.append(state(pl_module.network))

    keep = Keep()
    keep.steps = []
    net = module(regime="mixed", example_input=images() if example else None)
    trainer(keep, EMAWeightAveraging(decay=0.5), max_epochs=2, limit_train_batches=2).fit(net, data())
    last = state(net.network)
    for name in ("heads.0.layers.weight", "backbone.layers.conv1.weight"):
        average = keep.steps[0][name]
        for step in keep.steps[1:]:
            average = 0.5 * average + 0.5 * step[name]
        torch.testing.assert_close(last[name], average)


def test_stochastic_averages_of_the_last_phase_cover_exits_and_backbone() -> None:
    net, diary = module(regime="mixed", example_input=images(), optimizer=partial(torch.optim.SGD, lr=0.1)), Diary()
    averaging = StochasticWeightAveraging(0.05, swa_epoch_start=3, annealing_epochs=1)
    trainer(diary, averaging, max_epochs=4).fit(net, data())
    # behind the fit BatchNorm's statistics are estimated anew, without gradients
    assert [part for _, part, *_ in diary.batches if part] == ["b"] * 6 + ["bh"] * 6
    last = state(net.network)
    assert not torch.equal(last["heads.0.layers.weight"], diary.states[3]["heads.0.layers.weight"])


def test_stochastic_averaging_would_ruin_a_backbone_that_stands_still() -> None:
    averaging = StochasticWeightAveraging(0.05, swa_epoch_start=3)
    with pytest.raises(ValueError, match="use EMAWeightAveraging"):
        trainer(averaging).fit(module(regime="disjoint", example_input=images()), data())


def test_copies_made_before_the_exits_were_built_are_refused() -> None:
    averaging = StochasticWeightAveraging(0.05, swa_epoch_start=3)
    with pytest.raises(ValueError, match="copied the module before the exits were built"):
        trainer(averaging).fit(module(regime="mixed"), data())


def test_accumulated_batches_equal_large_ones() -> None:
    class NoNorm(nn.Sequential):
        def __init__(self) -> None:
            torch.manual_seed(0)
            super().__init__(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))

    runs = []
    for batches, size, accumulate in ((2, 32, 1), (4, 16, 2)):
        net = module(backbone=NoNorm(), exits=["2"], optimizer=partial(torch.optim.SGD, lr=0.1), example_input=images())
        loader = fixed_loader(batches, size)
        diary = Diary()
        trainer(diary, accumulate_grad_batches=accumulate, limit_train_batches=None).fit(net, loader, loader)
        assert [part for _, part, *_ in diary.batches] == ["b"] * 4 + ["bh"] * 4
        runs.append(state(net.network))
    for name in runs[0]:
        torch.testing.assert_close(runs[0][name], runs[1][name])


def test_the_learning_rate_of_every_phase_is_monitored(tmp_path: Path) -> None:
    regime = [
        Phase("backbone", 1, partial(torch.optim.SGD, lr=0.1)),
        Phase("all", 1, partial(torch.optim.AdamW, lr=0.02), partial(CosineAnnealingLR, T_max=None)),
    ]
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    monitor = LearningRateMonitor("step")
    trainer(monitor, logger=logger, log_every_n_steps=1, max_epochs=2).fit(module(regime=regime), data())
    logged = (Path(logger.log_dir) / "metrics.csv").read_text()
    assert "lr-SGD" in logged
    assert "lr-AdamW" in logged
    assert "early_exit/phase" in logged


def test_one_batch_of_everything_runs() -> None:
    pl.Trainer(fast_dev_run=True, accelerator="cpu", logger=False, enable_progress_bar=False).fit(
        module(regime="joint"), data()
    )


def test_gradients_of_every_phase_are_clipped() -> None:
    class Norms(pl.Callback):
        of_phase: dict[str, list[float]] = {}

        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            grads = [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
            norm = nn.utils.get_total_norm(grads).item()
            self.of_phase.setdefault(pl_module.phase.train, []).append(norm)

    norms = Norms()
    trainer(norms, gradient_clip_val=0.01, max_epochs=2).fit(module(regime="disjoint"), data())
    assert norms.of_phase == {part: pytest.approx([0.01] * 3, rel=1e-3) for part in ("backbone", "heads")}


def test_progress_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    trainer(enable_progress_bar=True, max_epochs=2).fit(module(), data())
    shown = capsys.readouterr()
    assert "val/accuracy@50" in shown.out + shown.err


def test_a_fitted_module_can_be_copied_and_goes_on_alone() -> None:
    net = module(regime="disjoint")
    trainer(max_epochs=2, limit_train_batches=1).fit(net, data())
    twin = copy.deepcopy(net)
    before = state(net.network)
    trainer(max_epochs=2, limit_train_batches=1).fit(twin, data())
    assert same(before, state(net.network))
    assert not same(before, state(twin.network))
