"""Repair makes small networks do what the whole one did, whatever the network looks like."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from networks import build
from test_cut import half_plan
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_eff.data import DigitsDataModule
from lightning_eff.models import SmallCNN
from lightning_eff.pruning.repair import Moments, Repair, RepairError, collect_moments, repair
from lightning_eff.surgery import ChannelGraph, PruningPlan, apply_plan
from lightning_eff.surgery.trial import Trial

UPDATES = ["gram", "channel", "sequential"]


def images(x: Tensor, count: int = 64) -> Tensor:
    return torch.randn(count, *x.shape[1:], generator=torch.Generator().manual_seed(3))


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def doubled(model: SmallCNN, seed: int = 0) -> SmallCNN:
    """A network in which channel ``C / 2 + j`` of every layer is channel ``j`` again, read with other weights."""
    torch.manual_seed(seed)
    for i in range(1, 6):
        conv, norm = getattr(model.layers, f"conv{i}"), getattr(model.layers, f"norm{i}")
        half = conv.out_channels // 2
        with torch.no_grad():
            norm.running_mean.uniform_(-0.2, 0.2)
            norm.running_var.uniform_(0.5, 1.5)
            for tensor in (conv.weight, conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var):
                tensor[half:] = tensor[:half]
    return model.eval()


def one_of_each_pair(graph: ChannelGraph, seed: int) -> PruningPlan:
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for name in graph.prunable:
        half = graph.groups[name].size // 2
        second = torch.rand(half, generator=generator) < 0.5
        keep[name] = (torch.arange(half) + half * second).sort().values.tolist()
    return PruningPlan(keep)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("seed", [0, 1])
def test_network_of_copied_channels_loses_half_of_them_and_gives_the_same(update: str, seed: int) -> None:
    model = doubled(SmallCNN(width=8))
    x = torch.randn(128, 1, 16, 16)
    graph = ChannelGraph.from_model(model, x)
    trial = Trial(model, graph, one_of_each_pair(graph, seed))
    dense = outputs(model, x)
    with trial:
        assert relative(outputs(model, x), dense) > 0.05
    errors = repair(trial, [(x, None)], Repair(update, ridge=1e-6, bn_samples=0))
    with trial:
        assert relative(outputs(model, x), dense) < 1e-3
    assert len(errors) == 5
    assert max(errors.values()) < 1e-4


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize(
    "name", ["LeNet", "SmallCNN", "DenseNet", "squeeze-excite", "grouped", "concat-flatten", "transposed", "ViT"]
)
def test_outputs_are_nearer_to_the_whole_networks_after_repair(name: str, update: str) -> None:
    model, x = build(name)
    model.eval()
    graph, x = ChannelGraph.from_model(model, x), images(x)
    dense, trial = outputs(model, x), Trial(model, graph, half_plan(graph))
    with trial:
        removed = relative(outputs(model, x), dense)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fewer calibration rows")
        warnings.filterwarnings("ignore", "the moments of all layers take more than max_memory_mb")
        errors = repair(trial, [(x[:32], None), (x[32:], None)], Repair(update, bn_samples=0))
    with trial:
        corrected = relative(outputs(model, x), dense)
    assert corrected < 0.9 * removed
    assert set(errors) == {m.path for group in trial.keep for m in graph.groups[group].consumers}
    assert all(0 <= error <= 1 for error in errors.values())


@pytest.mark.slow
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("name", ["ResNet-18", "MobileNetV2", "ResNeXt", "VGG-BN"])
def test_torchvision_networks_are_repaired(name: str, update: str) -> None:
    test_outputs_are_nearer_to_the_whole_networks_after_repair(name, update)


def test_corrected_weights_are_those_of_the_network_after_a_real_cut() -> None:
    model, x = build("SmallCNN")
    model.eval()
    graph, samples = ChannelGraph.from_model(model, x), images(x)
    plan = half_plan(graph)
    trial = Trial(model, graph, plan)
    repair(trial, [(samples, None)], Repair("sequential"))
    with trial:
        expected = outputs(model, samples)
    apply_plan(model, plan, x, graph=graph)
    model.load_state_dict(trial.state(), strict=False)
    assert torch.equal(outputs(model, samples), expected)


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("update", [*UPDATES, "none"])
def test_repair_leaves_the_whole_network_and_modes_alone(update: str, opened: bool) -> None:
    model, x = build("SmallCNN")
    model.train()
    model.layers.norm2.eval()
    graph, samples = ChannelGraph.from_model(model, x), images(x)
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    trial = Trial(model, graph, half_plan(graph))
    if opened:
        with trial:
            model.eval()
            repair(trial, [(samples, None)], Repair(update))
            assert not any(m.training for m in model.modules())
            assert model.layers.conv1.out_channels == 4
    else:
        repair(trial, [(samples, None)], Repair(update))
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("update", UPDATES)
def test_open_and_closed_trials_are_repaired_alike(update: str) -> None:
    model, x = build("SmallCNN")
    graph, samples = ChannelGraph.from_model(model, x), images(x)
    first, second = (Trial(model, graph, half_plan(graph)) for _ in range(2))
    repair(first, [(samples, None)], Repair(update))
    with second:
        repair(second, [(samples, None)], Repair(update))
    assert all(torch.equal(tensor, second.state()[name]) for name, tensor in first.state().items())


def test_exception_in_the_middle_leaves_the_network_whole() -> None:
    model, x = build("SmallCNN")
    graph, samples = ChannelGraph.from_model(model, x), images(x)
    before = copy.deepcopy(model.state_dict())
    trial = Trial(model, graph, half_plan(graph))
    wrong = torch.zeros(64, 2, 8, 8)
    for update in UPDATES:
        with pytest.raises(RuntimeError, match="channels"):
            repair(trial, [(samples, None), (wrong, None)], Repair(update))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_auto_is_gram_for_candidates_and_sequential_for_what_is_kept() -> None:
    model, x = build("SmallCNN")
    graph, batches = ChannelGraph.from_model(model, x), [(images(x), None)]

    def repaired(update: Any, **options: Any) -> dict[str, Tensor]:
        trial = Trial(model, graph, half_plan(graph))
        repair(trial, batches, Repair(update), **options)
        return trial.state()

    moments = collect_moments(model, graph, batches, Repair())
    for auto, named in (
        (repaired("auto"), repaired("gram")),
        (repaired("auto", moments=moments), repaired("gram")),
        (repaired("auto", moments=moments, final=True), repaired("sequential")),
    ):
        assert all(torch.equal(tensor, named[name]) for name, tensor in auto.items())


def test_without_update_only_norms_change() -> None:
    model, x = build("SmallCNN")
    graph, batches = ChannelGraph.from_model(model, x), [(images(x), None)]
    trial = Trial(model, graph, half_plan(graph))
    before = trial.state()
    assert repair(trial, batches, Repair("none", bn_samples=0)) == {}
    assert all(torch.equal(tensor, before[name]) for name, tensor in trial.state().items())
    repair(trial, batches, Repair("none"))
    changed = {name for name, tensor in trial.state().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"layers.norm{i}.{b}" for i in range(1, 6) for b in ("running_mean", "running_var")} | {
        f"layers.norm{i}.num_batches_tracked" for i in range(1, 6)
    }


class Shared(nn.Module):
    """The middle layer runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.d(F.relu(self.c(torch.tanh(self.b(torch.tanh(self.b(x)))))))


