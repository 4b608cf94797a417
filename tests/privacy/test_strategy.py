"""What a private step does."""

import math

import lightning as L
import pytest
import torch
from private_runs import Classifier, Gradients, dataset, equal, fit, loader, private, trainer_of, weights_of
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_eff.privacy.selection.plan import SelectionPlan
from lightning_eff.privacy.selection.selectors import NoisyGradientSelector

SEEDED = "ignore:noise_seed makes noise and sampling repeatable"
NO_NOISE = "ignore:noise_multiplier is 0"
pytestmark = [pytest.mark.filterwarnings(SEEDED), pytest.mark.filterwarnings(NO_NOISE)]


class Line(L.LightningModule):
    """Loss -w.x: the gradient of a sample is -x."""

    def __init__(self):
        super().__init__()
        self.line = nn.Linear(2, 1, bias=False)
        nn.init.zeros_(self.line.weight)

    def training_step(self, batch, batch_idx):
        return -self.line(batch[0]).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


EXAMPLES = torch.tensor([[3.0, 4.0], [0.0, 1.0]])


def fit_line(masks=None, **settings):
    """One step on both samples without noise, qN = 2."""
    module = Line()

    class Masks(L.Callback):
        def on_fit_start(self, trainer, pl_module):
            if masks:
                trainer.strategy.set_static_masks({"line.weight": torch.tensor([masks])}, "freeze")

    strategy = private(0.0, **settings)
    trainer = trainer_of(strategy, callbacks=[Masks()])
    trainer.fit(module, DataLoader(TensorDataset(EXAMPLES), batch_size=2))
    return module.line.weight.detach()[0]


def test_a_step_by_hand():
    # x1 = (3, 4) is clipped to (0.6, 0.8), x2 = (0, 1) stays; half of the sum
    assert fit_line().tolist() == pytest.approx([0.3, 0.9], abs=1e-6)


def test_coordinates_are_dropped_before_the_norm_is_taken():
    # (3, 0) is clipped to (1, 0); to drop after clipping would give (0.3, 0)
    assert fit_line(masks=[True, False]).tolist() == pytest.approx([0.5, 0], abs=1e-6)


@pytest.mark.parametrize("size", [1, None])
def test_automatic_clipping_by_hand(size):
    factors = [1 / 5.01, 1 / 1.01]
    expected = [3 * factors[0] / 2, (4 * factors[0] + factors[1]) / 2]
    assert fit_line(clipping="automatic", max_physical_batch_size=size).tolist() == pytest.approx(expected, abs=1e-6)


def test_physical_batches_of_any_size_give_the_same_step():
    results = [weights_of(fit(noise_seed=3, max_physical_batch_size=size)[0]) for size in (1, 7, None)]
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.allclose(value, other[name], rtol=1e-5, atol=1e-6)


def test_physical_batches_never_exceed_their_size_and_are_one_step():
    module, trainer = fit(max_physical_batch_size=3, trainer={"max_epochs": 2})
    assert max(module.sizes) <= 3
    assert trainer.global_step == trainer.strategy.ledger.steps == 10


