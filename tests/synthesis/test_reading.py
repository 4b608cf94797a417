import pytest
import torch
from synthesis.private_records import CountingDataset, records
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    random_split,
)

from lightning_eff import BatchKeys, split_batch
from lightning_eff.synthesis.processes import Processes
from lightning_eff.synthesis.reading import check_finite, records_of, shard_of

CPU = torch.device("cpu")


class Repeating(Sampler):
    def __iter__(self):
        return iter([0, 1, 2, 1])

    def __len__(self):
        return 4


class Stream(IterableDataset):
    def __iter__(self):
        x, y = records()
        return iter(list(zip(x, y, strict=True)))


def read(data, **arguments):
    shard = shard_of(data, **{"batch_size": 8, **arguments})
    batches = list(shard)
    return torch.cat([batch[0] for batch in batches]) if batches else torch.zeros(0), shard


@pytest.mark.parametrize(
    "loading",
    [
        {},
        {"shuffle": True},
        {"batch_size": 10, "shuffle": True},
        {"sampler": SubsetRandomSampler(range(101))},
        {"batch_sampler": BatchSampler(RandomSampler(range(101)), 9, drop_last=False)},
        {"num_workers": 1},
    ],
)
def test_every_record_is_read_once(loading):
    x, y = records()
    data = TensorDataset(x, y)
    seen, shard = read(DataLoader(data, **loading))
    assert shard.records == 101
    assert torch.equal(seen.sort(dim=0).values, x.sort(dim=0).values)


def test_data_set_tensors_and_batches_are_taken_too():
    x, y = records()
    for data in (
        TensorDataset(x, y),
        (x, y),
        (x.numpy(), y.numpy()),
        [(x[:50], y[:50]), (x[50:], y[50:])],
        DataLoader(Stream(), batch_size=7),
    ):
        seen, _ = read(data)
        assert torch.equal(seen, x)


def test_a_data_set_that_gives_batches_is_read_batch_by_batch():
    x, y = records(100)
    batches = [(x[k : k + 10], y[k : k + 10]) for k in range(0, 100, 10)]
    seen, _ = read(DataLoader(batches, batch_size=None))
    assert torch.equal(seen, x)


@pytest.mark.parametrize("world", [2, 3, 4, 101, 120])
def test_shards_are_disjoint_complete_and_without_padding(world):
    data = CountingDataset(*records())
    sizes = []
    for rank in range(world):
        shard = shard_of(data, batch_size=8, processes=Processes(rank, world))
        assert shard.records == 101
        sizes.append(sum(len(x) for x, _ in shard))
        assert sizes[-1] == shard.mine
    assert data.reads == dict.fromkeys(range(101), 1)
    assert max(sizes) - min(sizes) <= 1


def test_a_distributed_sampler_of_the_same_processes_is_replaced_by_shards_without_its_padding():
    data = CountingDataset(*records(10))
    for rank in range(4):
        sampler = DistributedSampler(data, num_replicas=4, rank=rank)
        list(shard_of(DataLoader(data, sampler=sampler), batch_size=8, processes=Processes(rank, 4)))
    assert data.reads == dict.fromkeys(range(10), 1)


def test_a_distributed_sampler_of_other_processes_is_refused():
    data = TensorDataset(*records(10))
    loader = DataLoader(data, sampler=DistributedSampler(data, num_replicas=4, rank=0))
    with pytest.raises(ValueError, match=r"4 processes pads its shards with repeated records"):
        shard_of(loader, batch_size=8)


def test_weights_and_replacement_are_refused_because_of_their_sensitivity():
    data = TensorDataset(*records())
    weighted = DataLoader(data, sampler=WeightedRandomSampler([1.0] * 101, 101))
    replaced = DataLoader(data, sampler=RandomSampler(data, replacement=True))
    for loader, name in ((weighted, "WeightedRandomSampler"), (replaced, "replacement=True")):
        with pytest.raises(ValueError, match=f"{name}.*sensitivity"):
            shard_of(loader, batch_size=8)


def test_a_sampler_that_repeats_records_needs_max_contributions():
    data = TensorDataset(*records())
    for loader in (
        DataLoader(data, sampler=Repeating()),
        DataLoader(data, batch_sampler=BatchSampler(Repeating(), 2, False)),
    ):
        with pytest.raises(ValueError, match=r"one record 2 times.*max_contributions=2"):
            shard_of(loader, batch_size=8)
        assert shard_of(loader, batch_size=8, max_contributions=2).records == 4


