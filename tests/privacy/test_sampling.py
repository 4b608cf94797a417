"""Poisson sampling and the loader that does it."""

import copy
import dataclasses
from collections import namedtuple

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_eff.privacy.batches import number_of_samples, some_samples
from lightning_eff.privacy.noise import SecretStreams
from lightning_eff.privacy.sampling import PoissonBatchSampler, poisson_loader


def sampler(num_samples, sample_rate, steps, **kwargs):
    return PoissonBatchSampler(num_samples, sample_rate, steps, streams=SecretStreams.from_seed(0), **kwargs)


def drawn(num_samples, sample_rate, steps):
    """``[steps, num_samples]``, True where the sample takes part."""
    taking_part = np.zeros((steps, num_samples), dtype=bool)
    for row, batch in zip(taking_part, sampler(num_samples, sample_rate, steps), strict=True):
        row[batch] = True
    return taking_part


@pytest.mark.parametrize("rate", [0.05, 0.4, 0.9])
def test_batch_sizes_have_mean_and_variance_of_a_binomial(rate):
    sizes = drawn(200, rate, 2000).sum(1)
    variance = 200 * rate * (1 - rate)
    assert sizes.mean() == pytest.approx(200 * rate, abs=4 * (variance / 2000) ** 0.5)
    assert sizes.var() == pytest.approx(variance, rel=4 * (2 / 2000) ** 0.5)


def test_every_example_takes_part_equally_often_and_without_regard_to_others():
    taking_part = drawn(20, 0.3, 4000)
    assert np.abs(taking_part.mean(0) - 0.3).max() < 4 * (0.21 / 4000) ** 0.5
    correlations = np.corrcoef(taking_part.T)[~np.eye(20, dtype=bool)]
    assert np.abs(correlations).max() < 4.5 / 4000**0.5
    following = np.corrcoef(taking_part[:-1, 0], taking_part[1:, 0])[0, 1]
    assert abs(following) < 4 / 4000**0.5


def test_a_batch_is_empty_as_often_as_chance_says():
    empty = (drawn(50, 1 / 50, 2000).sum(1) == 0).mean()
    assert empty == pytest.approx((1 - 1 / 50) ** 50, abs=0.05)  # 0.364


def test_rate_one_draws_everyone_and_a_tiny_rate_nearly_nobody():
    assert list(sampler(5, 1.0, 2)) == [list(range(5))] * 2
    assert sum(map(len, sampler(1000, 1e-12, 50))) == 0


def test_shards_are_disjoint_complete_and_equally_long():
    ranks = [list(sampler(11, 1.0, 3, rank=rank, world_size=3)) for rank in range(3)]
    assert [len(batches) for batches in ranks] == [3, 3, 3]
    for batches in zip(*ranks, strict=True):
        assert sorted(index for batch in batches for index in batch) == list(range(11))


def test_ranks_draw_independently():
    ours, theirs = (next(iter(sampler(2000, 0.5, 1, rank=rank, world_size=2))) for rank in range(2))
    both = np.isin(np.asarray(theirs) - 1, ours).mean()
    assert both == pytest.approx(0.5, abs=4 * 0.5 / 500**0.5)


def test_draws_are_secret_by_default_and_never_repeat_between_passes():
    batches = PoissonBatchSampler(1000, 0.5, 1)
    passes = [next(iter(batches)) for _ in range(3)]
    assert passes[0] != passes[1] != passes[2]
    assert next(iter(PoissonBatchSampler(1000, 0.5, 1))) != passes[0]


def test_no_draw_comes_twice_from_one_key_whichever_sampler_asks():
    streams = SecretStreams()
    draws = [PoissonBatchSampler(1000, rate, 2, streams=streams) for rate in (0.5, 0.5, 0.3)]
    steps = []
    for one in draws:
        # instead of drawing, note which of the key's draws it would be
        one.draw = lambda step: steps.append(step) or []
    for _ in range(2):
        for one in draws:
            list(one)
    assert steps == list(range(12))


