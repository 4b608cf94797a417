"""No feature is longer than one, whatever the record: where positions cancel, in half precision, among many others."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from synthesis.features.reference import discrepancy
from torch import Tensor, nn

from lightning_eff.synthesis.features import NTKFeatures, objective
from lightning_eff.synthesis.features.objective import Estimator
from lightning_eff.synthesis.features.uses import Backend
from lightning_eff.synthesis.networks import ConvFeatureNet, FCFeatureNet
from lightning_eff.synthesis.options import ReleaseOptions
from lightning_eff.synthesis.release import release_mean_embedding


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return make()


def ends(inputs: int) -> tuple[nn.Module, ...]:
    return nn.ReLU(), nn.Flatten(), nn.Linear(inputs, 10)


class Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mT


# behind each of them a normalisation over the positions: those of a constant image cancel to nothing
CENTRED = {
    "one convolution": lambda: nn.Sequential(nn.Conv2d(3, 64, 3), nn.InstanceNorm2d(64), *ends(64 * 36)),
    "two convolutions, InstanceNorm": lambda: nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.InstanceNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.InstanceNorm2d(64), *ends(1024)
    ),
    "two convolutions, GroupNorm": lambda: nn.Sequential(
        nn.Conv2d(3, 64, 3),
        nn.GroupNorm(64, 64, affine=False),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3),
        nn.GroupNorm(64, 64, affine=False),
        *ends(1024),
    ),
    "without biases": lambda: nn.Sequential(
        nn.Conv2d(3, 64, 3, bias=False), nn.InstanceNorm2d(64), nn.Flatten(), nn.Linear(64 * 36, 2, bias=False)
    ),
    "gradients written out from patches": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4), *ends(144)),
    "gradients written out, groups": lambda: nn.Sequential(
        nn.Conv2d(3, 24, 3, groups=3), nn.InstanceNorm2d(24), *ends(24 * 36)
    ),
    "dense layer at positions": lambda: nn.Sequential(
        nn.Flatten(2), Transposed(), nn.Linear(3, 200), nn.LayerNorm((64, 200), elementwise_affine=False), *ends(12800)
    ),
    "wide dense layer at positions": lambda: nn.Sequential(
        nn.Flatten(2), nn.Linear(64, 400), Transposed(), nn.InstanceNorm1d(400), *ends(1200)
    ),
}


def hard_records() -> Tensor:
    """Constant images, grey and coloured, and such with a little noise; ordinary ones."""
    generator = torch.Generator().manual_seed(0)
    grey = torch.tensor([0.0, 0.01, 0.25, 0.5, 1.0, 100.0]).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    coloured = torch.rand(20, 3, 1, 1, generator=generator).expand(-1, -1, 8, 8)
    noise = torch.randn(20, 3, 8, 8, generator=generator)
    ordinary = torch.rand(20, 3, 8, 8, generator=generator)
    return torch.cat([grey, coloured, coloured + 1e-6 * noise, coloured + 1e-3 * noise, ordinary])


@pytest.mark.parametrize("name", CENTRED)
def test_no_feature_is_longer_than_one_where_positions_cancel(name: str) -> None:
    features, x = NTKFeatures(seeded(CENTRED[name]), input_shape=(3, 8, 8)), hard_records()
    each = features.sums(len(x))
    each.add(x, torch.arange(len(x)))  # each a class of its own
    norms = each.embedding().norm(per_class=True)
    assert float(norms.max()) <= 1 + 1e-9
    torch.testing.assert_close(norms[-20:], torch.ones(20, dtype=torch.float64), atol=1e-5, rtol=0)
    # what is added for a record does not depend on how many others come with it
    together, first = features.sums(1), features.sums(1)
    together.add(x, torch.zeros(len(x), dtype=torch.int64))
    first.add(x[:1], torch.zeros(1, dtype=torch.int64))
    assert float(first.embedding().norm()) <= 1 + 1e-9
    torch.testing.assert_close(together.embedding().flatten()[0], each.embedding().flatten().sum(0), atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", CENTRED)
def test_discrepancy_has_a_finite_gradient_where_positions_cancel(name: str) -> None:
    features, x = NTKFeatures(seeded(CENTRED[name]), input_shape=(3, 8, 8)), hard_records()
    target = features.class_sums(x, torch.zeros(len(x), dtype=torch.int64), 1)
    for hard in (0, 3, 10):
        z = torch.cat([x[-3:], x[hard : hard + 1]]).requires_grad_()
        value = features.mmd2(target, z, torch.zeros(4, dtype=torch.int64))
        value.backward()
        assert z.grad is not None
        # features of at most norm one: ||t||^2 - 2 <t, e> + at most 1
        assert abs(float(value.detach())) < 4
        assert float(z.grad.abs().max()) < 1e6  # 1 / sqrt(eps) = 316 times for each normalisation


@pytest.mark.parametrize("name", ["two convolutions, InstanceNorm", "wide dense layer at positions"])
def test_discrepancy_of_nearly_constant_images_is_that_in_float64(name: str) -> None:
    shape = (3, 8, 8)
    narrow, wide = (NTKFeatures(seeded(CENTRED[name]).to(t), input_shape=shape) for t in (torch.float, torch.double))
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(6, 3, 1, 1, generator=generator) + 0.02 * torch.randn(6, *shape, generator=generator)
    y = torch.zeros(6, dtype=torch.int64)
    target = narrow.class_sums(hard_records(), torch.zeros(66 + 20, dtype=torch.int64), 1)
    one, other = x.clone().requires_grad_(), x.double().requires_grad_()
    actual = narrow.mmd2(target, one, y)
    expected = discrepancy(wide.dense, target.flatten().double(), target.counts.double(), other, y, True)
    torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=0)
    actual.backward()
    expected.backward()
    assert one.grad is not None
    assert other.grad is not None
    assert float((one.grad - other.grad).norm() / other.grad.norm()) < 1e-3


@pytest.mark.parametrize("backend", ["kernel", "dense"])
@pytest.mark.parametrize("estimator", ["u", "v"])
def test_discrepancy_does_not_depend_on_where_float64_is_called_in(
    estimator: Estimator, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = NTKFeatures(ConvFeatureNet((2, 4, 4), (16, 24, 16), (), 3, layer_norm=True))
    generator = torch.Generator().manual_seed(1)
    x, y = torch.rand(12, 2, 4, 4, generator=generator), torch.arange(12) // 4
    target = features.class_sums(torch.rand(30, 2, 4, 4, generator=generator), torch.arange(30) % 3, 3)
    found = []
    for limit in (math.inf, 0.0):
        monkeypatch.setattr(objective, "CANCELLED", limit)
        z = x.clone().requires_grad_()
        value = features.mmd2(target, z, y, estimator=estimator, backend=backend)
        found.append((value.detach(), *torch.autograd.grad(value, z)))
    assert not torch.equal(found[0][1], found[1][1])  # another way was gone
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=0)


@pytest.mark.parametrize("other", [torch.zeros(3, 8, 8), torch.full((3, 8, 8), 0.5)], ids=["zero", "grey"])
@pytest.mark.parametrize("adjacency", ["replace_one", "add_remove"])
@pytest.mark.filterwarnings("ignore:.*NOT PRIVATE")
def test_releases_of_neighbours_differ_by_no_more_than_the_sensitivity(other: Tensor, adjacency: Any) -> None:
    features = NTKFeatures(seeded(CENTRED["two convolutions, GroupNorm"]), input_shape=(3, 8, 8))
    x, y = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 2
    neighbour = (torch.cat([other[None], x[1:]]), y) if adjacency == "replace_one" else (x[1:], y[1:])
    if adjacency == "add_remove":
        x = torch.cat([other[None], x[1:]])
    options = ReleaseOptions(adjacency=adjacency)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one, two = (
            release_mean_embedding(data, features, 2, epsilon=math.inf, options=options, progress=False)
            for data in ((x, y), neighbour)
        )
    squares = (one.flatten() - two.flatten()).double().square().sum()
    squares = squares + options.kappa**2 * (one.counts - two.counts).double().square().sum()
    assert float(squares.sqrt()) <= options.sensitivity * (1 + 1e-5)  # what is released is float32


@pytest.mark.parametrize("change", ["replace", "remove"])
def test_one_record_among_32000_changes_the_sums_by_its_feature(change: str) -> None:
    features = NTKFeatures(FCFeatureNet(20, (50,)))
    x = torch.rand(32_000, 20, generator=torch.Generator().manual_seed(1))

    def summed(*records: Tensor) -> Tensor:
        sums = features.sums(1)
        for batch in torch.cat(records).split(1024):
            sums.add(batch, torch.zeros(len(batch), dtype=torch.int64))
        return sums.embedding().flatten()

    new = [-3 * x[:1]] if change == "replace" else []
    moved = summed(x) - summed(*new, x[1:])
    expected = summed(x[:1]) - (summed(*new) if new else 0)
    assert float((moved - expected).norm()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sketch_dim", [None, 32])
def test_networks_of_half_precision_have_features_of_single_precision(
    dtype: torch.dtype, sketch_dim: int | None
) -> None:
    given = FCFeatureNet(4, (200,)).to(dtype)
    features = NTKFeatures(given, sketch_dim=sketch_dim)
    assert {p.dtype for p in features.parameters()} == {torch.float32}
    assert {p.dtype for p in given.parameters()} == {dtype}
    x = torch.randn(1500, 4, generator=torch.Generator().manual_seed(0))
    each, one, other = features.sums(1500), features.sums(1), features.sums(1)
    each.add(x, torch.arange(1500))
    one.add(x, torch.zeros(1500, dtype=torch.int64))
    other.add(x[1:], torch.zeros(1499, dtype=torch.int64))
    assert float(each.embedding().norm(per_class=True).max()) <= 1 + 1e-9
    assert float((one.embedding().flatten() - other.embedding().flatten()).norm()) <= 1 + 1e-6


def test_precision_stays_when_a_module_around_is_cast() -> None:
    features = NTKFeatures(FCFeatureNet(4, (3,)), sketch_dim=8)
    before = [p.clone() for p in features.parameters()]
    nn.ModuleList([features]).to(torch.bfloat16)
    features.half()
    assert all(torch.equal(p, q) for p, q in zip(features.parameters(), before, strict=True))
    assert NTKFeatures(FCFeatureNet(4, (3,)).double()).float().dense(torch.rand(2, 4)).dtype == torch.float64


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
@pytest.mark.parametrize("sketch_dim", [None, 16])
def test_features_are_the_same_when_made_in_init_module(precision: Any, sketch_dim: int | None) -> None:
    def made() -> NTKFeatures:
        return NTKFeatures(FCFeatureNet(4, (8,)), sketch_dim=sketch_dim)

    trainer = L.Trainer(accelerator="cpu", precision=precision, logger=False, enable_checkpointing=False)
    with trainer.init_module():
        inside = made()
        assert torch.get_default_dtype() != torch.float32
    assert torch.get_default_dtype() == torch.float32
    x = torch.rand(3, 4)
    assert torch.equal(inside.dense(x), made().dense(x))
    assert inside.dense(x).dtype == torch.float32


def test_a_target_of_another_precision_is_converted() -> None:
    features = NTKFeatures(FCFeatureNet(4, (8,)))
    x, y = torch.rand(6, 4), torch.zeros(6, dtype=torch.int64)
    target = features.class_sums(x, y, 1)
    wide = target.to(dtype=torch.float64)
    assert torch.equal(features.mmd2(target, x, y), features.mmd2(wide, x, y))


class Remembers(nn.Module):
    """Keeps the last sample it has seen, and does nothing with it."""

    input_shape = (4,)

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.register_buffer("last", torch.zeros(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not torch._C._functorch.is_functorch_wrapped_tensor(x):
            self.last.copy_(x.detach()[-1])
        return self.layer(x)


class Averages(nn.Module):
    """Subtracts a running mean that it keeps as a plain attribute."""

    input_shape = (4,)

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.mean: Any = 0.0

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x - self.mean)
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return result


def test_networks_that_keep_what_they_have_seen_are_refused() -> None:
    with pytest.raises(ValueError, match="the network writes 'last' when it is called"):
        NTKFeatures(Remembers())
    with pytest.raises(ValueError, match="another output for the same sample"):
        NTKFeatures(Averages())


def test_a_dead_network_has_the_feature_zero_and_no_gradient() -> None:
    network = nn.Sequential(nn.Conv2d(1, 40, 3), nn.ReLU(), nn.Flatten(), nn.Linear(160, 1, bias=False))
    with torch.no_grad():
        network[0].bias.fill_(-1e3)
    features = NTKFeatures(network, input_shape=(1, 4, 4))
    x, y = torch.rand(4, 1, 4, 4).requires_grad_(), torch.zeros(4, dtype=torch.int64)
    sums = features.sums(1)
    sums.add(x, y)
    assert (sums.degenerate, float(sums.embedding().norm())) == (4, 0.0)
    assert float(features.dense(x).detach().abs().max()) == 0
    for estimator in ("u", "v"):
        target = features.class_sums(x, y, 1)
        for block in target.blocks.values():
            block += 1.0
        value = features.mmd2(target, x, y, estimator=estimator)
        (gradient,) = torch.autograd.grad(value, x)
        assert float(gradient.abs().max()) == 0
