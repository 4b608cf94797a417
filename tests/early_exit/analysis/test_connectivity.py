"""Losses along a path and on a plane against closed forms, and that the network comes back bit for bit."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_eff.early_exit.analysis import linear_path, loss_plane, random_direction


class Product(nn.Module):
    """Outputs ``u * x`` and ``u * v * x``."""

    def __init__(self, u: float, v: float) -> None:
        super().__init__()
        self.u, self.v = nn.Parameter(torch.tensor([[u]])), nn.Parameter(torch.tensor([[v]]))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x @ self.u, x @ self.u @ self.v]


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.backbone = nn.Sequential(
            nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU()), nn.Dropout(0.5), nn.Linear(8, 3)
        )
        self.exits = ("0",)
        self.heads = nn.ModuleList([nn.Linear(8, 3)])
        self.register_buffer("thresholds", torch.tensor([math.inf, 0.5]))

    def forward(self, x: Tensor) -> list[Tensor]:
        first = self.backbone[0](x)
        return [self.heads[0](first), self.backbone[2](self.backbone[1](first))]


def data(n: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 6, generator=generator), torch.randint(0, 3, (n,), generator=generator)


def trained(seed: int) -> Net:
    network, (x, y) = Net(seed).train(), data()
    optimizer = torch.optim.SGD(network.parameters(), 0.3)
    for _ in range(20):
        optimizer.zero_grad()
        sum(F.cross_entropy(output, y) for output in network(x)).backward()
        optimizer.step()
    return network


class Snapshot:
    """A network's bits, objects, modes and the random generator."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.tensors = [*network.named_parameters(), *network.named_buffers()]
        self.memory = [tensor.data_ptr() for _, tensor in self.tensors]
        self.values = [tensor.detach().clone() for _, tensor in self.tensors]
        self.modes = [(module, module.training, getattr(module, "momentum", None)) for module in network.modules()]
        self.random = torch.get_rng_state()

    def check(self) -> None:
        now = [*self.network.named_parameters(), *self.network.named_buffers()]
        for (name, tensor), (same_name, same), where, value in zip(
            now, self.tensors, self.memory, self.values, strict=True
        ):
            assert name == same_name
            assert tensor is same
            assert tensor.data_ptr() == where
            assert tensor.detach().numpy().tobytes() == value.numpy().tobytes()
        for module, mode, momentum in self.modes:
            assert module.training == mode
            assert getattr(module, "momentum", None) == momentum
        assert torch.equal(self.random, torch.get_rng_state())


def test_a_loss_of_fourth_order_has_its_barrier_in_closed_form() -> None:
    # u = v = 1 - 2a, target 1: (u v - 1)^2 is 0 at both ends and 1 in the middle; (u - 1)^2 = 4 a^2 is convex
    loader = [(torch.ones(4, 1), torch.ones(4, 1))]
    path = linear_path(Product(1.0, 1.0), Product(-1.0, -1.0), loader, points=5, criterion=F.mse_loss)
    torch.testing.assert_close(path.positions, torch.tensor([0, 0.25, 0.5, 0.75, 1], dtype=torch.float64))
    torch.testing.assert_close(path.loss[:, 1], torch.tensor([0, 0.5625, 1, 0.5625, 0], dtype=torch.float64))
    torch.testing.assert_close(path.loss[:, 0], torch.tensor([0, 0.25, 1, 2.25, 4], dtype=torch.float64))
    torch.testing.assert_close(path.barrier, torch.tensor([0, 1], dtype=torch.float64))
    assert path.accuracy.isnan().all()  # the target is not classes
    assert path.outputs == ("exit 0", "final")


@pytest.mark.parametrize("recompute_bn", [True, False])
def test_identical_checkpoints_have_no_barrier(recompute_bn: bool) -> None:
    network = trained(0)
    loader = DataLoader(TensorDataset(*data()), batch_size=16, shuffle=True)
    path = linear_path(network, copy.deepcopy(network), loader, points=5, recompute_bn=recompute_bn)
    assert path.barrier.tolist() == [0, 0]
    assert (path.loss == path.loss[0]).all()


