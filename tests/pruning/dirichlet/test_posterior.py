"""The Dirichlet distribution of importance switches, against closed forms, torch.distributions and scipy."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch
from torch.distributions import Dirichlet, kl_divergence

from lightning_eff.pruning import DirichletPosterior, dirichlet_kl

VALUES = [
    ((1, 1, 1), 0.5, 0.2810242469692912),
    ((1, 2, 3), 1.0, 0.5511973816621554),
    ((0.5, 0.5), 0.5, 0.0),
    ((2, 3), 1.0, 0.23490664978800035),
    ((0.1, 0.2, 0.7, 3), 0.05, 3.253829156834188),
    ((math.log(2),) * 4, 0.5, 0.10813266271971433),
]


@pytest.mark.parametrize(("phi", "alpha0", "expected"), VALUES)
def test_divergence_has_its_published_values(phi: tuple[float, ...], alpha0: float, expected: float) -> None:
    assert float(dirichlet_kl(torch.tensor(phi, dtype=torch.float64), alpha0)) == pytest.approx(expected, abs=1e-10)


def test_divergence_equals_torch_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    phi = torch.rand(50, 7, generator=generator, dtype=torch.float64) * 3 + 0.01
    expected = kl_divergence(Dirichlet(phi), Dirichlet(torch.full_like(phi, 0.3)))
    torch.testing.assert_close(dirichlet_kl(phi, 0.3), expected, rtol=0, atol=1e-12)


def test_gradient_of_the_divergence_is_its_closed_form() -> None:
    phi = torch.tensor([0.3, 1.7, 0.05, 4.0], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(dirichlet_kl(phi, 0.5), phi)
    with torch.no_grad():
        trigamma = torch.special.polygamma(1, phi)
        of_sum = torch.special.polygamma(1, phi.sum())
        expected = (phi - 0.5) * trigamma - of_sum * (phi - 0.5).sum()
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


def test_divergence_of_half_precision_is_computed_in_float32() -> None:
    phi = torch.tensor([0.5, 1.0, 2.0], dtype=torch.bfloat16)
    assert dirichlet_kl(phi, 0.5).dtype == torch.float32
    assert float(dirichlet_kl(phi, 0.5)) == pytest.approx(float(dirichlet_kl(phi.double(), 0.5)), rel=1e-5)


@pytest.mark.parametrize("alpha0", [0.0, -1.0])
def test_prior_must_be_above_zero(alpha0: float) -> None:
    with pytest.raises(ValueError, match=f"alpha0 must be > 0, got {alpha0}"):
        dirichlet_kl(torch.ones(3), alpha0)


def test_moments_of_one_two_three() -> None:
    posterior = DirichletPosterior(torch.tensor([1.0, 2.0, 3.0]))
    torch.testing.assert_close(posterior.mean, torch.tensor([1, 2, 3]) / 6)
    torch.testing.assert_close(posterior.variance, torch.tensor([5, 8, 9]) / 252)  # 0.0198, 0.0317, 0.0357
    torch.testing.assert_close(posterior.relative, torch.tensor([0.5, 1.0, 1.5]))
    assert posterior.rank() == [2, 1, 0]


def test_two_channels_are_compared_by_their_exact_probability() -> None:
    assert DirichletPosterior(torch.tensor([2.0, 1.0])).prob_greater(0, 1) == pytest.approx(0.75)
    assert DirichletPosterior(torch.tensor([1.0, 1.0])).prob_greater(0, 1) == pytest.approx(0.5)


def test_comparison_equals_the_share_of_random_draws() -> None:
    phi = torch.tensor([0.4, 0.9, 2.0, 0.1])
    torch.manual_seed(0)
    draws = Dirichlet(phi).sample((200_000,))
    seen = float((draws[:, 1] > draws[:, 0]).double().mean())
    # four standard errors of a share among 200,000 draws
    assert DirichletPosterior(phi).prob_greater(1, 0) == pytest.approx(seen, abs=4 * 0.5 / math.sqrt(200_000))


@pytest.mark.parametrize("level", [0.5, 0.9])
def test_intervals_are_those_of_scipy(level: float) -> None:
    phi = torch.tensor([0.3, 1.0, 5.0])
    low, high = DirichletPosterior(phi).interval(level)
    for j, value in enumerate(phi.tolist()):
        expected = scipy.stats.beta(value, float(phi.sum()) - value).interval(level)
        assert (float(low[j]), float(high[j])) == pytest.approx(expected, rel=1e-5)


def test_equal_channels_rank_by_their_number() -> None:
    assert DirichletPosterior(torch.tensor([1.0, 2.0, 1.0, 2.0])).rank() == [1, 3, 0, 2]


def test_certainty_of_the_cut_compares_the_two_channels_beside_it() -> None:
    posterior = DirichletPosterior(torch.tensor([4.0, 0.5, 3.0, 1.0]))
    assert posterior.prob_at_cut(2) == posterior.prob_greater(2, 3)
    assert posterior.prob_at_cut([0, 2]) == posterior.prob_greater(2, 3)
    assert posterior.prob_at_cut([0, 1]) == posterior.prob_greater(1, 2)
    assert math.isnan(posterior.prob_at_cut(4))


@pytest.mark.parametrize(
    ("phi", "message"),
    [
        (torch.ones(1), "at least two channels"),
        (torch.ones(2, 2), "at least two channels"),
        (torch.tensor([1.0, 0.0]), "finite and > 0"),
        (torch.tensor([1.0, torch.nan]), "finite and > 0"),
    ],
)
def test_what_is_no_concentration_is_refused(phi: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DirichletPosterior(phi)


def test_levels_and_pairs_out_of_range_are_refused() -> None:
    posterior = DirichletPosterior(torch.ones(3))
    with pytest.raises(ValueError, match=r"level must lie in \(0, 1\), got 1"):
        posterior.interval(1)
    with pytest.raises(ValueError, match="expected two channels, got 1 twice"):
        posterior.prob_greater(1, 1)
