import copy
import math

import pytest
import torch
from synthesis.private_records import CountingDataset, features, records
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from lightning_eff.accounting import PrivacyBudgetExceeded, PrivacyLedger, gaussian_sigma
from lightning_eff.synthesis import NTKFeatures, ReleaseOptions, release_mean_embedding
from lightning_eff.synthesis.signal import (
    class_weights,
    noise_floor,
    noise_norms,
    signal_norms,
    signal_to_noise,
    usable_classes,
)


def release(data, net=None, classes=3, epsilon=1.0, ledger=None, delta=1e-5, progress=False, **options):
    return release_mean_embedding(
        data,
        net or features(classes=classes),
        classes,
        epsilon=epsilon,
        delta=delta,
        options=ReleaseOptions(**options),
        ledger=ledger,
        progress=progress,
    )


def test_without_noise_it_is_the_class_sums():
    x, y = records()
    net = features()
    released = release((x, y), net, epsilon=math.inf, batch_size=16)
    phi = net.dense(x)
    for c in range(3):
        torch.testing.assert_close(released.flatten()[c], phi[y == c].sum(0), rtol=1e-5, atol=1e-5)
    assert released.counts.tolist() == [34, 34, 33]
    assert released.num_records == 101
    assert not released.private


# Delta: 2 within a class, sqrt(2 + 2 kappa^2) across classes; one record more or less: sqrt(1 + kappa^2)
@pytest.mark.parametrize(
    ("options", "sensitivity"),
    [
        ({}, 2.0),
        ({"count_weight": 2.0}, math.sqrt(10)),
        ({"label_prior": "uniform"}, 2.0),
        ({"max_contributions": 3}, 6.0),
        ({"adjacency": "add_remove"}, math.sqrt(1.01)),
        ({"adjacency": "add_remove", "count_weight": 0.5}, math.sqrt(1.25)),
        ({"adjacency": "add_remove", "label_prior": "uniform", "num_records": 100}, 1.0),
        ({"adjacency": "add_remove", "max_contributions": 2}, 2 * math.sqrt(1.01)),
    ],
)
def test_sensitivity_follows_from_what_counts_as_neighbours(options, sensitivity):
    assert ReleaseOptions(**options).sensitivity == pytest.approx(sensitivity, rel=1e-12)


def joint(phi, y, kappa):
    """The released vector before noise: class sums and weighted counts."""
    one_hot = torch.nn.functional.one_hot(y, 3).double()
    return torch.cat([(one_hot.T @ phi.double()).flatten(), kappa * one_hot.sum(0)])


@pytest.mark.parametrize("adjacency", ["replace_one", "add_remove"])
def test_no_pair_of_neighbours_differs_by_more_than_the_sensitivity(adjacency):
    random = torch.Generator().manual_seed(0)
    net, options = features(), ReleaseOptions(adjacency=adjacency)
    scale = 10 ** torch.empty(500, 1, 1).uniform_(-3, 3, generator=random)
    x = torch.randn(500, 7, 4, generator=random) * scale  # six records, and one that takes the place of the first
    x[::2, 6] = -x[::2, 0]  # opposite records of one class are the worst case within it
    y = torch.randint(3, (500, 7), generator=random)
    y[:, 6] = (y[:, 0] + torch.arange(500) % 3) % 3
    changes = []
    for phi, labels in zip(net.dense(x.flatten(0, 1)).unflatten(0, (500, 7)), y, strict=True):
        others = slice(1, 7) if adjacency == "replace_one" else slice(1, 6)
        change = joint(phi[:6], labels[:6], options.kappa) - joint(phi[others], labels[others], options.kappa)
        changes.append(float(change.norm()))
        assert changes[-1] <= options.sensitivity * (1 + 1e-5)
        if adjacency == "replace_one" and labels[0] != labels[6]:
            assert changes[-1] == pytest.approx(2.0, abs=1e-5)  # kappa = 1: the counts are free
    assert max(changes) > 0.99 * options.sensitivity  # the bound is attained: less noise would not do