def test_epoch_averages_weigh_physical_batches_by_their_size():
    class Constant(Classifier):
        def training_step(self, batch, batch_idx):
            self.log("first", batch[0][:, 0].mean(), on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    trainers = [fit(Constant(), noise_seed=1, max_physical_batch_size=size)[1] for size in (3, None)]
    few, whole = (float(trainer.callback_metrics["first"]) for trainer in trainers)
    assert few == pytest.approx(whole, rel=1e-5)


class Quiet(Classifier):
    """Gradients of exactly zero."""

    def training_step(self, batch, batch_idx):
        return 0 * self.net(batch[0]).mean()


def test_noise_has_its_deviation_on_active_coordinates_and_is_zero_elsewhere():
    gradients = Gradients()
    settings = {"noise_multiplier": 1.5, "max_grad_norm": 0.4, "drop_rate": 0.5}
    fit(Quiet(lr=0.0), callbacks=[gradients], trainer={"max_epochs": 60, "barebones": True}, **settings)
    noise = torch.stack([seen["net.0.weight"] for seen in gradients.seen])
    chosen = torch.stack([chosen["net.0.weight"].full_mask() for chosen in gradients.selections])
    active, dropped = noise[chosen], noise[~chosen]
    scaled = active * 8 / 0.4  # q N / C
    assert scaled.numel() == 300 * 24
    assert float(scaled.std()) == pytest.approx(1.5, rel=4 / (2 * scaled.numel()) ** 0.5)
    assert abs(float(scaled.mean())) < 4 * 1.5 / scaled.numel() ** 0.5
    assert not dropped.any()


def test_noise_is_unrelated_between_steps_and_between_runs_with_one_global_seed():
    runs = []
    for _ in range(2):
        L.seed_everything(7, verbose=False)
        gradients = Gradients()
        fit(Quiet(lr=0.0), callbacks=[gradients], trainer={"max_epochs": 40, "barebones": True})
        runs.append(torch.stack([seen["net.0.weight"].flatten() for seen in gradients.seen]))
    first, second = runs  # [200, 48]
    assert abs(float(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1])) < 4 / first.numel() ** 0.5
    following = torch.corrcoef(torch.stack([first[:-1].flatten(), first[1:].flatten()]))[0, 1]
    assert abs(float(following)) < 4 / first.numel() ** 0.5


