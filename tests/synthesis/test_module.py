import copy
import logging
import math
import warnings

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from synthesis.private_records import CountedData, CountingDataset, records, small, trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_eff import BatchKeys
from lightning_eff.accounting import PrivacyBudgetExceeded
from lightning_eff.synthesis import (
    ConvImageGenerator,
    DPNTKGenerator,
    FeatureOptions,
    MatchingOptions,
    MLPGenerator,
    NumericColumn,
    ReleaseOptions,
    TableSchema,
    TabularDataModule,
)

ONCE = dict.fromkeys(range(101), 1)


class Recording(L.Callback):
    """Losses and learning rates of every step."""

    def __init__(self):
        self.losses, self.rates, self.batches = [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))
        self.batches.append(type(batch).__name__)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def test_private_records_are_read_once_whatever_the_number_of_epochs():
    data, seen = CountedData(records()), Recording()
    trainer(max_epochs=3, callbacks=[seen]).fit(module := small(), datamodule=data)
    assert data.train.reads == ONCE
    assert not data.val.reads
    assert data.asked == 1
    assert seen.batches == ["StepToken"] * 21
    assert module.steps_trained == 21
    assert module.ledger.steps == 1
    assert module.ledger.epsilon() == pytest.approx(5.0, rel=1e-9)


def test_a_second_fit_and_samples_read_nothing_and_cost_nothing():
    data = CountedData(records())
    trainer().fit(module := small(), datamodule=data)
    data.train.reads.clear()
    trainer().fit(module, datamodule=data)
    trainer().fit(module)
    module.generate(50, seed=0)
    assert not data.train.reads
    assert module.ledger.steps == 1


@pytest.mark.parametrize("arguments", [{"limit_train_batches": 2}, {"overfit_batches": 3}, {"fast_dev_run": True}])
def test_limits_of_the_trainer_do_not_change_what_enters_the_release(arguments):
    data = CountedData(records())
    trainer(**arguments).fit(small(), datamodule=data)
    assert data.train.reads == ONCE


def test_loaders_are_shadowed_before_an_optimizer_can_ask_for_the_number_of_steps():
    class Asking(DPNTKGenerator):
        def configure_optimizers(self):
            self.estimated = self.trainer.estimated_stepping_batches
            return super().configure_optimizers()

    data, seen = CountedData(records()), Recording()
    module = Asking(5.0, num_classes=3, input_shape=(4,), feature_widths=(8,), samples_per_class=4, steps_per_epoch=7)
    trainer(max_epochs=3, callbacks=[seen]).fit(module, datamodule=data)
    assert module.estimated == 21
    assert set(seen.batches) == {"StepToken"}
    assert data.train.reads == ONCE


class Failing(L.Callback):
    def __init__(self, error):
        self.error = error

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        raise self.error


@pytest.mark.parametrize("error", [None, ValueError("stop"), SystemExit("stop")])
def test_loaders_and_limits_are_put_back_also_after_an_exception(error):
    data = CountedData(records())
    run = trainer(callbacks=[Failing(error)] if error else [], limit_val_batches=0.5)
    if error:
        with pytest.raises(type(error), match="stop"):
            run.fit(small(), datamodule=data)
    else:
        run.fit(small(), datamodule=data)
    assert "train_dataloader" not in vars(data)
    assert run.limit_val_batches == 0.5
    assert len(next(iter(data.train_dataloader()))[0]) == 16


def test_a_fit_that_leaves_other_data_unread_says_so(caplog):
    module = small()
    trainer().fit(module, datamodule=CountedData(records()))
    assert "are not read" not in caplog.text
    other = CountedData(records(50))
    with caplog.at_level(logging.INFO):
        trainer().fit(module, datamodule=other)
    assert "There is a release already: the training data are not read" in caplog.text
    assert not other.train.reads
    assert module.embedding.num_records == 101


class WithoutValidation(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(*records()), batch_size=16)


