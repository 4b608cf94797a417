import math

import numpy as np
import pytest
from scipy.stats import norm

from lightning_eff.accounting import composed_sigma, gaussian_delta, gaussian_epsilon, gaussian_sigma

# the analytic Gaussian mechanism (arXiv 1805.06530) evaluated with another program
SIGMAS = {
    (0.1, 1e-5): 30.7495661320,
    (0.2, 1e-5): 16.3041334209,
    (0.5, 1e-5): 7.0318266756,
    (1, 1e-5): 3.7306316348,
    (2, 1e-5): 1.9938124456,
    (5, 1e-5): 0.8918682650,
    (8, 1e-5): 0.6002290722,
    (10, 1e-5): 0.4998886197,
    (100, 1e-5): 0.0946699070,
    (1, 1e-6): 4.2246788893,
    (1, 1e-3): 2.5746570186,
    (0.01, 1e-5): 243.785437676,
    (50, 1e-9): 0.1747836249,
}


@pytest.mark.parametrize(("at", "sigma"), SIGMAS.items())
def test_noise_multiplier_is_the_exact_one(at, sigma):
    assert gaussian_sigma(*at) == pytest.approx(sigma, rel=1e-9)


@pytest.mark.parametrize(
    ("sigma", "epsilon"), [(0.5, 9.997256), (1, 4.377178), (2, 1.993091), (5, 0.725522), (25, 0.125422)]
)
def test_epsilon_is_the_exact_one(sigma, epsilon):
    assert gaussian_epsilon(sigma, 1e-5) == pytest.approx(epsilon, abs=5e-7)


@pytest.mark.parametrize(
    ("sigma", "epsilon", "delta"), [(1, 1, 0.1269367375), (2, 1, 0.0068295950), (1, 0, 0.3829249225)]
)
def test_delta_is_the_exact_one(sigma, epsilon, delta):
    assert gaussian_delta(sigma, epsilon) == pytest.approx(delta, abs=1e-10)


def test_delta_is_that_of_sampled_privacy_losses():
    # the loss of N(1/sigma, 1) against N(0, 1) is normal with mean 1/2 and variance 1 at sigma = 1
    losses = np.random.default_rng(0).normal(0.5, 1.0, 1_000_000)
    excess = np.maximum(0, 1 - np.exp(1.0 - losses))
    assert gaussian_delta(1.0, 1.0) == pytest.approx(excess.mean(), abs=3 * excess.std() / 1000)


@pytest.mark.parametrize("epsilon", [0.01, 0.3, 1, 7, 100])
@pytest.mark.parametrize("delta", [1e-12, 1e-8, 1e-5, 1e-2])
def test_three_functions_are_inverse_to_each_other(epsilon, delta):
    sigma = gaussian_sigma(epsilon, delta)
    assert gaussian_epsilon(sigma, delta) == pytest.approx(epsilon, rel=1e-8)
    assert gaussian_delta(sigma, epsilon) == pytest.approx(delta, rel=1e-6)


def test_more_noise_is_more_private():
    sigmas = np.geomspace(0.05, 200, 60)
    assert np.all(np.diff([gaussian_epsilon(sigma, 1e-5) for sigma in sigmas]) < 0)
    assert np.all(np.diff([gaussian_delta(sigma, 1.0) for sigma in sigmas if 0.2 < sigma < 10]) < 0)


@pytest.mark.parametrize(("times", "epsilon"), [(2, 1.465170), (3, 1.834965), (10, 3.618592)])
def test_equal_releases_compose_exactly(times, epsilon):
    assert gaussian_epsilon(composed_sigma([3.7306316348] * times), 1e-5) == pytest.approx(epsilon, abs=5e-7)


def test_unequal_releases_compose_exactly():
    assert gaussian_epsilon(composed_sigma([2, 5]), 1e-5) == pytest.approx(2.165545, abs=5e-7)


@pytest.mark.parametrize(
    ("sigma", "times", "delta", "epsilon"),
    [(1, 1, 1e-5, 4.37718), (2, 1, 1e-5, 1.99309), (4, 10, 1e-5, 3.34141), (5, 100, 1e-6, 10.99715)],
)
def test_full_batches_follow_the_closed_form_of_gaussian_privacy(sigma, times, delta, epsilon):
    assert gaussian_epsilon(composed_sigma([sigma] * times), delta) == pytest.approx(epsilon, abs=1e-5)
    mu = math.sqrt(times) / sigma
    closed = norm.cdf(-epsilon / mu + mu / 2) - math.exp(epsilon) * norm.cdf(-epsilon / mu - mu / 2)
    assert closed == pytest.approx(delta, rel=1e-4)


def test_no_noise_and_no_release_are_told_without_arithmetic():
    assert gaussian_epsilon(0, 1e-5) == math.inf
    assert gaussian_delta(0, 1.0) == 1
    assert gaussian_sigma(math.inf, 1e-5) == 0
    assert composed_sigma([]) == math.inf
    assert composed_sigma([2, 0]) == 0


def test_so_much_noise_that_nothing_is_told_costs_nothing():
    assert gaussian_epsilon(1e9, 1e-5) == 0


@pytest.mark.parametrize("epsilon", [0, -1, math.nan])
def test_epsilon_must_be_positive(epsilon):
    with pytest.raises(ValueError, match="epsilon must be > 0"):
        gaussian_sigma(epsilon, 1e-5)


@pytest.mark.parametrize("delta", [0, 1, -0.1, 1.5, math.nan])
def test_delta_must_lie_between_zero_and_one(delta):
    with pytest.raises(ValueError, match=r"delta must lie in \(0, 1\), got"):
        gaussian_sigma(1.0, delta)
    with pytest.raises(ValueError, match=r"delta must lie in \(0, 1\), got"):
        gaussian_epsilon(1.0, delta)


@pytest.mark.parametrize("sigma", [-1, math.nan, math.inf])
def test_noise_multiplier_must_be_a_number(sigma):
    with pytest.raises(ValueError, match="noise_multiplier must be >= 0"):
        gaussian_epsilon(sigma, 1e-5)


@pytest.mark.parametrize("epsilon", [-0.1, math.nan])
def test_delta_is_not_asked_for_at_an_epsilon_below_zero(epsilon):
    with pytest.raises(ValueError, match="epsilon must be >= 0, got"):
        gaussian_delta(1.0, epsilon)
