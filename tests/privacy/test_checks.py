"""What private training refuses, before it looks at a sample."""

from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.trainer.states import TrainerFn
from private_runs import Classifier, dataset, fit, loader, private, trainer_of
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, WeightedRandomSampler

from lightning_eff.privacy.checks import check_precision
from lightning_eff.privacy.options import PrivateTrainingOptions
from lightning_eff.privacy.outputs import loss_of
from lightning_eff.privacy.selection.plan import SelectionPlan
from lightning_eff.privacy.selection.selectors import PublicGradientSelector
from lightning_eff.privacy.strategy import DPGradientDropDDPStrategy, DPGradientDropStrategy


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise_multiplier": 1.0, "target_epsilon": 3.0}, "noise_multiplier=1.0 and target_epsilon=3.0"),
        ({"noise_multiplier": -1.0}, "noise_multiplier must be >= 0, got -1.0"),
        ({"target_epsilon": 0.0}, "target_epsilon must be > 0, got 0.0"),
        ({"noise_multiplier": 1.0, "max_grad_norm": 0.0}, "max_grad_norm must be > 0, got 0.0"),
        ({"noise_multiplier": 1.0, "max_grad_norm": float("inf")}, "max_grad_norm must be > 0 and finite, got inf"),
        ({"noise_multiplier": float("nan")}, "noise_multiplier must be >= 0, got nan"),
        ({"noise_multiplier": 1.0, "drop_rate": 1.0}, r"drop_rate must lie in \[0, 1\), got 1.0"),
        ({"noise_multiplier": 1.0, "drop_rate": -0.1}, r"drop_rate.*got -0.1"),
        ({"noise_multiplier": 1.0, "delta": 1.5}, r"delta.*1.5"),
        ({"noise_multiplier": 1.0, "delta": 0.0}, r"delta.*0"),
        ({"noise_multiplier": 1.0, "clipping": "none"}, "clipping must be one of flat, automatic, per_layer, got"),
        ({"noise_multiplier": 1.0, "max_physical_batch_size": 0}, "max_physical_batch_size must be a whole number"),
        ({"noise_multiplier": 1.0, "max_physical_batch_size": 2.5}, "must be a whole number >= 1, got 2.5"),
        ({"noise_multiplier": 1.0, "max_epsilon": -1.0}, "-1"),
        (
            {"noise_multiplier": 1.0, "selection": SelectionPlan(0.5), "drop_rate": 0.5},
            "a SelectionPlan has its own drop rate",
        ),
    ],
)
def test_arguments_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DPGradientDropStrategy(**settings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropped": "forget"}, "dropped must be one of freeze, zero_grad, got 'forget'"),
        ({"isolation_check": "maybe"}, "isolation_check must be one of"),
        ({"log_every_n_steps": 0}, "log_every_n_steps must be a whole number >= 1, got 0"),
        ({"noise_seed": 1.5}, "noise_seed must be a whole number >= 0, got 1.5"),
        ({"memory_budget_mb": float("nan")}, "memory_budget_mb must be >= 0, got nan"),
        ({"memory_budget_mb": -1}, "memory_budget_mb must be >= 0, got -1"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PrivateTrainingOptions(**options)


def test_neither_noise_nor_target_is_an_error_that_names_both():
    with pytest.raises(ValueError, match=r"one of noise_multiplier and target_epsilon, and a name carries no budget"):
        fit(noise_multiplier=None)


class Untouched(Dataset):
    """Fails when a sample is read."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        raise AssertionError("a sample was read")


def refused(message, module=None, data=None, callbacks=(), trainer=None, **settings):
    """A fit must fail with a message, without a step and without a sample read."""
    data = DataLoader(Untouched(), batch_size=8, shuffle=True) if data is None else data
    strategy = private(**settings)
    with pytest.raises(ValueError, match=message):
        trainer_of(strategy, callbacks=list(callbacks), **(trainer or {})).fit(
            Classifier() if module is None else module, data
        )
    assert strategy.ledger.steps == 0


def test_gradient_accumulation_is_refused_and_physical_batches_named():
    refused("max_physical_batch_size", trainer={"accumulate_grad_batches": 2})
    refused("max_physical_batch_size", callbacks=[GradientAccumulationScheduler({0: 1, 1: 2})])


def test_manual_optimization_is_refused():
    class Manual(Classifier):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    refused("Manual optimizes by hand", Manual())


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
def test_a_step_that_fetches_its_batches_is_refused():
    class Fetching(Classifier):
        def training_step(self, dataloader_iter):
            raise AssertionError

    refused("dataloader_iter", Fetching())


def test_compiled_modules_are_refused_by_name():
    module = Classifier()
    module.net[0].compile()
    refused(r"\['net.0'\] is compiled", module)
    module = Classifier()
    module.net = torch.compile(module.net)
    refused(r"\['net'\] is compiled", module)
    refused("is compiled", torch.compile(Classifier()))


@pytest.mark.parametrize("precision", ["16-true"])
def test_narrow_precisions_are_refused(precision):
    refused("32-true, 64-true, bf16-mixed, bf16-true", trainer={"precision": precision})


def test_loss_scaling_is_refused():
    with pytest.raises(ValueError, match="precision '16-mixed' scales losses"):
        check_precision(MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu")))


@pytest.mark.parametrize("finder", [LearningRateFinder, BatchSizeFinder])
def test_tuners_are_refused(finder):
    class WithData(Classifier):
        batch_size = 8

        def train_dataloader(self):
            return DataLoader(Untouched(), batch_size=self.batch_size, shuffle=True)

    with pytest.raises(ValueError, match="epsilon does not cover"):
        trainer_of(private(), callbacks=[finder()]).fit(WithData())


def test_overfitting_on_purpose_is_refused():
    refused("overfit_batches", trainer={"overfit_batches": 1}, data=DataLoader(Untouched(), batch_size=8))


EVALUATING = "ignore:Found 1 module.s. in eval mode at the start of training"


class Normed(Classifier):
    def __init__(self, layer, reshape=()):
        super().__init__()
        self.norm = layer
        self.reshape = reshape

    def training_step(self, batch, batch_idx):
        x, y = batch
        return super().training_step((self.norm(x.reshape(len(x), *self.reshape, -1)).flatten(1), y), batch_idx)


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm1d(8),
        nn.BatchNorm1d(8, affine=False),
        nn.BatchNorm1d(8, track_running_stats=False).eval(),
        nn.SyncBatchNorm(8),
        nn.InstanceNorm1d(2, track_running_stats=True),
    ],
)
def test_statistics_of_the_batch_are_refused_with_both_ways_out(layer):
    refused(r"(?s)norm \(.*Norm.*GroupNorm.*evaluation mode", Normed(layer))


def test_many_layers_with_statistics_are_not_all_named():
    class Deep(Classifier):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList(nn.BatchNorm1d(8) for _ in range(20))

    refused(
        r"^statistics of the batch .*: norms.0 \(BatchNorm1d\), norms.1 \(BatchNorm1d\), norms.2 \(BatchNorm1d\) and "
        r"17 more\. Replace each",
        Deep(),
    )


def test_several_optimizers_become_parameter_groups():
    class Two(Classifier):
        def configure_optimizers(self):
            return [torch.optim.SGD(self.net[i].parameters(), lr=0.1) for i in (0, 2)]

    refused("one optimizer: give it the parameters of the others as parameter groups", Two())


def test_options_as_a_dict_are_refused_with_what_to_write():
    with pytest.raises(TypeError, match=r"expected options=PrivateTrainingOptions\(accountant='rdp'\), got a dict"):
        DPGradientDropStrategy(noise_multiplier=1.0, options={"accountant": "rdp"})


def test_frozen_batch_normalisation_in_training_mode_is_refused_too():
    refused(r"norm \(BatchNorm1d\)", Normed(nn.BatchNorm1d(8).requires_grad_(False)))


@pytest.mark.filterwarnings(EVALUATING)
def test_batch_statistics_that_are_switched_on_for_the_step_alone_are_refused():
    class Late(Normed):
        def training_step(self, batch, batch_idx):
            self.norm.train(self.current_epoch > 0)
            loss = super().training_step(batch, batch_idx)
            self.norm.eval()
            return loss

    with pytest.raises(ValueError, match="statistics of the batch mixes samples"):
        fit(Late(nn.BatchNorm1d(8, affine=False).eval()), trainer={"max_epochs": 2})


@pytest.mark.filterwarnings(EVALUATING)
@pytest.mark.parametrize("where", ["configure_model", "setup"])
def test_batch_normalisation_may_be_frozen_in_the_hooks_that_are_named(where):
    class Frozen(Normed):
        def freeze(self, stage=None):
            self.norm.eval()

    setattr(Frozen, where, Frozen.freeze)
    assert fit(Frozen(nn.BatchNorm1d(8)))[1].strategy.ledger.steps == 5
    refused(f"eval.. on it in __init__, .*{where}", Normed(nn.BatchNorm1d(8)))


@pytest.mark.filterwarnings(EVALUATING)
def test_batch_normalisation_in_evaluation_mode_trains():
    module, trainer = fit(Normed(nn.BatchNorm1d(8).eval()))
    assert trainer.strategy.ledger.steps == 5
    assert not torch.equal(module.norm.weight, torch.ones(8))
    assert torch.equal(module.norm.running_mean, torch.zeros(8))


@pytest.mark.filterwarnings(EVALUATING)
def test_a_layer_that_is_put_into_training_mode_later_is_refused_then():
    class Wake(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                pl_module.norm.train()

    with pytest.raises(ValueError, match=r"norm \(BatchNorm1d\)"):
        fit(Normed(nn.BatchNorm1d(8).eval()), callbacks=[Wake()], trainer={"max_epochs": 2})


def test_weight_averaging_that_would_measure_batch_statistics_anew_is_refused():
    refused(
        "StochasticWeightAveraging",
        Normed(nn.BatchNorm1d(8).eval()),
        callbacks=[StochasticWeightAveraging(swa_lrs=0.1)],
    )


def test_nothing_to_train_is_an_error():
    refused("nothing to train: 0 parameters", Classifier().requires_grad_(False))

    class Elsewhere(Classifier):
        def configure_optimizers(self):
            return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)

    refused("nothing to train: 4 parameters require a gradient, and none of them is in the optimizer", Elsewhere())


def test_parameters_that_the_module_does_not_own_are_refused():
    class Listed(Classifier):
        def __init__(self):
            super().__init__()
            self.extra = [nn.Parameter(torch.zeros(8))]

        def training_step(self, batch, batch_idx):
            return super().training_step((batch[0] + self.extra[0], batch[1]), batch_idx)

        def configure_optimizers(self):
            return torch.optim.SGD([*self.parameters(), *self.extra], lr=1.0)

    refused(r"parameters of shapes \[\[8\]\] that are not among those of Listed", Listed())


def test_what_is_frozen_keeps_no_gradient_that_the_optimizer_would_follow():
    class Stale(Classifier):
        def training_step(self, batch, batch_idx):
            self.net[0].bias.grad = batch[0].mean() * torch.ones(6)
            return super().training_step(batch, batch_idx)

    module = Stale()
    module.net[0].bias.requires_grad_(False)
    before = module.net[0].bias.clone()
    fit(module)
    assert torch.equal(module.net[0].bias, before)


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_that_would_never_be_called_are_refused_by_name(register):
    module = Classifier()
    getattr(module.net[0].weight, register)(lambda given: None)
    refused(r"\['net.0.weight'\] have hooks", module)


def test_optimizers_that_ask_twice_are_refused():
    refused("LBFGS", Classifier(optimizer=torch.optim.LBFGS))

    class Twice(torch.optim.SGD):
        def step(self, closure):
            closure()
            return super().step(closure)

    with pytest.raises(RuntimeError, match="second gradient of one batch"):
        fit(Classifier(optimizer=Twice))


class Stream(IterableDataset):
    def __iter__(self):
        raise AssertionError("a sample was read")


@pytest.mark.parametrize(
    "data",
    [
        DataLoader(Stream(), batch_size=8),
        DataLoader(Untouched(), batch_size=8, sampler=WeightedRandomSampler([1.0] * 40, 40)),
    ],
)
def test_loaders_that_poisson_sampling_would_break_are_refused(data):
    refused("poisson_sampling=False", data=data)


def test_several_train_loaders_are_refused():
    both = [DataLoader(Untouched(), batch_size=8), DataLoader(Untouched(), batch_size=8)]
    refused("one train dataloader, got 2", data=both)


def test_a_stream_without_length_is_refused_without_poisson_sampling_too():
    refused("sampling rate is not known", data=DataLoader(Stream(), batch_size=8), poisson_sampling=False)


def test_a_target_needs_an_end():
    refused(r"Trainer\(max_epochs=...\)", target_epsilon=3.0, trainer={"max_epochs": -1})


def test_a_target_out_of_reach_names_what_is_within_reach():
    with pytest.raises(ValueError, match=r"epsilon 1e-06 is out of reach.*end at epsilon"):
        fit(target_epsilon=1e-6)


def test_several_devices_are_refused_by_the_strategy_for_one():
    with pytest.raises(ValueError, match=r"one device, got 2: use DPGradientDropDDPStrategy$"):
        trainer_of(private(), devices=2)
    with pytest.raises(ValueError, match="one node, got 2"):
        trainer_of(private(), num_nodes=2)


def test_a_large_delta_is_warned_about():
    with pytest.warns(UserWarning, match=r"delta = 0.05 is not below 1/N = 0.025"):
        fit(delta=0.05)


def test_no_noise_is_allowed_with_a_warning_and_infinite_epsilon():
    with pytest.warns(UserWarning, match="nothing is private"):
        strategy = fit(noise_multiplier=0.0)[1].strategy
    assert strategy.epsilon == float("inf")
    assert not strategy.ledger.facts()["private"]


def test_shuffled_batches_are_told_in_every_report():
    ordered = DataLoader(dataset(), batch_size=16)
    module, trainer = fit(data=ordered, poisson_sampling=False)
    assert module.sizes == [16, 16, 8]
    ledger = trainer.strategy.ledger
    assert ledger.history[0].sample_rate == 0.4
    assert "approximate" in ledger.to_markdown()
    assert not ledger.facts()["private"]


def test_private_data_given_as_public_are_refused():
    data = dataset()
    selector = PublicGradientSelector(DataLoader(data, batch_size=8))
    with pytest.raises(ValueError, match="samples of the private training data"):
        fit(data=DataLoader(data, batch_size=8), selection=selector, drop_rate=0.5)


def test_batches_that_cannot_be_split_are_refused_with_the_places():
    ragged = DataLoader(
        dataset(), batch_size=8, collate_fn=lambda examples: {"x": torch.zeros(len(examples), 8), "y": torch.zeros(99)}
    )
    with pytest.raises(ValueError, match=r"\['x'\] \[\d+, 8\], \['y'\] \[99\]"):
        fit(data=ragged)


def test_a_gradient_that_is_not_clipped_is_refused_by_name():
    class Penalised(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + self.net[0].weight.square().sum()

    with pytest.raises(RuntimeError, match=r"net.0.weight"):
        fit(Penalised())


def test_parameters_that_no_step_uses_are_told_once_and_get_noise():
    class Unused(Classifier):
        def __init__(self):
            super().__init__()
            self.extra = nn.Linear(2, 2)

    with pytest.warns(UserWarning, match="did not take part in the step") as told:
        module, _ = fit(Unused(), noise_multiplier=1.0)
    assert len([warning for warning in told if "did not take part" in str(warning.message)]) == 1
    assert module.extra.weight.grad.all()


def test_an_example_whose_gradient_is_not_finite_contributes_nothing():
    x, y = dataset().tensors
    x = x.clone()
    x[3] = float("nan")
    with pytest.warns(UserWarning, match="not finite: it contributes zero"):
        module, trainer = fit(data=DataLoader(TensorDataset(x, y), batch_size=40))
    assert trainer.strategy.ledger.steps == 1
    assert all(torch.isfinite(value).all() for value in module.state_dict().values())


def test_tensors_of_other_processes_cannot_be_gathered_in_a_private_step():
    from lightning_eff.privacy.strategy import DPGradientDropDDPStrategy

    strategy = DPGradientDropDDPStrategy(noise_multiplier=1.0)
    strategy._in_user_step = True
    with pytest.raises(RuntimeError, match="would depend on other samples"):
        strategy.all_gather(torch.zeros(1))
    assert strategy.reduce(3.0) == 3.0


def test_loader_is_the_users_afterwards():
    data = loader()
    fit(data=data)
    assert data.batch_size == 8
    assert len(data) == 5


def test_a_training_step_that_returns_no_loss_is_told_what_to_return():
    for output in (3.5, {"accuracy": 1.0}):
        with pytest.raises(TypeError, match="to return a loss tensor or a mapping with one under 'loss', got"):
            loss_of(output)
    with pytest.raises(ValueError, match=r"training_step returned None, .* Return the loss of every batch"):
        loss_of(None)


def test_synchronised_batch_statistics_are_refused_before_processes_start():
    strategy = DPGradientDropDDPStrategy(noise_multiplier=1.0)
    strategy._layer_sync = object()
    trainer = SimpleNamespace(state=SimpleNamespace(fn=TrainerFn.FITTING))
    with pytest.raises(ValueError, match=r"sync_batchnorm=True mixes .*: leave it out and use GroupNorm"):
        strategy.setup(trainer)


def test_a_seed_of_the_noise_is_warned_of():
    with pytest.warns(UserWarning, match=r"noise_seed makes noise and sampling repeatable: .* nothing is private"):
        DPGradientDropStrategy(noise_multiplier=1.0, options=PrivateTrainingOptions(noise_seed=0))
