"""Two processes on gloo: equal parameters bit for bit, equal histories, and no wait for a process without samples."""

import pytest
from helpers import run_ddp

HEAD = """
import os, sys
import torch, torch.distributed as dist
from private_runs import Classifier, dataset, weights_of
import lightning as L
from torch import nn
from torch.utils.data import DataLoader, WeightedRandomSampler
from lightning_eff.privacy.options import PrivateTrainingOptions
from lightning_eff.privacy.strategy import DPGradientDropDDPStrategy


def strategy_of(noise_multiplier=1.0, noise_seed=None, isolation_check="error", **settings):
    options = PrivateTrainingOptions(accountant="rdp", noise_seed=noise_seed, isolation_check=isolation_check)
    return DPGradientDropDDPStrategy(noise_multiplier=noise_multiplier, options=options, **settings)


def trainer_of(strategy, max_epochs=2, **settings):
    return L.Trainer(accelerator="cpu", devices=int(os.environ["DEVICES"]), strategy=strategy, max_epochs=max_epochs,
        logger=False, enable_progress_bar=False, enable_model_summary=False,
        **{"enable_checkpointing": False, **settings})


def flat(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def check_equal(tensor):
    others = [torch.empty_like(tensor) for _ in range(2)]
    dist.all_gather(others, tensor.contiguous())
    assert torch.equal(others[0], others[1])
"""


def test_processes_end_with_the_same_bits_and_the_same_history(tmp_path):
    run_ddp(
        HEAD
        + """
torch.manual_seed(100 + int(os.environ.get("LOCAL_RANK", 0)))
module = Classifier(momentum=0.9)
with torch.no_grad():
    module.net[0].weight.normal_()  # another one in each process: the first one's counts
strategy = strategy_of(drop_rate=0.5, granularity="row", max_physical_batch_size=3)
trainer = trainer_of(strategy, 3)
trainer.fit(module, DataLoader(dataset(), batch_size=4, shuffle=True))
check_equal(flat(module))
events = strategy.ledger.history
assert [(e.sample_rate, e.steps) for e in events] == [(0.2, 15)], events
assert trainer.global_step == 15
sizes = torch.tensor([float(sum(module.sizes))])
both = [torch.empty(1) for _ in range(2)]
dist.all_gather(both, sizes)
assert both[0] != both[1]  # each has drawn for itself
assert isinstance(strategy.model, Classifier)  # never wrapped
""",
        tmp_path,
    )


def test_a_process_without_examples_takes_every_step(tmp_path):
    run_ddp(
        HEAD
        + """
class Logging(Classifier):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("synced", loss, on_step=True, on_epoch=False, sync_dist=True)
        return loss

module = Logging()
strategy = strategy_of(max_epsilon=50.0)
trainer = trainer_of(strategy, 1)
trainer.fit(module, DataLoader(dataset(100), batch_size=1, shuffle=True))
assert trainer.global_step == strategy.ledger.steps == 50
assert 5 < len(module.sizes) < 45, len(module.sizes)  # q N / 2 = 1: about a third of the batches are empty
check_equal(flat(module))
""",
        tmp_path,
    )


def test_an_epoch_in_which_a_process_has_no_examples_is_logged_by_all(tmp_path):
    run_ddp(
        HEAD
        + """
import datetime, math, torchmetrics

class Logging(Classifier):
    def __init__(self):
        super().__init__()
        self.right = torchmetrics.Accuracy("multiclass", num_classes=3)
        self.each = torchmetrics.MeanMetric(dist_sync_on_step=True)
        self.epochs = []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("both", loss.detach(), on_step=True, on_epoch=True, sync_dist=True)
        self.log("most", float(len(batch[0])), on_step=False, on_epoch=True, sync_dist=True, reduce_fx="max")
        self.right(self.net(batch[0]), batch[1])
        self.log("right", self.right, on_step=False, on_epoch=True)
        self.each(loss.detach())
        self.each.compute()
        self.log("each", self.each, on_step=True, on_epoch=True)
        return loss

    def on_train_epoch_end(self):
        now = self.trainer.callback_metrics
        self.epochs.append((len(self.sizes), {k: float(v) for k, v in now.items()}))
        self.sizes.clear()

module = Logging()
strategy = strategy_of(1.0, noise_seed=4, isolation_check="off", timeout=datetime.timedelta(seconds=60))
trainer = trainer_of(strategy, 12, limit_train_batches=1)
import warnings; warnings.simplefilter("ignore")
trainer.fit(module, DataLoader(dataset(100), batch_size=1, shuffle=True))
both = [None, None]
dist.all_gather_object(both, module.epochs)
lonely = 0
for (mine, ours), (others, theirs) in zip(*both):
    assert ours.keys() == theirs.keys()
    if (mine == 0) != (others == 0):
        lonely += 1
        # on average over samples, so that it is the value of the process that has them
        alone = ours if mine else theirs
        assert ours["both_epoch"] == ours["each_epoch"] == alone["loss"], (ours, theirs)
    for name in {"both_epoch", "most", "right", "each_epoch"} & ours.keys():
        assert ours[name] == theirs[name] and math.isfinite(ours[name]), (name, ours, theirs)
assert lonely > 2, both
assert "epoch_end_reached" not in vars(trainer._logger_connector)
check_equal(flat(module))
""",
        tmp_path,
    )


