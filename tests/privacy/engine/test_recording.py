"""What is recorded, and what is left alone."""

import copy
from typing import Any

import pytest
import torch
from agreement import run
from per_sample_reference import example_losses
from torch import Tensor, nn

from lightning_eff.privacy.engine import PerSampleEngine
from lightning_eff.privacy.selection.selected import Selection

N = 4


class Barrier(torch.autograd.Function):
    """The identity, through which no gradient may go back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise AssertionError("backward went on")


def step(engine: PerSampleEngine, x: Tensor) -> Tensor:
    return run(engine, x, len(x))[0]


def test_backward_stops_where_all_that_comes_before_is_dropped() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(Barrier.apply(self.first(x)))

    model = Net()
    engine = PerSampleEngine(model)
    with pytest.raises(AssertionError, match="went on"):
        step(engine, torch.randn(N, 3))
    engine.select({name: Selection.none(p.shape) for name, p in model.first.named_parameters(prefix="first")})
    assert (step(engine, torch.randn(N, 3)) > 0).all()


def test_nothing_is_selected_in_the_whole_module() -> None:
    model = nn.Linear(3, 2)
    engine = PerSampleEngine(model)
    engine.select({name: Selection.none(p.shape) for name, p in model.named_parameters()})
    norms, sums = run(engine, torch.randn(N, 3), N)
    assert norms.tolist() == [0] * N
    assert {name: tuple(value.shape) for name, value in sums.items()} == {"weight": (0, 3), "bias": (0,)}


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Linear(3, 2)
    x = torch.randn(N, 3)
    both = step(PerSampleEngine(model), x)
    model.weight.requires_grad_(False)
    engine = PerSampleEngine(model)
    with engine.record(N):
        loss = example_losses(model(x)).mean()
    engine.backward(loss)
    assert (engine.norms() < both).all()
    assert list(engine.clipped_sum(1.0)) == ["bias"]


def test_what_runs_without_gradients_is_not_recorded() -> None:
    model = nn.Linear(3, 2)
    x = torch.randn(N, 3)
    expected = step(PerSampleEngine(model), x)
    engine = PerSampleEngine(model)
    with engine.record(N):
        with torch.no_grad():
            model(x[:3])  # a metric, on another number of samples
        loss = example_losses(model(x)).mean()
    engine.backward(loss)
    assert torch.equal(engine.norms(), expected)


def test_copies_of_the_module_are_their_own() -> None:
    model = nn.Linear(3, 2)
    engine = PerSampleEngine(model)
    x = torch.randn(N, 3)
    with engine.record(N):
        average = copy.deepcopy(model)
        loss = example_losses(model(x)).mean()
        other = average(x).sum()
    engine.backward(loss)
    other.backward()
    assert average.weight.grad is not None
    assert model.weight.grad is None
    assert torch.equal(engine.norms(), step(PerSampleEngine(model), x))


def test_module_is_left_as_it_was_also_after_an_error() -> None:
    model = nn.Linear(3, 2)
    before = {key: value for key, value in vars(model).items() if key != "training"}
    forward = type(model).forward
    engine = PerSampleEngine(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), engine.record(N):
        nn.Sequential(model, model)(torch.randn(N, 3))
    assert {key: value for key, value in vars(model).items() if key != "training"} == before
    assert type(model).forward is forward
    model(torch.randn(N, 3)).sum().backward()
    assert model.weight.grad is not None


def test_autocast_gives_norms_in_float32() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5))
    x = torch.randn(N, 2, 5, 5)
    expected = step(PerSampleEngine(model), x)
    engine = PerSampleEngine(model)
    with engine.record(N), torch.autocast("cpu", torch.bfloat16):
        loss = example_losses(model(x).float()).mean()
    engine.backward(loss)
    norms = engine.norms()
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms, expected, rtol=0.05, atol=0)


def test_an_input_changed_after_it_was_read_is_refused() -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x * 2
            y = self.layer(x)
            x.relu_()
            return y

    with pytest.raises(RuntimeError, match="changed in place after the layer had read it"):
        step(PerSampleEngine(Changing()), torch.randn(N, 3))


def test_gradients_that_the_step_takes_for_itself_do_not_count() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(N, 3)

    def attacked(example: Tensor) -> Tensor:
        example = example.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(example_losses(model(example)).mean(), example)
        return (example + 0.1 * gradient.sign()).detach()

    expected = run(PerSampleEngine(model, tune=False), attacked(x), N)
    engine = PerSampleEngine(model, tune=False)
    with engine.record(N):
        loss = example_losses(model(attacked(x))).mean()
    engine.backward(loss)
    torch.testing.assert_close(engine.norms(), expected[0])
    torch.testing.assert_close(engine.clipped_sum(1.0), expected[1])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_second_backward_pass_is_refused() -> None:
    model = nn.Linear(3, 2)
    engine = PerSampleEngine(model)
    x = torch.randn(N, 3)
    with engine.record(N):
        loss = example_losses(model(x)).mean()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward ran twice"):
        engine.backward(loss)


def test_a_gradient_of_a_gradient_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1))
    engine = PerSampleEngine(model)
    x = torch.randn(N, 3, requires_grad=True)
    with engine.record(N):
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        penalty = slope.square().sum(1).mean()
    with pytest.raises(RuntimeError, match="once_differentiable"):
        engine.backward(penalty)
