"""Techniques in modules of other people's making: dict batches, several optimizers, hooks, loaders in dicts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from lightning_cases import CASES, NOISE, PRIVATE_CASES, PRUNING, PRUNING_CASES, Convolutional, FeedForward, images
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_eff.batch import BatchKeys, split_batch
from lightning_eff.pruning import Calibration, RandomChannelPruningCallback, Search

pytestmark = [
    *NOISE,
    pytest.mark.filterwarnings("ignore:There is no validation loader"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]
IN_ANY_MODULE = [*PRUNING_CASES, *PRIVATE_CASES, "ReplaceFFN"]


def kind_of(name: str) -> type[Any]:
    return FeedForward if name == "ReplaceFFN" else Convolutional


def split_by(split: Any, callbacks: list[Any]) -> list[Any]:
    """Callbacks that are told how batches are split, where they look at batches at all."""
    for callback in callbacks:
        if hasattr(callback, "calibration"):
            callback.calibration = replace(callback.calibration, loader=None)
            callback.split_batch = split
    return callbacks


def fit(name: str, module: Any, loader: Any, split: Any = None, **options: Any) -> pl.Trainer:
    case = CASES[name]
    changed = replace(case, callbacks=lambda: split_by(split, case.callbacks()) if split else case.callbacks())
    _, trainer = replace(changed, validates=False).fit(module=module, loader=loader, **options)
    return trainer


class Dicts(torch.utils.data.Dataset):
    """Images and labels by name."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, Any]:
        x, y = images()[index]
        return {"image": x, "label": y}


@pytest.mark.parametrize("name", IN_ANY_MODULE)
def test_batches_that_are_dicts(name: str) -> None:
    class Theirs(kind_of(name)):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch["image"]), batch["label"])

    module = Theirs()
    trainer = fit(name, module, DataLoader(Dicts(), 8), BatchKeys("image", "label"))
    assert CASES[name].done(module, trainer)


@pytest.mark.parametrize("name", PRUNING_CASES)
def test_batches_that_are_dicts_are_told_how_to_split(name: str) -> None:
    with pytest.raises(TypeError, match=r"got a dict with keys .*pass split_batch="):
        fit(name, Convolutional(), DataLoader(Dicts(), 8), split_batch)


@pytest.mark.parametrize("name", ["ShapleyPruningCallback", "ReplaceFFN"])
def test_several_optimizers_stepped_by_hand(name: str) -> None:
    class Theirs(kind_of(name)):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = F.cross_entropy(self(batch[0]), batch[1])
            optimizers = self.optimizers()
            for optimizer in optimizers:
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in optimizers:
                optimizer.step()
            return loss

        def configure_optimizers(self) -> Any:
            first, *others = self.net.children()
            rest = [one for part in others for one in part.parameters()]
            return [torch.optim.Adam(first.parameters(), 0.01), torch.optim.SGD(rest, 0.05, momentum=0.9)]

    module = Theirs()
    trainer = fit(name, module, CASES[name].loader())
    assert CASES[name].done(module, trainer)
    for optimizer in trainer.optimizers:
        held = [one for group in optimizer.param_groups for one in group["params"]]
        assert {id(one) for one in held} <= {id(one) for one in module.parameters()}
        for one, state in optimizer.state.items():
            shapes = {tuple(value.shape) for value in state.values() if torch.is_tensor(value) and value.ndim}
            assert shapes <= {tuple(one.shape)}


@pytest.mark.parametrize("name", ["DirichletPruneCallback", "RandomChannelPruningCallback"])
def test_scores_by_a_loss_that_is_only_known_to_the_step_ask_for_it(name: str) -> None:
    module = Convolutional()
    module.automatic_optimization = False
    with pytest.raises(ValueError, match="optimizes by hand, so its training_step does not say what the loss is"):
        fit(name, module, CASES[name].loader())


