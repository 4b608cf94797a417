"""A network on trial is the network a real cut leaves, and closing the trial leaves no trace."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

import pytest
import torch
from networks import NETWORKS, build
from test_cut import half_plan
from torch import Tensor, nn

from lightning_eff.surgery import ChannelGraph, PruningPlan, SurgeryError, apply_plan
from lightning_eff.surgery.trial import Trial


def photograph(model: nn.Module) -> dict[str, Any]:
    """Everything a trial could disturb: tensors by identity and value, attributes, modes, hooks."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "identity": {name: id(tensor) for name, tensor in tensors.items()},
        "values": {name: tensor.detach().clone() for name, tensor in tensors.items()},
        "flags": {name: tensor.requires_grad for name, tensor in tensors.items()},
        "attributes": {
            path: {name: value for name, value in vars(module).items() if isinstance(value, int | float | str | tuple)}
            for path, module in model.named_modules()
        },
        "hooks": {path: len(module._forward_hooks) for path, module in model.named_modules()},
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    values, others = (before.pop("values"), after.pop("values")), (before, after)
    assert others[0] == others[1]
    assert values[0].keys() == values[1].keys()
    assert all(torch.equal(values[0][name], values[1][name]) for name in values[0])


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


@pytest.fixture
def small() -> tuple[nn.Module, Tensor, ChannelGraph]:
    model, x = build("SmallCNN")
    return model.eval(), x, ChannelGraph.from_model(model, x)


@pytest.mark.parametrize("name", NETWORKS)
def test_network_on_trial_is_the_network_that_a_cut_leaves(name: str) -> None:
    model, x = build(name)
    model.eval()
    graph = ChannelGraph.from_model(model, x)
    plan = half_plan(graph)
    before, dense = photograph(model), outputs(model, x)
    with Trial(model, graph, plan) as trial:
        inside = outputs(model, x)
    assert_same(before, photograph(model))
    assert torch.equal(outputs(model, x), dense)
    cut = apply_plan(model, plan, x, graph=graph)
    assert torch.equal(outputs(model, x), inside)
    assert trial.graph.to_dict() == cut.graph.to_dict()
    assert trial.plan.keep == cut.plan.keep


def test_everything_comes_back_after_training_inside_and_an_exception(
    small: tuple[nn.Module, Tensor, ChannelGraph],
) -> None:
    model, x, graph = small
    model.layers.norm2.eval()
    model.layers.conv3.requires_grad_(False)
    before = photograph(model)

    def interrupted() -> None:
        with Trial(model, graph, half_plan(graph)):
            model.train()
            model(x)  # norms update their statistics
            model.layers.norm1.reset_parameters()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert_same(before, photograph(model))


def test_stand_ins_keep_what_was_written_to_them(small: tuple[nn.Module, Tensor, ChannelGraph]) -> None:
    model, x, graph = small
    trial = Trial(model, graph, half_plan(graph))
    with trial:
        first = outputs(model, x)
        model.layers.conv3.weight.data.mul_(2)
        model.layers.norm3.running_mean = model.layers.norm3.running_mean + 1  # another tensor in its place
        inside = outputs(model, x)
    assert not torch.allclose(inside, first, rtol=1e-3)
    with trial:
        assert torch.equal(outputs(model, x), inside)
    trial.tensor("layers.conv3", "weight").div_(2)
    trial.tensor("layers.norm3", "running_mean").sub_(1)
    with trial:
        assert torch.allclose(outputs(model, x), first, atol=1e-5)
    assert trial.tensor("layers.conv3", "no such") is None


def test_gradients_are_wanted_in_the_trial_where_they_are_outside(
    small: tuple[nn.Module, Tensor, ChannelGraph],
) -> None:
    model, x, graph = small
    model.layers.conv3.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with Trial(model, graph, half_plan(graph)):
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
        copy.deepcopy(model)(x).sum().backward()
    assert all(p.grad is None for p in model.parameters())


def test_state_holds_what_to_load_after_a_real_cut(small: tuple[nn.Module, Tensor, ChannelGraph]) -> None:
    model, x, graph = small
    plan = half_plan(graph)
    with Trial(model, graph, plan) as trial:
        model.layers.conv3.weight.data.mul_(2)
        model.layers.norm2.running_var.add_(0.5)
        inside = outputs(model, x)
    state = trial.state()
    trial.tensor("layers.conv3", "weight").zero_()  # the state is a copy
    apply_plan(model, plan, x, graph=graph)
    missing = model.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    assert torch.equal(outputs(model, x), inside)


