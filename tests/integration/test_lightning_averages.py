"""Every technique under callbacks that average weights: what is averaged, in which shapes, and what is refused."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning_cases import CASES, NOISE, PRUNING_CASES
from torch import Tensor

pytestmark = NOISE


def weights(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: one.detach().clone() for name, one in module.named_parameters()}


class Weights(pl.Callback):
    """Weights after every step, and at the start of every epoch those of the module and of its average."""

    def __init__(self, averaging: Any) -> None:
        self.averaging = averaging
        self.steps: list[dict[str, Tensor]] = []
        self.starts: list[dict[str, Tensor]] = []
        self.average: dict[str, Tensor] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not batch_idx:
            self.starts.append(weights(pl_module))
            average = self.averaging._average_model
            self.average, self.steps = weights(getattr(average, "module", average)), []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        self.steps.append(weights(pl_module))


@pytest.mark.parametrize("name", CASES)
def test_exponential_averages_are_those_of_the_closed_form(name: str) -> None:
    case, averaging = CASES[name], EMAWeightAveraging(decay=0.75)
    seen = Weights(averaging)
    # a pruning callback measures the averages, so they come first; they copy what is there, so experts come first
    module, trainer = case.fit(averaging, seen, first=name in PRUNING_CASES)
    assert case.done(module, trainer)
    last = weights(module)
    for key, average in seen.average.items():  # when the last epoch began, after any cut
        for step in seen.steps:
            average = 0.75 * average + 0.25 * step[key]
        torch.testing.assert_close(last[key], average, rtol=1e-5, atol=1e-6)
    moved = [key for key in last if not torch.equal(last[key], seen.steps[-1][key])]
    assert bool(moved) is (name != "LidarSaSSelector")  # which trains nothing


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("AdaGlimpseModule", "LidarSaSSelector")])
@pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch")
def test_stochastic_averages_are_means_over_epochs(name: str) -> None:
    case, averaging = CASES[name], StochasticWeightAveraging(0.05, swa_epoch_start=3, annealing_epochs=1)
    seen = Weights(averaging)
    module, trainer = case.fit(averaging, seen, first=name in PRUNING_CASES, max_epochs=5)
    assert case.done(module, trainer)
    if name == "DPNTKGenerator":  # whose BatchNorm layers are estimated anew, in a pass that ends with a step
        assert len(seen.starts) == 6
        return
    for key, last in weights(module).items():
        torch.testing.assert_close(last, torch.stack([one[key] for one in seen.starts[2:5]]).mean(0))


def test_what_is_pruned_before_private_training_stays_zero_in_averages() -> None:
    case = CASES["DPPrePruneCallback"]
    module, trainer = case.fit(EMAWeightAveraging(decay=0.5))
    [prune] = [one for one in trainer.callbacks if hasattr(one, "masks")]
    for name, mask in prune.masks.items():
        assert not module.get_parameter(name)[~mask].any()


def test_lines_are_selected_by_the_averaged_network() -> None:
    case = CASES["LidarSaSCallback"]
    module, trainer = case.fit(EMAWeightAveraging(decay=0.5))
    with torch.no_grad():
        depths = [module(one["rgb"][None], one["sparse"][None]) for one in case.data()]
    errors = [1000 * (depth[0] - one["gt"]).abs().mean() for depth, one in zip(depths, case.data(), strict=True)]
    assert float(trainer.callback_metrics["lidar/v_full"]) == pytest.approx(float(torch.stack(errors).mean()), rel=1e-5)


def test_averages_of_an_agent_and_its_backbone_by_epoch_are_refused() -> None:
    with pytest.raises(ValueError, match="agent and backbone have optimizers of their own: use EMAWeightAveraging"):
        CASES["AdaGlimpseModule"].fit(StochasticWeightAveraging(0.05, swa_epoch_start=1))


def test_averages_of_what_trains_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="LidarSaSSelector trains nothing that could be averaged: leave it out"):
        CASES["LidarSaSSelector"].fit(StochasticWeightAveraging(0.05, swa_epoch_start=1))


@pytest.mark.parametrize("name", [*PRUNING_CASES, "ReplaceFFN"])
def test_the_order_of_callbacks_that_would_go_wrong_is_refused_before_training(name: str) -> None:
    message = "stands before ReplaceFFN" if name == "ReplaceFFN" else f"must come before {name} in callbacks"
    with pytest.raises(Exception, match=message):
        CASES[name].fit(EMAWeightAveraging(decay=0.5), first=name == "ReplaceFFN")