def test_validation_that_a_data_module_lacks_or_that_is_left_out_is_passed_over_in_silence():
    rows = {"age": [0.1, 0.9] * 100}
    table = DPNTKGenerator(
        5.0, schema=TableSchema([NumericColumn("age", 0, 1)]), feature_widths=(8,), steps_per_epoch=2
    )
    for module, data in (
        (small(), WithoutValidation()),
        (small(), CountedData(records())),
        (table, TabularDataModule(rows)),
    ):
        run = trainer(max_epochs=1)
        run.fit(module, datamodule=data)  # warnings are errors
        assert not {"train_dataloader", "val_dataloader"} & vars(data).keys()


def test_what_trains_before_a_release_is_told_to_release_first(tmp_path):
    with pytest.raises(RuntimeError, match=r"such as a search of the learning rate, needs model.release\(data\)"):
        small()._released()
    module = small()
    module.release(records())
    run = trainer(max_epochs=3, default_root_dir=tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`weights_only` was not set|.*across ranks is zero")
        found = Tuner(run).lr_find(module, num_training=5, update_attr=False)
    assert len(found.results["lr"]) == 5
    assert module.ledger.steps == 1


def test_without_data_and_release_the_two_ways_are_told():
    with pytest.raises(RuntimeError, match=r"trainer.fit\(model, datamodule=...\).*model.release\(data\)"):
        trainer().fit(small())


def test_a_loader_passed_to_fit_is_released_once_like_that_of_a_data_module():
    module, run = small(), trainer()
    loader = DataLoader(CountingDataset(*records()), batch_size=16, shuffle=True)
    run.fit(module, loader)
    assert loader.dataset.reads == ONCE
    assert module.steps_trained == 14
    assert run.fit_loop._data_source.instance is loader
    trainer().fit(module, loader)
    assert loader.dataset.reads == ONCE
    assert module.ledger.steps == 1


def test_private_batches_in_training_or_validation_are_refused():
    module = small()
    module.release(records())
    loader = DataLoader(CountingDataset(*records()), batch_size=16)
    with pytest.raises(RuntimeError, match="training got a batch of data"):
        module.training_step(next(iter(loader)), 0)
    loader.dataset.reads.clear()
    with pytest.raises(RuntimeError, match="validation got private records"):
        trainer().validate(module, loader, verbose=False)


def test_a_release_by_hand_needs_no_datamodule():
    module = small()
    released = module.release(records())
    assert released is module.embedding
    trainer().fit(module)
    assert module.steps_trained == 14


def test_a_further_release_is_added_up_and_stopped_by_the_budget_before_data_are_read():
    module = small(1.0, release_options=ReleaseOptions(max_epsilon=1.5, label_prior="uniform"))
    data = CountingDataset(*records())
    first = module.release(data)
    module.release(data, epsilon=0.9)
    assert module.embedding is not first
    assert [line["in_use"] for line in module.privacy_report().releases()] == [False, True]
    spent = module.ledger.epsilon()
    data.reads.clear()
    with pytest.raises(PrivacyBudgetExceeded):
        module.release(data)
    assert not data.reads
    assert module.ledger.epsilon() == spent


def test_a_second_release_wants_a_second_training_and_the_report_lists_both(tmp_path):
    module = small()
    module.release(records())
    trainer().fit(module)
    module.generate(3)
    module.release(records(), epsilon=2.0)
    with pytest.warns(UserWarning, match="trained on an earlier release"):
        module.generate(3)
    run = trainer(max_steps=3)
    run.fit(module)
    module.generate(3)  # warnings are errors
    run.save_checkpoint(tmp_path / "twice.ckpt")
    report = DPNTKGenerator.load_from_checkpoint(tmp_path / "twice.ckpt").privacy_report()
    first, second = report.releases()
    assert (first["epsilon"], second["epsilon"]) == pytest.approx((5.0, 2.0))
    assert not first["in_use"]
    assert second["in_use"]
    assert "| release | epsilon |" in report.to_markdown()


def test_classes_whose_signal_drowns_are_warned_of_once_and_remarked():
    module = small(0.3, release_options=ReleaseOptions(noise_seed=0, label_prior="uniform"))
    with pytest.warns(UserWarning, match="signal of the release is below its noise") as told:
        module.release(records(300))
    assert sum("below its noise" in str(warning.message) for warning in told) == 1
    assert "signal below its noise" in str(module.privacy_report())


def test_training_twice_from_one_release_is_post_processing():
    module = small()
    module.release(records())
    before = module.ledger.state_dict()
    for _ in range(2):
        other = copy.deepcopy(module)
        trainer().fit(other)
        assert other.ledger.state_dict() == before


def test_an_interrupted_release_leaves_nothing():
    x, y = records()
    x[70, 1] = math.nan
    data = CountedData((x, y))
    module = small()
    with pytest.raises(ValueError, match="records hold NaN or infinity, first in coordinate 1"):
        trainer().fit(module, datamodule=data)
    assert module.embedding is None
    assert module.ledger.steps == 0
    assert "train_dataloader" not in vars(data)


def test_the_loss_falls_to_the_noise_of_the_release():
    torch.manual_seed(0)
    x, y = records(1_000)
    seen = Recording()
    module = small(1.0, samples_per_class=30, steps_per_epoch=150, release_options={"noise_seed": 0})
    module.release(((x + y[:, None]) / 3, y))
    trainer(max_epochs=1, callbacks=[seen]).fit(module)
    assert seen.losses[0] > 8 * module.noise_floor
    # one draw of noise leaves its floor to a sixth, as it has 3 x 65 coordinates; samples may differ a little besides
    assert 0.7 < sum(seen.losses[-30:]) / 30 / module.noise_floor < 1.5


@pytest.mark.parametrize("schedule", ["cosine", "step", "constant"])
def test_learning_rate_follows_its_schedule(schedule):
    seen = Recording()
    module = small(lr=0.02, matching=MatchingOptions(lr_schedule=schedule, lr_period=5))
    module.release(records())
    trainer(callbacks=[seen]).fit(module)
    expected = {
        "cosine": [0.01 * (1 + math.cos(math.pi * step / 14)) for step in range(14)],
        "step": [0.02 * 0.9 ** (step // 5) for step in range(14)],
        "constant": [0.02] * 14,
    }
    assert seen.rates == pytest.approx(expected[schedule])


def test_cosine_needs_an_end():
    module = small()
    module.release(records())
    with pytest.raises(ValueError, match="set max_epochs or max_steps"):
        trainer(max_epochs=-1).fit(module)


def test_validation_is_compared_where_that_was_allowed_and_the_report_says_so(tmp_path):
    data = CountedData(records(), records(50, seed=1))
    module = small(release_options={"allow_nonprivate_validation": True})
    run = trainer(num_sanity_val_steps=0)
    run.fit(module, datamodule=data)
    assert data.val.reads == dict.fromkeys(range(50), 2)
    assert math.isfinite(run.callback_metrics["val/mmd2"])
    assert any("val/mmd2" in sentence for sentence in module.privacy_report().not_covered)
    assert module.privacy_report().facts["nonprivate_validation"] is True


def test_everything_that_is_promised_is_logged(tmp_path):
    run = trainer(logger=CSVLogger(tmp_path), log_every_n_steps=1)
    run.fit(module := small(), datamodule=CountedData(records()))
    assert {"train/mmd2", "train/mmd2_cross", "train/lr"} <= run.callback_metrics.keys()
    text = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text()
    for name in ("epsilon", "sigma", "noise_norm", "signal_norm", "release_seconds"):
        assert f"synthesis/{name}" in text.splitlines()[0]
    constant = run.callback_metrics["train/mmd2"] - run.callback_metrics["train/mmd2_cross"]
    means = module.embedding.flatten() / module.embedding.counts[:, None]
    assert float(constant) == pytest.approx(float(means.square().sum(1).mean()), rel=1e-4)


def test_infinite_epsilon_is_trained_and_marked():
    with pytest.warns(UserWarning, match="NOT PRIVATE"):
        trainer().fit(module := small(math.inf), datamodule=CountedData(records()))
    report = module.privacy_report()
    assert not report.private
    assert str(report).startswith("NOT PRIVATE")
    assert "NOT PRIVATE" in report.to_markdown()


def test_classes_with_too_few_records_are_warned_of_and_left_out():
    x, y = torch.rand(300, 4), (torch.arange(300) % 2).clone()
    y[0] = 2
    module = small(1.0, release_options={"noise_seed": 0})
    with pytest.warns(UserWarning, match="class 2: too few records for this epsilon"):
        module.release((x, y))
    assert module.privacy_report().classes[2]["remark"].startswith("too few records")
    trainer().fit(module)


def test_a_class_that_is_said_to_have_no_records_is_neither_trained_nor_generated():
    x, y = records(400)
    module = small(release_options={"label_prior": [0.5, 0.5, 0.0], "noise_seed": 0})
    with pytest.warns(UserWarning, match="class 2: too few records for this epsilon"):
        module.release((x, y % 2))
    assert module._class_weights().tolist() == [0.5, 0.5, 0.0]
    trainer().fit(module)
    assert module.generate(100, seed=0).y.bincount().tolist() == [50, 50]


def test_averaged_weights_early_stopping_and_checkpoints_work_as_with_any_module(tmp_path):
    data = CountedData(records())
    callbacks = [
        EMAWeightAveraging(decay=0.9),
        EarlyStopping("train/mmd2", patience=50),
        checkpoint := ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1),
    ]
    trainer(callbacks=callbacks, enable_checkpointing=True).fit(module := small(), datamodule=data)
    assert data.train.reads == ONCE
    assert len(list(tmp_path.glob("*.ckpt"))) == 2
    assert checkpoint.best_model_path
    assert module.generate(5, seed=0).x.shape == (5, 4)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_the_release_is_the_same_in_every_precision(precision):
    options = {"release_options": {"noise_seed": 0}}
    trainer().fit(plain := small(**options), datamodule=CountedData(records()))
    trainer(precision=precision).fit(other := small(**options), datamodule=CountedData(records()))
    assert torch.equal(other.embedding.flatten(), plain.embedding.flatten())
    assert other.generate(3, seed=0).x.dtype == torch.float32


def test_the_training_is_given_by_seeds_and_leaves_global_generators_alone():
    runs = []
    for _ in range(2):
        torch.manual_seed(1)
        module = small(release_options={"noise_seed": 0})
        torch.manual_seed(2)
        expected = torch.rand(1)
        torch.manual_seed(2)
        trainer().fit(module, datamodule=CountedData(records()))
        runs.append(weights(module))
        assert torch.equal(torch.rand(1), expected)
    assert same(*runs)


def test_samples_are_given_by_the_seed_and_not_by_the_batch_size():
    trainer().fit(module := small(), datamodule=CountedData(records()))
    first, second = module.generate(40, seed=1), module.generate(40, seed=1, batch_size=7)
    torch.testing.assert_close(first.x, second.x, rtol=0, atol=1e-6)
    assert torch.equal(first.y, second.y)
    assert not torch.equal(first.x, module.generate(40, seed=2).x)
    assert not torch.equal(module.generate(40).x, module.generate(40).x)


def test_generating_disturbs_neither_modes_nor_generators():
    trainer().fit(module := small(), datamodule=CountedData(records()))
    module.train()
    before = weights(module)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    module.generate(10)
    assert torch.equal(torch.rand(1), expected)
    assert module.generator.training
    assert same(before, weights(module))


def test_classes_are_generated_in_the_shares_of_the_release_or_as_asked_for():
    module = small()
    x, y = records(4_000)
    module.release((torch.cat([x, x[:2_000]]), torch.cat([y, torch.zeros(2_000, dtype=torch.int64)])))
    module.steps_trained = 1
    shares = module.embedding.counts / module.embedding.counts.sum()
    made = module.generate(999, seed=0)
    assert (made.y.bincount() / 999 - shares).abs().max() < 1.01 / 999
    assert not torch.equal(made.y, made.y.sort().values)
    assert module.generate(5, labels=1).y.tolist() == [1] * 5
    assert module.generate(3, labels=torch.tensor([2, 0, 1])).y.tolist() == [2, 0, 1]
    assert module.generate(3, labels=[2, 0, 1]).y.tolist() == [2, 0, 1]


def test_a_sketch_of_the_features_is_released_and_trained_on_in_the_same_way():
    data = CountedData(records())
    trainer().fit(module := small(feature_options={"sketch_dim": 32}), datamodule=data)
    assert module.embedding.layout == {"sketch": (32,)}
    assert data.train.reads == ONCE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "n must be a whole number >= 1, got 0"),
        ({"n": -3}, "n must be a whole number >= 1"),
        ({"n": 5, "labels": 7}, r"labels must lie in 0..2, got 7..7"),
        ({"n": 5, "labels": -1}, r"labels must lie in 0..2"),
        ({"n": 5, "labels": [0, 1]}, "one class or n = 5 of them"),
        ({"n": 5, "labels": 0.5}, "labels must be integers"),
        ({"n": 5, "batch_size": 0}, "batch_size must be a whole number >= 1"),
    ],
)
def test_what_cannot_be_generated_is_told(arguments, message):
    module = small()
    module.steps_trained = 1
    with pytest.raises(ValueError, match=message):
        module.generate(**arguments)