def test_state_loads_into_another_trial_of_the_plan(small: tuple[nn.Module, Tensor, ChannelGraph]) -> None:
    model, x, graph = small
    first, second = (Trial(model, graph, half_plan(graph)) for _ in range(2))
    first.tensor("layers.conv3", "weight").mul_(2)
    second.load(first.state())
    with first:
        expected = outputs(model, x)
    with second:
        assert torch.equal(outputs(model, x), expected)


def test_states_of_other_plans_are_refused(small: tuple[nn.Module, Tensor, ChannelGraph]) -> None:
    model, _, graph = small
    trial, whole = Trial(model, graph, half_plan(graph)), Trial(model, graph, PruningPlan({}))
    with pytest.raises(ValueError, match=r"expected the shape \[4\] of this trial, got \[8\]"):
        trial.load(whole.state())
    with pytest.raises(KeyError, match=r"no tensor of the trial named 'layers.conv9.weight'; close names: layers.conv"):
        trial.load({"layers.conv9.weight": torch.zeros(1)})


def test_whole_network_is_seen_while_the_trial_is_lifted(small: tuple[nn.Module, Tensor, ChannelGraph]) -> None:
    model, x, graph = small
    dense = outputs(model, x)
    trial = Trial(model, graph, half_plan(graph))
    with trial:
        inside = outputs(model, x)
        with trial, suppress(RuntimeError), trial.lifted():
            assert torch.equal(outputs(model, x), dense)
            raise RuntimeError
        assert torch.equal(outputs(model, x), inside)
    with trial.lifted():
        assert torch.equal(outputs(model, x), dense)


def test_two_trials_of_one_network_take_turns(small: tuple[nn.Module, Tensor, ChannelGraph]) -> None:
    model, x, graph = small
    before = photograph(model)
    first, second = (Trial(model, graph, half_plan(graph, seed)) for seed in (0, 1))
    with first:
        inside = outputs(model, x)
    with second:
        assert not torch.allclose(outputs(model, x), inside, rtol=1e-3)
        with pytest.raises(SurgeryError, match="is another trial open"):
            first.__enter__()
    assert_same(before, photograph(model))


def test_trial_of_a_smaller_network_opens_inside_of_a_trial(small: tuple[nn.Module, Tensor, ChannelGraph]) -> None:
    model, x, graph = small
    before = photograph(model)
    with Trial(model, graph, PruningPlan({"layers.conv1": [0, 2, 4, 6]})) as outer:
        with Trial(model, outer.graph, PruningPlan({"layers.conv1": [1, 2]})):
            inner = outputs(model, x)
        assert model.layers.conv1.out_channels == 4
    assert_same(before, photograph(model))
    with Trial(model, graph, PruningPlan({"layers.conv1": [2, 4]})):
        assert torch.equal(outputs(model, x), inner)


def test_plan_that_keeps_everything_changes_nothing(small: tuple[nn.Module, Tensor, ChannelGraph]) -> None:
    model, x, graph = small
    dense = outputs(model, x)
    with Trial(model, graph, PruningPlan({})) as trial:
        assert torch.equal(outputs(model, x), dense)
    assert trial.keep == {}
    assert trial.graph.sizes == graph.sizes


def test_trial_made_in_inference_mode_lets_its_stand_ins_be_written(
    small: tuple[nn.Module, Tensor, ChannelGraph],
) -> None:
    model, _, graph = small
    with torch.inference_mode():
        trial = Trial(model, graph, half_plan(graph))
    trial.tensor("layers.conv3", "weight").zero_()
    assert not any(tensor.is_inference() for tensor in trial.state().values())


def test_plans_that_do_not_fit_are_refused(small: tuple[nn.Module, Tensor, ChannelGraph]) -> None:
    model, _, graph = small
    with pytest.raises(KeyError, match=r"no channel group named 'layers\.conv9'"):
        Trial(model, graph, PruningPlan({"layers.conv9": [0]}))
    with pytest.raises(ValueError, match=r"expected channels in 0..7, got 0..8"):
        Trial(model, graph, PruningPlan({"layers.conv1": [0, 8]}))
