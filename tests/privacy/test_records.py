"""A sample makes at most one row of a step, and a draw is used once."""

import pytest
import torch
from private_runs import Classifier, dataset, fit, private, trainer_of
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
    random_split,
)

from lightning_eff.privacy.records import check_each_record_once, check_rows


class Numbered(Classifier):
    """Notes which samples take part, epoch by epoch."""

    def __init__(self):
        super().__init__()
        self.epochs = []

    def on_train_epoch_start(self):
        self.epochs.append([])

    def on_train_batch_start(self, batch, batch_idx):
        self.epochs[-1].append(batch[2].tolist())

    def training_step(self, batch, batch_idx):
        return super().training_step(batch[:2], batch_idx)


def numbered(examples=60):
    return TensorDataset(*dataset(examples).tensors, torch.arange(examples))


class Anew(Numbered):
    def train_dataloader(self):
        return DataLoader(numbered(), batch_size=6)


@pytest.mark.parametrize("reloading", [0, 1, 2])
def test_no_epoch_repeats_the_draws_of_another_one_when_loaders_are_made_anew(reloading):
    module = Anew()
    trainer_of(private(), max_epochs=4, reload_dataloaders_every_n_epochs=reloading).fit(module)
    draws = [batch for epoch in module.epochs for batch in epoch if len(batch) > 2]
    assert len(draws) > 20
    # any two of them are equal with a probability below 1e-3
    assert len(set(map(tuple, draws))) > 0.9 * len(draws)


def test_no_fit_repeats_the_draws_of_another_one():
    strategy = private()
    fits = []
    for _ in range(2):
        module = Numbered()
        trainer_of(strategy, accelerator="auto", devices=1).fit(module, DataLoader(numbered(), batch_size=6))
        fits.append(module.epochs)
    assert fits[0] != fits[1]


def views(examples):
    """Two rows of each sample."""
    x, y = default_collate(examples)
    return x.repeat_interleave(2, 0), y.repeat_interleave(2, 0)


def test_a_collate_function_that_makes_two_rows_of_a_record_is_refused():
    with pytest.raises(ValueError, match=r"16 rows, of 8 samples.*second dimension"):
        fit(data=DataLoader(dataset(8), batch_size=8, collate_fn=views))


def test_a_transfer_hook_that_makes_two_rows_of_a_record_is_refused():
    class Augmented(Classifier):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return tuple(torch.cat([part, part]) for part in batch) if self.trainer.training else batch

    with pytest.raises(ValueError, match="16 rows, of 8 samples"):
        fit(Augmented(), DataLoader(dataset(8), batch_size=8))


def test_views_in_the_second_dimension_are_fine():
    class Views(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch[0].mean(1), batch[1]), batch_idx)

    def pairs(examples):
        x, y = default_collate(examples)
        return torch.stack([x, x], 1), y

    _, trainer = fit(Views(), DataLoader(dataset(), batch_size=8, collate_fn=pairs))
    assert trainer.global_step == 5


def time_first(examples):
    """[T, B, F], with fewer times than samples."""
    x, y = default_collate(examples)
    return x.unsqueeze(0).expand(3, -1, -1), y.unsqueeze(0).expand(3, -1)


def test_batches_with_time_first_are_refused_although_they_have_few_rows():
    class Times(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch[0].flatten(0, 1), batch[1].flatten(0, 1)), batch_idx)

    with pytest.raises(ValueError, match=r"3 rows, of a single sample.*\[T, B"):
        fit(Times(), DataLoader(dataset(), batch_size=40, collate_fn=time_first))


def test_a_collate_function_may_leave_records_out():
    def positive(examples):
        kept = [one for one in examples if one[1] > 0]
        return default_collate(kept) if kept else None

    module, trainer = fit(data=DataLoader(dataset(), batch_size=2, collate_fn=positive))
    assert trainer.global_step == trainer.strategy.ledger.steps == 20
    assert 0 < sum(module.sizes) < 40


def test_rows_of_shuffled_batches_are_counted_too():
    with pytest.raises(ValueError, match="16 rows, of 8 samples"):
        fit(data=DataLoader(dataset(), batch_size=8, collate_fn=views), poisson_sampling=False)


def test_fewer_rows_than_records_are_fine():
    check_rows(3, 3)
    check_rows(0, 5)


class Pictures(Dataset):
    """Keeps its samples as CIFAR does."""

    def __init__(self, transform=None):
        self.data = torch.arange(48).reshape(12, 4).numpy()
        self.transform = transform

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return self.data[index]


DATA = dataset(20)


@pytest.mark.parametrize(
    "twice",
    [
        Subset(DATA, [0] * 20 + [1]),
        Subset(DATA, [0, -20]),
        Subset(Subset(DATA, [3, 4, 5]), [0, 1, 0]),
        ConcatDataset([DATA, DATA]),
        ConcatDataset([Subset(DATA, range(10)), Subset(DATA, range(9, 20))]),
        Subset(ConcatDataset([DATA, DATA]), [0, 20]),
        ConcatDataset([DATA, TensorDataset(*(tensor.clone() for tensor in DATA.tensors))]),
        ConcatDataset([Pictures(), Pictures(transform=torch.neg)]),
    ],
)
def test_data_that_hold_a_record_twice_are_refused(twice):
    with pytest.raises(ValueError, match=r"several times|twice"):
        check_each_record_once(twice)
    with pytest.raises(ValueError, match=r"several times|twice"):
        fit(data=DataLoader(twice, batch_size=4))


@pytest.mark.parametrize(
    "once",
    [
        DATA,
        ConcatDataset(random_split(DATA, [12, 8])),
        Subset(ConcatDataset([DATA, dataset(20, seed=1)]), [0, 20, 39]),
        Subset(ConcatDataset([DATA, DATA]), [0, 21]),
        ConcatDataset([Pictures(), DATA]),
    ],
)
def test_data_that_hold_every_record_once_are_not(once):
    check_each_record_once(once)


@pytest.mark.parametrize(
    "sampler",
    [
        WeightedRandomSampler([1.0] * 20, 20),
        RandomSampler(DATA, replacement=True),
        RandomSampler(DATA, num_samples=30),
        SubsetRandomSampler([0, 0, 1]),
    ],
)
def test_samplers_with_replacement_are_refused_without_poisson_sampling_too(sampler):
    with pytest.raises(ValueError, match=f"{type(sampler).__name__} takes samples several times"):
        fit(data=DataLoader(DATA, batch_size=4, sampler=sampler), poisson_sampling=False)


def test_a_sampler_that_orders_records_is_fine_without_poisson_sampling():
    _, trainer = fit(data=DataLoader(DATA, batch_size=4, sampler=SubsetRandomSampler(range(8))), poisson_sampling=False)
    assert "shuffled" in trainer.strategy.ledger.caveats[0]
