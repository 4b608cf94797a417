"""The squared mean discrepancy and its gradient: every form gives the value that written-out features give."""

from __future__ import annotations

import pytest
import torch
from synthesis.features.reference import discrepancy
from torch import Tensor

from lightning_eff.synthesis.embedding import MeanEmbedding
from lightning_eff.synthesis.features import NTKFeatures
from lightning_eff.synthesis.networks import ConvFeatureNet, FCFeatureNet

NETWORKS = {
    "dense": lambda: FCFeatureNet(12, (30, 8), 3, activations=(True, False)),
    "convolutions": lambda: ConvFeatureNet((2, 6, 6), (4, 6), (5,), 3),
    "wide convolutions": lambda: ConvFeatureNet((2, 4, 4), (16, 24, 16), (), 3, layer_norm=True),
}


def problem(name: str, dtype: torch.dtype = torch.float32) -> tuple[NTKFeatures, MeanEmbedding, Tensor, Tensor]:
    """Features, the embedding of 30 records, and 12 samples of three classes, not sorted and not equally many."""
    features = NTKFeatures(NETWORKS[name]().to(dtype))
    generator = torch.Generator().manual_seed(1)
    records = torch.rand(30, *features.input_shape, generator=generator).to(dtype)
    target = features.class_sums(records, torch.arange(30) % 3, 3)
    x = torch.rand(12, *features.input_shape, generator=generator).to(dtype)
    return features, target, x, torch.tensor([2, 0, 1, 1, 0, 2, 1, 1, 0, 2, 1, 1])


@pytest.mark.parametrize("backend", ["kernel", "dense", "auto"])
@pytest.mark.parametrize("estimator", ["u", "v"])
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("classes", ["unequal", "equal"])
def test_every_form_gives_value_and_gradient_of_written_out_features(
    name: str, estimator: str, backend: str, classes: str
) -> None:
    features, target, x, y = problem(name)
    if classes == "equal":
        y = torch.arange(12) // 4
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    actual = features.mmd2(target, one, y, estimator=estimator, backend=backend)
    expected = discrepancy(features.dense, target.flatten(), target.counts, other, y, estimator == "u")
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    actual.backward()
    expected.backward()
    torch.testing.assert_close(one.grad, other.grad, atol=1e-6, rtol=0)


@pytest.mark.parametrize("backend", ["kernel", "dense"])
@pytest.mark.parametrize("name", NETWORKS)
def test_gradient_agrees_with_finite_differences(name: str, backend: str) -> None:
    features, target, x, y = problem(name, torch.float64)
    x.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: features.mmd2(target, x, y, weights=torch.tensor([0.2, 0.5, 0.3]), backend=backend), x, fast_mode=True
    )


def test_v_form_is_zero_where_the_samples_are_the_records() -> None:
    features, _, x, y = problem("dense")
    target = features.class_sums(x, y, 3)
    assert float(features.mmd2(target, x, y, estimator="v")) == pytest.approx(0, abs=1e-6)
    assert float(features.mmd2(target, x.flip(0), y.flip(0), estimator="v")) == pytest.approx(0, abs=1e-6)


def test_u_form_is_unbiased() -> None:
    # x takes two values with probability 0.3 and 0.7; the exact value follows from a 2 x 2 kernel matrix
    features, target, x, _ = problem("dense", torch.float64)
    target = MeanEmbedding(
        {name: block.sum(0, keepdim=True) for name, block in target.blocks.items()}, torch.ones(1) * 30
    )
    points, chances = x[:2], torch.tensor([0.3, 0.7], dtype=torch.float64)
    phi, mean = features.dense(points), target.flatten()[0] / 30
    exact = (chances @ phi - mean).square().sum()
    generator = torch.Generator().manual_seed(0)
    values = torch.empty(2000, dtype=torch.float64)
    biased = torch.empty(2000, dtype=torch.float64)
    draws = torch.multinomial(chances.float(), 2000 * 3, replacement=True, generator=generator).view(2000, 3)
    known: dict[int, tuple[Tensor, Tensor]] = {}  # the value depends only on how often the first point is drawn
    for index, draw in enumerate(draws):
        key = int(draw.sum())
        if key not in known:
            args = target, points[draw], torch.zeros(3, dtype=torch.int64)
            known[key] = features.mmd2(*args), features.mmd2(*args, estimator="v")
        values[index], biased[index] = known[key]
    error = float(values.std()) / 2000**0.5
    assert abs(float(values.mean() - exact)) < 3 * error
    assert float(biased.mean() - exact) > 10 * error


