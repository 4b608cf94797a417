"""A run that stops and goes on: the same bits with a noise seed, one history, and no secret in the file."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from private_runs import Classifier, equal, fit, loader, private, trainer_of, weights_of
from torch.utils.data import DataLoader, TensorDataset

from lightning_eff.accounting import PrivacyEvent
from lightning_eff.privacy.accounted import CHECKPOINT_KEY
from lightning_eff.privacy.budget import _begins_with
from lightning_eff.privacy.selection.plan import SelectionPlan
from lightning_eff.privacy.selection.selectors import NoisyGradientSelector

pytestmark = pytest.mark.filterwarnings("ignore:noise_seed makes noise and sampling repeatable")


class Scheduled(Classifier):
    """Momentum and a scheduler that counts steps."""

    def __init__(self):
        super().__init__(momentum=0.9)

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def train(epochs, path=None, resume=None, callbacks=(), trainer=None, **settings):
    module = Scheduled()
    runner = trainer_of(private(**settings), max_epochs=epochs, callbacks=list(callbacks), **(trainer or {}))
    runner.fit(module, loader(), ckpt_path=resume)
    if path is not None:
        runner.save_checkpoint(path)
    return module, runner


@pytest.mark.parametrize(
    "settings",
    [
        {"drop_rate": 0.5},
        {"drop_rate": 0.5, "granularity": "row", "selection": "magnitude", "max_physical_batch_size": 3},
        {"selection": SelectionPlan(0.6, "noisy_gradient", refresh=7)},
        {"selection": SelectionPlan(0.5, "magnitude", refresh="epoch", explore=0.3)},
    ],
)
def test_two_and_two_epochs_are_four_epochs_bit_for_bit(tmp_path, settings):
    def twin():
        plan = settings.get("selection")
        if not isinstance(plan, SelectionPlan):
            return dict(settings)
        rule = NoisyGradientSelector(6) if plan.refresh == 7 else "magnitude"
        return {"selection": SelectionPlan(plan.drop_rate, rule, refresh=plan.refresh, explore=plan.explore)}

    whole, _ = train(4, noise_seed=5, **twin())
    train(2, tmp_path / "half.ckpt", noise_seed=5, **twin())
    again, runner = train(4, resume=tmp_path / "half.ckpt", noise_seed=5, **twin())
    assert equal(weights_of(whole), weights_of(again))
    assert runner.strategy.ledger.steps == 20
    assert [(event.steps, event.noise_multiplier) for event in runner.strategy.ledger.history] == [(20, 1.0)]


def test_a_run_stopped_within_an_epoch_goes_on_bit_for_bit(tmp_path):
    whole, _ = train(2, noise_seed=5, drop_rate=0.5)

    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    train(1, callbacks=[Stop()], noise_seed=5, drop_rate=0.5)
    again, runner = train(2, resume=tmp_path / "middle.ckpt", noise_seed=5, drop_rate=0.5)
    assert equal(weights_of(whole), weights_of(again))
    assert runner.strategy.ledger.steps == runner.global_step == 10


def test_averaged_weights_go_on_bit_for_bit(tmp_path):
    whole, _ = train(4, noise_seed=5, callbacks=[EMAWeightAveraging()])
    save = L.pytorch.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    train(2, noise_seed=5, callbacks=[EMAWeightAveraging(), save], trainer={"enable_checkpointing": True})
    again, _ = train(4, resume=tmp_path / "epoch=1.ckpt", noise_seed=5, callbacks=[EMAWeightAveraging()])
    assert equal(weights_of(whole), weights_of(again))


def test_a_resumed_run_never_repeats_its_noise(tmp_path):
    L.seed_everything(42, verbose=False)
    _first, _ = train(1, tmp_path / "one.ckpt")
    results = []
    for _ in range(2):
        L.seed_everything(42, verbose=False)
        results.append(weights_of(train(2, resume=tmp_path / "one.ckpt")[0]))
    assert not torch.equal(results[0]["net.0.weight"], results[1]["net.0.weight"])


def test_the_file_loads_as_plain_data_tells_epsilon_and_holds_no_generator(tmp_path):
    _, runner = train(2, tmp_path / "half.ckpt", drop_rate=0.5, selection="magnitude")
    state = torch.load(tmp_path / "half.ckpt", weights_only=True)[CHECKPOINT_KEY]
    assert state["epsilon"] == runner.strategy.epsilon
    assert state["ledger"]["history"][0]["steps"] == 10
    assert state["data"] == {
        "num_samples": 40,
        "expected_batch": 8,
        "steps_per_epoch": 5,
        "dataset": "TensorDataset",
    }

    def leaves(node):
        if isinstance(node, dict):
            return [leaf for value in node.values() for leaf in leaves(value)]
        if isinstance(node, list | tuple):
            return [leaf for value in node for leaf in leaves(value)]
        return [node]

    for leaf in leaves(state):
        assert isinstance(leaf, str | int | float | bool | torch.Tensor | None)
        assert not isinstance(leaf, torch.Tensor) or leaf.numel() < 625  # a generator's state is longer
        assert not isinstance(leaf, str) or len(leaf) < 250


def test_the_key_of_the_noise_is_in_no_file(tmp_path):
    keys = []

    class Key(L.Callback):
        def on_train_end(self, trainer, pl_module):
            keys.append(trainer.strategy._streams.key)
            trainer.save_checkpoint(tmp_path / "file.ckpt")

    train(1, callbacks=[Key()])
    content = (tmp_path / "file.ckpt").read_bytes()
    assert keys[0] not in content
    assert keys[0].hex().encode() not in content


def test_load_from_checkpoint_and_a_plain_fit_need_nothing_of_ours(tmp_path):
    trained, _ = train(1, tmp_path / "one.ckpt")
    loaded = Scheduled.load_from_checkpoint(tmp_path / "one.ckpt", weights_only=True)
    assert equal(weights_of(trained), weights_of(loaded))
    trainer_of("auto").fit(loaded, loader())
    private_again = trainer_of(private(), max_epochs=1)
    private_again.fit(Scheduled.load_from_checkpoint(tmp_path / "one.ckpt", weights_only=True), loader())
    assert private_again.strategy.ledger.steps == 5


def test_a_checkpoint_that_tells_nothing_is_refused_unless_allowed(tmp_path):
    plain = trainer_of("auto")
    plain.fit(Scheduled(), loader())
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(ValueError, match=r"does not tell what was spent before.*allow_unaccounted_resume"):
        train(2, resume=tmp_path / "plain.ckpt")
    _, runner = train(2, resume=tmp_path / "plain.ckpt", options={"allow_unaccounted_resume": True})
    report = runner.strategy.ledger.facts()
    assert not report["private"]
    assert "does not tell what was spent" in report["caveats"][0]
    assert runner.strategy.ledger.steps == 5


def test_caveats_stay_with_a_run_that_goes_on(tmp_path):
    train(1, tmp_path / "seeded.ckpt", noise_seed=1)
    _, runner = train(2, resume=tmp_path / "seeded.ckpt")
    assert any("noise_seed" in sentence for sentence in runner.strategy.ledger.caveats)


def test_another_noise_or_batch_makes_the_history_longer(tmp_path):
    train(1, tmp_path / "one.ckpt")
    runner = trainer_of(private(2.0), max_epochs=2)
    runner.fit(Scheduled(), loader(batch_size=4), ckpt_path=tmp_path / "one.ckpt")
    events = [(event.noise_multiplier, event.sample_rate, event.steps) for event in runner.strategy.ledger.history]
    assert events == [(1.0, 0.2, 5), (2.0, 0.1, 10)]


def test_another_data_set_is_refused_unless_allowed(tmp_path):
    class Other(TensorDataset):
        pass

    train(1, tmp_path / "one.ckpt")
    other = DataLoader(Other(*loader().dataset.tensors), batch_size=8)
    with pytest.raises(ValueError, match="trained on a TensorDataset, this is a Other"):
        trainer_of(private(), max_epochs=2).fit(Scheduled(), other, ckpt_path=tmp_path / "one.ckpt")
    runner = trainer_of(private(options={"allow_unaccounted_resume": True}), max_epochs=2)
    runner.fit(Scheduled(), other, ckpt_path=tmp_path / "one.ckpt")
    assert runner.strategy.ledger.steps == 10
    assert any("another data set" in sentence for sentence in runner.strategy.ledger.caveats)


def test_a_target_keeps_its_noise_and_refuses_a_longer_plan(tmp_path):
    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "half.ckpt")
                trainer.should_stop = True

    first = train(4, callbacks=[Stop()], target_epsilon=3.0)[1].strategy
    assert first.ledger.steps == 10
    _, runner = train(4, resume=tmp_path / "half.ckpt", target_epsilon=3.0)
    assert runner.strategy.noise_multiplier == first.noise_multiplier
    assert runner.strategy.epsilon == pytest.approx(3.0, rel=2e-3)
    with pytest.raises(ValueError, match="above target_epsilon = 3"):
        train(8, resume=tmp_path / "half.ckpt", target_epsilon=3.0)
    _, runner = train(8, resume=tmp_path / "half.ckpt", target_epsilon=4.0)
    assert runner.strategy.epsilon == pytest.approx(4.0, rel=2e-3)
    assert len(runner.strategy.ledger.history) == 2


def test_a_bound_counts_what_was_spent_before(tmp_path):
    _, runner = train(1, tmp_path / "one.ckpt")
    spent = runner.strategy.epsilon
    strategy = train(9, resume=tmp_path / "one.ckpt", max_epsilon=spent + 1e-3)[1].strategy
    assert strategy.ledger.steps == 5


def test_going_back_to_an_older_file_in_one_process_forgets_nothing(tmp_path):
    strategy = private()
    trainer = trainer_of(strategy, max_epochs=1)
    module = Scheduled()
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader())
    trainer.fit(module, loader(), ckpt_path=tmp_path / "one.ckpt")
    assert strategy.ledger.steps == 15  # three epochs looked at the data, whichever weights are left


def test_validation_from_a_file_tells_what_its_weights_cost(tmp_path):
    class Validated(Scheduled):
        def validation_step(self, batch, batch_idx):
            pass

    spent = train(1, tmp_path / "one.ckpt")[1].strategy.epsilon
    strategy = private()
    whole = DataLoader(loader().dataset, batch_size=8)
    trainer_of(strategy).validate(Validated(), whole, ckpt_path=tmp_path / "one.ckpt", verbose=False)
    assert strategy.epsilon == spent


def test_a_checkpoint_written_after_the_fit_tells_it_too(tmp_path):
    _, trainer = fit(drop_rate=0.5, selection="magnitude")
    trainer.save_checkpoint(tmp_path / "after.ckpt", weights_only=True)
    state = torch.load(tmp_path / "after.ckpt", weights_only=True)[CHECKPOINT_KEY]
    assert state["ledger"]["history"][0]["steps"] == 5


def test_histories_are_compared_by_their_steps():
    def of(*steps):
        return [PrivacyEvent(1.0 + i, 0.1, count) for i, count in enumerate(steps)]

    assert _begins_with(of(5), [])
    assert _begins_with(of(5), of(5))
    assert _begins_with(of(5), of(3))
    assert _begins_with(of(5, 2), of(5))
    assert _begins_with(of(5, 2), of(5, 1))
    assert not _begins_with(of(5, 2), of(4, 1))
    assert not _begins_with(of(3), of(5))
    assert not _begins_with([], of(1))


def test_another_selection_rule_starts_from_nothing(tmp_path):
    train(1, tmp_path / "one.ckpt", drop_rate=0.5)
    _, runner = train(2, resume=tmp_path / "one.ckpt", selection=SelectionPlan(0.5, NoisyGradientSelector(3)))
    assert runner.strategy.ledger.steps == 10