def shared() -> tuple[nn.Module, ChannelGraph]:
    """Channels 4..7 copy 0..3; two groups are prunable: what the twice-called layer reads, and what the last reads."""
    torch.manual_seed(0)
    model = Shared()
    with torch.no_grad():
        for layer in (model.a, model.b):
            layer.weight[4:], layer.bias[4:] = layer.weight[:4], layer.bias[:4]
        model.c.weight[3:], model.c.bias[3:] = model.c.weight[:3], model.c.bias[:3]
    wide, narrow = list(range(8)), list(range(6))
    groups = [
        {
            "name": "a",
            "size": 8,
            "producers": ["a", "b"],
            "members": [
                {"path": "a", "axis": "out", "index": wide},
                {"path": "b", "axis": "out", "index": wide},
                {"path": "b", "axis": "in", "index": wide},
                {"path": "c", "axis": "in", "index": wide},
            ],
        },
        {
            "name": "c",
            "size": 6,
            "members": [{"path": "c", "axis": "out", "index": narrow}, {"path": "d", "axis": "in", "index": narrow}],
        },
    ]
    return model, ChannelGraph.from_dict({"groups": groups}, model, torch.zeros(2, 5))


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("batches", [1, 3])
def test_layer_that_is_called_twice_is_fitted_to_both_calls(update: str, batches: int) -> None:
    model, graph = shared()
    x = torch.randn(90, 5)
    trial = Trial(model, graph, PruningPlan({"a": [0, 5, 2, 7], "c": [3, 1, 2]}))
    dense = outputs(model, x)
    errors = repair(trial, [(part, None) for part in x.chunk(batches)], Repair(update, ridge=1e-6))
    with trial:
        assert relative(outputs(model, x), dense) < 1e-3
    assert sorted(errors) == ["b", "c", "d"]


def test_sequential_gives_the_same_in_one_pass_and_layer_by_layer() -> None:
    model, x = build("SmallCNN")
    model, x = model.double(), x.double()
    graph, samples = ChannelGraph.from_model(model, x), images(x).double()
    labels = torch.zeros(64)
    states, passes = [], []
    for batches in (
        [(samples[:24], labels[:24]), (samples[24:], labels[24:])],
        [(samples[:24], ""), (samples[24:], "")],
    ):
        trial = Trial(model, graph, half_plan(graph))
        calls: list[int] = []
        handle = model.layers.conv1.register_forward_hook(lambda m, a, o, calls=calls: calls.append(len(o)))
        repair(trial, batches, Repair("sequential", bn_samples=0, positions=64))
        handle.remove()
        states.append(trial.state())
        passes.append(calls)
    assert passes[0] == [2, 64, 64]  # a look, the whole network, the smaller one
    assert passes[1] == [2, 24, 40] + 5 * [24, 40]  # batches that cannot be joined: a pass for each of five layers
    for name, tensor in states[0].items():
        assert torch.allclose(states[1][name], tensor, atol=1e-8), name


