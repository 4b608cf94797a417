"""Private training with everything else of Lightning: it goes on as one knows it."""

import copy
import signal

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from private_runs import Classifier, Gradients, dataset, equal, fit, loader, private, trainer_of, weights_of
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_eff.privacy.strategy import DPGradientDropStrategy

SEEDED = "ignore:noise_seed makes noise and sampling repeatable"
NO_NOISE = "ignore:noise_multiplier is 0"
pytestmark = [pytest.mark.filterwarnings(SEEDED), pytest.mark.filterwarnings(NO_NOISE)]


def test_the_module_is_left_as_it_came():
    module, plain = Classifier(), Classifier()
    modes = [layer.training for layer in module.modules()]
    fit(module, drop_rate=0.5)
    trainer_of("auto").fit(plain, loader())
    assert module.__dict__.keys() == plain.__dict__.keys()
    assert not any(layer._forward_hooks or layer._backward_hooks for layer in module.modules())
    assert all("forward" not in vars(layer) for layer in module.modules())
    assert modes == [layer.training for layer in module.modules()]
    assert all(parameter.requires_grad and parameter.grad_fn is None for parameter in module.parameters())
    copy.deepcopy(module)


def test_a_plain_fit_goes_on_from_a_private_one():
    module, _ = fit()
    before = weights_of(module)
    trainer_of("auto").fit(module, loader())
    assert not equal(before, weights_of(module))


def test_global_generators_are_not_drawn_from():
    module, data = Classifier(), DataLoader(dataset(), batch_size=8)
    torch.manual_seed(5)
    trainer = trainer_of(private(drop_rate=0.5))
    before = torch.get_rng_state()
    trainer.fit(module, data)
    # a DataLoader draws the seed of its workers, whatever its sampler
    drawn = torch.get_rng_state()
    plain = trainer_of("auto")
    torch.set_rng_state(before)
    plain.fit(copy.deepcopy(module), data)
    assert torch.equal(drawn, torch.get_rng_state())


def test_schedulers_that_ask_for_the_number_of_steps_get_it():
    class Scheduled(Classifier):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            self.asked = self.trainer.estimated_stepping_batches
            scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=self.asked)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    module, trainer = fit(Scheduled(), trainer={"max_epochs": 3})
    assert module.asked == trainer.global_step == 15
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0)


def test_epsilon_and_learning_rate_are_logged(tmp_path):
    logger = CSVLogger(tmp_path)
    _, trainer = fit(
        callbacks=[LearningRateMonitor("step")],
        trainer={"logger": logger, "max_epochs": 2, "log_every_n_steps": 1},
        options={"log_every_n_steps": 2},
    )
    rows = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()
    columns = rows[0].split(",")
    spent = [row.split(",")[columns.index("privacy/epsilon")] for row in rows[1:]]
    values = [float(value) for value in spent if value]
    assert values == sorted(values)
    assert values[-1] == pytest.approx(trainer.strategy.epsilon, rel=1e-5)
    assert any(name.startswith("lr-") for name in columns)
    assert trainer.callback_metrics["privacy/drop_rate"] == 0
    assert trainer.callback_metrics["privacy/active_coordinates"] == 6 * 9 + 3 * 7
    assert trainer.progress_bar_metrics["privacy/epsilon"] == pytest.approx(trainer.strategy.epsilon, rel=1e-5)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_other_precisions_train(precision):
    module, trainer = fit(trainer={"precision": precision, "max_epochs": 2}, drop_rate=0.5, granularity="row")
    assert trainer.strategy.ledger.steps == 10
    assert all(torch.isfinite(value).all() for value in module.state_dict().values())
    assert min(module.sizes) >= 1


def test_gradients_are_clipped_again_by_the_trainer_after_the_noise():
    gradients = Gradients()

    class After(L.Callback):
        norms = []

        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            norm = [p.grad.norm() for p in pl_module.parameters() if p.grad is not None]
            self.norms.extend([torch.stack(norm).norm()] if norm else [])

    after = After()
    fit(callbacks=[gradients, after], trainer={"gradient_clip_val": 1e-3})
    assert all(norm <= 1e-3 * (1 + 1e-4) for norm in after.norms)
    before = torch.stack([value.norm() for value in gradients.seen[0].values()]).norm()
    assert before > 1e-3


def test_a_callback_sees_gradients_with_noise_only():
    gradients = Gradients()
    fit(callbacks=[gradients], data=DataLoader(dataset(), batch_size=40), noise_multiplier=1e4, max_grad_norm=1.0)
    assert gradients.seen[0]["net.0.weight"].abs().mean() > 10  # the sum itself is at most 1


