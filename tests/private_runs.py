"""Small networks, data and trainers that the tests of private training share."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_eff.privacy.options import PrivateTrainingOptions
from lightning_eff.privacy.strategy import DPGradientDropStrategy


class Classifier(L.LightningModule):
    """Two linear layers on 8 numbers, three classes, the same in every test; remembers the sizes of its batches."""

    def __init__(self, lr=0.5, optimizer=torch.optim.SGD, **settings):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))
        self.optimizer = optimizer
        self.settings = {"lr": lr, **settings}
        self.sizes = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.sizes.append(len(x))
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), **self.settings)


def dataset(examples=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, 8, generator=generator)
    return TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long())


def loader(examples=40, batch_size=8, **settings):
    return DataLoader(dataset(examples), batch_size=batch_size, shuffle=True, **settings)


def private(noise_multiplier=1.0, noise_seed=None, isolation_check="off", accountant="rdp", **settings):
    """A strategy whose accountant is quick; further options by ``options``."""
    options = PrivateTrainingOptions(
        noise_seed=noise_seed, isolation_check=isolation_check, accountant=accountant, **settings.pop("options", {})
    )
    if "target_epsilon" in settings:
        noise_multiplier = None
    return DPGradientDropStrategy(noise_multiplier=noise_multiplier, options=options, **settings)


def trainer_of(strategy, max_epochs=1, **settings):
    defaults = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(max_epochs=max_epochs, strategy=strategy, **{**defaults, **settings})


def weights_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def fit(module=None, data=None, callbacks=(), trainer=None, **settings):
    """Train by ``private(**settings)`` and return module and trainer."""
    module = Classifier() if module is None else module
    strategy = private(**settings)
    trainer = trainer_of(strategy, callbacks=list(callbacks), **(trainer or {}))
    trainer.fit(module, loader() if data is None else data)
    return module, trainer


class Gradients(L.Callback):
    """Keeps what the optimizer gets."""

    def __init__(self):
        self.seen = []
        self.selections = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append({name: p.grad.clone() for name, p in pl_module.named_parameters()})
        self.selections.append(trainer.strategy.selection_state)