class Bits(L.Callback):
    """Compares weights before and after each step with what the step trained."""

    def __init__(self):
        self.steps = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = weights_of(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        for name, parameter in pl_module.named_parameters():
            chosen = trainer.strategy.selection_state[name]
            changed = parameter.detach() != self.before[name]
            assert not (changed & ~chosen.full_mask()).any()
            assert int(changed.sum()) <= chosen.count
        self.steps += 1


@pytest.mark.parametrize(
    ("granularity", "optimizer", "settings"),
    [
        ("element", torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
        ("row", torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
        ("row_col", torch.optim.Adam, {"weight_decay": 0.1}),
        ("tensor", torch.optim.AdamW, {}),
    ],
)
def test_dropped_coordinates_keep_their_bits_whatever_the_optimizer(granularity, optimizer, settings):
    bits = Bits()
    fit(
        Classifier(0.1, optimizer, **settings),
        callbacks=[bits],
        drop_rate=0.6,
        granularity=granularity,
        trainer={"max_epochs": 2},
    )
    assert bits.steps == 10


def test_zero_grad_leaves_dropped_coordinates_to_weight_decay():
    class Decayed(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.before = pl_module.net[0].weight.detach().clone()

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            dropped = ~trainer.strategy.selection_state["net.0.weight"].full_mask()
            now = pl_module.net[0].weight.detach()[dropped]
            assert torch.allclose(now, self.before[dropped] * (1 - 0.5 * 0.1))

    fit(
        Classifier(weight_decay=0.1),
        callbacks=[Decayed()],
        drop_rate=0.5,
        options={"dropped": "zero_grad"},
    )


@pytest.mark.parametrize(
    ("dropped", "mode", "optimizer"),
    [
        ("freeze", "prune", torch.optim.SGD),
        ("zero_grad", "prune", torch.optim.AdamW),
        ("zero_grad", "freeze", torch.optim.SGD),
    ],
)
def test_static_masks_hold_for_fifty_steps(dropped, mode, optimizer):
    kept = torch.rand(6, 8, generator=torch.Generator().manual_seed(0)) < 0.4

    class Masks(L.Callback):
        def on_fit_start(self, trainer, pl_module):
            self.before = pl_module.net[0].weight.detach().clone()
            trainer.strategy.set_static_masks({"net.0.weight": kept}, mode)

    masks = Masks()
    settings = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    module, trainer = fit(
        Classifier(0.1, optimizer, weight_decay=0.1, **settings),
        callbacks=[masks],
        drop_rate=0.3,
        options={"dropped": dropped},
        trainer={"max_epochs": 10},
    )
    weight = module.net[0].weight.detach()
    expected = torch.zeros(()) if mode == "prune" else masks.before[~kept]
    assert trainer.global_step == 50
    assert torch.equal(weight[~kept], expected.expand_as(weight[~kept]))
    assert (weight[kept] != masks.before[kept]).any()


def test_masks_that_do_not_fit_are_refused_and_nothing_is_applied():
    class Masks(L.Callback):
        def on_fit_start(self, trainer, pl_module):
            before = weights_of(pl_module)
            masks = {
                "net.0.weight": torch.zeros(6, 8, dtype=torch.bool),
                "net.2.weight": torch.zeros(2, 2, dtype=torch.bool),
                "nowhere": torch.zeros(1, dtype=torch.bool),
            }
            with pytest.raises(ValueError, match=r"(?s)nowhere.*net\.2\.weight.*\[2, 2\]") as refused:
                trainer.strategy.set_static_masks(masks, "prune")
            assert "net.0.weight" not in str(refused.value)
            assert equal(before, weights_of(pl_module))

    fit(callbacks=[Masks()])


def test_what_a_step_trains_does_not_depend_on_the_private_data():
    selections = []
    for seed in (0, 1):
        gradients = Gradients()
        fit(
            callbacks=[gradients],
            data=DataLoader(dataset(40, seed), batch_size=8),
            drop_rate=0.5,
            trainer={"max_epochs": 2},
        )
        selections.append(gradients.selections)
    for one, other in zip(*selections, strict=True):
        assert all(one[name].equals(other[name]) for name in one)
    assert not selections[0][0]["net.0.weight"].equals(selections[0][1]["net.0.weight"])


def test_a_selection_for_an_epoch_holds_for_the_epoch():
    gradients = Gradients()
    plan = SelectionPlan(0.5, refresh="epoch", granularity="row")
    fit(callbacks=[gradients], selection=plan, trainer={"max_epochs": 2})
    rows = [chosen["net.0.weight"].rows.tolist() for chosen in gradients.selections]
    assert rows[:5] == [rows[0]] * 5
    assert rows[5:] == [rows[5]] * 5


def test_epsilon_knows_neither_rates_nor_selection():
    spent = {
        fit(drop_rate=rate, granularity=unit)[1].strategy.epsilon
        for rate, unit in ((0.0, "element"), (0.9, "element"), (0.5, "row"))
    }
    assert len(spent) == 1
    assert math.isfinite(spent.pop())


def test_epsilon_equals_that_of_a_plain_opacus_loop():
    from opacus.accountants import RDPAccountant

    strategy = fit(noise_multiplier=1.3)[1].strategy
    accountant = RDPAccountant()
    for _ in range(5):
        accountant.step(noise_multiplier=1.3, sample_rate=8 / 40)
    assert strategy.ledger.to_opacus(RDPAccountant()).history == accountant.history


def test_empty_batches_are_steps_with_noise_alone_for_which_the_users_step_is_not_called():
    gradients = Gradients()
    module, trainer = fit(data=loader(40, 1), callbacks=[gradients], noise_seed=0, trainer={"max_epochs": 2})
    empty = 80 - len(module.sizes)
    assert 0 < empty < 80
    assert min(module.sizes) >= 1
    assert trainer.strategy.ledger.steps == trainer.global_step == len(gradients.seen) == 80
    assert all(seen["net.0.weight"].all() for seen in gradients.seen)
    assert torch.isfinite(trainer.callback_metrics["loss"])


def test_a_second_fit_observes_anew_what_the_first_one_observed():
    strategy = private(drop_rate=0.5, selection=NoisyGradientSelector(warmup_steps=3))

    class Active(L.Callback):
        counts = []

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.counts.append(trainer.strategy.active_coordinates)

    wider = Classifier()
    wider.net[0], wider.net[2] = nn.Linear(8, 9), nn.Linear(9, 3)
    for module in (Classifier(), wider):
        trainer = trainer_of(strategy, accelerator="auto", devices=1, callbacks=[Active()])
        trainer.fit(module, loader())
    everything, half = 75, 48 // 2 + 6 + 18 // 2 + 3
    assert Active.counts[:5] == [everything] * 3 + [half] * 2
    everything, half = 9 * 9 + 3 * 10, 72 // 2 + 9 + round(27 / 2) + 3
    assert Active.counts[5:] == [everything] * 3 + [half] * 2