@pytest.mark.parametrize("averaging", [EMAWeightAveraging, lambda: StochasticWeightAveraging(0.1, swa_epoch_start=1)])
def test_averages_of_weights_are_taken_and_keep_pruned_coordinates_at_zero(averaging):
    class Masks(L.Callback):
        def on_fit_start(self, trainer, pl_module):
            trainer.strategy.set_static_masks({"net.0.weight": torch.arange(48).reshape(6, 8) < 20}, "prune")

    class Validated(Classifier):
        def validation_step(self, batch, batch_idx):
            self.log("val", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    module = Validated()
    trainer = trainer_of(private(), max_epochs=4, callbacks=[averaging(), Masks()])
    trainer.fit(module, loader(), DataLoader(dataset(seed=1), batch_size=8))
    assert not module.net[0].weight.flatten()[20:].any()
    assert trainer.strategy.ledger.steps == 20


def test_an_epoch_cut_short_leaves_no_residue():
    updates = []
    for limit in (2, 1.0):
        gradients = Gradients()
        fit(
            Classifier(lr=0.0),
            callbacks=[gradients],
            noise_seed=1,
            trainer={"max_epochs": 5, "max_steps": 6, "limit_train_batches": limit},
        )
        updates.append(gradients.seen)
    assert len(updates[0]) == 6
    for one, other in zip(*updates, strict=True):
        assert equal(one, other)


def test_validation_test_and_prediction_read_their_loaders_whole():
    class Counting(Classifier):
        def validation_step(self, batch, batch_idx):
            self.read = getattr(self, "read", 0) + len(batch[0])

        test_step = validation_step

        def predict_step(self, batch, batch_idx):
            return self.net(batch[0])

    module = Counting()
    whole = DataLoader(dataset(), batch_size=16)
    trainer = trainer_of(private(), num_sanity_val_steps=1, max_epochs=1)
    trainer.validate(module, whole, verbose=False)
    trainer.test(module, whole, verbose=False)
    assert module.read == 80
    assert len(torch.cat(trainer.predict(module, whole))) == 40
    assert trainer.strategy.ledger.steps == 0
    trainer.fit(module, loader(), whole)
    assert module.read == 80 + 16 + 40
    assert trainer.strategy.ledger.steps == 5


def test_one_strategy_adds_up_all_its_fits():
    strategy = private()
    module = Classifier()
    trainer = trainer_of(strategy)
    trainer.fit(module, loader())
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, loader())
    assert strategy.ledger.steps == trainer.global_step == 15
    trainer_of(strategy, accelerator="auto").fit(Classifier(), loader())
    assert strategy.ledger.steps == 20
    assert len(strategy.ledger.history) == 1