def test_ends_of_the_path_are_the_networks_themselves() -> None:
    one, other, (x, y) = trained(0), trained(1), data()
    path = linear_path(one, other.state_dict(), [(x[:25], y[:25]), (x[25:], y[25:])], points=3, recompute_bn=False)
    for place, network in ((0, one), (2, other)):
        with torch.no_grad():
            outputs = network.eval()(x)
        expected = torch.stack([F.cross_entropy(output, y) for output in outputs]).double()
        torch.testing.assert_close(path.loss[place], expected, rtol=1e-6, atol=1e-7)
        right = torch.stack([(output.argmax(1) == y).double().mean() for output in outputs])
        torch.testing.assert_close(path.accuracy[place], right)
    rows = path.table().rows
    assert [row[0] for row in rows] == ["0", "final"]
    assert rows[1][1] == float(path.loss[0, 1])
    assert rows[1][3] >= max(rows[1][1], rows[1][2])


def test_statistics_are_the_mean_over_the_batches_at_every_point() -> None:
    one, other, (x, y) = trained(0), trained(1), data()
    path = linear_path(one, other, [(x[:20], y[:20]), (x[20:], y[20:])], points=3)
    middle = copy.deepcopy(one)
    with torch.no_grad():
        for mine, theirs in zip(middle.parameters(), other.parameters(), strict=True):
            mine.copy_((mine + theirs) / 2)
        hidden = [middle.backbone[0][0](half) for half in (x[:20], x[20:])]
        norm = middle.backbone[0][1]
        norm.running_mean.copy_(torch.stack([half.mean(0) for half in hidden]).mean(0))
        norm.running_var.copy_(torch.stack([half.var(0) for half in hidden]).mean(0))
        expected = torch.stack([F.cross_entropy(output, y) for output in middle.eval()(x)]).double()
    torch.testing.assert_close(path.loss[1], expected, rtol=1e-5, atol=1e-6)
    interpolated = linear_path(one, other, [(x, y)], points=3, recompute_bn=False)
    assert not torch.allclose(interpolated.loss[1], expected, rtol=1e-2)


def test_everything_is_restored_bit_for_bit() -> None:
    network, loader = trained(0), DataLoader(TensorDataset(*data()), batch_size=16, shuffle=True)
    network.backbone[0].eval()
    other = trained(1)
    before, others = Snapshot(network), Snapshot(other)
    linear_path(network, other, loader, points=3)
    loss_plane(network, loader, steps=3, recompute_bn=True)
    before.check()
    others.check()


@pytest.mark.parametrize("pass_number", [0, 1, 3])
def test_everything_is_restored_after_an_exception(pass_number: int) -> None:
    network, batch = trained(0), data()
    other = trained(1)

    class Breaks:
        passes = 0

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            yield batch
            if self.passes == pass_number:
                raise RuntimeError("broken")
            self.passes += 1

    before = Snapshot(network)
    with pytest.raises(RuntimeError, match="broken"):
        linear_path(network, other, Breaks(), points=3)
    before.check()
    with pytest.raises(RuntimeError, match="broken"):
        loss_plane(network, Breaks(), steps=3)
    before.check()


def test_recurrent_layers_follow_the_path() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LSTM(2, 3, batch_first=True)

        def forward(self, x: Tensor) -> list[Tensor]:
            return [self.layer(x)[0][:, -1]]

    torch.manual_seed(0)
    one, other = Recurrent(), Recurrent()
    loader = [(torch.randn(8, 4, 2), torch.randint(0, 3, (8,)))]
    path = linear_path(one, other, loader, points=2)
    with torch.no_grad():
        expected = F.cross_entropy(other(loader[0][0])[0], loader[0][1])
    torch.testing.assert_close(path.loss[1, 0], expected.double(), rtol=1e-6, atol=1e-7)


