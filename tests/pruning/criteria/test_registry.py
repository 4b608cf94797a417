"""The registry, what criteria need, what they must leave as it was, and how they are written down."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Iterator
from typing import Any

import jsonargparse
import numpy as np
import pytest
import torch
from channel_networks import network
from criteria_networks import cross_entropy, only, sharpen
from torch import Tensor, nn

from lightning_eff.batch import BatchKeys
from lightning_eff.pruning import DirichletOptions, GameOptions
from lightning_eff.pruning.criteria import (
    CRITERIA,
    KL,
    L1,
    Criterion,
    DirichletCriterion,
    KLFisher,
    Needs,
    Random,
    ShapleyCriterion,
    Taylor,
    importance,
    needs,
    register_criterion,
    resolve_criterion,
)
from lightning_eff.pruning.dirichlet.options import Prior
from lightning_eff.surgery import ChannelGraph

NAMES = ("random", "l1", "l2", "gm", "bn_scale", "taylor", "es", "kl", "kl_fisher", "shapley", "dirichlet")
DATA = ("taylor", "es", "kl", "kl_fisher", "shapley", "dirichlet")
QUICK = {
    "shapley": ShapleyCriterion(budget="6n"),
    "dirichlet": DirichletCriterion(DirichletOptions(epochs=2, lr=0.1, prior=Prior(weight=0))),
}


@pytest.fixture
def registry() -> Iterator[None]:
    before = dict(CRITERIA)
    yield
    CRITERIA.clear()
    CRITERIA.update(before)


def small() -> tuple[nn.Module, ChannelGraph, list[tuple[Tensor, Tensor]]]:
    model, graph, x, y = network("SmallCNN", count=12)
    sharpen(model)
    graph = only(graph, "layers.conv1", "layers.conv3")
    return model, graph, [(x[:8], y[:8]), (x[8:], y[8:])]


def test_names_are_those_of_the_published_criteria() -> None:
    assert set(CRITERIA) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_criterion_gives_a_finite_score_for_every_channel(name: str) -> None:
    model, graph, batches = small()
    scores = importance(model, graph, QUICK.get(name, name), batches, cross_entropy)
    assert list(scores) == list(graph.prunable)
    for group, values in scores.items():
        assert values.shape == (graph.groups[group].size,)
        assert values.dtype == torch.float64
        assert not values.requires_grad
        assert values.unique().numel() > 1


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_gives_the_same_scores(name: str) -> None:
    model, graph, batches = small()
    one, two = (importance(model, graph, QUICK.get(name, name), batches, cross_entropy, seed=5) for _ in range(2))
    assert all(torch.equal(one[group], two[group]) for group in one)


@pytest.mark.parametrize("name", DATA)
def test_dict_batches_are_taken_apart_by_their_keys(name: str) -> None:
    model, graph, batches = small()
    plain = importance(model, graph, QUICK.get(name, name), batches, cross_entropy)
    keyed = [{"x": x, "y": y} for x, y in batches]
    same = importance(model, graph, QUICK.get(name, name), keyed, cross_entropy, split_batch=BatchKeys("x", "y"))
    assert all(torch.equal(plain[group], same[group]) for group in plain)


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    parameters = [(id(p), p.requires_grad, None if p.grad is None else id(p.grad)) for p in model.parameters()]
    held = [sorted(vars(m)) for m in model.modules()]
    return [m.training for m in model.modules()], parameters, hooks, held


def disturbed() -> tuple[nn.Module, ChannelGraph, list[tuple[Tensor, Tensor]]]:
    """A network with mixed modes, some frozen weights and gradients of its own."""
    model, graph, batches = small()
    model.train()
    model.layers.norm2.eval()
    model.layers.conv1.requires_grad_(False)
    model.layers.conv2.weight.grad = torch.ones_like(model.layers.conv2.weight)
    return model, graph, batches


def generators() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def state(model: nn.Module) -> dict[str, Tensor]:
    gradients = {f"{name}.grad": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return copy.deepcopy({**model.state_dict(), **gradients})


def same_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", NAMES)
def test_network_and_generators_are_left_as_they_were(name: str) -> None:
    model, graph, batches = disturbed()
    before, tensors, drawn = snapshot(model), state(model), generators()
    importance(model, graph, QUICK.get(name, name), batches, cross_entropy)
    assert snapshot(model) == before
    assert same_state(tensors, state(model))
    assert generators() == drawn


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("name", DATA)
def test_network_and_generators_are_left_as_they_were_after_an_exception(name: str, kind: type) -> None:
    model, graph, batches = disturbed()
    before, tensors, drawn = snapshot(model), state(model), generators()
    calls = 0

    def failing(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal calls
        calls += 1
        torch.rand(1)
        if calls == 2:
            raise kind("stop")

    handle = model.layers.pool4.register_forward_hook(failing)
    with pytest.raises(kind, match="stop"):
        importance(model, graph, QUICK.get(name, name), batches, cross_entropy)
    handle.remove()
    assert snapshot(model) == before
    assert same_state(tensors, state(model))
    assert generators() == drawn


def test_callable_of_the_user_may_differentiate_weights_and_leaves_no_trace() -> None:
    model, graph, batches = disturbed()
    before, tensors, drawn = snapshot(model), state(model), generators()

    def gradient_times_weight(model: nn.Module, graph: ChannelGraph, batches: Any, loss_fn: Any) -> dict[str, Tensor]:
        torch.rand(3)
        model.train()
        model.requires_grad_(True)
        loss_fn(model, batches[0]).backward()
        layers = {name: model.get_submodule(name).weight for name in graph.prunable}
        return {name: (w * w.grad).flatten(1).sum(1).square() for name, w in layers.items()}

    scores = importance(model, graph, gradient_times_weight, batches, cross_entropy)
    assert all(bool(values.any()) for values in scores.values())
    assert snapshot(model) == before
    assert same_state(tensors, state(model))
    assert generators() == drawn


def test_unknown_name_is_refused_with_the_list_of_names() -> None:
    model, graph, _ = small()
    with pytest.raises(
        ValueError, match=r"criterion must be one of 'bn_scale', 'dirichlet', .* or a callable .*, got 'l3'"
    ):
        importance(model, graph, "l3")
    with pytest.raises(ValueError, match="a criterion must be a name or a callable, got 3"):
        resolve_criterion(3)  # type: ignore[arg-type]


class Untouchable(nn.Module):
    """Fails when anything of it is used."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"the network was touched: {name}")