def test_dict_batches_and_collate_functions_of_the_user_are_taken_as_they_are():
    class Rows(Dataset):
        x, y = dataset().tensors

        def __len__(self):
            return 40

        def __getitem__(self, index):
            return {"x": self.x[index], "y": self.y[index], "name": str(index)}

    class OfDicts(Classifier):
        def training_step(self, batch, batch_idx):
            assert len(batch["name"]) == len(batch["x"])
            assert all(torch.equal(Rows.x[int(name)], x) for name, x in zip(batch["name"], batch["x"], strict=True))
            return {"loss": super().training_step((batch["x"], batch["y"]), batch_idx), "names": batch["x"][:, 0]}

    class Outputs(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if len(batch["x"]):
                assert torch.equal(outputs["names"], batch["x"][:, 0])

    _, trainer = fit(
        OfDicts(),
        data=DataLoader(Rows(), batch_size=8, num_workers=1),
        max_physical_batch_size=3,
        callbacks=[Outputs()],
    )
    assert trainer.strategy.ledger.steps == 5


@pytest.mark.parametrize("size", [None, 4])
def test_a_step_that_leaves_a_batch_out_is_refused(size):
    class Guarded(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss if torch.isfinite(loss) else None

    x, y = (values.clone() for values in dataset().tensors)
    x[30] = float("nan")
    with pytest.raises(ValueError, match="would depend on the others"):
        fit(Guarded(), data=DataLoader(TensorDataset(x, y), batch_size=40), max_physical_batch_size=size)


def test_batches_that_an_optimizer_step_skips_are_told():
    class Skipping(Classifier):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
            if batch_idx % 2:
                optimizer.step(closure=optimizer_closure)
            else:
                optimizer_closure()

    with pytest.warns(UserWarning, match="no optimizer step came after a batch"):
        _, trainer = fit(Skipping())
    assert trainer.strategy.ledger.steps == 2


def test_parameters_that_are_unfrozen_later_join_in():
    class Later(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                pl_module.net[0].requires_grad_(True)
                trainer.optimizers[0].add_param_group({"params": list(pl_module.net[0].parameters())})

    class Frozen(Classifier):
        def configure_optimizers(self):
            self.net[0].requires_grad_(False)
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.5)

    module = Frozen()
    before = weights_of(module)
    fit(module, callbacks=[Later()], trainer={"max_epochs": 1})
    assert torch.equal(module.net[0].weight, before["net.0.weight"])
    assert not torch.equal(module.net[2].weight, before["net.2.weight"])
    fit(module, callbacks=[Later()], trainer={"max_epochs": 2})
    assert not torch.equal(module.net[0].weight, before["net.0.weight"])


def test_parameters_outside_of_the_optimizer_are_neither_trained_nor_given_a_gradient():
    class Part(Classifier):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net[2].parameters(), lr=0.5)

    module, _ = fit(Part())
    assert module.net[0].weight.grad is None
    assert module.net[2].weight.grad is not None


def test_the_loader_may_be_loaded_anew_in_every_epoch():
    class Reloaded(Classifier):
        calls = 0

        def train_dataloader(self):
            self.calls += 1
            return loader(40 if self.calls == 1 else 80, 8)

    module = Reloaded()
    trainer = trainer_of(private(), max_epochs=2, reload_dataloaders_every_n_epochs=1)
    trainer.fit(module)
    events = [(event.sample_rate, event.steps) for event in trainer.strategy.ledger.history]
    assert events == [(0.2, 5), (0.1, 10)]


def test_the_best_checkpoint_may_be_chosen_by_epsilon(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, monitor="privacy/epsilon", mode="min")
    fit(callbacks=[checkpoint], trainer={"enable_checkpointing": True, "max_epochs": 2})
    assert torch.load(checkpoint.best_model_path, weights_only=True)["global_step"] == 5


def test_memory_and_devices_are_the_trainers():
    strategy = DPGradientDropStrategy(noise_multiplier=1.0)
    trainer = trainer_of(strategy)
    assert trainer.strategy.root_device == torch.device("cpu")
    assert trainer.num_devices == 1


def test_epsilon_of_the_last_step_is_logged_where_a_fit_ends_within_an_epoch():
    trainer = fit(trainer={"max_steps": 3})[1]
    assert trainer.callback_metrics["privacy/epsilon"] == pytest.approx(trainer.strategy.epsilon, rel=1e-5)
    assert trainer.strategy.ledger.steps == 3


@pytest.mark.parametrize("how", ["with_closure", "closure_first"])
def test_an_optimizer_step_of_the_users_own_takes_private_gradients(how):
    class Own(Classifier):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
            optimizer.param_groups[0]["lr"] = 0.1 * (batch_idx + 1)
            if how == "with_closure":
                optimizer.step(closure=optimizer_closure)
            else:
                optimizer_closure()
                optimizer.step()

    gradients = Gradients()
    module, trainer = fit(Own(), callbacks=[gradients])
    assert trainer.strategy.ledger.steps == len(gradients.seen) == 5
    assert not equal(weights_of(Classifier()), weights_of(module))


def test_a_run_stopped_by_hand_counts_the_steps_taken_and_lets_go_of_the_key():
    class Stopped(Classifier):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise KeyboardInterrupt
            return super().training_step(batch, batch_idx)

    strategy = private()
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit):
            trainer_of(strategy).fit(Stopped(), loader())
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning lets it be ignored from then on
    assert strategy.ledger.steps == 2
    assert strategy._streams is None


def test_activations_may_be_computed_again_in_backward():
    class Again(Classifier):
        again = False

        def training_step(self, batch, batch_idx):
            layer = self.net[0]
            inner = checkpoint(layer, batch[0], use_reentrant=False) if self.again else layer(batch[0])
            return nn.functional.cross_entropy(self.net[2](self.net[1](inner)), batch[1])

    once, again = Again(), Again()
    again.again = True
    for module in (once, again):
        fit(module, noise_seed=2)
    assert equal(weights_of(once), weights_of(again))


def test_a_dict_of_one_loader_is_one_loader():
    class Named(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["a"], batch_idx)

    assert fit(Named(), data={"a": loader()})[1].strategy.ledger.steps == 5