def test_samples_of_an_untrained_generator_are_warned_of():
    with pytest.warns(UserWarning, match="the generator has not been trained"):
        small().generate(3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epsilon": 0}, "epsilon must be > 0"),
        ({"delta": 2.0}, "delta must lie in"),
        ({"latent_dim": 0}, "latent_dim must be a whole number >= 1"),
        ({"samples_per_class": 1}, "samples_per_class must be a whole number >= 2"),
        ({"steps_per_epoch": 0}, "steps_per_epoch must be a whole number >= 1"),
        ({"lr": 0.0}, "lr must be > 0"),
        ({"num_classes": 0}, "num_classes must be a whole number >= 1"),
        ({"input_shape": ()}, "input_shape must have at least one axis"),
        ({"input_shape": None}, "expected schema= for a table, or num_classes= and input_shape="),
        ({"release_options": {"adjacancy": "replace_one"}}, "expected ReleaseOptions or a dict with some of"),
        ({"matching": {"weighting": "fair"}}, "weighting must be one of"),
        ({"feature_options": {"input_range": "bytes"}}, "input_range must be one of"),
        ({"feature_options": {"sketch_dim": 0}}, "sketch_dim must be a whole number >= 1"),
    ],
)
def test_arguments_out_of_range_are_told_at_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        small(**{"epsilon": 1.0, **arguments})