# noise multipliers of (epsilon, 1e-5), tabulated to ten digits for the analytic Gaussian mechanism
@pytest.mark.parametrize(("epsilon", "sigma"), [(10.0, 0.4998886197), (1.0, 3.7306316348), (0.2, 16.3041334209)])
def test_noise_has_the_exact_size_on_sums_and_counts(epsilon, sigma):
    x, y = records(60)
    net = features(4, 4_000)
    clean, noisy = release((x, y), net, epsilon=math.inf), release((x, y), net, epsilon=epsilon)
    noise = (noisy.flatten() - clean.flatten()).double() / (2 * sigma)
    assert noise.numel() > 70_000
    assert float(noise.std()) == pytest.approx(1, rel=0.01)  # standard error 0.0027
    assert abs(float(noise.mean())) < 4 / math.sqrt(noise.numel())
    assert noisy.meta["sigma"] == pytest.approx(sigma, rel=1e-9)
    assert noisy.meta["sensitivity"] == 2.0


def test_counts_carry_noise_of_the_same_draw_and_keep_their_public_sum():
    x, y = records(600)
    drawn = torch.stack([release((x, y), features(4, 2), epsilon=1.0).counts for _ in range(100)])
    assert float(drawn.sum(1).sub(600).abs().max()) < 0.01
    # each count has noise of standard deviation 7.46; scaling to the public sum takes a third of the variance away
    assert float(drawn.std()) == pytest.approx(2 * 3.7306316348 * math.sqrt(2 / 3), rel=0.15)


def test_two_releases_differ_and_global_seeds_do_not_matter():
    x, y = records()
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        drawn.append(release((x, y)).flatten())
    assert not torch.equal(*drawn)


def test_a_noise_seed_reproduces_the_noise_and_the_ledger_says_what_that_means():
    x, y = records()
    ledger = PrivacyLedger(adjacency="replace_one")
    first = release((x, y), noise_seed=1, ledger=ledger)
    assert torch.equal(first.flatten(), release((x, y), noise_seed=1).flatten())
    assert not torch.equal(first.flatten(), release((x, y), noise_seed=2).flatten())
    assert not first.private
    assert "NOT PRIVATE" in ledger.caveats[0]


def test_one_class_has_the_public_number_as_its_count():
    released = release(records()[0], classes=1)
    assert released.counts.tolist() == [101.0]
    assert released.num_classes == 1


def test_public_shares_are_not_released():
    x, y = records(100)
    uniform = release((x, y), label_prior="uniform", noise_seed=0)
    assert uniform.counts.tolist() == pytest.approx([100 / 3] * 3)
    assert uniform.meta["count_weight"] is None
    assert release((x, y), label_prior=[0.5, 0.25, 0.25]).counts.tolist() == [50, 25, 25]
    with pytest.raises(ValueError, match="a share for each of 3 classes"):
        release((x, y), label_prior=[0.5, 0.5])


def test_add_or_remove_keeps_the_number_of_records_private():
    ledger = PrivacyLedger(adjacency="add_remove")
    released = release(records(), adjacency="add_remove", ledger=ledger)
    assert released.num_records is None
    assert "101" not in str(ledger.state_dict()) + str(released.meta)
    assert bool((released.counts >= 1).all())


