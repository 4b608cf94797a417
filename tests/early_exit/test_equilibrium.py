"""Gradient equilibrium on chains whose gradients are known by hand."""

import pytest
import torch
from torch import Tensor, nn

from lightning_eff.early_exit.training.equilibrium import equilibrium_branch, scale_gradient


def chain(factors: list[Tensor], x: Tensor, balanced: bool) -> list[Tensor]:
    """Outputs x_k = x_{k-1} * a_k of a chain with an exit behind each factor but the last."""
    branch = equilibrium_branch(len(factors))
    outputs = []
    for k, factor in enumerate(factors):
        x = x * factor
        to_head = x
        if balanced and k < len(factors) - 1:
            to_head, x = branch(k, x)
        outputs.append(to_head)
    return outputs


def gradients(count: int, balanced: bool) -> list[float]:
    factors = [torch.tensor(1.0, requires_grad=True) for _ in range(count)]
    torch.stack(chain(factors, torch.tensor(1.0), balanced)).sum().backward()
    return [factor.grad.item() for factor in factors]


def test_gradients_of_a_chain_of_three_add_up_without_and_are_one_with_equilibrium() -> None:
    assert gradients(3, balanced=False) == [3, 2, 1]
    assert gradients(3, balanced=True) == pytest.approx([1, 1, 1])


def test_a_feature_gets_the_mean_of_the_gradients_of_the_outputs_behind_it() -> None:
    slopes = [5.0, -2.0, 0.5, 4.0]
    x = torch.tensor(1.0, requires_grad=True)
    outputs = chain([x, *(torch.tensor(1.0) for _ in slopes[1:])], torch.tensor(1.0), balanced=True)
    sum(slope * output for slope, output in zip(slopes, outputs, strict=True)).backward()
    assert x.grad.item() == pytest.approx(sum(slopes) / 4)


def test_heads_get_their_gradients_unscaled() -> None:
    torch.manual_seed(0)
    feature, head = torch.randn(5, 3, requires_grad=True), nn.Linear(3, 2)
    to_head, _ = equilibrium_branch(4)(1, feature)
    head(to_head).square().sum().backward()
    scaled = head.weight.grad.clone(), feature.grad.clone()
    head.zero_grad()
    feature.grad = None
    head(feature).square().sum().backward()
    assert torch.equal(scaled[0], head.weight.grad)
    torch.testing.assert_close(scaled[1], feature.grad / 3)


def test_values_are_bit_identical() -> None:
    torch.manual_seed(0)
    feature = torch.randn(64, 7, requires_grad=True) * 1e-30
    for branch in equilibrium_branch(3)(0, feature):
        assert torch.equal(branch, feature)


def test_layers_behind_an_exit_may_write_into_the_feature() -> None:
    feature = torch.tensor([-1.0, 2.0], requires_grad=True)
    to_head, goes_on = equilibrium_branch(2)(0, feature * 1.0)
    (nn.ReLU(inplace=True)(goes_on).sum() + to_head.sum()).backward()
    assert to_head.tolist() == [-1, 2]
    assert feature.grad.tolist() == [0.5, 1.0]


def test_features_without_gradients_are_not_copied() -> None:
    feature = torch.ones(3)
    assert all(branch is feature for branch in equilibrium_branch(2)(0, feature))


def test_scaling_goes_through_compile() -> None:
    compiled = torch.compile(lambda x: (scale_gradient(x, 0.25) * 2).sum(), fullgraph=True, backend="aot_eager")
    x = torch.ones(3, requires_grad=True)
    compiled(x).backward()
    assert x.grad.tolist() == [0.5] * 3


def test_no_outputs_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one output, got 0"):
        equilibrium_branch(0)