@pytest.mark.parametrize("name", DATA)
def test_missing_data_and_loss_are_named_before_any_work(name: str) -> None:
    _, graph, batches = small()
    with pytest.raises(ValueError, match=f"criterion '{name}' needs calibration data: pass batches"):
        importance(Untouchable(), graph, name, [], cross_entropy)
    if needs(name).loss:
        with pytest.raises(ValueError, match=f"criterion '{name}' needs a loss: pass loss_fn"):
            importance(Untouchable(), graph, name, batches)
        with pytest.raises(ValueError, match=f"criterion '{name}' needs calibration data: .*; and a loss: "):
            CRITERIA[name]()(Untouchable(), graph, [], None)


def test_needs_are_known_before_work() -> None:
    assert {name for name in NAMES if needs(name).data} == set(DATA)
    assert {name for name in NAMES if needs(name).loss} == {"taylor", "dirichlet"}
    assert needs(Taylor(granularity="batch")) == Needs(data=True, loss=True)
    assert needs(lambda model, graph, batches, loss_fn: {}) == Needs()


def test_split_and_seed_are_filled_in_where_an_object_has_none() -> None:
    keys = BatchKeys("x", "y")
    assert resolve_criterion("kl_fisher", split_batch=keys, seed=7) == KLFisher(split_batch=keys, seed=7)
    assert resolve_criterion(KLFisher(seed=3), split_batch=keys, seed=7) == KLFisher(split_batch=keys, seed=3)
    assert resolve_criterion(L1(), split_batch=keys, seed=7) == L1()