def test_one_sample_of_a_class_is_enough_for_the_biased_estimator():
    module = small(samples_per_class=1, matching=MatchingOptions(estimator="v"))
    module.release(records())
    trainer().fit(module)


class WrongShape(nn.Module):
    def forward(self, z, y):
        return z[:, :2]


class Hungry(nn.Module):
    noise_dim = 9

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(9, 4)

    def forward(self, z, y):
        return self.layer(z)


def test_generator_and_records_must_fit_and_that_is_told_at_construction():
    with pytest.raises(ValueError, match=r"WrongShape to give records \[6, 4\], got \[6, 2\]"):
        small(generator=WrongShape())
    stubborn = Hungry()
    stubborn.noise_dim = 3
    with pytest.raises(ValueError, match=r"Hungry must map z \[B, 3\] and classes"):
        small(generator=stubborn)
    images = {"num_classes": 2, "input_shape": (1, 8, 8), "feature_widths": (5,), "latent_dim": 3}
    with pytest.raises(ValueError, match=r"ConvImageGenerator to give numbers in \[0, 1\].*output='sigmoid'"):
        DPNTKGenerator(1.0, generator=ConvImageGenerator(3, 2, (1, 8, 8), output="tanh"), **images)
    assert small(generator=Hungry()).noise_dim == 9