def test_replacement_is_taken_where_the_most_that_a_record_was_drawn_is_allowed():
    data = TensorDataset(*records())
    loader = DataLoader(data, sampler=RandomSampler(data, replacement=True, num_samples=20))
    assert shard_of(loader, batch_size=8, max_contributions=20).records == 20


@pytest.mark.parametrize("adjacency", ["replace_one", "add_remove"])
def test_drop_last_leaves_no_record_out(adjacency):
    # one record more would let a whole batch in, however small the noise for one record is
    x, y = records()
    for data in (TensorDataset(x, y), Stream()):
        with pytest.warns(UserWarning, match="drop_last=True is for training"):
            seen, _ = read(DataLoader(data, batch_size=16, drop_last=True), adjacency=adjacency)
        assert torch.equal(seen, x)


def test_samplers_that_fix_how_many_records_are_read_are_refused_where_their_number_is_private():
    data = TensorDataset(*records())
    for sampler in (
        RandomSampler(data, num_samples=50),
        RandomSampler(data, num_samples=101),
        RandomSampler(data, replacement=True),
    ):
        with pytest.raises(ValueError, match=r"takes others where there is one record more.*adjacency='add_remove'"):
            shard_of(DataLoader(data, sampler=sampler), batch_size=8, max_contributions=200, adjacency="add_remove")
    fixed = DataLoader(data, sampler=RandomSampler(data, num_samples=50))
    assert shard_of(fixed, batch_size=8).records == 50
    assert shard_of(DataLoader(data, shuffle=True), batch_size=8, adjacency="add_remove").records == 101


def test_records_that_a_data_set_made_of_others_holds_several_times_are_seen():
    x, y = records()
    data = TensorDataset(x, y)
    for repeated, most in (
        (Subset(data, [0] * 5 + list(range(101))), 6),
        (Subset(Subset(data, [3, 3, 4]), [0, 1, 2]), 2),
        (ConcatDataset([data] * 3), 3),
        (ConcatDataset([data, TensorDataset(x, y + 1)]), 2),
        (ConcatDataset([data, Subset(data, [7])]), 2),
    ):
        with pytest.raises(ValueError, match=f"gives one record {most} times.*max_contributions={most}"):
            shard_of(repeated, batch_size=8)
        assert shard_of(repeated, batch_size=8, max_contributions=most).records == len(repeated)
    halves = ConcatDataset([Subset(data, range(50)), Subset(data, range(50, 101))])
    assert torch.equal(read(halves)[0], x)


def test_a_choice_of_records_that_cannot_be_checked_is_told():
    data = TensorDataset(*records())
    assert shard_of(DataLoader(data, shuffle=True), batch_size=8).assumptions == ()
    for loader, name in (
        (DataLoader(data, sampler=SubsetRandomSampler(range(50))), "SubsetRandomSampler"),
        (DataLoader(Subset(data, range(50))), "Subset"),
        (DataLoader(data, sampler=RandomSampler(data, num_samples=5)), "RandomSampler"),
    ):
        (told,) = shard_of(loader, batch_size=8).assumptions
        assert told == f"Which records {name} takes does not depend on other records; that could not be checked."
    x, y = records(100)
    batches = DataLoader([(x[:50], y[:50]), (x[50:], y[50:])], batch_size=None)
    assert "batches of the data set hold every record once" in shard_of(batches, batch_size=8).assumptions[0]
    collated = DataLoader(data, collate_fn=lambda rows: tuple(map(torch.stack, zip(*rows, strict=True))))
    assert "collate_fn gives records one by one" in shard_of(collated, batch_size=8).assumptions[0]


def test_processes_are_compared_by_what_is_behind_their_indices():
    x, y = records()
    data, counted = TensorDataset(x, y), CountingDataset(x, y)

    def of(dataset, rank=0):
        return shard_of(dataset, batch_size=8, processes=Processes(rank, 2))

    assert of(data).fingerprint == of(TensorDataset(x.clone(), y), rank=1).fingerprint
    shuffled = TensorDataset(x.flip(0), y)
    assert of(data).fingerprint != of(shuffled).fingerprint
    first, second = (random_split(counted, [80, 21], torch.Generator().manual_seed(seed))[0] for seed in (0, 1))
    assert of(first).fingerprint != of(second).fingerprint
    assert of(counted).fingerprint != of(Subset(counted, range(101))).fingerprint
    assert not of(data).assumptions
    assert "the same records in the same order" in of(counted).assumptions[0]
    assert not counted.reads


