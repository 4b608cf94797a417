"""The engine's own promises: clipping, errors, what is not finite, memory."""

import math
import weakref

import pytest
import torch
from agreement import draw_selections, run
from per_sample_reference import example_losses, vmap_gradients
from torch import Tensor, nn

from lightning_eff.privacy.engine import PerSampleEngine
from lightning_eff.privacy.selection.selected import Selection

N = 6


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(9, 4), nn.Tanh(), nn.Linear(4, 2)
    ).double()


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(N, 2, 5, generator=torch.Generator().manual_seed(1)).double()


def recorded(engine: PerSampleEngine, inputs: Tensor) -> Tensor:
    with engine.record(len(inputs)):
        loss = example_losses(engine.module(inputs)).mean()
    return loss


def test_automatic_clipping_scales_every_gradient(model: nn.Module, inputs: Tensor) -> None:
    gradients = vmap_gradients(model, inputs)
    norms, sums = run(PerSampleEngine(model), inputs, N, 2.0, "automatic")
    for name, value in sums.items():
        torch.testing.assert_close(value, torch.einsum("n,n...->...", 2 / (norms + 0.01), gradients[name]))


def test_layers_are_clipped_by_themselves_to_a_share_of_the_bound(model: nn.Module, inputs: Tensor) -> None:
    gradients = vmap_gradients(model, inputs)
    engine = PerSampleEngine(model)
    engine.backward(recorded(engine, inputs))
    layers = engine.layer_norms()
    assert list(layers) == ["5", "3", "0"]
    sums = engine.clipped_sum(0.5, "per_layer")
    for layer, norms in layers.items():
        own = {name: g for name, g in gradients.items() if name.startswith(layer + ".")}
        torch.testing.assert_close(norms, sum(g.flatten(1).square().sum(1) for g in own.values()).sqrt())
        factors = (0.5 / math.sqrt(3) / (norms + 1e-6)).clamp(max=1)
        for name, g in own.items():
            torch.testing.assert_close(sums[name], torch.einsum("n,n...->...", factors, g))


@pytest.mark.parametrize("clipping", ["flat", "automatic", "per_layer"])
@pytest.mark.parametrize("granularity", ["all", "mask", "rows"])
def test_one_example_moves_the_sum_by_no_more_than_the_bound(
    model: nn.Module, inputs: Tensor, clipping: str, granularity: str
) -> None:
    engine = PerSampleEngine(model)
    engine.select(draw_selections(model, granularity))
    _, everyone = run(engine, inputs * 30, N, 0.1, clipping)
    _, without = run(engine, inputs[1:] * 30, N - 1, 0.1, clipping)
    moved = torch.cat([(everyone[name] - without[name]).flatten() for name in everyone]).norm()
    assert 0.09 < moved <= 0.1 * (1 + 1e-9)


def test_sum_does_not_need_the_helper_for_backward(model: nn.Module, inputs: Tensor) -> None:
    expected = run(PerSampleEngine(model), inputs, N)
    engine = PerSampleEngine(model)
    (N * recorded(engine, inputs)).backward()
    assert torch.equal(engine.norms(), expected[0])


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("budget", [0, 256])
@pytest.mark.parametrize("granularity", ["all", "mask", "rows"])
def test_an_example_that_is_not_finite_contributes_zero(
    model: nn.Module, inputs: Tensor, granularity: str, budget: float, bad: float
) -> None:
    engine = PerSampleEngine(model, memory_budget_mb=budget)
    engine.select(draw_selections(model, granularity))
    _, expected = run(engine, inputs[1:], N - 1)
    inputs[0] = bad
    with pytest.warns(UserWarning, match="not finite") as told:
        _, sums = run(engine, inputs, N)
    assert not any(character.isdigit() for character in str(told[0].message))  # how many is private
    for name, value in sums.items():
        torch.testing.assert_close(value, expected[name])
    assert not inputs[0].isfinite().all()  # the user's batch is not written to


def test_examples_that_are_left_out_are_missing_in_the_sum_alone(model: nn.Module, inputs: Tensor) -> None:
    def sums(*left_out: int) -> dict[str, Tensor]:
        engine = PerSampleEngine(model, tune=False)
        engine.backward(recorded(engine, inputs))
        engine.leave_out(torch.tensor(left_out, dtype=torch.int64))
        assert (engine.norms() > 0).all()
        return engine.clipped_sum(1e3)

    others = [i for i in range(N) if i != 1]
    whole = sums()
    torch.testing.assert_close(whole, {name: value + sums(*others)[name] for name, value in sums(1).items()})
    assert max(float(value.abs().max()) for value in sums(*others).values()) > 0