def test_plane_of_a_quadratic_is_its_closed_form() -> None:
    class Point(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([[3.0, -4.0]]))

        def forward(self, x: Tensor) -> list[Tensor]:
            return [self.w.expand(len(x), 2)]

    network = Point()
    loader = [(torch.zeros(2, 1), torch.zeros(2, 2))]
    plane = loss_plane(
        network, loader, steps=5, radius=0.5, seed=3, criterion=lambda output, target: (output - target)[0].norm() ** 2
    )
    generator = torch.Generator().manual_seed(3)
    u, v = (random_direction(network, generator)["w"][0] for _ in range(2))
    w = network.w[0].detach()
    assert plane.positions.tolist() == [-0.5, -0.25, 0, 0.25, 0.5]
    expected = [[float((w + a * u + b * v).norm() ** 2) for b in plane.positions] for a in plane.positions]
    torch.testing.assert_close(plane.loss[..., 0], torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    assert float(plane.loss[2, 2, 0]) == pytest.approx(25)


@pytest.mark.parametrize(("steps", "radius"), [(7, 0.7), (21, 1.3), (5, 1e-3)])
def test_the_middle_of_the_plane_is_the_network_itself(steps: int, radius: float) -> None:
    network, (x, y) = trained(0), data()
    plane = loss_plane(network, [(x, y)], steps=steps, radius=radius)
    with torch.no_grad():
        expected = torch.stack([F.cross_entropy(output, y) for output in network.eval()(x)]).double()
    assert float(plane.positions[steps // 2]) == 0
    torch.testing.assert_close(plane.loss[steps // 2, steps // 2], expected, rtol=1e-7, atol=0)
    assert plane.loss.shape == plane.accuracy.shape == (steps, steps, 2)


def test_plane_depends_on_the_seed_alone() -> None:
    network = trained(0)
    planes = [loss_plane(network, [data()], steps=2, seed=seed).loss for seed in (0, 0, 1)]
    assert torch.equal(planes[0], planes[1])
    assert not torch.allclose(planes[0], planes[2])


def test_directions_have_the_norm_of_every_filter_and_do_not_move_vectors() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(5, 4))
    direction = random_direction(network, torch.Generator().manual_seed(0))
    for name, parameter in network.named_parameters():
        if parameter.ndim < 2:
            assert (direction[name] == 0).all()
        else:
            torch.testing.assert_close(direction[name].flatten(1).norm(dim=1), parameter.flatten(1).norm(dim=1))
    assert list(direction) == [name for name, _ in network.named_parameters()]


def test_directions_may_be_scaled_by_layer_or_not_at_all_and_move_vectors() -> None:
    torch.manual_seed(0)
    network = nn.Linear(6, 4)
    by_layer = random_direction(network, torch.Generator().manual_seed(0), "layer", vectors=True)
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(by_layer[name].norm(), parameter.norm())
    plain = random_direction(network, torch.Generator().manual_seed(0), "none")
    assert torch.equal(plain["weight"], torch.randn(4, 6, generator=torch.Generator().manual_seed(0)))


def test_checkpoints_of_another_architecture_are_refused() -> None:
    network = Net()
    state = network.state_dict()
    del state["heads.0.bias"]
    state["extra"] = torch.zeros(1)
    state["backbone.2.weight"] = torch.zeros(4, 8)
    shape = r"backbone.2.weight has shape \[4, 8\] instead of \[3, 8\]"
    with pytest.raises(ValueError, match=f"{shape}, extra is not in the network, heads.0.bias is missing"):
        linear_path(network, state, [data()])


def test_loaders_and_numbers_that_cannot_work_are_refused() -> None:
    network = Net()
    with pytest.raises(ValueError, match="got an iterator: give a DataLoader"):
        linear_path(network, network, iter([data()]))
    with pytest.raises(ValueError, match="got an iterator: give a DataLoader"):
        loss_plane(network, iter([data()]))
    with pytest.raises(ValueError, match="the loader gave no batch"):
        loss_plane(network, [])
    with pytest.raises(ValueError, match="expected points >= 2, the two ends, got 1"):
        linear_path(network, network, [data()], points=1)
    with pytest.raises(ValueError, match=r"expected steps >= 2 and radius > 0, got 1 and 1\.0"):
        loss_plane(network, [data()], steps=1)
    with pytest.raises(ValueError, match="expected steps >= 2 and radius > 0, got 21 and 0"):
        loss_plane(network, [data()], radius=0)
    with pytest.raises(ValueError, match="normalise must be one of filter, layer, none, got 'rows'"):
        loss_plane(network, [data()], normalise="rows")
    x, y = data(3)
    with pytest.raises(ValueError, match="batches of one sample: give larger batches or recompute_bn=False"):
        linear_path(network, network, list(zip(x.split(1), y.split(1), strict=True)))


def test_a_last_batch_of_one_sample_is_counted_but_gives_no_statistics() -> None:
    one, other, (x, y) = trained(0), trained(1), data(17)
    path = linear_path(one, other, [(x[:16], y[:16]), (x[16:], y[16:])], points=2)
    first = linear_path(one, other, [(x[:16], y[:16])], points=2)
    assert path.loss.isfinite().all()
    assert not torch.equal(path.loss, first.loss)