def test_counts_below_one_are_lifted_to_one():
    x, y = torch.rand(3, 4), torch.tensor([0, 0, 0])
    for _ in range(5):
        released = release((x, y), epsilon=0.1, adjacency="add_remove", delta=0.01)
        assert float(released.counts.min()) >= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epsilon": 0.0}, "epsilon must be > 0, got 0.0"),
        ({"epsilon": -1.0}, "epsilon must be > 0"),
        ({"epsilon": math.nan}, "epsilon must be > 0, got nan"),
        ({"delta": 0.0}, r"delta must lie in \(0, 1\), got 0.0"),
        ({"delta": 1.0}, "delta must lie in"),
        ({"adjacency": "swap"}, "adjacency must be one of"),
        ({"count_weight": 0.0}, "count_weight must be > 0"),
        ({"max_contributions": 0}, "max_contributions must be a whole number >= 1"),
        ({"max_epsilon": 0.0}, "max_epsilon must be > 0"),
        ({"noise_seed": -1}, "noise_seed must be a whole number >= 0"),
        ({"num_records": 2.5}, "num_records must be a whole number"),
        ({"label_prior": "guess"}, "label_prior must be one of"),
        ({"label_prior": [0.5, 0.6]}, "label_prior must hold shares >= 0 with sum 1"),
        ({"label_prior": [math.nan] * 3}, "label_prior must hold shares >= 0 with sum 1"),
        ({"label_prior": [math.inf, 0.0, 0.0]}, "label_prior must hold shares >= 0 with sum 1"),
        ({"adjacency": "add_remove", "label_prior": "uniform"}, "state a public estimate as num_records"),
    ],
)
def test_arguments_out_of_range_are_told_before_data_are_read(arguments, message):
    data = CountingDataset(*records())
    with pytest.raises(ValueError, match=message):
        release(data, **arguments)
    assert not data.reads


def test_delta_of_one_record_in_n_is_warned_of():
    with pytest.warns(UserWarning, match=r"delta = 0.02 is not below 1 / n = .* n = 101"):
        release(records(), delta=0.02)


def test_where_the_number_of_records_is_private_the_warning_does_not_tell_it():
    with pytest.warns(UserWarning, match="delta = 0.02 is not below 1 / n") as told:
        release(records(), delta=0.02, adjacency="add_remove")
    assert "101" not in str(told[0].message)


def test_one_record_is_warned_of():
    with pytest.warns(UserWarning, match="one record"):
        release((torch.rand(1, 4), torch.zeros(1, dtype=torch.int64)), delta=1e-9)


def test_no_record_is_an_error():
    with pytest.raises(ValueError, match="expected private records, got none"):
        release((torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)))


def collated(repeat):
    def collate(rows):
        x, y = map(torch.stack, zip(*rows, strict=True))
        return x.repeat(repeat, 1), y.repeat(repeat)

    return collate


def test_records_that_loader_or_split_batch_repeat_or_leave_out_are_counted():
    x, y = records(100)
    ledger, net = PrivacyLedger(adjacency="replace_one"), features()
    loader = DataLoader(TensorDataset(x, y), batch_size=10, collate_fn=collated(4))
    with pytest.raises(ValueError, match=r"expected 100 records in the batches of this process, got 400.*collate_fn"):
        release(loader, ledger=ledger)
    with pytest.raises(ValueError, match="expected 100 records in the batches of this process, got 90"):
        release_mean_embedding(
            (x, y), net, 3, epsilon=1.0, ledger=ledger, split_batch=lambda batch: (batch[0][10:], batch[1][10:])
        )
    with pytest.raises(ValueError, match="expected 100 to 300 records"):
        release(loader, ledger=ledger, max_contributions=3)
    assert not ledger.history
    assert release(loader, ledger=ledger, max_contributions=4).num_records == 400


def test_a_stated_number_of_records_is_checked():
    ledger = PrivacyLedger(adjacency="replace_one")
    with pytest.raises(ValueError, match="num_records = 100 records, read 101"):
        release(records(), num_records=100, ledger=ledger)
    assert not ledger.history
    assert release(records(), num_records=101).num_records == 101


