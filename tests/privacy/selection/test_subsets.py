"""Exactly k of n: uniform without replacement, or the largest."""

from __future__ import annotations

import pytest
import torch

from lightning_eff.privacy.selection.subsets import largest_subset, random_subset


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("k", [0, 1, 7, 1_000, 4_999, 5_000, 5_001, 9_990, 9_999, 10_000])
def test_random_subset_has_exactly_k_of_what_is_allowed(k: int) -> None:
    n = 30_000
    allowed = torch.zeros(n, dtype=torch.bool)
    allowed[torch.randperm(n, generator=generator(5))[:10_000]] = True
    for seed in range(3):
        assert int(random_subset(10_000, k, generator(seed)).sum()) == k
        subset = random_subset(n, k, generator(seed), allowed=allowed)
        assert int(subset.sum()) == k
        assert not (subset & ~allowed).any()


@pytest.mark.parametrize(("n", "k"), [(6, 2), (6, 4), (6, 3)])
def test_every_subset_is_equally_likely(n: int, k: int) -> None:
    from math import comb

    from scipy.stats import chisquare

    rng = generator(1)
    draws = 4_000
    counts: dict[tuple[int, ...], int] = {}
    for _ in range(draws):
        subset = tuple(random_subset(n, k, rng).nonzero().squeeze(1).tolist())
        counts[subset] = counts.get(subset, 0) + 1
    assert len(counts) == comb(n, k)
    assert chisquare(list(counts.values())).pvalue > 0.001


def test_every_coordinate_is_equally_likely_in_a_large_tensor_drawn_in_rounds() -> None:
    n, k, draws = 20_000, 8_000, 200
    rng = generator(2)
    counts = sum(random_subset(n, k, rng).double() for _ in range(draws))
    # variance of a count is 200 * 0.4 * 0.6 = 48; of n of them, the mean square deviates by sqrt(2 / n) = 1%
    assert float((counts - 80).square().mean()) == pytest.approx(48, rel=0.04)
    halves = counts[: n // 2].mean(), counts[n // 2 :].mean()
    assert float(halves[0]) == pytest.approx(float(halves[1]), abs=0.5)


def test_a_seed_gives_a_subset_and_another_seed_another_one() -> None:
    one, same, other = (random_subset(5_000, 2_000, generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(one, same)
    assert int((one & other).sum()) == pytest.approx(800, abs=80)  # 4 standard deviations of independent draws


def test_about_k_random_numbers_are_drawn_for_k_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    randint = torch.randint

    def counting(high: int, size: tuple[int, ...], **options: object) -> torch.Tensor:
        drawn.append(size[0])
        return randint(high, size, **options)

    monkeypatch.setattr(torch, "randint", counting)
    random_subset(1_000_000, 20_000, generator())
    assert sum(drawn) < 1.2 * 20_000


def test_the_largest_are_taken_and_of_equal_ones_those_with_the_lower_index() -> None:
    scores = torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0, 2.0, 0.0])
    assert largest_subset(scores, 3).nonzero().squeeze(1).tolist() == [1, 2, 3]
    assert largest_subset(scores, 4).nonzero().squeeze(1).tolist() == [1, 2, 3, 4]
    assert largest_subset(torch.zeros(5), 2).nonzero().squeeze(1).tolist() == [0, 1]
    allowed = torch.tensor([True, False, False, True, True, True, True])
    assert largest_subset(scores, 2, allowed=allowed).nonzero().squeeze(1).tolist() == [3, 4]


@pytest.mark.parametrize("k", [0, 1, 500, 999, 1_000])
def test_largest_agrees_with_a_stable_sort(k: int) -> None:
    scores = torch.randint(50, (1_000,), generator=generator(7)).float()
    expected = torch.zeros(1_000, dtype=torch.bool)
    expected[scores.sort(descending=True, stable=True).indices[:k]] = True
    assert torch.equal(largest_subset(scores, k), expected)


@pytest.mark.parametrize("distribution", ["normal", "skew", "half equal", "nearly all equal", "sorted", "periodic"])
@pytest.mark.parametrize("share", [1e-5, 0.01, 0.3, 0.5, 0.9, 0.99999])
def test_the_largest_of_many_are_exact_whatever_the_distribution(distribution: str, share: float) -> None:
    n = 100_000
    scores = torch.randn(n, generator=generator(8))
    if distribution == "skew":
        scores = scores**9
    if "equal" in distribution:
        scores[torch.rand(n, generator=generator(9)) < (0.5 if distribution == "half equal" else 0.999)] = 0.1
    if distribution == "sorted":
        scores = scores.sort().values
    if distribution == "periodic":  # with the period of the sample
        scores = torch.arange(n).remainder(n // 4096).float()
    k = round(share * n)
    expected = torch.zeros(n, dtype=torch.bool)
    expected[scores.sort(descending=True, stable=True).indices[:k]] = True
    assert torch.equal(largest_subset(scores, k), expected)
    assert torch.equal(largest_subset(scores.double(), k), expected)


def test_not_a_number_counts_as_the_lowest_and_half_precision_is_taken() -> None:
    scores = torch.tensor([torch.nan, 1.0, torch.nan, -torch.inf, 2.0])
    assert largest_subset(scores, 2).nonzero().squeeze(1).tolist() == [1, 4]
    assert int(largest_subset(scores, 4).sum()) == 4
    assert largest_subset(scores.bfloat16(), 1).nonzero().squeeze(1).tolist() == [4]