def test_the_range_of_images_is_checked_and_can_be_set():
    arguments = {"num_classes": 2, "input_shape": (1, 8, 8), "feature_widths": (5,), "latent_dim": 3}
    y = torch.arange(20) % 2
    unit = torch.rand(20, 1, 8, 8)
    DPNTKGenerator(5.0, **arguments).release((unit, y))
    for other in (unit * 255, unit * 2 - 1, unit - 0.1):
        with pytest.raises(ValueError, match=r"numbers in \[0, 1\], got others.*divide bytes by 255"):
            DPNTKGenerator(5.0, **arguments).release((other, y))
    with torch.random.fork_rng(devices=[]):  # the generator's first weights
        torch.manual_seed(0)
        signed = DPNTKGenerator(5.0, feature_options=FeatureOptions(input_range="signed"), **arguments)
    signed.release((unit * 2 - 1, y))
    signed.steps_trained = 1
    assert float(signed.generate(50, seed=0).x.min()) < 0
    DPNTKGenerator(5.0, feature_options={"input_range": "any"}, **arguments).release((unit * 255, y))


def test_images_may_lack_axes_of_size_one_and_must_have_their_channels_first():
    arguments = {"num_classes": 2, "feature_widths": (5,), "latent_dim": 3}
    y = torch.arange(20) % 2
    grey, colour = (DPNTKGenerator(5.0, input_shape=(channels, 8, 8), **arguments) for channels in (1, 3))
    for shape in ((1, 8, 8), (8, 8), (8, 8, 1), (64,)):
        grey.release((torch.rand(20, *shape), y))
    colour.release((torch.rand(20, 192), y))
    for shape, hint in (((8, 8, 3), "channels first"), ((8, 24), ""), ((8, 3, 8), "")):
        with pytest.raises(ValueError, match=rf"records of shape \[3, 8, 8\], got .*{hint}"):
            colour.release((torch.rand(20, *shape), y))


