"""What a run says of itself: the banner, loggers, files, and where a bound ends it."""

import json

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from private_runs import Classifier, dataset, fit, loader, private, trainer_of
from torch import nn
from torch.utils.data import DataLoader

from lightning_eff.accounting import PrivacyLedger
from lightning_eff.privacy import DPGradientDropStrategy
from lightning_eff.privacy.planning import PrivacyPlan
from lightning_eff.synthesis import NTKFeatures, ReleaseOptions, release_mean_embedding


def banner_of(caplog, **settings):
    with caplog.at_level("INFO", "lightning.pytorch"):
        fit(**settings)
    (text,) = [record.getMessage() for record in caplog.records if "Private training:" in record.getMessage()]
    return text


def test_the_banner_has_three_lines_that_say_what_is_spent_on_what(caplog):
    text = banner_of(caplog, drop_rate=0.5, granularity="row", max_grad_norm=0.4)
    first, second, third = text.splitlines()
    assert "N = 40, expected batch 8 (q = 0.2), 5 steps" in first
    assert "epsilon" in first
    assert second.startswith("  C = 0.4 (flat); 75 coordinates, 75 kept, ")
    assert "samples drawn for each step; noise from the operating system." in second
    assert "one sample more or less" in third
    assert "approximate" not in text


def test_the_banner_says_where_epsilon_is_approximate_or_nothing_is_private(caplog):
    with pytest.warns(UserWarning, match="nothing is private"):
        text = banner_of(caplog, poisson_sampling=False, noise_seed=1)
    assert "batches SHUFFLED, so that epsilon is approximate" in text
    assert "noise_seed, NOT PRIVATE" in text


def test_the_banner_and_the_plan_tell_where_a_bound_ends_training(caplog):
    text = banner_of(caplog, max_epsilon=6.0, trainer={"max_epochs": 50})
    strategy = private(max_epsilon=6.0, delta=1e-5)
    plan = strategy.plan(40, 8, 50)
    assert f"max_epsilon = 6 ends training after {plan.allowed_steps} of 250 steps, epsilon 5." in str(plan)
    assert f"max_epsilon = 6 ends training after {plan.allowed_steps} of 250 steps, epsilon 5." in text
    assert plan.epsilon_after(plan.allowed_steps) <= 6.0 < plan.epsilon_after(plan.allowed_steps + 1)


def test_a_bound_below_the_cost_of_a_step_is_an_error_before_the_first_step():
    with pytest.raises(ValueError, match=r"max_epsilon = 0.1 is below the cost of a single step, epsilon \d\.\d+"):
        fit(max_epsilon=0.1)
    with pytest.raises(ValueError, match="below the cost of a single step"):
        PrivacyPlan.make(40, 8, epochs=1, noise_multiplier=1.0, max_epsilon=0.1, accountant="rdp")


def test_a_target_above_the_bound_is_refused():
    with pytest.raises(ValueError, match="target_epsilon = 3 lies above max_epsilon = 2"):
        DPGradientDropStrategy(target_epsilon=3.0, max_epsilon=2.0)
    assert fit(target_epsilon=2.0, max_epsilon=2.0)[1].strategy.ledger.steps == 5


def test_a_name_without_budget_says_what_to_write_instead():
    with pytest.raises(
        ValueError, match=r"a name carries no budget: strategy=DPGradientDropStrategy\(target_epsilon=3.0\)"
    ):
        trainer_of(DPGradientDropStrategy()).fit(Classifier(), loader())


def test_loggers_get_the_settings_beside_the_modules_own(tmp_path):
    class Own(Classifier):
        def __init__(self, depth=3):
            super().__init__()
            self.save_hyperparameters()

    fit(Own(), max_grad_norm=0.25, clipping="automatic", trainer={"logger": CSVLogger(tmp_path)})
    written = (tmp_path / "lightning_logs/version_0/hparams.yaml").read_text()
    for line in (
        "depth: 3",
        "privacy/max_grad_norm: 0.25",
        "privacy/clipping: automatic",
        "privacy/noise_multiplier: 1.0",
        "privacy/delta: 1.0e-05",
        "privacy/accountant: rdp",
    ):
        assert line in written.splitlines()


def test_the_reports_of_a_fit_are_written(tmp_path):
    strategy = fit(options={"dirpath": str(tmp_path / "privacy")})[1].strategy
    assert PrivacyLedger.load(tmp_path / "privacy/privacy.json").history == strategy.ledger.history
    assert json.loads((tmp_path / "privacy/privacy.json").read_text())["report"]["steps"] == 5
    assert (tmp_path / "privacy/privacy.md").read_text() == strategy.ledger.to_markdown()


