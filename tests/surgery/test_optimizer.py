"""The optimizer goes on as if the removed channels had never had momentum."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import build
from test_cut import half_plan
from torch import nn
from torch.nn import functional as F
from torch.optim import Optimizer

from lightning_eff.surgery import ChannelGraph, PruningPlan, apply_plan
from lightning_eff.surgery.graph import axis_masks

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "Adam": lambda p: torch.optim.Adam(p, 1e-3, amsgrad=True, weight_decay=1e-2),
    "AdamW": lambda p: torch.optim.AdamW(p, 1e-3, weight_decay=1e-2),
    "AdamW fused": lambda p: torch.optim.AdamW(p, 1e-3, weight_decay=1e-2, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 1e-3, centered=True, momentum=0.9),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 1e-2),
    "NAdam": lambda p: torch.optim.NAdam(p, 1e-3),
    "RAdam": lambda p: torch.optim.RAdam(p, 1e-3),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "Rprop": lambda p: torch.optim.Rprop(p, 1e-3),
    "ASGD": lambda p: torch.optim.ASGD(p, 1e-3),
    "Adafactor": lambda p: torch.optim.Adafactor(p, 1e-2),
    "LBFGS": lambda p: torch.optim.LBFGS(p, 1e-2, max_iter=2),
}


def train(model: nn.Module, optimizer: Optimizer, x: torch.Tensor, steps: int) -> None:
    target = torch.arange(len(x)) % 4

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_parameter_keeps_moving_after_the_cut(name: str) -> None:
    model, x = build("SmallCNN")
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, x, 3)
    plan = half_plan(graph := ChannelGraph.from_model(model, x))
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    states = {key: copy.deepcopy(optimizer.state.get(p, {})) for key, p in model.named_parameters()}
    apply_plan(model, plan, x, graph=graph, optimizers=[optimizer])
    masks = axis_masks(graph, plan.keep_masks(graph))
    for path, p in model.named_parameters():
        layer, _, kind = path.rpartition(".")
        for key, value in optimizer.state.get(p, {}).items():
            old = states[path][key]
            if isinstance(value, torch.Tensor) and value.shape == p.shape and old.ndim:
                expected = old
                if (layer, "out") in masks:
                    expected = expected[masks[layer, "out"]]
                if kind == "weight" and (layer, "in") in masks:
                    expected = expected[:, masks[layer, "in"]]
                assert torch.equal(value, expected), (path, key)
    cut = {key: value.detach().clone() for key, value in model.named_parameters()}
    train(model, optimizer, x, 3)
    # A bias before a norm has no gradient but rounding, which not every optimizer acts on.
    acted_on = {key: value for key, value in model.named_parameters() if value.grad.abs().max() > 1e-6}
    assert len(acted_on) >= 10
    assert not any(torch.equal(value, cut[key]) for key, value in acted_on.items())
    assert any(value.shape != before[key].shape for key, value in model.named_parameters())
    copy.deepcopy(optimizer).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "AdamW fused"])
def test_step_after_the_cut_equals_the_masked_networks_step_on_what_is_kept(name: str) -> None:
    # A network without norms: batch statistics of removed channels have no influence on the others anyway.
    model, x = build("concat-flatten")
    model, x = model.double(), x.double()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, x, 3)
    masked = copy.deepcopy(model)
    state = copy.deepcopy(optimizer.state_dict())
    plan = PruningPlan({"a": [1], "c": [0], "d": [0, 2, 3]})
    graph = ChannelGraph.from_model(model, x)
    masks = {key: mask.double() for key, mask in plan.keep_masks(graph).items()}
    apply_plan(model, plan, x, graph=graph, optimizers=[optimizer])
    train(model, optimizer, x, 1)
    full_optimizer = OPTIMIZERS[name](masked.parameters())
    full_optimizer.load_state_dict(state)
    with graph.gate(masked, masks):
        train(masked, full_optimizer, x, 1)
    apply_plan(masked, plan, x, graph=graph)
    for (key, small), full in zip(model.named_parameters(), masked.parameters(), strict=True):
        assert torch.allclose(small, full, rtol=1e-6, atol=1e-9), key


def test_param_groups_and_schedulers_stay_valid() -> None:
    model, x = build("SmallCNN")
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.SGD([{"params": decay, "weight_decay": 0.1}, {"params": rest, "lr": 0.5}], 0.1, 0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)
    train(model, optimizer, x, 1)
    scheduler.step()
    apply_plan(model, half_plan(ChannelGraph.from_model(model, x)), x, optimizers=[optimizer])
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.01, 0.05])
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
    train(model, optimizer, x, 1)
    scheduler.step()


def test_state_of_unknown_layout_is_dropped_with_a_warning() -> None:
    model, x = build("SmallCNN")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    weight = next(model.parameters())
    optimizer.state[weight]["flat"] = torch.zeros(weight.numel())
    with pytest.warns(UserWarning, match="starts afresh"):
        apply_plan(model, half_plan(ChannelGraph.from_model(model, x)), x, optimizers=[optimizer])
    assert weight not in optimizer.state
