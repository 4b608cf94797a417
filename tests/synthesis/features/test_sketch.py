"""Sketches of features: short, of norm one, and with nearly the same inner products."""

from __future__ import annotations

import pytest
import torch
from synthesis.features.reference import discrepancy, summed

from lightning_eff.synthesis.features import NTKFeatures
from lightning_eff.synthesis.networks import ConvFeatureNet, FCFeatureNet

NETWORKS = {
    "dense": lambda: FCFeatureNet(20, (40,), 3),
    "convolutions": lambda: ConvFeatureNet((2, 6, 6), (4, 6), (5,), 3),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_kernel_of_sketches_is_nearly_that_of_gradients(name: str) -> None:
    network = NETWORKS[name]()
    features, exact = NTKFeatures(network, sketch_dim=8192), NTKFeatures(network)
    assert features.layout == {"sketch": (8192,)}
    x = torch.randn(20, *features.input_shape, generator=torch.Generator().manual_seed(1))
    kernel = features.kernel(x)
    torch.testing.assert_close(kernel.diagonal(), torch.ones(20), atol=1e-5, rtol=0)
    # inner products of unit vectors: standard deviation at most sqrt(3 / k) of two hashes, 0.02
    assert float((kernel - exact.kernel(x)).square().mean().sqrt()) < 0.02
    assert float((kernel - exact.kernel(x)).abs().max()) < 0.1


@pytest.mark.parametrize("name", NETWORKS)
def test_sums_and_discrepancy_of_sketches(name: str) -> None:
    features = NTKFeatures(NETWORKS[name]().double(), sketch_dim=64)
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(12, *features.input_shape, generator=generator).double()
    y = torch.arange(12) % 3
    target = features.class_sums(x, y, 3)
    torch.testing.assert_close(target.flatten(), summed(features.dense(x), y, 3))
    z = torch.rand(12, *features.input_shape, generator=generator).double().requires_grad_()
    expected = discrepancy(features.dense, target.flatten(), target.counts, z, y, u=True)
    torch.testing.assert_close(features.mmd2(target, z, y), expected)
    assert torch.autograd.gradcheck(lambda z: features.mmd2(target, z, y), z, fast_mode=True)


def test_sketch_is_fixed_by_its_seed() -> None:
    network, x = NETWORKS["dense"](), torch.rand(3, 20)
    one, same, other = (NTKFeatures(network, sketch_dim=32, sketch_seed=seed).dense(x) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)


def test_sketch_needs_a_dimension() -> None:
    with pytest.raises(ValueError, match="sketch_dim >= 1, got 0"):
        NTKFeatures(NETWORKS["dense"](), sketch_dim=0)
