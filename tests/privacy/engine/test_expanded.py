"""Parameters outside of layers: what belongs to samples is recorded, what does not is refused by name."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from agreement import assert_agrees, run
from per_sample_reference import loop_gradients, vmap_gradients
from torch import Tensor, nn

from lightning_eff.privacy.engine import PerSampleEngine


class With(nn.Module):
    """A parameter and what is done with it."""

    def __init__(self, forward: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(shape, dtype=torch.float64) + 0.5)
        self.made_of = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.made_of(x, self.weight)


@pytest.mark.parametrize(
    ("forward", "shape"),
    [
        (lambda x, w: x + w, (4,)),
        (lambda x, w: w - x, (3, 4)),
        (lambda x, w: x / w, (1, 3, 1)),
        (lambda x, w: (x * 1).mul_(w), (4,)),
        (lambda x, w: x.abs().pow(w), ()),
        (lambda x, w: torch.where(x > 0, x, w), (3, 1)),
        (lambda x, w: torch.addcmul(x, x, w, value=2), (4,)),
        (lambda x, w: torch.cat([x, w.repeat(len(x), 1, 1)], 1), (1, 2, 4)),
        (lambda x, w: torch.cat([x, w.expand(len(x), -1)[:, None]], 1), (4,)),
        (lambda x, w: torch.stack([x, w.expand_as(x)], 1), (3, 4)),
        (lambda x, w: x + w.exp().T[None, :, :].flip(1), (4, 3)),
        (lambda x, w: x @ w.softmax(0), (4, 2)),
        (lambda x, w: x + w[: x.shape[1]] * torch.arange(3.0).double()[:, None], (5, 1)),
        (lambda x, w: torch.einsum("ntd,de->nte", x, w), (4, 2)),
    ],
)
def test_each_way_to_use_a_parameter_has_the_gradients_of_single_passes(
    forward: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    model, x = With(forward, *shape), torch.randn(5, 3, 4, dtype=torch.float64)
    assert_agrees(model, x, loop_gradients(model, x, 5))


def test_as_many_positions_as_examples_are_still_positions() -> None:
    torch.manual_seed(0)
    for forward in (lambda x, w: x + w, lambda x, w: x + w.expand(4, -1), lambda x, w: x * w[torch.arange(4)]):
        model, x = With(forward, 4, 1), torch.randn(4, 4, 2, dtype=torch.float64)
        if forward(x, model.weight).shape == x.shape:
            assert_agrees(model, x, vmap_gradients(model, x))


def test_a_derived_tensor_that_is_changed_later_keeps_its_way_back() -> None:
    def forward(x: Tensor, w: Tensor) -> Tensor:
        scale = w * 2
        scaled = x * scale
        scale += 1
        scale *= w
        return scaled + x * scale

    torch.manual_seed(0)
    model, x = With(forward, 4), torch.randn(5, 3, 4, dtype=torch.float64)
    assert_agrees(model, x, loop_gradients(model, x, 5))


def test_an_array_brings_data_and_no_constant() -> None:
    layer = nn.Linear(4, 2)
    rows = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    engine = PerSampleEngine(layer)
    with engine.record(3):
        loss = layer(torch.as_tensor(rows)).square().mean(1).mean()
    engine.backward(loss)
    assert (engine.norms() > 0).all()


def test_a_constant_that_was_written_to_is_a_constant_no_more() -> None:
    def forward(x: Tensor, w: Tensor) -> Tensor:
        rows = torch.zeros(5, 4, dtype=torch.float64)
        rows[:, 1] = x[:, 0, 0]
        return nn.functional.linear(rows, w)

    torch.manual_seed(0)
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    engine = PerSampleEngine(With(forward, 2, 4))
    norms, _ = run(engine, x, 5)
    assert norms.unique().numel() == 5


@pytest.mark.parametrize("penalty", [lambda w: w.square().sum(), lambda w: w.abs().mean() * 0.1])
def test_a_penalty_in_the_loss_is_refused_by_name(penalty: Callable[[Tensor], Tensor]) -> None:
    model = nn.Linear(4, 2)
    x = torch.randn(3, 4)
    engine = PerSampleEngine(model)
    with engine.record(3):
        loss = model(x).square().mean() + penalty(model.weight)
    engine.backward(loss)
    with pytest.raises(RuntimeError, match=r"\['weight'\] got a gradient on a way that is not recorded"):
        engine.clipped_sum(1.0)
    assert model.weight.grad is None


def test_a_parameter_beside_the_examples_is_refused_by_name() -> None:
    # concatenated along the samples: row 3 belongs to nobody
    model = With(lambda x, w: torch.cat([x.flatten(1), w]), 1, 12)
    x = torch.randn(3, 3, 4, dtype=torch.float64)
    engine = PerSampleEngine(model)
    with engine.record(3):
        loss = model(x).square().mean()
    engine.backward(loss)
    with pytest.raises(RuntimeError, match=r"\['weight'\]"):
        engine.norms()