def test_records_of_another_shape_are_told():
    with pytest.raises(ValueError, match=r"records of shape \[4\], got \[5\]"):
        small().release(records(shape=(5,)))


def test_records_without_labels_are_generated_unconditionally():
    module = small(num_classes=1)
    module.release(records()[0])
    trainer().fit(module)
    assert module.generate(7).y.tolist() == [0] * 7


def test_dictionaries_are_split_as_everywhere_in_the_package():
    x, y = records()
    rows = [{"inputs": x[k], "target": y[k]} for k in range(101)]
    module = small(split_batch=BatchKeys())
    module.release(DataLoader(rows, batch_size=20))
    assert module.embedding.num_records == 101


SCHEMA = {
    "label": "income",
    "label_categories": ["<=50K", ">50K"],
    "columns": [{"name": "age", "low": 17, "high": 90, "bins": 8}, {"name": "sex", "categories": ["Male", "Female"]}],
}


def rows(n=400):
    random = torch.Generator().manual_seed(0)
    age = (17 + 73 * torch.rand(n, generator=random)).tolist()
    return {
        "age": age,
        "sex": [("Male", "Female")[k % 2] for k in range(n)],
        "income": ["<=50K" if value < 60 else ">50K" for value in age],
    }


def test_a_table_is_made_in_a_few_lines(tmp_path):
    schema = TableSchema.from_dict(SCHEMA)
    module = DPNTKGenerator(
        epsilon=1.0, delta=1e-5, schema=schema, feature_widths=(50,), latent_dim=20, samples_per_class=200,
        steps_per_epoch=5,
    )  # fmt: skip
    trainer(max_epochs=1).fit(module, datamodule=TabularDataModule(rows()))  # its schema is the module's
    made = module.generate(30, seed=1)
    assert set(made.rows) == {"age", "sex", "income"}
    assert all(17 <= value <= 90 for value in made.rows["age"])
    lines = made.to_csv(tmp_path / "synthetic.csv").read_text().splitlines()
    assert lines[0] == "age,sex,income"
    assert len(lines) == 31