@pytest.mark.parametrize("broken", ["nan", "label", "stop"])
def test_after_an_error_while_reading_nothing_is_recorded_and_clean_sums_are_gone(broken):
    x, y = records()
    sums = []

    class Stream(IterableDataset):
        def __iter__(self):
            for k in range(101):
                if k == 90 and broken == "stop":
                    raise KeyboardInterrupt
                yield x[k], y[k]

    if broken == "nan":
        x[90, 2] = math.nan
    if broken == "label":
        y[90] = 3
    net = features()
    make = net.sums
    net.sums = lambda *arguments, **options: sums.append(make(*arguments, **options)) or sums[-1]
    ledger = PrivacyLedger(adjacency="replace_one")
    with pytest.raises(KeyboardInterrupt if broken == "stop" else ValueError):
        release(DataLoader(Stream(), batch_size=10), net, ledger=ledger)
    assert not ledger.history
    assert sums[0].records == 90
    assert float(sums[0].embedding().flatten().abs().max()) == 0


def test_after_a_release_the_clean_sums_are_overwritten():
    net, sums = features(), []
    make = net.sums
    net.sums = lambda *arguments, **options: sums.append(make(*arguments, **options)) or sums[-1]
    release(records(), net)
    assert float(sums[0].embedding().flatten().abs().max()) == 0


def test_budget_is_checked_before_a_record_is_read():
    data = CountingDataset(*records())
    ledger = PrivacyLedger(max_epsilon=1.5, adjacency="replace_one")
    release(data, ledger=ledger)
    data.reads.clear()
    release(data, ledger=ledger, epsilon=0.9)  # both together: 1.39, as one release of the composed sigma
    data.reads.clear()
    with pytest.raises(PrivacyBudgetExceeded, match=r"above max_epsilon = 1.5.*train on the release that is there"):
        release(data, ledger=ledger)
    assert not data.reads
    assert ledger.steps == 2


def test_releases_compose_exactly():
    ledger = PrivacyLedger(adjacency="replace_one")
    for expected in (1.0, 1.465170, 1.834965):  # sigma 3.7306316348 once, twice, three times at delta 1e-5
        release(records(), ledger=ledger)
        assert ledger.epsilon() == pytest.approx(expected, abs=1e-6)


def test_a_budget_of_just_epsilon_is_enough():
    for epsilon in (0.1, 0.3, 1.0, 3.0, 10.0):
        release(records(), epsilon=epsilon, max_epsilon=epsilon)


def test_infinite_epsilon_is_entered_as_not_private():
    ledger = PrivacyLedger(adjacency="replace_one")
    release(records(), epsilon=math.inf, ledger=ledger)
    assert math.isinf(ledger.epsilon())
    assert "NOT PRIVATE" in ledger.caveats[0]


def test_records_whose_feature_is_zero_are_warned_of_with_their_share():
    dead = nn.Sequential(nn.Linear(4, 3, bias=False), nn.ReLU(), nn.Linear(3, 1, bias=False))
    nn.init.constant_(dead[0].weight, 1.0)
    x, y = records(100)
    x[:25] = -x[:25]
    with pytest.warns(UserWarning, match=r"the feature of 25.0% of the records is zero"):
        release((x, y), NTKFeatures(dead, input_shape=(4,)))


def test_class_sums_too_large_for_the_memory_are_refused_before_a_record_is_read(monkeypatch):
    from lightning_eff.synthesis.features import sums

    monkeypatch.setattr(sums, "memory_bytes", lambda device: 1_000)
    data = CountingDataset(*records())
    with pytest.raises(ValueError, match=r"bytes.*narrower feature network.*sketch_dim"):
        release(data)
    assert not data.reads