def test_terms_add_up_and_noise_on_the_target_enters_its_norm() -> None:
    features, target, x, y = problem("dense")
    terms = features.mmd2_terms(target, x.requires_grad_(), y)
    assert float(terms.mmd2.detach()) == pytest.approx(float(terms.target - 2 * terms.cross + terms.spread), abs=1e-6)
    assert terms.mmd2.requires_grad
    assert not any(term.requires_grad for term in terms[1:])
    means = target.flatten() / target.counts[:, None]
    assert float(terms.target) == pytest.approx(float(means.square().sum() / 3), rel=1e-5)
    for block in target.blocks.values():
        block += 1.0  # in place, as noise is added
    louder = features.mmd2_terms(target, x, y)
    means = target.flatten() / target.counts[:, None]
    assert float(louder.target) == pytest.approx(float(means.square().sum() / 3), rel=1e-5)


def test_weights_of_classes() -> None:
    features, target, x, y = problem("dense")
    each = [
        features.mmd2(target, x, y, weights=torch.nn.functional.one_hot(torch.tensor(c), 3).double()) for c in range(3)
    ]
    weights = torch.tensor([0.5, 2.0, 0.25])
    together = features.mmd2(target, x, y, weights=weights)
    assert float(together) == pytest.approx(
        sum(w * float(v) for w, v in zip(weights.tolist(), each, strict=True)), abs=1e-6
    )
    # a class of weight zero needs neither samples nor a count, and gets no gradient
    target.counts[2] = -3.0
    z = x.clone().requires_grad_()
    features.mmd2(target, z, y, weights=torch.tensor([1.0, 1.0, 0.0])).backward()
    assert z.grad is not None
    assert torch.equal(z.grad[y == 2], torch.zeros(3, 12))
    assert bool((z.grad[y != 2] != 0).any())


def test_noisy_minimum_is_near_the_true_one() -> None:
    # | ||t~ - e|| - ||t - e|| | <= ||noise|| for every sample, so a private minimiser loses at most twice that
    features, target, x, y = problem("dense", torch.float64)
    generator = torch.Generator().manual_seed(3)
    noise = {n: 0.3 * torch.randn(b.shape, generator=generator).double() for n, b in target.blocks.items()}
    noisy = MeanEmbedding({n: b + noise[n] for n, b in target.blocks.items()}, target.counts)
    only = torch.tensor([0.0, 1.0, 0.0])
    length = float(MeanEmbedding(noise, target.counts).norm(per_class=True)[1] / target.counts[1])
    for scale in (0.1, 1.0, 10.0):
        apart = [float(features.mmd2(t, scale * x, y, weights=only, estimator="v")) ** 0.5 for t in (noisy, target)]
        assert abs(apart[0] - apart[1]) <= length * (1 + 1e-9)


def test_value_is_the_same_without_a_graph_and_in_inference_mode() -> None:
    features, target, x, y = problem("convolutions")
    expected = float(features.mmd2(target, x.clone().requires_grad_(), y).detach())
    assert float(features.mmd2(target, x, y)) == pytest.approx(expected, abs=1e-6)
    with torch.inference_mode():
        assert float(features.mmd2(target, x + 0, y)) == pytest.approx(expected, abs=1e-6)


def test_a_generator_learns_through_it() -> None:
    features, target, x, y = problem("dense")
    x = x.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], 0.05)
    first = float(features.mmd2(target, x, y, estimator="v").detach())
    for _ in range(60):
        optimizer.zero_grad()
        features.mmd2(target, x, y, estimator="v").backward()
        optimizer.step()
    assert float(features.mmd2(target, x, y, estimator="v").detach()) < first / 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.tensor([0, 1] * 6)}, r"at least 2 samples of class 2 \(estimator 'u'\), got 0"),
        ({"y": torch.tensor([0, 1] * 5 + [0, 2])}, "at least 2 samples of class 2"),
        ({"weights": torch.ones(2)}, "expected 3 finite weights"),
        ({"weights": torch.tensor([1.0, -1.0, 1.0])}, "expected 3 finite weights"),
        ({"estimator": "w"}, "estimator must be one of u, v, got 'w'"),
        ({"backend": "fast"}, "backend must be one of auto, kernel, dense, got 'fast'"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    features, target, x, y = problem("dense")
    with pytest.raises(ValueError, match=message):
        features.mmd2(**{"target": target, "x": x, "y": y, **change})


def test_a_target_that_does_not_fit_is_refused() -> None:
    features, target, x, y = problem("dense")
    with pytest.raises(ValueError, match=r"expected a target on cpu"):
        features.mmd2(target.to("meta"), x, y)
    with pytest.raises(ValueError, match=r"expected block 'layers.0.weight' of shape \(30, 12\), got \(29, 12\)"):
        features.mmd2(NTKFeatures(FCFeatureNet(12, (29, 8), 3)).class_sums(x, y, 3), x, y)
    target.counts[1] = 0
    with pytest.raises(ValueError, match=r"class 1 has a count of 0\.0"):
        features.mmd2(target, x, y)
