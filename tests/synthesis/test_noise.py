import math

import pytest
import torch
from scipy import stats

from lightning_eff.synthesis.noise import NormalNoise


def test_secret_noise_is_standard_normal():
    drawn = NormalNoise().draw(400_000)
    assert drawn.dtype == torch.float64
    # Kolmogorov-Smirnov: a right draw fails this once in a million runs
    assert stats.kstest(drawn.numpy(), "norm").pvalue > 1e-6
    assert abs(float(drawn.mean())) < 5 / math.sqrt(len(drawn))
    assert abs(float(drawn.var()) - 1) < 5 * math.sqrt(2 / len(drawn))


def test_neighbouring_numbers_of_secret_noise_are_uncorrelated():
    drawn = NormalNoise().draw(200_001)
    half = len(drawn) // 2
    for first, second in ((drawn[:-1], drawn[1:]), (drawn[:half], drawn[half : 2 * half])):
        assert abs(float((first * second).mean())) < 5 / math.sqrt(len(first))


def test_no_global_seed_reproduces_secret_noise_and_no_global_state_is_used():
    torch.manual_seed(0)
    first = NormalNoise().draw(8)
    after_first = torch.rand(1)
    torch.manual_seed(0)
    second = NormalNoise().draw(8)
    assert not torch.equal(first, second)
    assert torch.equal(after_first, torch.rand(1))


@pytest.mark.parametrize("size", [0, 1, 7, (1 << 20) + 3])
def test_any_number_of_numbers_is_drawn(size):
    drawn = NormalNoise().draw(size)
    assert drawn.shape == (size,)
    assert bool(drawn.isfinite().all())


def test_a_seed_reproduces_noise_and_further_draws_differ():
    first, second = NormalNoise(3), NormalNoise(3)
    once = first.draw(50)
    assert torch.equal(once, second.draw(50))
    assert not torch.equal(once, first.draw(50))


def test_torch_seeds_its_generator_with_32_bits_which_is_why_it_is_not_used():
    low, high = (torch.randn(4, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1 + 2**32))
    assert torch.equal(low, high)