@pytest.mark.usefixtures("registry")
def test_functions_and_classes_can_be_registered() -> None:
    @register_criterion("first", needs=Needs(data=True))
    def first(model: nn.Module, graph: ChannelGraph, batches: Any, loss_fn: Any) -> dict[str, Any]:
        return {name: range(graph.groups[name].size) for name in graph.prunable}

    @register_criterion("last")
    class Last:
        needs = Needs(loss=True)

        def __call__(self, model: nn.Module, graph: ChannelGraph, batches: Any, loss_fn: Any) -> dict[str, Any]:
            return {name: -torch.arange(graph.groups[name].size) for name in graph.prunable}

    model, graph, batches = small()
    assert importance(model, graph, "first", batches)["layers.conv1"].tolist() == list(range(8))
    assert importance(model, graph, "last", loss_fn=cross_entropy)["layers.conv1"].tolist() == [-j for j in range(8)]
    with pytest.raises(ValueError, match="criterion 'first' needs calibration data"):
        importance(model, graph, "first")
    with pytest.raises(ValueError, match="criterion 'last' needs a loss"):
        importance(model, graph, "last")
    with pytest.raises(ValueError, match="criterion 'l1' is L1 already: choose another name"):
        register_criterion("l1")(Last)
    register_criterion("last")(Last)  # a notebook cell that is run again


def test_scores_of_a_callable_are_checked() -> None:
    model, graph, _ = small()
    good = {"layers.conv1": torch.ones(8), "layers.conv3": [1.0] * 16}
    assert importance(model, graph, lambda *_: good)["layers.conv3"].tolist() == [1.0] * 16
    with pytest.raises(ValueError, match=r"gave no scores for layers\.conv3"):
        importance(model, graph, lambda *_: {"layers.conv1": torch.ones(8)})
    with pytest.raises(ValueError, match=r"gave scores of shape \[7\] for layers\.conv1, expected \[8\]"):
        importance(model, graph, lambda *_: {**good, "layers.conv1": torch.ones(7)})
    with pytest.raises(ValueError, match=r"not finite for channels \[2\] of layers\.conv1"):
        importance(model, graph, lambda *_: {**good, "layers.conv1": torch.tensor([1, 1, torch.nan, 1, 1, 1, 1, 1])})
    with pytest.raises(KeyError, match=r"no channel group named 'layers\.conv9'"):
        importance(model, graph, lambda *_: {**good, "layers.conv9": torch.ones(8)})


def test_activations_that_are_not_a_number_are_reported_with_their_group() -> None:
    model, graph, batches = small()
    batches[0][0][0] = torch.nan
    with pytest.raises(ValueError, match=r"criterion 'kl_fisher' gave scores that are not finite for channels .* of"):
        importance(model, graph, "kl_fisher", batches)


OBJECTS = [
    Random(3), L1("max"), Taylor("batch"), KL("gaussian", key="logits"), KLFisher(5, split_batch=BatchKeys("x", "y")),
    ShapleyCriterion(game=GameOptions(groups=2)), DirichletCriterion(DirichletOptions(epochs=3)),
]  # fmt: skip


@pytest.mark.parametrize("criterion", OBJECTS, ids=lambda criterion: type(criterion).__name__)
def test_criteria_are_values_that_can_be_pickled_and_compared(criterion: Any) -> None:
    again = pickle.loads(pickle.dumps(criterion))
    if not isinstance(criterion, KLFisher):  # BatchKeys of equal keys are different objects
        assert again == criterion
    assert repr(again).split("(")[0] == type(criterion).__name__
    with pytest.raises(AttributeError):
        criterion.seed = 3


def criterion_option(criterion: str | Criterion = "l1") -> str | Criterion:
    return criterion


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("kl", "kl"),
        ('{"class_path": "lightning_eff.pruning.criteria.L1", "init_args": {"reduction": "sum"}}', L1("sum")),
        (
            '{"class_path": "lightning_eff.pruning.criteria.KLFisher", "init_args": {"backwards": null, "key": 1}}',
            KLFisher(backwards=None, key=1),
        ),
        (
            '{"class_path": "lightning_eff.pruning.criteria.ShapleyCriterion", "init_args": {"budget": "4n"}}',
            ShapleyCriterion(budget="4n"),
        ),
        (
            '{"class_path": "lightning_eff.pruning.criteria.DirichletCriterion", "init_args": {"options": '
            '{"epochs": 3}}}',
            DirichletCriterion(DirichletOptions(epochs=3)),
        ),
    ],
)
def test_criteria_can_be_written_in_yaml(text: str, expected: Any) -> None:
    assert jsonargparse.auto_cli(criterion_option, args=[f"--criterion={text}"]) == expected
