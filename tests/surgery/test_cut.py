"""A cut network is the masked network, and nothing but the channels changes."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import NETWORKS, ConcatFlatten, HardCodedView, PadShortcut, Rolled, Tied, build, torchvision_net
from torch import Tensor, nn

from lightning_eff.surgery import ChannelGraph, PruningPlan, SurgeryError, apply_plan


def half_plan(graph: ChannelGraph, seed: int = 0) -> PruningPlan:
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for name in graph.prunable:
        size = graph.groups[name].size
        keep[name] = sorted(torch.randperm(size, generator=generator)[: max(1, size // 2)].tolist())
    return PruningPlan(keep)


def masked_output(model: nn.Module, graph: ChannelGraph, plan: PruningPlan, x: Tensor) -> Tensor:
    """Zero the weights of every consumer that read removed channels: independent of gates and hooks."""
    model = copy.deepcopy(model).eval()
    for name, mask in plan.keep_masks(graph).items():
        for member in graph.groups[name].consumers:
            layer = model.get_submodule(member.path)
            gone = member.index[~mask[member.root]]
            weight = layer.weight.data
            if isinstance(layer, nn.ConvTranspose2d):
                weight[gone] = 0
            elif getattr(layer, "groups", 1) > 1:
                blocks = weight.view(layer.groups, -1, *weight.shape[1:])
                for position in gone.tolist():
                    blocks[position // weight.shape[1], :, position % weight.shape[1]] = 0
            else:
                weight[:, gone] = 0
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("name", NETWORKS)
def test_cut_equals_zeroed_weights_and_gates(name: str) -> None:
    model, x = build(name)
    graph = ChannelGraph.from_model(model, x)
    assert graph.prunable
    plan = half_plan(graph)
    expected = masked_output(model, graph, plan, x)
    masks = {name: mask.float() for name, mask in plan.keep_masks(graph).items()}
    model.eval()
    with torch.no_grad(), graph.gate(model, masks):
        gated = model(x)
    apply_plan(model, plan, x, graph=graph)
    with torch.no_grad():
        cut = model(x)
    assert (gated - expected).norm() <= 1e-5 * expected.norm()
    assert (cut - expected).norm() <= 1e-5 * expected.norm()
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in build(name)[0].parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_cut_network_still_trains(name: str) -> None:
    model, x = build(name)
    apply_plan(model, half_plan(ChannelGraph.from_model(model, x)), x)
    model.train()(x).square().mean().backward()
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())


def test_hand_example_of_two_channels() -> None:
    def network() -> nn.Sequential:
        first, second = nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(2, 1, 1, bias=False)
        first.weight.data = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)
        second.weight.data = torch.tensor([3.0, 5.0]).view(1, 2, 1, 1)
        return nn.Sequential(first, nn.ReLU(), second)

    x = torch.ones(1, 1, 1, 1)
    assert network()(x).item() == 13
    for keep, output in (([0], 3.0), ([1], 10.0)):
        model = network()
        apply_plan(model, PruningPlan({"0": keep}), x)
        assert model(x).item() == output
        assert model(x).shape == (1, 1, 1, 1)


def test_concat_offsets_and_flatten_blocks_are_followed() -> None:
    model, x = build("concat-flatten")
    assert isinstance(model, ConcatFlatten)
    before_c, before_d = model.c.weight.detach().clone(), model.d.weight.detach().clone()
    apply_plan(model, PruningPlan({"b": [0, 2], "c": [0]}), x)
    assert torch.equal(model.c.weight, before_c[:1, [0, 1, 2, 4]])  # channel 1 of b is input column 3
    assert torch.equal(model.d.weight, before_d[:, :4])  # channel 0 of a 2x2 map is features 0-3


def test_parameters_modules_flags_and_hooks_keep_their_identity() -> None:
    model, x = build("ResNet-18")
    model = model.to(memory_format=torch.channels_last)
    model.layer1[0].bn1.eval()
    model.layer2[0].conv1.weight.requires_grad_(False)
    fired: list[str] = []
    model.layer3[0].conv1.register_forward_hook(lambda *_: fired.append("hook"))
    ids = {name: id(p) for name, p in model.named_parameters()}
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    modes = [module.training for module in model.modules()]
    apply_plan(model, half_plan(ChannelGraph.from_model(model, x)), x)
    assert {name: id(p) for name, p in model.named_parameters()} == ids
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == frozen
    assert [module.training for module in model.modules()] == modes
    assert model.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    fired.clear()
    model(x)
    assert fired == ["hook"]


def test_fully_frozen_network_is_cut_and_stays_frozen() -> None:
    model, x = build("SmallCNN")
    model.requires_grad_(False)
    graph = ChannelGraph.from_model(model, x)
    cut = apply_plan(model, half_plan(graph), x, graph=graph)
    assert cut.params[1] < cut.params[0]
    assert not any(p.requires_grad for p in model.parameters())


def test_two_cuts_in_a_row_equal_one_composed_cut() -> None:
    first, x = build("ResNet-18")
    graph = ChannelGraph.from_model(first, x)
    plan = half_plan(graph)
    cut = apply_plan(first, plan, x, graph=graph)
    later = half_plan(cut.graph, seed=1)
    apply_plan(first, later, x, graph=cut.graph)
    second, _ = build("ResNet-18")
    apply_plan(second, cut.plan.compose(PruningPlan(later.validate(cut.graph))), x)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def test_renumbered_graph_equals_a_new_trace() -> None:
    model, x = build("DenseNet")
    graph = ChannelGraph.from_model(model, x)
    renumbered = apply_plan(model, half_plan(graph), x, graph=graph).graph
    traced = ChannelGraph.from_model(model, x)
    assert renumbered.sizes == traced.sizes
    for name, group in traced.groups.items():
        assert sorted((m.path, m.axis, m.index.tolist()) for m in group.members) == sorted(
            (m.path, m.axis, m.index.tolist()) for m in renumbered.groups[name].members
        )


@pytest.mark.parametrize("name", ["ResNet-18", "DenseNet", "MobileNetV2"])
def test_cut_gives_the_tensors_of_torch_pruning(name: str) -> None:
    tp = pytest.importorskip("torch_pruning")
    model, x = build(name)
    peer = copy.deepcopy(model)
    graph = ChannelGraph.from_model(model, x)
    plan = half_plan(graph)
    apply_plan(model, plan, x, graph=graph)
    dependency = tp.DependencyGraph().build_dependency(peer, x, verbose=False)
    for path, keep in plan.validate(graph).items():
        gone = sorted(set(range(graph.groups[path].size)) - set(keep))
        dependency.get_pruning_group(peer.get_submodule(path), tp.prune_conv_out_channels, gone).prune()
    for key, tensor in peer.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key]), key


def test_padded_shortcut_is_protected_and_only_its_stream() -> None:
    torch.manual_seed(0)
    model, x = PadShortcut(), torch.randn(3, 3, 8, 8)
    graph = ChannelGraph.from_model(model, x)
    assert graph.prunable == ("inner",)
    assert "wrongly" in graph.groups["outer"].protected


def test_silently_wrong_mapping_is_found_by_the_trial_cut() -> None:
    torch.manual_seed(0)
    graph = ChannelGraph.from_model(Rolled(), torch.randn(3, 3, 8, 8))
    assert graph.prunable == ("b",)
    assert "not masking" in graph.groups["a"].protected


@pytest.mark.parametrize("make", [Rolled, HardCodedView])
def test_failing_verification_leaves_the_model_bit_for_bit(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = make(), torch.randn(3, 3, 8, 8)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    ids = [id(p) for p in model.parameters()]
    graph = ChannelGraph.from_model(model, x, check=False)
    with pytest.raises(SurgeryError, match=r"of (a|conv) does not give the masked network"):
        apply_plan(model, half_plan(graph), x, graph=graph)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [id(p) for p in model.parameters()] == ids
    model(x)


def test_interrupt_during_verification_restores_the_model() -> None:
    model, x = build("SmallCNN")
    graph = ChannelGraph.from_model(model, x)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    calls = 0

    def interrupt(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:  # the first run is the gated network, the second the smaller one
            raise KeyboardInterrupt

    handle = model.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        apply_plan(model, half_plan(graph), x, graph=graph)
    handle.remove()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_tied_layers_are_protected() -> None:
    graph = ChannelGraph.from_model(Tied(), torch.randn(2, 3, 8, 8))
    assert graph.prunable == ()
    assert "shares a parameter" in graph.groups["b"].protected


def test_parametrized_layer_is_protected() -> None:
    model, x = build("concat-flatten")
    nn.utils.parametrizations.weight_norm(model.d)
    assert "parametrization" in ChannelGraph.from_model(model, x).groups["d"].protected


def test_layer_called_twice_is_one_group() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.b(self.a(x).relu()).relu()).relu())

    model, x = Twice(), torch.randn(5, 4)
    graph = ChannelGraph.from_model(model, x)
    assert graph.resolve("a").name == graph.resolve("b").name
    plan = PruningPlan({"a": [0, 3, 5]})
    expected = masked_output(model, graph, plan, x)
    apply_plan(model, plan, x, graph=graph)
    assert torch.allclose(model(x), expected, atol=1e-6)


def test_norm_coupled_groups_are_cut_only_when_allowed() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(3, 4)
    assert ChannelGraph.from_model(model, x).prunable == ()
    graph = ChannelGraph.from_model(model, x, allow_norm_coupled=True)
    with pytest.warns(UserWarning, match="more than the missing channels"):
        apply_plan(model, PruningPlan({"0": [1, 2, 5]}), x, graph=graph)
    assert model[1].normalized_shape == (3,)
    assert model(x).shape == (3, 2)


def test_group_norm_loses_the_same_position_of_every_group() -> None:
    model = nn.Sequential(nn.Conv2d(3, 12, 1), nn.GroupNorm(4, 12), nn.ReLU(), nn.Conv2d(12, 2, 1))
    x = torch.randn(2, 3, 4, 4)
    graph = ChannelGraph.from_model(model, x, allow_norm_coupled=True)
    assert graph.groups["0"].size == 3
    with pytest.warns(UserWarning, match="more than the missing channels"):
        apply_plan(model, PruningPlan({"0": [0, 2]}), x, graph=graph)
    assert (model[1].num_channels, model[1].num_groups) == (8, 4)
    model(x)


def test_inference_tensors_are_refused_with_the_way_out() -> None:
    with torch.inference_mode():
        model, x = build("SmallCNN")
    clean, x = build("SmallCNN")
    graph = ChannelGraph.from_model(clean, x)
    with pytest.raises(SurgeryError, match="clone the model"):
        apply_plan(model, half_plan(graph), x, graph=graph)


def test_twin_is_cut_the_same_way() -> None:
    model, x = build("SmallCNN")
    twin = copy.deepcopy(model)
    graph = ChannelGraph.from_model(model, x)
    apply_plan(model, half_plan(graph), x, graph=graph, twins=[twin])
    for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_compiled_model_is_traced_and_cut() -> None:
    model, x = build("SmallCNN")
    compiled = torch.compile(model, backend="eager")
    expected = copy.deepcopy(model)
    plan = half_plan(ChannelGraph.from_model(compiled, x))
    named = {name.removeprefix("_orig_mod."): keep for name, keep in plan.keep.items()}
    apply_plan(compiled, plan, x)
    apply_plan(expected, PruningPlan(named), x)
    compiled.eval(), expected.eval()
    assert torch.allclose(compiled(x), expected(x), atol=1e-6)


def test_works_under_no_grad() -> None:
    model, x = build("SmallCNN")
    with torch.no_grad():
        assert ChannelGraph.from_model(model, x).prunable


def test_cut_that_cannot_be_seen_is_told() -> None:
    model, x = build("SmallCNN")
    nn.init.zeros_(model.layers.out.weight)
    nn.init.zeros_(model.layers.out.bias)
    with pytest.warns(UserWarning, match="could not be checked"):
        apply_plan(model, half_plan(ChannelGraph.from_model(model, x)), x)


@pytest.mark.parametrize("kind", [nn.MultiheadAttention, nn.LSTM])
def test_channels_that_reach_attention_or_a_recurrent_layer_are_protected(kind: type[nn.Module]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)
            self.mix = nn.MultiheadAttention(8, 2) if kind is nn.MultiheadAttention else nn.LSTM(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.b((self.mix(x, x, x) if kind is nn.MultiheadAttention else self.mix(x))[0])

    graph = ChannelGraph.from_model(Net(), torch.randn(5, 2, 4))
    assert graph.prunable == ()
    assert all(group.protected for group in graph.groups.values())


def test_map_that_is_right_for_one_half_by_luck_is_found() -> None:
    class Chunked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            u, v = self.a(x).chunk(2, 1)
            return self.c(torch.relu(self.b(u * v.sigmoid())))

    torch.manual_seed(0)
    assert ChannelGraph.from_model(Chunked(), torch.randn(2, 3, 4, 4)).prunable == ("b",)


def test_graph_from_before_an_earlier_cut_is_refused() -> None:
    model, x = build("SmallCNN")
    graph = ChannelGraph.from_model(model, x)
    apply_plan(model, half_plan(graph), x, graph=graph)
    with pytest.raises(SurgeryError, match="another state of the model"):
        apply_plan(model, half_plan(graph, 1), x, graph=graph)


def test_weight_norms_have_one_entry_per_channel_of_any_layer() -> None:
    for name in ("grouped", "transposed", "ResNet-18"):
        model, x = build(name)
        graph = ChannelGraph.from_model(model, x)
        norms = graph.weight_norms(model, p=1)
        assert {key: len(value) for key, value in norms.items()} == {key: graph.groups[key].size for key in norms}
    weights = [model.get_submodule(path).weight.detach() for path in graph.groups["conv1"].producers]
    assert torch.allclose(norms["conv1"].float(), sum(weight.flatten(1).abs().sum(1) for weight in weights))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["efficientnet_b0", "regnet_y_400mf", "squeezenet1_1", "densenet121", "convnext_tiny", "vit_b_32"]
)
def test_further_torchvision_networks_are_cut_exactly(name: str) -> None:
    torch.manual_seed(0)
    model = torchvision_net(name)()
    x = torch.randn(2, 3, 224 if name.startswith("vit") else 64, 224 if name.startswith("vit") else 64)
    if name.startswith("vit"):
        nn.init.normal_(model.heads.head.weight, std=0.02)
    graph = ChannelGraph.from_model(model, x)
    plan = half_plan(graph)
    expected = masked_output(model, graph, plan, x)
    cut = apply_plan(model, plan, x, graph=graph)
    assert cut.macs[1] < 0.75 * cut.macs[0]
    with torch.no_grad():
        assert (model.eval()(x) - expected).norm() <= 1e-5 * expected.norm()


def test_norms_without_weights_or_without_statistics_and_layers_without_bias_are_cut() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6, affine=False), nn.ReLU(),
        nn.Conv2d(6, 8, 3, bias=False), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 16, 3, bias=False),
    )  # fmt: skip
    x = torch.randn(4, 1, 8, 8)
    graph = ChannelGraph.from_model(model, x)
    plan = PruningPlan({"0": [0, 2, 5], "3": [1, 6]})
    expected = masked_output(model, graph, plan, x)
    apply_plan(model, plan, x, graph=graph)
    assert model[1].running_mean.shape == (3,)
    assert (model[1].num_features, model[4].num_features) == (3, 2)
    torch.testing.assert_close(model.eval()(x), expected)