def test_rows_of_a_table_are_released_directly_and_schema_and_shape_must_agree():
    module = DPNTKGenerator(1.0, schema=SCHEMA, feature_widths=(8,))
    assert module.release(rows()).num_records == 400
    with pytest.raises(ValueError, match=r"column 'sex'.*none of the declared categories"):
        module.release({**rows(), "sex": ["?"] * 400})
    assert module.ledger.steps == 1
    with pytest.raises(ValueError, match="the schema says num_classes = 2, got 3"):
        DPNTKGenerator(1.0, schema=SCHEMA, num_classes=3)


def test_a_broken_record_of_a_table_is_told_by_the_name_of_its_column():
    schema = TableSchema([NumericColumn("age", 0, 1), NumericColumn("height", 0, 1, encoding="unit")])
    x, y = schema.encode({"age": [0.5] * 9, "height": [0.25] * 9})
    x[4, -1] = math.nan
    with pytest.raises(ValueError, match="first in column 'height'"):
        DPNTKGenerator(1.0, schema=schema).release((x, y))


def test_classes_of_a_table_may_be_named_and_columns_that_are_not_read_are_told(caplog):
    rows = {"id": list(range(200)), "age": [20, 60] * 100, "smoker": ["yes", "no"] * 100}
    schema = TableSchema([NumericColumn("age", 0, 99)], "smoker", ["yes", "no"])
    module = DPNTKGenerator(50.0, schema=schema, feature_widths=(8,), steps_per_epoch=2, samples_per_class=4)
    with caplog.at_level(logging.INFO):
        trainer(max_epochs=1).fit(module, datamodule=TabularDataModule(rows))
    assert "not read, as the schema has no such column: id" in caplog.text
    assert set(module.generate(np.int64(3), labels="no").rows["smoker"]) == {"no"}
    assert module.generate(2, labels=["no", 0]).y.tolist() == [1, 0]
    with pytest.raises(ValueError, match="one of the classes 'yes' = 0, 'no' = 1, got 'maybe'"):
        module.generate(3, labels="maybe")
    for data in ("rows.csv", TabularDataModule(rows)):
        with pytest.raises(ValueError, match=r"release reads rows.*read_csv"):
            module.release(data)
    assert len(repr(module.generate(3))) < 200
    assert len(repr(module.embedding)) < 200


def test_rare_classes_are_kept_in_share_and_place():
    torch.manual_seed(0)
    n = 20_000
    y = (torch.arange(n) < n // 100).long()
    x = torch.randn(n, 2) + torch.tensor([[-1.0, 0.5], [1.0, -0.5]])[y]
    module = DPNTKGenerator(
        10.0, num_classes=2, input_shape=(2,), feature_widths=(400,), samples_per_class=200, steps_per_epoch=250,
        latent_dim=4, generator=MLPGenerator(4, 2, (2,), (64, 64), "identity"), release_options={"noise_seed": 0},
    )  # fmt: skip
    module.release((x, y))
    trainer(max_epochs=1).fit(module)
    made = module.generate(n, seed=0)
    assert abs(float(made.y.float().mean()) - 0.01) < 0.002
    even = module.generate(n, torch.arange(n) % 2, seed=0)  # enough of the rare class to tell its mean
    for c in range(2):  # in standard deviations of the class
        assert float((even.x[even.y == c].mean(0) - x[y == c].mean(0)).abs().max()) < 0.1
