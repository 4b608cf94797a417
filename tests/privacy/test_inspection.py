"""What a user's step shows while it runs: samples that depend on each other, private data that it keeps or goes by."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from private_runs import Classifier, dataset, fit
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.data import DataLoader, TensorDataset

from lightning_eff.privacy.options import PrivateTrainingOptions


class Weighted(Classifier):
    """From some epoch on, samples of a class count more."""

    since = 0

    def training_step(self, batch, batch_idx):
        x, y = batch
        weight = torch.tensor([1.0, 1.0, 9.0]) if self.current_epoch >= self.since else None
        return nn.functional.cross_entropy(self.net(x), y, weight=weight)


def told(trainer):
    (sentence,) = [s for s in trainer.strategy.ledger.assumptions if s.startswith("The loss of a sample")]
    return sentence[sentence.index("(") + 1 : sentence.index(")")]


def private(trainer):
    return trainer.strategy.ledger.facts()["private"]


def test_a_loss_that_mixes_examples_is_an_error_a_warning_or_let_pass():
    whole = DataLoader(dataset(), batch_size=40)
    with pytest.raises(ValueError, match=r"depends on the other samples.*times its norm alone"):
        fit(Weighted(), data=whole, isolation_check="error")
    with pytest.warns(UserWarning, match="depends on the other samples"):
        _, trainer = fit(Weighted(), data=whole, isolation_check="warn")
    assert any("depend on other samples" in caveat for caveat in trainer.strategy.ledger.caveats)
    assert not private(trainer)
    _, trainer = fit(Weighted(), data=whole, isolation_check="off")
    assert told(trainer) == "not checked"


def test_a_sum_over_examples_is_refused():
    class Summed(Classifier):
        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1], reduction="sum")

    with pytest.raises(ValueError, match="must be the plain mean over samples"):
        fit(Summed(), isolation_check="error")


def test_the_isolation_check_leaves_no_trace():
    from torchmetrics.classification import MulticlassAccuracy

    class Counting(Classifier):
        def __init__(self):
            super().__init__()
            self.accuracy = MulticlassAccuracy(3, average="micro")
            self.drop = nn.Dropout(0.5)
            self.calls = 0

        def training_step(self, batch, batch_idx):
            x, y = batch
            self.calls += 1
            output = self.net(self.drop(x))
            self.accuracy(output, y)
            self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
            return nn.functional.cross_entropy(output, y)

    class Seen(L.Callback):
        examples = 0

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.examples += len(batch[0])

        def on_train_epoch_end(self, trainer, pl_module):
            self.counted = int(pl_module.accuracy.tp.sum() + pl_module.accuracy.fn.sum())

    seen = Seen()
    module, _ = fit(Counting(), callbacks=[seen], isolation_check="error", noise_seed=None)
    assert module.calls <= 5
    assert seen.counted == seen.examples


def test_a_loss_that_mixes_examples_later_is_found_later():
    module = Weighted()
    module.since = 1
    with pytest.raises(ValueError, match="depends on the other samples"):
        fit(module, data=DataLoader(dataset(), batch_size=40), isolation_check="error", trainer={"max_epochs": 4})


def test_the_report_tells_how_often_the_isolation_was_checked_and_with_how_many():
    whole = DataLoader(dataset(64), batch_size=64)
    assert told(fit(data=whole, isolation_check="error")[1]) == "checked on 1 batch, with up to 32 samples"
    _, trainer = fit(data=whole, isolation_check="error", trainer={"max_epochs": 5})
    assert told(trainer) == "checked on 3 batches, with up to 32 samples"
    assert private(trainer)
    assert told(fit(data=DataLoader(dataset(1), batch_size=1), isolation_check="error")[1]) == "not checked"


def test_classes_that_come_one_after_the_other_are_all_among_the_examples_compared():
    x, y = dataset(200).tensors
    in_order = TensorDataset(x, y.sort().values)
    with pytest.raises(ValueError, match="depends on the other samples"):
        fit(Weighted(), data=DataLoader(in_order, batch_size=200), isolation_check="error")


def test_a_step_that_cannot_be_judged_never_passes_as_checked():
    class Own(Classifier):
        def training_step(self, batch, batch_idx):
            x, y = batch
            noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(torch.seed() % 2**31))
            return super().training_step((x + noise, y), batch_idx)

    with pytest.raises(ValueError, match="every time it runs"):
        fit(Own(), isolation_check="error")
    with pytest.warns(UserWarning, match="every time it runs"):
        _, trainer = fit(Own(), isolation_check="warn")
    assert told(trainer) == "not checked"


class Remembering(Classifier):
    """Keeps a sample from some step on."""

    since = 0

    def __init__(self):
        super().__init__()
        self.register_buffer("last", torch.zeros(8))

    def training_step(self, batch, batch_idx):
        if self.global_step >= self.since:
            self.last = batch[0][0].detach() * (self.global_step + 1)  # another one even where the sample is the same
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("since", [0, 2])
def test_buffers_that_training_changes_make_a_run_not_private(since):
    module = Remembering()
    module.since = since
    with pytest.warns(UserWarning, match=r"changes the buffers \['last'\]") as warned:
        _, trainer = fit(module)
    assert len([warning for warning in warned if "buffers" in str(warning.message)]) == 1
    assert any("last" in sentence for sentence in trainer.strategy.ledger.caveats)
    assert not private(trainer)


def test_buffers_that_hold_nothing_of_the_examples_may_change():
    assert private(fit(Remembering(), options={"public_buffers": ["la*"]})[1])
    module = Classifier()
    spectral_norm(module.net[0])
    assert private(fit(module)[1])
    with pytest.raises(ValueError, match="public_buffers must be a sequence"):
        PrivateTrainingOptions(public_buffers="last")


class Plateau(Classifier):
    """Lowers its learning rate by what a metric tells."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "loss"}}


class AtTheEnd(Classifier):
    """Logs when its only epoch is over."""

    def on_train_epoch_end(self):
        self.log("late", torch.zeros(()))


def test_who_goes_by_metrics_of_private_batches_makes_a_run_not_private():
    for module, callbacks, who in (
        (Plateau(), [], "ReduceLROnPlateau goes by 'loss'"),
        (Classifier(), [EarlyStopping("loss")], "EarlyStopping goes by 'loss'"),
        (AtTheEnd(), [EarlyStopping("late")], "EarlyStopping goes by 'late'"),
    ):
        with pytest.warns(UserWarning, match=who):
            _, trainer = fit(module, callbacks=callbacks)
        assert any(caveat.startswith(who) for caveat in trainer.strategy.ledger.caveats)
        assert not private(trainer)


def test_what_is_private_already_or_belongs_to_validation_may_be_gone_by(tmp_path):
    class Validated(Classifier):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

        def val_dataloader(self):
            return DataLoader(dataset(8, seed=1), batch_size=8)

    callbacks = [EarlyStopping("val_loss"), ModelCheckpoint(tmp_path, monitor="privacy/epsilon")]
    assert private(fit(Validated(), callbacks=callbacks, trainer={"enable_checkpointing": True})[1])
