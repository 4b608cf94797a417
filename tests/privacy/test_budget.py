"""What may be spent: noise for a target, the stop before a bound, plans."""

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from private_runs import Classifier, fit, loader, private, trainer_of

from lightning_eff.accounting import PrivacyBudgetExceeded, PrivacyEvent, subsampled_epsilon
from lightning_eff.privacy.budget import Budget, PrivateData
from lightning_eff.privacy.planning import PrivacyPlan, default_delta
from lightning_eff.privacy.strategy import DPGradientDropStrategy


def test_the_noise_is_found_that_ends_the_planned_steps_at_the_target():
    strategy = fit(target_epsilon=3.0, delta=1e-4, trainer={"max_epochs": 4})[1].strategy
    assert strategy.ledger.steps == 20
    assert strategy.epsilon == pytest.approx(3.0, rel=2e-3)
    assert strategy.epsilon <= 3.0
    assert strategy.plan().noise_multiplier == strategy.noise_multiplier


@pytest.mark.parametrize(
    ("settings", "steps"),
    [({"max_epochs": -1, "max_steps": 7}, 7), ({"limit_train_batches": 3, "max_epochs": 3}, 9)],
)
def test_a_target_counts_the_steps_the_trainer_will_take(settings, steps):
    strategy = fit(target_epsilon=2.0, trainer=settings)[1].strategy
    assert strategy.ledger.steps == steps
    assert strategy.epsilon == pytest.approx(2.0, rel=2e-3)


def test_solved_noise_agrees_with_values_of_opacus():
    # N = 60000, 4 epochs of batch 512: 468 steps at least
    plan = PrivacyPlan.make(60_000, 512, steps=468, target_epsilon=2.0, delta=1e-5)
    assert plan.noise_multiplier == pytest.approx(0.8057, abs=0.005)
    plan = PrivacyPlan.make(60_000, 512, steps=468, target_epsilon=2.0, delta=1e-5, accountant="rdp")
    assert plan.noise_multiplier == pytest.approx(0.8826, abs=0.005)


def affordable(epsilon):
    """Steps at q = 0.2, sigma = 1, delta = 1e-5 that keep epsilon."""
    steps = 0
    while subsampled_epsilon([PrivacyEvent(1.0, 0.2, steps + 1)], 1e-5, "rdp") <= epsilon:
        steps += 1
    return steps


def test_training_stops_before_the_bound_would_be_passed(tmp_path):
    class Ends(L.Callback):
        ended = 0

        def on_train_end(self, trainer, pl_module):
            self.ended += 1

    ends = Ends()
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    settings = {"max_epochs": 50, "enable_checkpointing": True}
    strategy = fit(callbacks=[ends, checkpoint], max_epsilon=6.0, trainer=settings)[1].strategy
    assert 5 < strategy.ledger.steps == affordable(6.0) < 50
    assert strategy.epsilon <= 6.0 < strategy.ledger.epsilon_after(1.0, 0.2)
    assert ends.ended == 1
    assert (tmp_path / "last.ckpt").exists()


def test_a_spent_budget_takes_no_step_at_all():
    strategy = private(max_epsilon=6.0)
    trainer = trainer_of(strategy, max_epochs=50)
    trainer.fit(Classifier(), loader())
    spent = strategy.ledger.steps
    trainer.fit_loop.max_epochs = 60
    trainer.fit(Classifier(), loader())
    assert strategy.ledger.steps == spent


def test_a_bound_that_forbids_steps_the_trainer_must_take_is_an_error():
    with pytest.raises(ValueError, match=r"asks for 100 more steps, max_epsilon = 6 allows \d"):
        fit(max_epsilon=6.0, trainer={"min_epochs": 20, "max_epochs": 30})


def test_a_bound_above_the_plan_stops_nothing():
    trainer = fit(max_epsilon=100.0, trainer={"max_epochs": 2})[1]
    assert trainer.strategy.ledger.steps == 10
    assert not trainer.should_stop


