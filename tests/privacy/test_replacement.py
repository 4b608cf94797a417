"""Parameters that are cut or exchanged in the middle of a fit: training goes on, and the ledger tells."""

import lightning as L
import pytest
import torch
from private_runs import Classifier, dataset, loader, private, trainer_of
from torch import nn
from torch.utils.data import DataLoader

from lightning_eff import Calibration, Schedule, ShapleyPruningCallback
from lightning_eff.privacy import DPPrePruneCallback

CAVEAT = "replaced or resized parameters during training"


class Exchange(L.Callback):
    """Exchanges the head at the start of an epoch."""

    def __init__(self, epoch=1, width=None, like=False):
        self.epoch, self.like = epoch, like

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            pl_module.net[2] = nn.Linear(6, 3) if self.like else nn.Linear(6, 4)
            trainer.optimizers[0].param_groups[0]["params"] = list(pl_module.parameters())


class Forward(Classifier):
    def forward(self, x):
        return self.net(x)

    def validation_step(self, batch, batch_idx):
        self.log("val", nn.functional.cross_entropy(self(batch[0]), batch[1]))


@pytest.mark.parametrize("like", [True, False])
@pytest.mark.parametrize("settings", [{}, {"drop_rate": 0.5}, {"drop_rate": 0.5, "selection": "noisy_gradient"}])
def test_a_new_head_is_trained_from_the_next_step_on_and_the_ledger_tells(like, settings):
    strategy, module = private(**settings), Classifier()
    with pytest.warns(UserWarning, match=CAVEAT):
        trainer_of(strategy, max_epochs=10, callbacks=[Exchange(epoch=6, like=like)]).fit(module, loader())
    assert strategy.ledger.steps == 50
    assert all(parameter.grad is not None for parameter in module.net[2].parameters())
    (caveat,) = [one for one in strategy.ledger.caveats if CAVEAT in one]
    assert "(net.2.bias, net.2.weight)" in caveat
    assert not strategy.ledger.facts()["private"]


def test_a_parameter_resized_in_place_is_noticed():
    class Resize(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                pl_module.net[2].weight.data = torch.zeros(5, 6)
                pl_module.net[2].bias.data = torch.zeros(5)

    strategy = private(drop_rate=0.5, granularity="row")
    with pytest.warns(UserWarning, match=CAVEAT):
        trainer_of(strategy, max_epochs=2, callbacks=[Resize()]).fit(Classifier(), loader())
    assert strategy.ledger.steps == 10


@pytest.mark.parametrize("settings", [{}, {"drop_rate": 0.5, "granularity": "row"}])
def test_channels_that_another_technique_cuts_in_the_middle_make_the_run_not_private(settings):
    callback = ShapleyPruningCallback(
        0.5, schedule=Schedule(start=1), calibration=Calibration(samples=16), value="neg_loss", verbose=False
    )
    strategy, module = private(**settings), Forward()
    validation = DataLoader(dataset(seed=1), batch_size=8)
    told = "chose during training which channels stay, on validation data: what it looked at is not covered"
    with pytest.warns(UserWarning, match=told):
        trainer_of(strategy, max_epochs=3, callbacks=[callback]).fit(module, loader(), validation)
    assert module.net[0].out_features == 3
    assert strategy.ledger.steps == 15
    assert any(told in one for one in strategy.ledger.caveats)
    assert not strategy.ledger.facts()["private"]


def test_who_only_trains_has_no_such_caveat():
    strategy = private(drop_rate=0.5)
    trainer_of(strategy, max_epochs=2, callbacks=[DPPrePruneCallback(0.5)]).fit(Classifier(), loader())
    assert strategy.ledger.caveats == []
    assert strategy.ledger.facts()["private"]


def test_unfrozen_parameters_are_no_replacement_and_noisy_gradients_are_gathered_anew():
    class Later(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 5:
                pl_module.net[0].requires_grad_(True)
                trainer.optimizers[0].add_param_group({"params": list(pl_module.net[0].parameters())})

    class Frozen(Classifier):
        def configure_optimizers(self):
            self.net[0].requires_grad_(False)
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.5)

    strategy = private(drop_rate=0.5, selection="noisy_gradient")
    trainer_of(strategy, max_epochs=10, callbacks=[Later()]).fit(Frozen(), loader())
    assert strategy.ledger.steps == 50
    assert strategy.ledger.caveats == []