@pytest.mark.parametrize("name", PRIVATE_CASES)
def test_private_training_of_optimizers_stepped_by_hand_is_refused(name: str) -> None:
    module = Convolutional()
    module.automatic_optimization = False
    with pytest.raises(ValueError, match=r"optimizes by hand .*several optimizers become one with parameter groups"):
        fit(name, module, CASES[name].loader())


@pytest.mark.parametrize("name", [*PRUNING_CASES, *PRIVATE_CASES])
def test_networks_that_configure_model_builds(name: str) -> None:
    class Theirs(Convolutional):
        def __init__(self) -> None:
            super().__init__()
            self.net = None  # type: ignore[assignment]

        def configure_model(self) -> None:
            if self.net is None:
                self.net = self.network()

    module = Theirs()
    trainer = fit(name, module, CASES[name].loader())
    assert CASES[name].done(module, trainer)


def test_experts_of_a_network_that_configure_model_builds_are_put_in_there() -> None:
    class Theirs(FeedForward):
        def __init__(self) -> None:
            super().__init__()
            self.net = None  # type: ignore[assignment]

        def configure_model(self) -> None:
            self.net = self.network()

    with pytest.raises(ValueError, match="what configure_model builds is not there yet: replace it there"):
        fit("ReplaceFFN", Theirs(), CASES["ReplaceFFN"].loader())


class Plain(pl.LightningModule):
    """Saves no hyperparameters, keeps a list in hooks, steps its schedule with every batch, nests its network."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.losses: list[float] = []
        self.epochs = 0

    @property
    def net(self) -> nn.Module:
        return self.inner.net

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def on_train_epoch_end(self) -> None:
        self.epochs += len(self.losses) == 4 * (self.epochs + 1)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters())
        total = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, int(total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.mark.parametrize("name", [one for one in IN_ANY_MODULE if one != "ReplaceFFN"])
def test_nested_modules_with_hooks_and_schedules_of_steps(name: str) -> None:
    module = Plain(Convolutional())
    size = 8
    trainer = fit(name, module, CASES[name].loader(batch_size=size))
    assert CASES[name].done(module, trainer)
    if name in PRUNING_CASES:
        assert module.epochs == 2  # the hook saw four batches an epoch, and none of the calibration
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == trainer.global_step


class Pairs(Convolutional):
    """Trains on two loaders at once."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return torch.stack([F.cross_entropy(self(x), y) for x, y in batch.values()]).mean()


@pytest.mark.parametrize("combined", [False, True])
@pytest.mark.parametrize("name", ["ShapleyPruningCallback", "RandomChannelPruningCallback"])
def test_loaders_in_a_dict(name: str, combined: bool) -> None:
    case, module = CASES[name], Pairs()
    loaders: Any = {"a": case.loader(), "b": case.loader(batch_size=4)}
    by_loss = [
        RandomChannelPruningCallback(
            0.5,
            search=Search(candidates=3, top_k=1, monitor="val/loss"),
            repair=None,
            **{**PRUNING, "calibration": Calibration("val", samples=16)},
        )
    ]
    trainer = replace(case, callbacks=lambda: by_loss if name[0] == "R" else case.callbacks()).fit(
        module=module, loader=CombinedLoader(loaders, "max_size_cycle") if combined else loaders
    )[1]
    assert case.done(module, trainer)


def test_loaders_in_a_dict_need_one_whose_batches_the_loss_can_take() -> None:
    case = CASES["DirichletPruneCallback"]
    bare = replace(case, callbacks=lambda: split_by(lambda batch: batch, case.callbacks()))
    loaders: Any = {"a": case.loader(), "b": case.loader()}
    with pytest.raises(ValueError, match=r"there are 2 loaders: give Calibration\(loader=...\)"):
        bare.fit(module=Pairs(), loader=loaders)


@pytest.mark.parametrize("name", PRIVATE_CASES)
def test_private_training_of_several_loaders_is_refused(name: str) -> None:
    loaders: Any = {"a": CASES[name].loader(), "b": CASES[name].loader()}
    with pytest.raises(ValueError, match="private training takes one train dataloader, got 2"):
        CASES[name].fit(module=Pairs(), loader=loaders)
