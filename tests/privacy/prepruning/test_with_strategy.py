"""Pre-pruning together with private training: what is out stays out, whatever optimizer, selection or interruption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import run_ddp
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_eff.privacy.options import PrivateTrainingOptions
from lightning_eff.privacy.prepruning.callback import DPPrePruneCallback
from lightning_eff.privacy.selection.plan import SelectionPlan
from lightning_eff.privacy.selection.selectors import PublicGradientSelector
from lightning_eff.privacy.strategy import DPGradientDropStrategy

pytestmark = pytest.mark.filterwarnings("ignore:noise_seed makes noise and sampling repeatable")

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda parameters: torch.optim.Adam(parameters, 0.01, weight_decay=0.01),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 0.01, weight_decay=0.01),
}


class Classifier(L.LightningModule):
    def __init__(self, optimizer: str = "sgd") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3))
        self.optimizer = optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return OPTIMIZERS[self.optimizer](self.parameters())


def examples(seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(96, 12, generator=generator), torch.arange(96) % 3)


class Watch(L.Callback):
    """Every step: what is out is unchanged, what the step does not train too, the rest may move."""

    def __init__(self, prune: DPPrePruneCallback) -> None:
        self.prune = prune
        self.active: list[int] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.start = {name: one.detach().clone() for name, one in pl_module.named_parameters()}

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.before = {name: one.detach().clone() for name, one in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        assert isinstance(trainer.strategy, DPGradientDropStrategy)
        self.active.append(trainer.strategy.active_coordinates)
        for name, selection in trainer.strategy.selection_state.items():
            now, out = pl_module.get_parameter(name), ~selection.full_mask()
            assert torch.equal(now[out], self.before[name][out])
            if name in self.prune.masks:
                gone = ~self.prune.masks[name]
                assert not (gone & ~out).any()
                assert torch.equal(now[gone], self.start[name][gone])
                if self.prune.mode == "prune":
                    assert not now[gone].any()


def fit(
    strategy: DPGradientDropStrategy, model: L.LightningModule, *callbacks: L.Callback, epochs: int = 2, **options: Any
) -> L.Trainer:
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        strategy=strategy,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=any(isinstance(one, ModelCheckpoint) for one in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(examples(), batch_size=16), weights_only=True, **options)
    return trainer


def strategy(**plan: Any) -> DPGradientDropStrategy:
    options = PrivateTrainingOptions(noise_seed=3)
    return DPGradientDropStrategy(noise_multiplier=1.0, selection=SelectionPlan(**plan), options=options)


@pytest.mark.parametrize("mode", ["prune", "freeze"])
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_what_is_out_holds_its_bits_through_private_steps(optimizer: str, mode: str) -> None:
    prune = DPPrePruneCallback(0.5, mode=mode)
    watch = Watch(prune)
    fit(strategy(drop_rate=0.5), Classifier(optimizer), prune, watch, epochs=9)
    # half of half of the weights, 12 * 16 and 16 * 3, and all biases
    assert watch.active == [48 + 12 + 19] * 54


@pytest.mark.parametrize("granularity", ["row", "row_col", "tensor"])
@pytest.mark.parametrize("by", ["element", "row"])
def test_units_are_chosen_inside_of_what_is_left(granularity: str, by: str) -> None:
    prune = DPPrePruneCallback(0.5, granularity=by)
    watch = Watch(prune)
    fit(strategy(drop_rate=0.5, granularity=granularity), Classifier(), prune, watch)
    assert 0 < max(watch.active) < 139


@pytest.mark.parametrize("refresh", ["step", "epoch", 4])
@pytest.mark.parametrize("selection", ["random", "magnitude", "noisy_gradient", "public_gradient"])
def test_an_interrupted_run_ends_where_the_whole_one_does(selection: str, refresh: Any, tmp_path: Path) -> None:
    def run(folder: str, ckpt_path: Path | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        rule: Any = PublicGradientSelector(examples(seed=8)) if selection == "public_gradient" else selection
        prune = DPPrePruneCallback(0.5, score="snip", public_data=examples(seed=9))
        save = ModelCheckpoint(tmp_path / folder, "{step}", save_top_k=-1, every_n_train_steps=9)
        model = Classifier()
        fit(strategy(drop_rate=0.5, selection=rule, refresh=refresh), model, prune, save, epochs=4, ckpt_path=ckpt_path)
        return {name: one.detach() for name, one in model.named_parameters()}, prune.masks

    whole, masks = run("whole")
    resumed, same = run("resumed", tmp_path / "whole" / "step=9.ckpt")  # in the middle of an epoch
    assert all(torch.equal(masks[name], same[name]) for name in masks)
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


TWO_PROCESSES = """
import torch, lightning as L
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from lightning_eff.privacy.prepruning.callback import DPPrePruneCallback
from lightning_eff.privacy.selection.plan import SelectionPlan
from lightning_eff.privacy.strategy import DPGradientDropDDPStrategy

class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)

torch.manual_seed(0)
private = TensorDataset(torch.randn(64, 12), torch.arange(64) % 3)
public = TensorDataset(torch.randn(32, 12), torch.arange(32) % 3)
plan = SelectionPlan(0.5, "magnitude", explore=0.2)
strategy = DPGradientDropDDPStrategy(noise_multiplier=1.0, selection=plan)
prune = DPPrePruneCallback(0.5, score="snip", public_data=public)
trainer = L.Trainer(max_epochs=2, accelerator="cpu", devices=2, strategy=strategy, callbacks=[prune], logger=False,
                    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
model = Classifier()
trainer.fit(model, DataLoader(private, batch_size=8))
for name, weight in model.named_parameters():
    both = trainer.strategy.all_gather(weight.detach())
    assert torch.equal(both[0], both[1]), name
    if name in prune.masks:
        assert not weight[~prune.masks[name]].any()
print("agrees")
"""


def test_two_processes_train_the_same_coordinates(tmp_path: Path) -> None:
    assert run_ddp(TWO_PROCESSES, tmp_path).stdout.count("agrees") == 2