def test_unused_parameters_are_told_once_and_have_gradient_zero() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    engine = PerSampleEngine(Spare())
    x = torch.randn(N, 3)
    with pytest.warns(UserWarning, match=r"\['spare.weight', 'spare.bias'\] did not take part"):
        _, sums = run(engine, x, N)
    assert sums["spare.weight"].shape == (2, 3)
    assert not sums["spare.weight"].any()
    run(engine, x, N)  # a second warning would be an error
    assert engine.unused == ["spare.weight", "spare.bias"]


def test_gradients_of_the_last_step_are_no_stray_ones(model: nn.Module, inputs: Tensor) -> None:
    before = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.grad = before[name]
    run(PerSampleEngine(model), inputs, N)
    assert all(p.grad is before[name] for name, p in model.named_parameters())


@pytest.mark.parametrize("held", [False, True])
def test_a_penalty_on_weights_is_refused_and_leaves_nothing_behind(
    model: nn.Module, inputs: Tensor, held: bool
) -> None:
    if held:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
    engine = PerSampleEngine(model)
    weight = model[3].weight
    with engine.record(N):
        loss = example_losses(model(inputs)).mean()
    engine.backward(loss + weight.square().sum())
    with pytest.raises(RuntimeError, match=r"\['3\.weight'\].*penalty"):
        engine.norms()
    assert weight.grad is None


def test_recorded_tensors_are_let_go_with_the_sum(model: nn.Module, inputs: Tensor) -> None:
    kept: list[weakref.ref[Tensor]] = []
    model[1].register_forward_hook(lambda module, args, output: kept.append(weakref.ref(output)))
    engine = PerSampleEngine(model, memory_budget_mb=0)
    engine.backward(recorded(engine, inputs))
    received = engine._recorded().received
    gradients = [weakref.ref(use._gradient) for use in received if use._gradient is not None]
    assert len(gradients) == 2  # the third layer stored what is smaller
    engine.clipped_sum(1.0)
    assert not received
    assert all(gradient() is None for gradient in gradients)
    assert kept[0]() is None


def test_row_subsets_keep_only_their_gradients(inputs: Tensor) -> None:
    model = nn.Linear(5, 8).double()
    engine = PerSampleEngine(model, memory_budget_mb=0)
    rows = torch.tensor([1, 6])
    engine.select({name: Selection(p.shape, rows=rows) for name, p in model.named_parameters()})
    engine.backward(recorded(engine, inputs))
    (use,) = engine._recorded().received
    assert use.gradient.shape == (N, 2, 2)


def test_mistakes_are_told(model: nn.Module, inputs: Tensor) -> None:
    engine = PerSampleEngine(model)
    with pytest.raises(RuntimeError, match="nothing was recorded"):
        engine.norms()
    with pytest.raises(ValueError, match="at least one sample, got 0"), engine.record(0):
        pass
    recorded(engine, inputs)
    with pytest.raises(RuntimeError, match=r"call engine\.backward"):
        engine.norms()
    engine.backward(recorded(engine, inputs))
    with pytest.raises(ValueError, match="max_norm must be > 0, got 0"):
        engine.clipped_sum(0)
    with pytest.raises(ValueError, match="got 'global'"):
        engine.clipped_sum(1.0, "global")
    engine.clipped_sum(1.0)
    with pytest.raises(RuntimeError, match="taken before"):
        engine.clipped_sum(1.0)
    with pytest.raises(ValueError, match="memory_budget_mb must be >= 0, got -1"):
        PerSampleEngine(model, memory_budget_mb=-1)
    with pytest.raises(ValueError, match="no such parameter"):
        engine.select({"head.weight": Selection.all([2, 4])})
    with pytest.raises(ValueError, match=r"\[2, 4\].*\[4, 2\]"):
        engine.select({"5.weight": Selection.all([4, 2])})
    with pytest.raises(ValueError, match="nothing to train"), PerSampleEngine(model.requires_grad_(False)).record(N):
        pass
