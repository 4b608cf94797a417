"""The bundled digits, through the loaders and through a Trainer that stops and resumes."""

import copy

import lightning.pytorch as L
import pytest
import torch
from helpers import run_ddp
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_eff.data import DigitsDataModule


@pytest.fixture
def digits():
    data = DigitsDataModule()
    data.setup()
    return data


def test_every_digit_is_in_exactly_one_part(digits):
    parts = (digits.train_set, digits.val_set, digits.test_set)
    images = torch.cat([part.images.flatten(1) for part in parts])
    assert [len(part) for part in parts] == [1077, 360, 360]
    assert len(images.unique(dim=0)) == len(images) == 1797


def test_every_part_has_the_same_share_of_each_class(digits):
    shares = [torch.bincount(part.labels) / len(part) for part in (digits.train_set, digits.val_set, digits.test_set)]
    # stratified: off by at most one image of the 360 a class
    assert all(torch.allclose(share, shares[0], atol=2 / 360) for share in shares)


def test_batches_are_float_images_with_integer_labels(digits):
    images, labels = next(iter(digits.train_dataloader()))
    assert (images.shape, images.dtype) == ((64, 1, 8, 8), torch.float32)
    assert (labels.shape, labels.dtype) == ((64,), torch.int64)


def test_pixels_lie_between_zero_and_one_unless_normalized():
    data = DigitsDataModule(normalize=False)
    data.setup()
    images, _ = next(iter(DataLoader(data.train_set, batch_size=2000)))
    assert (images.min(), images.max()) == (0, 1)


def test_normalized_pixels_have_mean_zero_and_deviation_one(digits):
    images, _ = next(iter(DataLoader(digits.train_set, batch_size=2000)))
    # the constants are those of all 1,797 images, the training set is a sample of 1,077
    assert images.mean().abs() < 0.01
    assert (images.std() - 1).abs() < 0.01


def test_one_sample_is_what_the_batch_holds(digits):
    (images, labels) = next(iter(digits.val_dataloader()))
    image, label = digits.val_set[3]
    assert torch.equal(image, images[3])
    assert torch.equal(label, labels[3])


def test_reading_samples_leaves_the_stored_images_alone(digits):
    before = digits.train_set.images.clone()
    next(iter(digits.train_dataloader()))
    assert torch.equal(digits.train_set.images, before)


def test_seed_decides_split_and_order():
    def first(seed):
        data = DigitsDataModule(seed=seed)
        data.setup()
        return next(iter(data.train_dataloader()))[0]

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


def test_setup_and_shuffling_leave_the_global_generator_alone(digits):
    state = torch.get_rng_state()
    DigitsDataModule().setup()
    list(digits.train_dataloader().sampler)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number >= 1, got 0"),
        ({"num_workers": -1}, "num_workers must be a whole number >= 0, got -1"),
        ({"val_fraction": 1.0}, r"val_fraction must lie in \(0, 1\), got 1.0"),
        ({"val_fraction": 0.6, "test_fraction": 0.5}, "expected val_fraction .* < 1, got 0.6 .* 0.5"),
    ],
)
def test_arguments_out_of_range_are_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        DigitsDataModule(**arguments)


class Recorder(L.LightningModule):
    """Remembers which images it saw."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(64, 10)
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch_idx, batch[0].sum((1, 2, 3))))
        return self.layer(batch[0].flatten(1)).square().mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


def train(tmp_path, ckpt_path=None, **trainer):
    model = Recorder()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = L.Trainer(default_root_dir=tmp_path, **quiet, **trainer)
    trainer.fit(model, datamodule=DigitsDataModule(batch_size=256), ckpt_path=ckpt_path)
    return model, trainer


def same(left, right):
    return [seen[:2] for seen in left] == [seen[:2] for seen in right] and all(
        torch.equal(a, b) for (*_, a), (*_, b) in zip(left, right, strict=True)
    )


def test_epochs_are_shuffled_differently(tmp_path):
    model, _ = train(tmp_path, max_epochs=2)
    assert not torch.equal(model.seen[0][2], model.seen[5][2])


@pytest.mark.parametrize("steps", [5, 10], ids=["after one epoch", "after two"])
def test_resumed_run_sees_the_same_batches(tmp_path, steps):
    straight, _ = train(tmp_path, max_epochs=3)
    first, trainer = train(tmp_path, max_epochs=3, max_steps=steps)
    trainer.save_checkpoint(tmp_path / "stop.ckpt")
    rest, _ = train(tmp_path, max_epochs=3, ckpt_path=tmp_path / "stop.ckpt")
    assert same(first.seen + rest.seen, straight.seen)


def test_run_resumed_within_an_epoch_sees_the_same_batches(tmp_path):
    every_step = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    straight, _ = train(tmp_path, max_epochs=3, callbacks=[every_step])
    rest, _ = train(tmp_path, max_epochs=3, ckpt_path=tmp_path / "step=7.ckpt")
    assert same(rest.seen, straight.seen[7:])


def test_resumable_loader_counts_what_it_has_handed_out(digits):
    loader = digits.train_dataloader()
    batches = iter(loader)
    next(batches), next(batches)
    resumed = copy.copy(loader)
    resumed.load_state_dict(loader.state_dict())
    assert torch.equal(next(iter(resumed))[0], next(batches)[0])
    assert len(list(resumed)) == len(loader)  # only the first pass is shortened


DDP = """
import os, torch
import lightning.pytorch as L
from lightning_eff.data import DigitsDataModule

class Recorder(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer, self.seen = torch.nn.Linear(64, 10), []
    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch[0].flatten(1)))
        return self.layer(batch[0].flatten(1)).square().mean()
    def validation_step(self, batch, batch_idx):
        self.log("n", float(len(batch[0])), sync_dist=True, reduce_fx="sum")
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)

model = Recorder()
trainer = L.Trainer(max_epochs=2, accelerator="cpu", devices=int(os.environ["DEVICES"]), strategy="ddp", logger=False,
                    enable_progress_bar=False, enable_checkpointing=False, num_sanity_val_steps=0)
trainer.fit(model, datamodule=DigitsDataModule(batch_size=256))
seen = [torch.cat([x for e, x in model.seen if e == epoch]) for epoch in (0, 1)]
torch.save({"seen": seen, "epochs": trainer.train_dataloader.sampler.epoch,
            "replicas": trainer.train_dataloader.sampler.num_replicas, "n": trainer.callback_metrics["n"]},
           f"rank{trainer.global_rank}.pt")
"""


def test_two_processes_share_every_epoch_between_them(tmp_path):
    run_ddp(DDP, tmp_path)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    data = DigitsDataModule()
    data.setup()
    everything = {tuple(row.tolist()) for row in next(iter(DataLoader(data.train_set, batch_size=2000)))[0].flatten(1)}
    for epoch in (0, 1):
        parts = [{tuple(row.tolist()) for row in rank["seen"][epoch]} for rank in ranks]
        assert [len(rank["seen"][epoch]) for rank in ranks] == [539, 539]  # 1,077 and one to make it even
        assert parts[0] | parts[1] == everything
        assert len(parts[0] & parts[1]) <= 1
    assert not torch.equal(ranks[0]["seen"][0], ranks[0]["seen"][1])
    assert [(rank["epochs"], rank["replicas"]) for rank in ranks] == [(1, 2)] * 2