def test_longer_training_than_planned_is_planned_anew():
    class Longer(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.fit_loop.max_epochs = 3

    strategy = fit(callbacks=[Longer()], max_epsilon=100.0)[1].strategy
    assert strategy.ledger.steps == 15
    with pytest.raises(ValueError, match="above target_epsilon = 3"):
        fit(callbacks=[Longer()], target_epsilon=3.0)


def test_the_ledger_knows_of_a_step_before_the_weights_change():
    class Broken(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.weights = pl_module.net[0].weight.detach().clone()
            raise KeyError("power cut")

    broken, module = Broken(), Classifier()
    strategy = private()
    with pytest.raises(KeyError, match="power cut"):
        trainer_of(strategy, callbacks=[broken]).fit(module, loader())
    assert strategy.ledger.steps == 1
    assert (module.net[0].weight.detach() == broken.weights).all()


def test_a_step_that_fails_before_its_gradient_is_not_counted():
    class Failing(Classifier):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise KeyError("bad luck")
            return super().training_step(batch, batch_idx)

    strategy = private()
    with pytest.raises(KeyError, match="bad luck"):
        trainer_of(strategy).fit(Failing(), loader())
    assert strategy.ledger.steps == 2


def test_more_than_the_bound_cannot_be_recorded():
    budget = Budget(1.0, None, 1e-5, 6.0, "rdp")
    budget.begin(PrivateData(40, 8, 5, "TensorDataset"), 64)
    assert budget.steps_left == affordable(6.0)
    for _ in range(budget.steps_left):
        budget.record()
    assert budget.is_spent
    with pytest.raises(PrivacyBudgetExceeded, match="above max_epsilon = 6"):
        budget.record()
    assert budget.ledger.steps == affordable(6.0)


def test_a_plan_needs_no_training():
    strategy = DPGradientDropStrategy(target_epsilon=2.0, delta=1e-5)
    plan = strategy.plan(num_samples=60_000, batch_size=512, epochs=4)
    assert (plan.steps, plan.steps_per_epoch) == (472, 118)
    assert plan.epsilon == pytest.approx(2.0, rel=2e-3)
    with pytest.raises(ValueError, match="num_samples, batch_size and epochs"):
        strategy.plan()


def test_the_plan_tells_epsilon_by_epoch_and_noise_by_target():
    plan = PrivacyPlan.make(1437, 64, epochs=4, noise_multiplier=1.0, delta=1e-4, accountant="rdp")
    table = plan.epochs()
    assert [row[1] for row in table.rows] == [23, 46, 69, 92]
    assert table.rows[-1][2] == pytest.approx(plan.epsilon)
    assert [row[2] for row in table.rows] == sorted(row[2] for row in table.rows)
    noise = {row[0]: row[1] for row in plan.noise_for([3.0, 1e-9]).rows}
    assert noise[1e-9] is None
    assert plan.epsilon_after(0) == 0
    reached = PrivacyPlan.make(1437, 64, epochs=4, noise_multiplier=noise[3.0], delta=1e-4, accountant="rdp")
    assert reached.epsilon == pytest.approx(3.0, rel=2e-3)
    assert "1,437" in str(plan)


def test_a_long_plan_is_told_in_few_rows_with_its_end():
    plan = PrivacyPlan.make(100, 10, epochs=95, noise_multiplier=2.0, accountant="rdp")
    rows = plan.epochs(rows=5).rows
    assert len(rows) <= 6
    assert rows[-1][1] == 950


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": 1, "steps": 5, "noise_multiplier": 1.0}, "give epochs or steps"),
        ({"noise_multiplier": 1.0}, "give epochs or steps"),
        ({"epochs": 0.5, "noise_multiplier": 1.0}, "epochs must be a whole number >= 0, got 0.5"),
        ({"epochs": 1}, "exactly one of noise_multiplier and target_epsilon"),
    ],
)
def test_plans_that_contradict_themselves_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PrivacyPlan.make(100, 10, **arguments)


def test_delta_stays_well_below_one_over_n():
    assert default_delta(100) == 1e-5
    assert default_delta(60_000) == pytest.approx(1 / 600_000)
    assert fit(data=loader(400, 200))[1].strategy.ledger.delta == 1e-5
