"""Gates multiply channels where removal would take them away, and leave nothing behind."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from networks import build
from torch import Tensor, nn

from lightning_eff.surgery import ChannelGraph, Gates


@pytest.fixture
def small() -> tuple[nn.Module, Tensor, ChannelGraph]:
    model, x = build("SmallCNN")
    return model.eval(), x, ChannelGraph.from_model(model, x)


def hooks(model: nn.Module) -> list[int]:
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("SmallCNN", "layers.conv3"),
        ("LeNet", "c3.0"),
        ("ResNet-18", "layer2.0.conv2"),
        ("DenseNet", "features.conv0"),
        ("concat-flatten", "b"),
        ("grouped", "a"),
        ("transposed", "down"),
        ("ViT", "encoder.layers.encoder_layer_0.mlp.0"),
    ],
)
def test_gates_per_sample_equal_gates_of_whole_batches_one_by_one(name: str, group: str) -> None:
    model, x = build(name)
    model.eval()
    graph = ChannelGraph.from_model(model, x)
    gates = values(3, graph.groups[group].size)
    with torch.no_grad():
        with graph.gate(model, {group: gates}):
            together = model(x)
        for i in range(3):
            with graph.gate(model, {group: gates[i]}):
                # other batch sizes take other kernels: rounding only
                assert torch.allclose(together[i : i + 1], model(x[i : i + 1]), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(together, model(x), rtol=1e-2)


def test_gates_equal_scaled_columns_of_the_readers_weights(small: tuple[nn.Module, Tensor, ChannelGraph]) -> None:
    model, x, graph = small
    gate = values(8)
    scaled = copy.deepcopy(model)
    scaled.layers.conv3.weight.data *= values(8).view(1, 8, 1, 1)
    with torch.no_grad(), graph.gate(model, {"layers.conv2": gate}):
        assert torch.allclose(model(x), scaled(x), atol=1e-6)


def test_several_groups_are_gated_at_once(small: tuple[nn.Module, Tensor, ChannelGraph]) -> None:
    model, x, graph = small
    first, second = values(8), values(3, 16, seed=1)
    scaled = copy.deepcopy(model)
    scaled.layers.conv2.weight.data *= first.view(1, 8, 1, 1)
    with torch.no_grad():
        with graph.gate(model, {"layers.conv1": first, "layers.conv4": second}):
            together = model(x)
        for i in range(3):
            one = copy.deepcopy(scaled)
            one.layers.conv5.weight.data *= second[i].view(1, 16, 1, 1)
            assert torch.allclose(together[i : i + 1], one(x[i : i + 1]), atol=1e-5)


def test_two_groups_that_one_layer_reads_keep_their_places() -> None:
    model, x = build("concat-flatten")
    graph = ChannelGraph.from_model(model, x)
    scaled = copy.deepcopy(model)
    scaled.c.weight.data *= torch.tensor([2.0, 3.0, 5.0, 7.0, 11.0]).view(1, 5, 1, 1)
    with torch.no_grad(), graph.gate(model, {"a": torch.tensor([2.0, 3.0]), "b": torch.tensor([5.0, 7.0, 11.0])}):
        assert torch.allclose(model(x), scaled(x), atol=1e-5)


def test_producer_site_equals_zeroed_weight_and_bias_before_the_norm(
    small: tuple[nn.Module, Tensor, ChannelGraph],
) -> None:
    model, x, graph = small
    gate = torch.tensor([1.0, 0, 1, 0, 0, 1, 1, 1])
    zeroed = copy.deepcopy(model)
    zeroed.layers.conv2.weight.data[gate == 0] = 0
    zeroed.layers.conv2.bias.data[gate == 0] = 0
    with torch.no_grad(), graph.gate(model, {"layers.conv2": gate}, site="producer"):
        assert torch.allclose(model(x), zeroed(x), atol=1e-6)


def test_fill_puts_a_constant_in_the_place_of_a_closed_channel() -> None:
    first, second = nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(2, 1, 1, bias=False)
    first.weight.data = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)
    second.weight.data = torch.tensor([3.0, 5.0]).view(1, 2, 1, 1)
    model, x = nn.Sequential(first, second), torch.ones(1, 1, 1, 1)
    graph = ChannelGraph.from_model(model, x)
    fill = {"1": torch.tensor([10.0, 100.0])}
    with Gates(graph.groups, model, {"0": torch.tensor([1.0, 0.0])}, fill=fill):
        assert model(x).item() == 3 * 1 + 5 * 100
    with Gates(graph.groups, model, {"0": torch.tensor([0.5, 1.0])}, fill=fill):
        assert model(x).item() == 3 * (0.5 * 1 + 0.5 * 10) + 5 * 2


def test_values_change_while_the_context_is_open(small: tuple[nn.Module, Tensor, ChannelGraph]) -> None:
    model, x, graph = small
    with torch.no_grad():
        dense = model(x)
        with graph.gate(model, {"layers.conv2": torch.zeros(8)}) as gates:
            closed = model(x)
            gates.set("layers.conv2", torch.ones(8))
            assert torch.equal(model(x), dense)
    assert not torch.allclose(closed, dense)


def test_nothing_stays_on_the_model_after_the_context(small: tuple[nn.Module, Tensor, ChannelGraph]) -> None:
    model, x, graph = small
    before, dense = hooks(model), model(x)
    with graph.gate(model, {"layers.conv2": torch.zeros(8)}):
        assert hooks(model) != before
    assert hooks(model) == before
    assert torch.equal(model(x), dense)


def test_nothing_stays_on_the_model_after_an_exception(small: tuple[nn.Module, Tensor, ChannelGraph]) -> None:
    model, _, graph = small
    before = hooks(model)
    with (
        pytest.raises(KeyboardInterrupt),
        graph.gate(model, {"layers.conv2": torch.zeros(8), "layers.conv4": torch.zeros(16)}),
    ):
        raise KeyboardInterrupt
    assert hooks(model) == before


def test_an_open_context_may_be_entered_again(small: tuple[nn.Module, Tensor, ChannelGraph]) -> None:
    model, x, graph = small
    before = hooks(model)
    gates = graph.gate(model, {"layers.conv2": torch.full((8,), 0.5)})
    with torch.no_grad(), gates:
        once = model(x)
        gates.__enter__()
        assert torch.equal(model(x), once)
    assert hooks(model) == before


@pytest.mark.parametrize("shape", [(7,), (3, 7), (), (1, 3, 8)])
def test_values_of_another_size_are_refused(
    small: tuple[nn.Module, Tensor, ChannelGraph], shape: tuple[int, ...]
) -> None:
    model, _, graph = small
    with pytest.raises(ValueError, match=r"expected gate values \[8\] or \[B, 8\], got"):
        graph.gate(model, {"layers.conv2": torch.ones(shape)})


def test_unknown_group_is_refused_with_close_names(small: tuple[nn.Module, Tensor, ChannelGraph]) -> None:
    model, _, graph = small
    with pytest.raises(KeyError, match=r"layers\.conv2"):
        graph.gate(model, {"layers.convv2": torch.ones(8)})
    with pytest.raises(KeyError, match=r"no gate on 'layers.conv1'; gated groups: layers.conv2"):
        graph.gate(model, {"layers.conv2": torch.ones(8)}).set("layers.conv1", torch.ones(8))


def test_gates_for_another_batch_are_refused(small: tuple[nn.Module, Tensor, ChannelGraph]) -> None:
    model, x, graph = small
    before = hooks(model)
    with (
        pytest.raises(ValueError, match=r"layers\.conv3: 2 gates per sample for a batch of 3"),
        graph.gate(model, {"layers.conv2": torch.ones(2, 8)}),
    ):
        model(x)
    assert hooks(model) == before


@pytest.mark.parametrize("shape", [(8,), (3, 8)])
def test_gradient_of_a_gate_equals_the_finite_difference(
    small: tuple[nn.Module, Tensor, ChannelGraph], shape: tuple[int, ...]
) -> None:
    model, x, graph = small
    model, x = model.double(), x.double()
    gate = values(*shape).double().requires_grad_()
    with graph.gate(model, {"layers.conv2": gate}) as gates:
        model(x).sin().sum().backward()
        step = 1e-6 * torch.eye(gate.numel(), dtype=torch.float64)[3].reshape(shape)
        with torch.no_grad():
            ends = []
            for sign in (1, -1):
                gates.set("layers.conv2", gate + sign * step)
                ends.append(float(model(x).sin().sum()))
    # a central difference of step h errs by about h^2 and by rounding 1e-16 / h
    assert gate.grad.flatten()[3].item() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5)


def test_two_backward_passes_in_a_row_accumulate(small: tuple[nn.Module, Tensor, ChannelGraph]) -> None:
    model, x, graph = small
    gate = values(8).requires_grad_()
    with graph.gate(model, {"layers.conv2": gate}):
        model(x).sum().backward()
        once = gate.grad.clone()
        model(x).sum().backward()
    assert torch.allclose(gate.grad, 2 * once)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_flow_after_a_pass_without_gradients(
    small: tuple[nn.Module, Tensor, ChannelGraph], mode: type
) -> None:
    model, x, graph = small
    gate = values(8).requires_grad_()
    with graph.gate(model, {"layers.conv2": gate}):
        with mode():
            model(x)
        model(x).sum().backward()
    assert gate.grad.abs().sum() > 0


def test_gates_made_in_inference_mode_let_weights_train(small: tuple[nn.Module, Tensor, ChannelGraph]) -> None:
    model, x, graph = small
    with graph.gate(model, {"layers.conv2": values(8)}):
        with torch.inference_mode():
            model(x)
        model(x).sum().backward()
    assert model.layers.conv3.weight.grad is not None


def encoders() -> Iterator[tuple[str, nn.Module]]:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=12, batch_first=True)
    yield "layer", layer
    yield "encoder", nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


@pytest.mark.parametrize("kind", ["layer", "encoder"])
def test_fused_transformer_layer_is_gated(kind: str) -> None:
    model = dict(encoders())[kind].eval()
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))
    graph = ChannelGraph.from_model(model, x)
    name = next(name for name in graph.prunable if name.endswith("linear1"))
    gate = (torch.arange(12) % 3 > 0).float()
    scaled = copy.deepcopy(model)
    scaled.get_submodule(name).weight.data[gate == 0] = 0  # ReLU(0) = 0: the unit is gone
    scaled.get_submodule(name).bias.data[gate == 0] = 0
    with torch.no_grad():
        with graph.gate(model, {name: gate}):
            gated = model(x)
        assert torch.allclose(gated, scaled(x), atol=1e-5)
        assert not torch.allclose(gated, model(x), atol=1e-3)