def test_reports_are_written_of_what_a_broken_fit_has_spent_and_not_of_a_test(tmp_path):
    class Failing(Classifier):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise KeyError("bad luck")
            return super().training_step(batch, batch_idx)

        def test_step(self, batch, batch_idx):
            pass

    strategy = private(options={"dirpath": str(tmp_path)})
    trainer = trainer_of(strategy)
    trainer.test(Failing(), DataLoader(dataset(), batch_size=8), verbose=False)
    assert not list(tmp_path.iterdir())
    with pytest.raises(KeyError, match="bad luck"):
        trainer.fit(Failing(), loader())
    assert PrivacyLedger.load(tmp_path / "privacy.json").steps == 2


def test_one_strategy_serves_several_trainers_on_the_device_each_asks_for():
    strategy = private()
    first = trainer_of(strategy)
    first.fit(Classifier(), loader())
    second = L.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=strategy,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    second.fit(Classifier(), loader())
    assert strategy.ledger.steps == 10
    first.fit_loop.max_epochs = 2
    first.fit(Classifier(), loader())
    assert strategy.ledger.steps == 15


def test_a_second_fit_with_a_spent_target_says_so():
    strategy = private(target_epsilon=3.0)
    trainer_of(strategy).fit(Classifier(), loader())
    wanted = "this strategy has already spent 3 of 3; make a new one or raise target_epsilon"
    with pytest.raises(ValueError, match=wanted):
        trainer_of(strategy).fit(Classifier(), loader())
    assert strategy.ledger.steps == 5


def test_a_ledger_that_releases_were_entered_into_goes_on():
    ledger = PrivacyLedger(1e-5, max_epsilon=6.0, accountant="rdp")
    ledger.record(4.0, label="release of class sums")
    strategy = private(ledger=ledger)
    assert strategy.ledger is ledger
    trainer_of(strategy, max_epochs=50).fit(Classifier(), loader())
    assert [event.label for event in ledger.history] == ["release of class sums", "training"]
    assert ledger.epsilon() <= 6.0 < ledger.epsilon_after(1.0, 0.2)
    alone = fit(max_epsilon=6.0, delta=1e-5, trainer={"max_epochs": 50})[1].strategy
    assert ledger.history[-1].steps < alone.ledger.steps


def test_a_release_of_class_sums_and_training_are_told_together():
    ledger = PrivacyLedger(1e-5, accountant="rdp")
    net = NTKFeatures(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)))
    options = ReleaseOptions(adjacency="add_remove")
    release_mean_embedding(dataset().tensors, net, 3, epsilon=1.0, options=options, ledger=ledger, progress=False)
    strategy = private(noise_multiplier=3.0, ledger=ledger)
    trainer_of(strategy).fit(Classifier(), loader())
    assert [event.steps for event in ledger.history] == [1, 5]
    assert ledger.epsilon() > max(1.0, fit(noise_multiplier=3.0)[1].strategy.epsilon)
    assert any("class sums" in event.label for event in strategy.ledger.history)


def test_a_run_goes_on_with_the_ledger_that_it_wrote(tmp_path):
    ledger = PrivacyLedger(1e-5, accountant="rdp")
    ledger.record(4.0, label="release")
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    first = private(ledger=ledger, options={"dirpath": str(tmp_path)})
    trainer_of(first, callbacks=[checkpoint], enable_checkpointing=True).fit(Classifier(), loader())
    second = private(ledger=PrivacyLedger.load(tmp_path / "privacy.json"))
    trainer_of(second, max_epochs=3).fit(Classifier(), loader(), ckpt_path=tmp_path / "last.ckpt")
    assert [(event.label, event.steps) for event in second.ledger.history] == [("release", 1), ("training", 15)]


def test_a_target_counts_what_is_in_the_given_ledger():
    ledger = PrivacyLedger(1e-5, accountant="rdp")
    ledger.record(4.0)
    strategy = private(target_epsilon=3.0, ledger=ledger)
    trainer_of(strategy).fit(Classifier(), loader())
    assert ledger.epsilon() == pytest.approx(3.0, rel=2e-3)


def test_who_enters_something_in_the_middle_brings_the_end_nearer():
    ledger = PrivacyLedger(1e-5, max_epsilon=6.0, accountant="rdp")

    class Release(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 2:
                ledger.record(2.0, label="release")

    trainer_of(private(ledger=ledger), max_epochs=50, callbacks=[Release()]).fit(Classifier(), loader())
    assert [event.label for event in ledger.history] == ["training", "release", "training"]
    assert ledger.epsilon() <= 6.0 < ledger.epsilon_after(1.0, 0.2)


@pytest.mark.parametrize(
    ("ledger", "settings", "message"),
    [
        ({"adjacency": "replace_one"}, {}, "adjacency 'replace_one'.*add_remove"),
        ({"delta": 1e-6}, {"delta": 1e-5}, "delta = 1e-05 beside a ledger with 1e-06"),
        ({"max_epsilon": 3.0}, {"max_epsilon": 4.0}, "max_epsilon = 4 beside a ledger with 3.0"),
    ],
)
def test_a_ledger_that_says_otherwise_is_refused(ledger, settings, message):
    with pytest.raises(ValueError, match=message):
        private(ledger=PrivacyLedger(**ledger), **settings)