def test_sequential_stops_a_pass_where_the_layer_is() -> None:
    model, x = build("SmallCNN")
    graph, samples = ChannelGraph.from_model(model, x), images(x)
    trial = Trial(model, graph, PruningPlan({"layers.conv1": [0, 3]}))
    calls: list[int] = []
    model.layers.conv3.register_forward_hook(lambda m, a, o: calls.append(len(o)))
    repair(trial, [(samples, None)], Repair("sequential", bn_samples=0))
    assert calls == [2, 64]  # only in the whole network


def test_memory_bounds_how_many_layers_are_fitted_together() -> None:
    model, x = build("SmallCNN")
    model, x = model.double(), x.double()
    graph, samples = ChannelGraph.from_model(model, x), images(x).double()
    states = []
    for memory in (2048, 0.9):  # one layer's moments take 0.8 MB, outputs of all layers more
        trial = Trial(model, graph, half_plan(graph))
        repair(trial, [(samples, 0)], Repair("sequential", bn_samples=0, positions=64, max_memory_mb=memory))
        states.append(trial.state())
    for name, tensor in states[0].items():
        assert torch.allclose(states[1][name], tensor, atol=1e-4), name


@pytest.mark.parametrize("update", ["gram", "sequential"])
def test_activations_that_are_not_finite_name_the_layer(update: str) -> None:
    model, x = build("SmallCNN")
    graph, samples = ChannelGraph.from_model(model, x), images(x)
    samples[3] = float("inf")
    trial = Trial(model, graph, half_plan(graph))
    with pytest.raises(RepairError, match=r"layers\.conv2: its inputs are not all finite"):
        repair(trial, [(samples, None)], Repair(update))


def test_moments_of_another_mode_are_refused() -> None:
    model, x = build("SmallCNN")
    graph, batches = ChannelGraph.from_model(model, x), [(images(x), None)]
    moments = Moments.collect(model, graph, batches, mode="channel")
    trial = Trial(model, graph, half_plan(graph))
    with pytest.raises(ValueError, match="expected moments of mode 'kernel' for update='gram', got 'channel'"):
        repair(trial, batches, Repair("gram"), moments=moments)


@pytest.mark.parametrize("update", UPDATES)
def test_no_sample_is_an_error(update: str) -> None:
    model, x = build("SmallCNN")
    graph = ChannelGraph.from_model(model, x)
    with pytest.raises(ValueError, match="expected at least one calibration sample, got none"):
        repair(Trial(model, graph, half_plan(graph)), [], Repair(update))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"update": "grams"}, "update must be one of auto, gram, sequential, channel, none, got 'grams'"),
        ({"ridge": -1e-3}, r"ridge must lie in \[0, 1\], got -0.001"),
        ({"positions": 0}, "positions must be a whole number >= 1, got 0"),
        ({"samples": 0}, "samples must be a whole number >= 1, got 0"),
        ({"bn_samples": -1}, "bn_samples must be a whole number >= 0, got -1"),
        ({"positions": 2.5}, "positions must be a whole number >= 1, got 2.5"),
        ({"max_memory_mb": float("nan")}, "max_memory_mb must be > 0, got nan"),
        ({"max_memory_mb": 0}, "max_memory_mb must be > 0, got 0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Repair(**options)


def test_repair_brings_a_trained_network_back_without_training() -> None:
    """Digits: half of all channels at random, the smallest accuracy of three draws."""
    data = DigitsDataModule()
    data.setup("fit")
    x, y = (torch.stack(list(part)) for part in zip(*data.train_dataloader().dataset, strict=True))
    torch.manual_seed(0)
    model = SmallCNN(width=8)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(6):
        for index in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
    model.eval()
    graph = ChannelGraph.from_model(model, x[:2])

    def accuracy() -> float:
        return float((outputs(model, x).argmax(1) == y).float().mean())

    assert accuracy() > 0.97
    found: dict[str, float] = {}
    for update in ("none", "channel", "gram", "sequential"):
        for seed in range(3):
            trial = Trial(model, graph, half_plan(graph, seed))
            repair(trial, [(x[:512], None)], Repair(update, bn_samples=0 if update == "none" else 512))
            with trial:
                found[update] = min(found.get(update, 1.0), accuracy())
    assert found["none"] < 0.5
    assert found["gram"] > 0.6
    assert found["sequential"] > 0.8
