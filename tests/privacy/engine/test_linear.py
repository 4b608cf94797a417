"""Linear layers agree with torch.func on every kind of selection."""

import pytest
import torch
from agreement import GRANULARITIES, assert_agrees, draw_selections, run
from per_sample_reference import vmap_gradients
from torch import Tensor, nn
from torch.nn import functional

from lightning_eff.privacy.engine import PerSampleEngine
from lightning_eff.privacy.engine.weights import WeightUse
from lightning_eff.privacy.selection.selected import Selection

N = 5


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6)], ids=["2-D", "3-D", "4-D"])
@pytest.mark.parametrize("drop_rate", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_linear_agrees_with_torch_func(granularity: str, drop_rate: float, shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10, bias=bias), nn.ReLU(inplace=True), nn.Linear(10, 3, bias=bias)).double()
    inputs = torch.randn(N, *shape).double()
    assert_agrees(model, inputs, vmap_gradients(model, inputs), draw_selections(model, granularity, drop_rate))


def test_step_by_hand() -> None:
    """C = 1, two samples (3, 4) and (0, 1) with loss -w x: norms 5 and 1, sum -((0.6, 0.8) + (0, 1))."""
    model = nn.Linear(2, 1, bias=False)
    x = torch.tensor([[3.0, 4.0], [0.0, 1.0]])

    def step(selection: Selection | None) -> tuple[list[float], Tensor]:
        engine = PerSampleEngine(model)
        engine.select(None if selection is None else {"weight": selection})
        with engine.record(2):
            loss = -model(x).mean()
        engine.backward(loss)
        return engine.norms().tolist(), engine.clipped_sum(1.0)["weight"]

    norms, total = step(None)
    assert norms == [5, 1]
    torch.testing.assert_close(total, torch.tensor([[-0.6, -1.8]]))
    # dropped before it is clipped: (3, 0) has norm 3 and becomes (1, 0), not (0.6, 0)
    kept = torch.tensor([[True, False]])
    for selection in (
        Selection(model.weight.shape, mask=kept),
        Selection(model.weight.shape, columns=torch.tensor([0])),
    ):
        norms, total = step(selection)
        assert norms == [3, 0]
        torch.testing.assert_close(selection.expand(total), torch.tensor([[-1.0, 0.0]]))


def test_one_position_never_makes_a_gradient_for_each_example(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("made per-sample gradients")

    monkeypatch.setattr(WeightUse, "product", refuse)
    model = nn.Linear(30, 20)
    for granularity in GRANULARITIES:
        engine = PerSampleEngine(model)
        engine.select(draw_selections(model, granularity, 0.9))
        run(engine, torch.randn(N, 30), N)


def test_layer_called_twice_has_the_norm_of_the_sum() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x).tanh())

    torch.manual_seed(0)
    model = Twice().double()
    for shape in ((4,), (3, 4)):
        inputs = torch.randn(N, *shape).double()
        for granularity in GRANULARITIES:
            assert_agrees(model, inputs, vmap_gradients(model, inputs), draw_selections(model, granularity))


def test_uses_that_cancel_have_norm_zero() -> None:
    model = nn.Linear(3, 2)
    x = torch.randn(N, 3)
    engine = PerSampleEngine(model)
    with engine.record(N):
        loss = (model(x) - model(x)).sum() / N
    engine.backward(loss)
    assert engine.norms().tolist() == [0] * N


def test_weights_used_outside_of_their_module_are_seen() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(input=x, weight=self.encoder.weight, bias=self.encoder.bias)

    model = Functional().double()
    inputs = torch.randn(N, 4).double()
    assert_agrees(model, inputs, vmap_gradients(model, inputs))


def test_several_rows_of_an_example_belong_together() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    inputs = torch.randn(N, 2, 4).double()
    expected = vmap_gradients(model, inputs)
    engine = PerSampleEngine(model)
    with engine.record(N):
        rows = model(inputs.flatten(0, 1))  # [2 * N, 3]: windows of an image, frames of a film
        outputs = rows.view(N, 2, 3).flatten(1)
        tilt = torch.linspace(0.5, 1.5, 6, dtype=torch.float64)
        loss = ((outputs.sin() * tilt).sum(1) + 0.5 * (outputs**2 * tilt.flip(0)).sum(1)).mean()
    engine.backward(loss)
    norms = (expected["weight"].flatten(1).square().sum(1) + expected["bias"].square().sum(1)).sqrt()
    torch.testing.assert_close(engine.norms(), norms)


def test_an_input_without_the_examples_in_front_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    engine, inputs = PerSampleEngine(model), torch.randn(7, 4)
    with pytest.raises(ValueError, match=r"0\.weight.*shape \[7, 4\].*batch of 5 samples"), engine.record(N):
        model(inputs)


@pytest.mark.parametrize("positions", [2, 20])
def test_positions_that_cancel_keep_their_norm_in_gram_matrices(positions: int) -> None:
    """The gradients of two positions differ by 1e-4: their Gram matrices in float32 give a norm of 0, or of nan."""
    torch.manual_seed(0)
    model = nn.Linear(64, 48, bias=False)
    half = torch.randn(N, positions // 2, 64)
    x = torch.cat([half, half + 1e-4 * torch.randn_like(half)], 1)
    sign = torch.ones(positions).index_fill_(0, torch.arange(positions // 2, positions), -1.0)
    weight = torch.randn(48)
    exact = torch.einsum("nti,t,o->noi", x.double(), sign.double(), weight.double()).flatten(1).norm(dim=1)
    engine = PerSampleEngine(model, memory_budget_mb=0, tune=False)
    with engine.record(N):
        loss = torch.einsum("nto,t,o->", model(x), sign, weight) / N
    engine.backward(loss)
    assert next(iter(engine._tuner._plans.values())).method == "gram"
    torch.testing.assert_close(engine.norms().double(), exact, rtol=1e-3, atol=0)
