"""Gradient dominance against closed forms, and that it leaves no trace."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_eff.early_exit.analysis import gradient_dominance


def total(output: Tensor, target: Tensor) -> Tensor:
    return output.sum()


class Scale(nn.Module):
    def __init__(self, value: float = 1.0) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(value))

    def forward(self, x: Tensor) -> Tensor:
        return self.a * x


class Chain(nn.Module):
    """Outputs ``x_k = x_(k-1) * a_k``, ``a = 1``: the k-th factor moves all outputs from k on by one each."""

    def __init__(self, signs: tuple[float, ...] = (1.0, 1.0, 1.0)) -> None:
        super().__init__()
        self.backbone = nn.Sequential(*(Scale() for _ in signs))
        self.signs = signs

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs = []
        for sign, stage in zip(self.signs, self.backbone, strict=True):
            x = stage(x)
            outputs.append(sign * x)
        return outputs


class Net(nn.Module):
    """Everything that could leave a trace: batch norm, dropout, a head, a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU()),
            nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.ReLU()),
            nn.Linear(8, 3),
        )
        self.exits = ("0", "1")
        self.heads = nn.ModuleList([nn.Linear(8, 3), nn.Linear(8, 3)])
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> list[Tensor]:
        self.calls = self.calls + 1
        first = self.backbone[0](x)
        second = self.backbone[1](first)
        return [self.heads[0](first), self.heads[1](second), self.backbone[2](second)]


def batch(n: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 6, generator=generator), torch.randint(0, 3, (n,), generator=generator)


def test_shares_of_a_scalar_chain_are_those_of_the_outputs_behind_each_factor() -> None:
    result = gradient_dominance(Chain(), torch.ones(1), torch.zeros(1), weights=[1, 1, 1], criterion=total)
    # gradients of a_0 are (1, 1, 1), of a_1 (0, 1, 1), of a_2 (0, 0, 1); over all of it they add up to (3, 2, 1)
    expected = [[1 / 3, 1 / 3, 1 / 3], [0, 1 / 2, 1 / 2], [0, 0, 1], [3 / 14, 5 / 14, 6 / 14]]
    torch.testing.assert_close(result.values, torch.tensor(expected, dtype=torch.float64))
    assert result.groups == ("0", "1", "2", "backbone")
    assert result.outputs == ("exit 0", "exit 1", "final")


def test_weights_act_on_the_gradients() -> None:
    result = gradient_dominance(Chain(), torch.ones(1), torch.zeros(1), weights=[1, 2, 5], criterion=total)
    torch.testing.assert_close(result.values[0], torch.tensor([1, 2, 5], dtype=torch.float64) / 8)
    torch.testing.assert_close(result.values[1], torch.tensor([0, 2, 5], dtype=torch.float64) / 7)


def test_norms_of_a_scalar_chain() -> None:
    values = gradient_dominance(
        Chain(), torch.ones(1), torch.zeros(1), weights=[1, 1, 1], criterion=total, measure="norm"
    ).values
    # over all of it the gradients are (1, 0, 0), (1, 1, 0), (1, 1, 1)
    norms = torch.tensor([1, math.sqrt(2), math.sqrt(3)], dtype=torch.float64)
    torch.testing.assert_close(values[3], norms / norms.sum())
    torch.testing.assert_close(values[1], torch.tensor([0, 0.5, 0.5], dtype=torch.float64))