def test_the_features_and_global_generators_are_left_as_they_were():
    net = features()
    before = copy.deepcopy(net.state_dict())
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    release(DataLoader(CountingDataset(*records()), shuffle=True), net)
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_sums_do_not_suffer_from_autocast():
    x, y = records()
    net = features()
    plain = release((x, y), net, noise_seed=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(release((x, y), net, noise_seed=0).flatten(), plain.flatten())


def test_what_could_not_be_checked_of_the_data_is_in_the_ledger():
    ledger = PrivacyLedger(adjacency="replace_one")
    release(Subset(TensorDataset(*records()), range(80)), ledger=ledger)
    assert any("Which records Subset takes does not depend on other records" in line for line in ledger.assumptions)


def test_one_of_several_processes_without_a_group_releases_nothing(monkeypatch):
    for name, value in (("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        data, ledger = CountingDataset(*records()), PrivacyLedger(adjacency="replace_one")
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with pytest.raises(RuntimeError, match=r"one of 2 processes.*datamodule=..."):
                release(data, ledger=ledger)
        assert not data.reads
        assert not ledger.history


def test_the_ledger_must_be_for_the_same_neighbours():
    with pytest.raises(ValueError, match="the ledger is for adjacency 'add_remove'"):
        release(records(), ledger=PrivacyLedger())


def test_estimated_signal_is_that_of_the_clean_sums():
    x, y = records(3_000)
    net = features()
    clean = release((x, y), net, epsilon=math.inf).norm(per_class=True)
    noisy = release((x, y), net, epsilon=1.0)
    torch.testing.assert_close(signal_norms(noisy), clean, rtol=0.05, atol=0.0)
    scale = 2 * gaussian_sigma(1.0, 1e-5)
    torch.testing.assert_close(noise_norms(noisy), math.sqrt(noisy.feature_dim) * scale / noisy.counts.double())
    torch.testing.assert_close(signal_to_noise(noisy), signal_norms(noisy) / (math.sqrt(noisy.feature_dim) * scale))


def test_noise_floor_is_what_noise_leaves_of_the_discrepancy():
    x, y = records(3_000)
    net = features(4, 100)
    clean, noisy = release((x, y), net, epsilon=math.inf), release((x, y), net, epsilon=1.0, label_prior="uniform")
    weights = class_weights(noisy, "conditional")
    distance = ((noisy.flatten() - clean.flatten()) / 1_000).square().sum(1).mean()
    assert noise_floor(noisy, weights) == pytest.approx(float(distance), rel=0.15)  # 2,100 squares: error 3 %


@pytest.mark.parametrize("epsilon", [1.0, math.inf])
def test_classes_of_small_public_shares_get_no_weight(epsilon):
    x, y = records(1_000)
    # three standard deviations of the noise on a class sum are 22 at epsilon 1
    released = release((x, y % 2), epsilon=epsilon, label_prior=[0.49, 0.49, 0.02], noise_seed=0)
    assert usable_classes(released).tolist() == [True, True, math.isinf(epsilon)]
    released = release((x, y % 2), epsilon=epsilon, label_prior=[0.5, 0.5, 0.0], noise_seed=0)
    assert usable_classes(released).tolist() == [True, True, False]


def test_a_single_class_is_of_known_size_only_where_that_is_public():
    x, _ = records(5)
    few = {"classes": 1, "epsilon": 0.1, "noise_seed": 0}
    assert usable_classes(release(x, **few)).tolist() == [True]
    assert usable_classes(release(x, adjacency="add_remove", **few)).tolist() == [False]


def test_classes_of_few_records_get_no_weight():
    x = torch.rand(3_000, 4)
    y = (torch.arange(3_000) % 2).clone()
    y[:3] = 2  # three records; three standard deviations of the noise on a count are 22
    released = release((x, y), epsilon=1.0, noise_seed=0)
    assert usable_classes(released).tolist() == [True, True, False]
    assert class_weights(released, "conditional").tolist() == [0.5, 0.5, 0.0]
    for weighting, total in (("proportional", 1.0), ("joint", 0.5)):
        weights = class_weights(released, weighting)
        assert weights[2] == 0
        assert float(weights.sum()) == pytest.approx(total, abs=0.01)
    with pytest.raises(ValueError, match="every class has too few records for this epsilon"):
        class_weights(release((x[:9], y[:9]), epsilon=0.1, noise_seed=0), "conditional")