@pytest.mark.slow
def test_the_sum_over_processes_is_the_sum_over_their_examples(tmp_path):
    run_ddp(
        HEAD
        + """
module = Classifier(lr=1.0)
before = weights_of(module)
strategy = strategy_of(0.0, max_grad_norm=0.1, isolation_check="off")
trainer = trainer_of(strategy, 1)
import warnings; warnings.simplefilter("ignore")
trainer.fit(module, DataLoader(dataset(), batch_size=20))  # q = 1
x, y = dataset().tensors
alone = Classifier()
total = {name: torch.zeros_like(value) for name, value in alone.named_parameters()}
for i in range(40):
    loss = nn.functional.cross_entropy(alone.net(x[i : i + 1]), y[i : i + 1])
    gradients = torch.autograd.grad(loss, list(alone.parameters()))
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    for name, gradient in zip(total, gradients):
        total[name] += gradient * min(1.0, 0.1 / (float(norm) + 1e-6))
for name, value in module.state_dict().items():
    assert torch.allclose(value, before[name] - total[name] / 40, atol=1e-6), name
""",
        tmp_path,
    )


@pytest.mark.slow
def test_two_processes_go_on_bit_for_bit(tmp_path):
    run_ddp(
        HEAD
        + """
import warnings; warnings.simplefilter("ignore")
def run(epochs, **settings):
    module = Classifier(momentum=0.9)
    strategy = strategy_of(noise_seed=3, drop_rate=0.5)
    trainer = trainer_of(strategy, epochs)
    trainer.fit(module, DataLoader(dataset(), batch_size=4, shuffle=True), **settings)
    return module, trainer

whole, _ = run(4)
_, half = run(2)
half.save_checkpoint("half.ckpt")
again, trainer = run(4, ckpt_path="half.ckpt")
assert torch.equal(flat(whole), flat(again))
check_equal(flat(again))
assert trainer.strategy.ledger.steps == 20
""",
        tmp_path,
    )


@pytest.mark.slow
def test_what_cannot_run_on_several_processes_is_refused(tmp_path):
    run_ddp(
        HEAD
        + """
def message(trainer=None, data=None):
    try:
        trainer_of(strategy_of(), 1, **(trainer or {})).fit(Classifier(), data or DataLoader(dataset(), batch_size=4))
    except ValueError as error:
        return str(error)
    raise AssertionError("nothing was refused")

assert "sync_batchnorm" in message({"sync_batchnorm": True})
weighted = DataLoader(dataset(), batch_size=4, sampler=WeightedRandomSampler([1.0] * 40, 40))
assert "poisson_sampling=False" in message(data=weighted)
""",
        tmp_path,
    )


@pytest.mark.slow
def test_the_ledger_comes_back_from_processes_that_were_spawned(tmp_path):
    run_ddp(
        HEAD.replace("import os, sys", "import os, sys\nos.environ.setdefault('DEVICES', '2')")
        + """
from lightning_eff.accounting import PrivacyLedger

if __name__ == "__main__":
    ledger = PrivacyLedger(1e-5, accountant="rdp")
    ledger.record(4.0, label="release")
    strategy = strategy_of(start_method="spawn", ledger=ledger)
    trainer = trainer_of(strategy, 1)
    trainer.fit(Classifier(), DataLoader(dataset(), batch_size=4))
    assert strategy.ledger is ledger
    assert [(event.label, event.steps) for event in ledger.history] == [("release", 1), ("training", 5)]
    assert abs(trainer.callback_metrics["privacy/epsilon"] - strategy.epsilon) < 1e-5
    print("came back")
""",
        tmp_path,
    )
