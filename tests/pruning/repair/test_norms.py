"""Recalibrated BatchNorm statistics are those of the given images, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_eff.batch import BatchKeys
from lightning_eff.pruning.repair import recalibrate_norms


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(),
        nn.Flatten(),
        nn.Linear(36, 3),
        nn.BatchNorm1d(3),
    ).double()


def images(n: int) -> Tensor:
    return torch.randn(n, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_statistics_are_mean_and_variance_over_the_images() -> None:
    model, x = network().eval(), images(32)
    recalibrate_norms(model, [(x, None)])
    first = model[0](x).detach()
    assert torch.allclose(model[1].running_mean, first.mean((0, 2, 3)), atol=1e-12)
    assert torch.allclose(model[1].running_var, first.var((0, 2, 3)), atol=1e-12)
    normed = nn.functional.batch_norm(first, None, None, model[1].weight, model[1].bias, training=True)
    last = model[5](model[4](normed.relu())).detach()
    assert torch.allclose(model[6].running_mean, last.mean(0), atol=1e-12)
    assert torch.allclose(model[6].running_var, last.var(0), atol=1e-12)


def test_batches_count_by_their_samples() -> None:
    model, x = network(), images(30)
    recalibrate_norms(model, [(x[:20], None), (x[20:], None)])
    seen = model[0](x).detach()
    assert torch.allclose(model[1].running_mean, seen.mean((0, 2, 3)), atol=1e-12)
    variance = (20 * seen[:20].var((0, 2, 3)) + 10 * seen[20:].var((0, 2, 3))) / 30
    assert torch.allclose(model[1].running_var, variance, atol=1e-12)


def test_only_so_many_samples_are_used_and_batches_may_be_dicts() -> None:
    one, other, x = network(), network(), images(30)
    recalibrate_norms(one, [(x[:20], None)])
    split = BatchKeys("pixels", "label")
    batches = [{"pixels": x[:16], "label": 0}, {"pixels": x[16:], "label": 0}]
    recalibrate_norms(other, batches, split_batch=split, samples=20)
    assert torch.allclose(other[1].running_mean, one[1].running_mean, atol=1e-12)


def test_remainder_of_one_sample_is_left_out() -> None:
    one, other, x = network(), network(), images(9)
    recalibrate_norms(one, [(x[:8], None)])
    recalibrate_norms(other, [(x[:8], None), (x[8:], None)])
    assert torch.equal(other[6].running_var, one[6].running_var)


def test_modes_momentum_and_generators_come_back() -> None:
    model = network().train()
    model[1].eval()
    model[1].momentum, model[6].momentum = None, 0.3
    parameters = {name: p.clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    recalibrate_norms(model, [(images(8), None)])
    assert (model[1].momentum, model[6].momentum) == (None, 0.3)
    assert [model[1].training, model[3].training, model[6].training] == [False, True, True]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, parameters[name]) for name, p in model.named_parameters())


def test_statistics_come_back_after_an_exception() -> None:
    model = network()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with pytest.raises(RuntimeError):
        recalibrate_norms(model, [(images(8), None), (torch.zeros(8, 3, 5, 5, dtype=torch.float64), None)])
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert model[1].momentum == 0.1


def test_networks_without_statistics_are_left_alone() -> None:
    recalibrate_norms(nn.Linear(2, 2), [])
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.GroupNorm(2, 4))
    recalibrate_norms(model, [])


def test_synchronised_norms_average_over_this_process_only() -> None:
    model, x = network(), images(16)
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(network())
    for one in (model, synced):
        recalibrate_norms(one, [(x, None)])
    assert torch.equal(synced[1].running_var, model[1].running_var)
    assert "forward" not in vars(synced[1])


def test_no_sample_is_an_error() -> None:
    model = network()
    before = model[1].running_mean.clone()
    with pytest.raises(ValueError, match="expected at least one calibration sample, got none"):
        recalibrate_norms(model, [])
    assert torch.equal(model[1].running_mean, before)