def test_a_pass_that_begins_at_a_step_goes_on_as_the_one_that_came_through_it():
    whole = list(sampler(100, 0.1, 8))
    assert list(sampler(100, 0.1, 5, first_step=lambda: 3)) == whole[3:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0.5, 1), "num_samples"),
        ((5, 0.0, 1), "sample_rate"),
        ((5, 1.5, 1), "sample_rate"),
        ((5, 0.5, 0), "steps"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PoissonBatchSampler(*arguments)
    with pytest.raises(ValueError, match="rank"):
        PoissonBatchSampler(5, 0.5, 1, rank=2, world_size=2)


class Dicts(Dataset):
    """Dict samples with a name, which need the default collate function to be batched."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return {"image": torch.full((2, 3), float(index)), "label": index, "name": f"sample {index}"}


def twice(examples):
    """A collate function of the user."""
    return torch.stack([image for image, _ in examples]) * 2, torch.stack([label for _, label in examples])


DATA = TensorDataset(torch.arange(40.0).reshape(40, 1), torch.arange(40))


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_load_poisson_batches_and_empty_ones_keep_their_structure(workers):
    loader = DataLoader(Dicts(), batch_size=2, num_workers=workers)
    batches = list(poisson_loader(loader, sampler(40, 0.02, 30)))
    expected = list(sampler(40, 0.02, 30))
    assert [batch["label"].tolist() for batch in batches] == expected
    assert [] in expected  # about 45 % of them
    empty = batches[expected.index([])]
    assert empty["image"].shape == (0, 2, 3)
    assert empty["name"] == []


def test_the_users_collate_function_never_sees_an_empty_list():
    loader = poisson_loader(DataLoader(DATA, batch_size=1, collate_fn=twice), sampler(40, 0.01, 30))
    batches = list(loader)
    assert {len(images) for images, _ in batches} >= {0, 1}
    assert all(torch.equal(images[:, 0], 2.0 * labels) for images, labels in batches)


def no_zeros(examples):
    """Leaves samples out, all of them perhaps."""
    kept = [label for _, label in examples if label >= 20]
    return torch.stack(kept) if kept else None


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_is_empty_where_the_users_collate_function_gives_none(workers):
    loader = DataLoader(DATA, batch_size=1, collate_fn=no_zeros, num_workers=workers)
    batches = list(poisson_loader(loader, sampler(40, 0.05, 30)))
    expected = [[index for index in batch if index >= 20] for batch in sampler(40, 0.05, 30)]
    assert [batch.tolist() for batch in batches] == expected
    assert any(batch and not kept for batch, kept in zip(sampler(40, 0.05, 30), expected, strict=True))


def test_a_collate_function_that_never_gives_a_batch_is_refused():
    with pytest.raises(ValueError, match="None for each of the 40 samples"):
        list(poisson_loader(DataLoader(DATA, batch_size=1, collate_fn=lambda _: None), sampler(40, 0.05, 3)))


def test_every_batch_is_counted_in_the_order_it_comes():
    batches = sampler(40, 0.1, 8)
    loader = poisson_loader(DataLoader(DATA, batch_size=4, num_workers=2, in_order=False), batches)
    assert all(len(labels) == batches.next_count() for _ in range(2) for _, labels in loader)
    with pytest.raises(RuntimeError, match="did not draw"):
        batches.next_count()


def test_a_loader_of_another_class_keeps_its_class_and_the_original_stays():
    class Loader(DataLoader):
        def __init__(self, data, extra):
            super().__init__(data, batch_size=4, shuffle=True)
            self.extra = extra

    original = Loader(DATA, "kept")
    changed = poisson_loader(original, sampler(40, 0.1, 7))
    assert type(changed) is Loader
    assert changed.extra == "kept"
    assert len(changed) == 7
    assert len(original) == 10
    assert isinstance(original.sampler, RandomSampler)


def test_persistent_workers_serve_every_pass():
    loader = DataLoader(DATA, batch_size=4, num_workers=1, persistent_workers=True)
    next(iter(loader))
    changed = poisson_loader(loader, sampler(40, 0.1, 5))
    assert [len(list(changed)) for _ in range(2)] == [5, 5]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(5))


@pytest.mark.parametrize(
    ("loader", "named"),
    [
        (DataLoader(Stream(), batch_size=2), "Stream cannot be read by index"),
        (DataLoader(DATA, sampler=SubsetRandomSampler([1, 2])), "SubsetRandomSampler"),
        (DataLoader(DATA, sampler=WeightedRandomSampler([1.0] * 40, 40)), "WeightedRandomSampler with replacement"),
        (DataLoader(DATA, sampler=RandomSampler(DATA, replacement=True)), "RandomSampler with replacement"),
        (DataLoader(DATA, sampler=RandomSampler(DATA, num_samples=10)), "draws 10 samples"),
        (
            DataLoader(DATA, batch_sampler=type("Mine", (BatchSampler,), {})(SequentialSampler(DATA), 4, False)),
            "its own Mine",
        ),
        (DataLoader(DATA, batch_size=None), "does not make batches"),
        ([torch.zeros(2)], "is a list, not a torch DataLoader"),
    ],
)
def test_loaders_whose_order_poisson_sampling_would_break_are_refused(loader, named):
    with pytest.raises(ValueError, match=named) as refused:
        poisson_loader(loader, sampler(40, 0.1, 5))
    assert "poisson_sampling=False" in str(refused.value)


@dataclasses.dataclass
class Batch:
    image: torch.Tensor
    notes: list


Pair = namedtuple("Pair", "x y")


def test_examples_are_cut_out_of_whatever_a_batch_is_made_of():
    x = torch.arange(12).reshape(4, 3)
    some = some_samples(
        {"pair": Pair(x, [x, np.arange(4)]), "data": Batch(x, ["a", "b", "c", "d"]), "scale": 0.5, "two": ["p", "q"]},
        slice(1, 3),
    )
    assert torch.equal(some["pair"].x, x[1:3])
    assert some["pair"].y[1].tolist() == [1, 2]
    assert some["data"].notes == ["b", "c"]
    assert torch.equal(some["data"].image, x[1:3])
    assert some["scale"] == 0.5
    assert some["two"] == ["p", "q"]


def test_the_batch_that_examples_are_cut_out_of_stays():
    batch = {"x": torch.arange(4), "names": list("abcd")}
    before = copy.deepcopy(batch)
    some_samples(batch, slice(0, 1))
    assert batch["names"] == before["names"]
    assert torch.equal(batch["x"], before["x"])


@pytest.mark.parametrize(
    ("batch", "error", "named"),
    [
        ({"a": torch.zeros(3, 2), "b": (torch.zeros(4),)}, ValueError, r"\['a'\] \[3, 2\], \['b'\]\[0\] \[4\]"),
        ((torch.zeros(3), torch.tensor(1.0)), ValueError, r"without dimensions.*\[1\] \[\]"),
        (object(), TypeError, "the batch is a object"),
        ([1, 2], TypeError, "got a list"),
        ((torch.zeros(3), object()), TypeError, r"\[1\] is a object"),
    ],
)
def test_batches_whose_examples_cannot_be_told_apart_are_refused_by_name(batch, error, named):
    with pytest.raises(error, match=named):
        number_of_samples(batch)


def test_a_list_with_an_entry_for_each_example_may_hold_anything():
    things = [object(), [object()], object()]
    batch = torch.zeros(3), things
    assert number_of_samples(batch) == 3
    assert some_samples(batch, slice(1, 2))[1] == things[1:2]