def test_cosines_of_a_scalar_chain() -> None:
    values = gradient_dominance(
        Chain(), torch.ones(1), torch.zeros(1), weights=[1, 1, 1], criterion=total, measure="cosine"
    ).values
    # g = (3, 2, 1)
    expected = [3 / math.sqrt(14), 5 / math.sqrt(28), 6 / math.sqrt(42)]
    torch.testing.assert_close(values[3], torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(values[1], torch.tensor([0, 1, 1], dtype=torch.float64))


def test_an_output_that_pulls_the_other_way_has_a_negative_share() -> None:
    result = gradient_dominance(
        Chain((1.0, -1.0, 1.0)), torch.ones(1), torch.zeros(1), weights=[1, 1, 1], criterion=total
    )
    torch.testing.assert_close(result.values[0], torch.tensor([1, -1, 1], dtype=torch.float64))


@pytest.mark.parametrize("measure", ["share", "cosine"])
def test_gradients_that_cancel_have_no_share(measure: str) -> None:
    chain = Chain((1.0, -1.0))
    result = gradient_dominance(chain, torch.ones(1), torch.zeros(1), criterion=total, measure=measure)
    assert result.values[0].isnan().all()
    assert result.values[1].tolist() == [0, 1]


@pytest.mark.parametrize("measure", ["share", "cosine", "norm"])
def test_a_group_without_any_gradient_is_not_a_number(measure: str) -> None:
    result = gradient_dominance(Chain(), torch.zeros(1), torch.zeros(1), criterion=total, measure=measure)
    assert result.values.isnan().all()


def test_shares_add_up_to_one_and_equal_those_of_plain_backward() -> None:
    torch.manual_seed(0)
    network, (x, y) = Net().eval(), batch()
    weights = [0.2, 0.3, 0.5]
    values = gradient_dominance(network, x, y, weights=weights).values
    torch.testing.assert_close(values.sum(1), torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-12)
    gradients = []
    for k, weight in enumerate(weights):
        network.zero_grad()
        (weight * F.cross_entropy(network(x)[k], y)).backward()
        gradients.append(
            torch.cat(
                [p.new_zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in network.backbone.parameters()]
            )
        )
    whole = sum(gradients)
    expected = torch.stack([g @ whole / (whole @ whole) for g in gradients])
    torch.testing.assert_close(values[3], expected.double(), rtol=1e-4, atol=1e-6)  # float32 gradients
    assert values[2].tolist() == [0, 0, 1]  # heads do not reach the last layer of the backbone


def test_nothing_about_the_network_changes() -> None:
    torch.manual_seed(0)
    network, (x, y) = Net().train(), batch()
    network.backbone[1].eval()
    network.backbone[0][0].weight.requires_grad_(False)
    network.heads[0].weight.grad = torch.full_like(network.heads[0].weight, 3.0)
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    buffers = dict(network.named_buffers())
    versions = [tensor._version for tensor in (*network.parameters(), *network.buffers())]
    modes = [module.training for module in network.modules()]
    flags = [parameter.requires_grad for parameter in network.parameters()]
    random = torch.get_rng_state()
    with torch.no_grad():
        gradient_dominance(network, x, y)
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    assert all(tensor is buffers[name] for name, tensor in network.named_buffers())
    assert versions == [tensor._version for tensor in (*network.parameters(), *network.buffers())]
    assert modes == [module.training for module in network.modules()]
    assert flags == [parameter.requires_grad for parameter in network.parameters()]
    assert torch.equal(random, torch.get_rng_state())
    grads = {name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}
    assert list(grads) == ["heads.0.weight"]
    assert (grads["heads.0.weight"] == 3).all()


def test_buffers_come_back_after_an_exception() -> None:
    network, (x, y) = Net().train(), batch()
    buffers = dict(network.named_buffers())

    def broken(output: Tensor, target: Tensor) -> Tensor:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        gradient_dominance(network, x, y, criterion=broken)
    assert all(tensor is buffers[name] for name, tensor in network.named_buffers())
    assert float(network.calls) == 0


def test_a_training_step_under_way_is_not_disturbed() -> None:
    torch.manual_seed(0)
    network, (x, y) = Net().eval(), batch()
    expected = torch.autograd.grad(F.cross_entropy(network(x)[2], y), network.backbone[0][0].weight)[0]
    loss = F.cross_entropy(network(x)[2], y)
    gradient_dominance(network.train(), x, y)
    loss.backward()  # would raise if a tensor saved for it had been written to
    torch.testing.assert_close(network.backbone[0][0].weight.grad, expected)


def test_groups_may_be_named_or_given_as_parameters() -> None:
    torch.manual_seed(0)
    network, (x, y) = Net().eval(), batch()
    named = gradient_dominance(network, x, y, groups=["1", "0.1"])
    own = gradient_dominance(network, x, y, groups={"mine": network.backbone[1].parameters()})
    assert named.groups == ("1", "0.1")
    assert own.groups == ("mine",)
    assert torch.equal(named.values[0], own.values[0])


def test_stages_of_a_backbone_with_one_child_are_the_children_of_that() -> None:
    network = Chain()
    network.backbone = nn.Sequential(network.backbone)
    network.forward = lambda x: [network.backbone(x)]
    result = gradient_dominance(network, torch.ones(1), torch.zeros(1), criterion=total)
    assert result.groups == ("0.0", "0.1", "0.2", "backbone")


def test_table_names_exits_and_groups() -> None:
    network, (x, y) = Net().eval(), batch()
    table = gradient_dominance(network, x, y).table()
    assert [column.name for column in table.columns] == ["gradient of", "0", "1", "final"]
    assert [row[0] for row in table.rows] == ["0", "1", "2", "backbone"]
    assert table.rows[2][1:] == (0, 0, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"measure": "angle"}, "measure must be one of share, cosine, norm, got 'angle'"),
        ({"weights": [1, 1]}, "expected 3 finite weights >= 0"),
        ({"weights": [1, -1, 1]}, "expected 3 finite weights >= 0"),
        ({"weights": [1, math.nan, 1]}, "expected 3 finite weights >= 0"),
        ({"weights": [0, 0, 0]}, "not all of them zero"),
        ({"groups": ["layer9"]}, r"no submodules \['layer9'\].*such as \['0', '1', '2'\]"),
        ({"groups": ["1.2"]}, r"groups that have parameters, got none in \['1.2'\]"),
        ({"groups": []}, "an empty list of groups"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    x, y = batch()
    with pytest.raises(ValueError, match=message):
        gradient_dominance(Net(), x, y, **arguments)


def test_a_network_with_one_output_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match="expected forward to give a list of K tensors, one an output, got a Tensor"):
        gradient_dominance(nn.Linear(6, 3), *batch())
