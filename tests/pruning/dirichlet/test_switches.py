"""Gates of importance switches and how they move: gradients against formulas worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_eff.pruning import DirichletOptions, Draws, Gate, Prior
from lightning_eff.pruning.dirichlet.switches import EPSILON, Switches


def switches(phi: list[float] | None = None, seed: int = 0, **options: Any) -> Switches:
    made = Switches({"layer": len(phi or [0] * 4)}, DirichletOptions(**options), seed=seed)
    if phi is not None:
        with torch.no_grad():
            made.theta["layer"].copy_((torch.tensor(phi, dtype=torch.float64) - EPSILON).expm1().log())
    return made


def test_concentration_is_the_softplus_of_the_parameter() -> None:
    assert switches(init=-1.0).concentration("layer").tolist() == pytest.approx([0.31326 + 1e-4] * 4, rel=1e-4)


def test_gates_of_the_mean_sum_to_the_scale() -> None:
    assert float(switches([1, 2, 5]).gate("layer", 7).sum().detach()) == pytest.approx(1)
    assert float(switches([1, 2, 5], gate=Gate(scale=2.5)).gate("layer", 7).sum().detach()) == pytest.approx(2.5)
    assert float(switches([1, 2, 5], gate=Gate(scale="dim")).gate("layer", 7).mean().detach()) == pytest.approx(1)


def test_every_example_has_a_draw_of_its_own_or_the_batch_one() -> None:
    own = switches([1, 2, 5], estimator="sample").gate("layer", 7)
    assert own.shape == (7, 3)
    assert len(own.unique(dim=0)) == 7
    torch.testing.assert_close(own.sum(1), torch.ones(7))
    assert switches([1, 2, 5], estimator="sample", draws=Draws(scope="batch")).gate("layer", 7).shape == (3,)


def test_draws_depend_on_the_seed_alone() -> None:
    draws = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        draws.append(switches([1, 2, 5], estimator="sample", seed=3).gate("layer", 4))
    assert torch.equal(*draws)


def test_gradient_of_the_mean_is_its_closed_form() -> None:
    made, w = switches([0.5, 1.0, 2.0]), torch.tensor([1.0, -2.0, 0.5])
    phi = made.concentration("layer").detach()
    (gradient,) = torch.autograd.grad((made.gate("layer", 1) * w).sum(), made.theta["layer"])
    total = phi.sum()
    of_mean = (torch.eye(3) * total - phi.unsqueeze(1)) / total**2  # ds_i / dphi_j
    expected = (w @ of_mean) * torch.sigmoid(made.theta["layer"].detach())
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(
    ("power", "expected"), [(1, (0.326531, -0.530612, 0.183673)), (2, (-0.169312, 0.211640, -0.185185))]
)
def test_implicit_gradients_of_random_switches_agree_with_exact_ones(power: int, expected: tuple[float, ...]) -> None:
    phi, w = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64, requires_grad=True), torch.tensor([1.0, -2.0, 0.5])
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(40):
        draws = torch._standard_gamma(phi.expand(10_000, 3), generator=generator)
        value = ((draws / draws.sum(-1, keepdim=True)) * w).sum(-1) ** power
        batches.append(torch.autograd.grad(value.mean(), phi)[0])
    found = torch.stack(batches)
    error = found.std(0) / math.sqrt(len(found))
    assert bool(((found.mean(0) - torch.tensor(expected)).abs() < 4 * error).all())


def test_random_gates_of_the_switches_have_those_gradients() -> None:
    made, w = switches([0.5, 1.0, 2.0], estimator="sample"), torch.tensor([1.0, -2.0, 0.5])
    found = torch.stack(
        [torch.autograd.grad((made.gate("layer", 5_000) * w).sum(-1).mean(), made.theta["layer"])[0] for _ in range(40)]
    )
    of_theta = torch.sigmoid(made.theta["layer"].detach())
    expected = torch.tensor([0.326531, -0.530612, 0.183673]) * of_theta
    assert bool(((found.mean(0) - expected).abs() < 4 * found.std(0) / math.sqrt(40)).all())


def test_draws_survive_tiny_concentrations() -> None:
    made = Switches({"layer": 512}, DirichletOptions(estimator="sample", init=-12.0))
    gate = made.gate("layer", 64)
    assert bool(gate.isfinite().all())
    torch.testing.assert_close(gate.sum(1), torch.ones(64))


def test_linear_layer_moves_by_the_gradient_worked_out_by_hand() -> None:
    # y = sum_j s_j w_j x_j with squared loss: dL/ds_j = 2 (y - t) w_j x_j
    w, x, target = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([1.0, 3.0, -2.0]), 0.7
    made = switches([0.4, 0.8, 1.5], optimizer="sgd", lr=0.1)
    theta, phi = made.theta["layer"].detach().clone(), made.concentration("layer").detach()
    y = (made.gate("layer", 1) * w * x).sum()
    (gradient,) = torch.autograd.grad((y - target) ** 2, made.theta["layer"])
    share, total = phi / phi.sum(), phi.sum()
    of_share = 2 * (float(y.detach()) - target) * w * x
    by_hand = (of_share - (of_share * share).sum()) / total * torch.sigmoid(theta)
    torch.testing.assert_close(gradient, by_hand)
    made.step({"layer": gradient}, 0.0)
    torch.testing.assert_close(made.theta["layer"].detach(), theta - 0.1 * by_hand)


def test_step_adds_the_weighted_gradient_of_the_divergence() -> None:
    made = switches([0.4, 0.8, 1.5], optimizer="sgd", lr=0.1)
    theta, phi = made.theta["layer"].detach().double(), made.concentration("layer").detach().double()
    trigamma = torch.special.polygamma(1, phi)
    of_phi = (phi - 0.5) * trigamma - torch.special.polygamma(1, phi.sum()) * (phi - 0.5).sum()
    made.step({"layer": torch.zeros(3)}, 0.3)
    expected = theta - 0.1 * 0.3 * of_phi * torch.sigmoid(theta)
    torch.testing.assert_close(made.theta["layer"].detach().double(), expected, rtol=1e-5, atol=1e-6)


def test_layers_do_not_influence_each_other() -> None:
    alone, together = (
        Switches(dict.fromkeys(names, 3), DirichletOptions()) for names in (["a"], ["a", "b"])
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        gradient, other = torch.randn(2, 3, generator=generator)
        alone.step({"a": gradient}, 0.1)
        together.step({"a": gradient, "b": other}, 0.1)
    assert torch.equal(alone.theta["a"], together.theta["a"])


def test_posterior_holds_the_concentrations() -> None:
    made = switches([0.5, 1.0, 2.0])
    torch.testing.assert_close(made.posterior()["layer"].concentration, torch.tensor([0.5, 1.0, 2.0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (lambda: Prior(0), "alpha0 must be > 0, got 0"),
        (lambda: Prior(-0.5), "alpha0 must be > 0"),
        (lambda: Prior(math.nan), "alpha0 must be > 0, got nan"),
        (lambda: Prior(weight=-1), "weight must be >= 0"),
        (lambda: Prior(anneal_epochs=-1), "anneal_epochs must be >= 0"),
        (lambda: Prior(dataset_size=0), "dataset_size must be a whole number >= 1"),
        (lambda: Draws(0), "number must be a whole number >= 1"),
        (lambda: Draws(scope="epoch"), "scope must be one of"),
        (lambda: Draws(average="weights"), "average must be one of"),
        (lambda: Gate(0), 'scale must be > 0 or "dim", got 0'),
        (lambda: Gate("width"), 'scale must be > 0 or "dim"'),
        (lambda: Gate(site="loss"), "site must be one of"),
        (lambda: DirichletOptions(lr=0), "lr must be > 0"),
        (lambda: DirichletOptions(lr=math.inf), "lr must be > 0 and finite, got inf"),
        (lambda: DirichletOptions(init=math.nan), "init must be a number, got nan"),
        (lambda: DirichletOptions(epochs=1.5), "epochs must be a whole number >= 1, got 1.5"),
        (lambda: DirichletOptions(max_batches="10"), "max_batches must be an int >= 1, a fraction .* got '10'"),
        (lambda: DirichletOptions(epochs=0), "epochs must be a whole number >= 1"),
        (lambda: DirichletOptions(max_batches=0), "max_batches must be an int >= 1, a fraction"),
        (lambda: DirichletOptions(max_batches=1.5), "max_batches must be an int >= 1, a fraction"),
        (lambda: DirichletOptions(estimator="median"), "estimator must be one of mean, sample, got 'median'"),
        (lambda: DirichletOptions(optimizer="lbfgs"), "optimizer must be one of"),
        (lambda: DirichletOptions(layers="both"), "layers must be one of"),
    ],
)
def test_bad_options_are_refused_at_once(options: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        options()


def test_softplus_of_the_tests_is_inverted_exactly() -> None:
    made: Tensor = switches([0.3, 2.0]).theta["layer"].detach()
    torch.testing.assert_close(F.softplus(made) + EPSILON, torch.tensor([0.3, 2.0]))