def test_what_cannot_be_shown_to_be_read_once_is_refused():
    loader = DataLoader(Stream(), num_workers=2)
    with pytest.raises(ValueError, match="2 workers may each give all records"):
        shard_of(loader, batch_size=8)
    with pytest.raises(ValueError, match="map-style"):
        shard_of(Stream(), batch_size=8, processes=Processes(0, 2))
    loaders = [DataLoader(TensorDataset(*records()))] * 2
    with pytest.raises(ValueError, match="one data loader, got 2"):
        shard_of(loaders, batch_size=8)
    with pytest.raises(ValueError, match="got a int"):
        shard_of(3, batch_size=8)
    with pytest.raises(ValueError, match="as many labels as records, got 3 and 4"):
        shard_of((torch.zeros(4, 2), torch.zeros(3)), batch_size=8)
    assert "could not be checked" in shard_of(Stream(), batch_size=8).assumptions[0]


def test_samplers_are_asked_without_a_trace_in_the_global_generators():
    data = TensorDataset(*records())
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    shard_of(DataLoader(data, sampler=SubsetRandomSampler(range(50))), batch_size=8)
    assert torch.equal(torch.rand(1), expected)


def test_labels_come_as_integers_columns_or_one_hot():
    x, y = records(6)
    one_hot = torch.nn.functional.one_hot(y, 3)
    for labels in (y, y[:, None], y.to(torch.uint8), one_hot, one_hot.float(), one_hot.bool()):
        seen, classes = records_of((x, labels), 3, 0, split_batch, CPU)
        assert torch.equal(seen, x)
        assert torch.equal(classes, y)


def test_records_without_labels_are_one_class():
    x, _ = records(6)
    for batch in (x, [x], (x, torch.zeros(6, dtype=torch.int64))):
        seen, classes = records_of(batch, 1, 0, split_batch, CPU)
        assert torch.equal(seen, x)
        assert classes.tolist() == [0] * 6


def test_dictionaries_go_through_split_batch():
    x, y = records(6)
    batch = {"image": x, "kind": y}
    assert torch.equal(records_of(batch, 3, 0, BatchKeys("image", "kind"), CPU)[1], y)
    with pytest.raises(TypeError, match=r"pass split_batch="):
        records_of(batch, 3, 0, split_batch, CPU)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.full((6,), 3), r"batch 4: expected labels \[B\] as integers in 0..2, got labels outside"),
        (torch.full((6,), -1), r"integers in 0..2.*is one missing"),
        (torch.zeros(6), r"integers in 0..2, got torch.float32 \[6\]; is this a regression target"),
        (torch.zeros(5, dtype=torch.int64), r"for 6 records, got torch.int64 \[5\]"),
        (torch.full((6, 3), 0.3), r"whose rows are not one-hot"),
        ([0] * 6, "got a list"),
    ],
)
def test_what_are_no_classes_is_refused_with_the_range(labels, message):
    with pytest.raises(ValueError, match=message):
        records_of((records(6)[0], labels), 3, 4, split_batch, CPU)


def test_arrays_are_taken_for_tensors():
    x, y = records(6)
    seen, classes = records_of((x.numpy(), y.numpy()), 3, 0, split_batch, CPU)
    assert torch.equal(seen, x)
    assert torch.equal(classes, y)


def test_labels_where_no_classes_are_wanted_can_be_left_out():
    x, y = records(6)
    with pytest.raises(ValueError, match=r"num_classes=1 is for records without labels.*split_batch=lambda batch"):
        records_of((x, y), 1, 0, split_batch, CPU)
    _, classes = records_of((x, y), 1, 0, lambda batch: (batch[0], None), CPU)
    assert classes.tolist() == [0] * 6


def test_what_are_no_records_is_refused():
    with pytest.raises(ValueError, match=r"records as a tensor \[B, ...\] of numbers, got a list"):
        records_of(([1.0], torch.zeros(1)), 3, 0, split_batch, CPU)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_records_that_are_not_finite_are_told_by_batch_and_column_without_their_values(value):
    x = torch.full((5, 3), 0.123)
    x[2, 1] = value
    with pytest.raises(ValueError, match="batch 7: 1 of 5 records hold NaN or infinity, first in column 'age'") as told:
        check_finite(x, 7, ["sex", "age", "age"])
    assert "0.123" not in str(told.value)
    with pytest.raises(ValueError, match="first in coordinate 1"):
        check_finite(x, 7)
