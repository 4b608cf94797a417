"""The Taylor criterion against explicit activations, finite differences, and what it must refuse."""

from __future__ import annotations

import pytest
import torch
from channel_networks import network
from criteria_networks import cross_entropy, only
from torch import Tensor, nn

from lightning_eff.pruning.criteria import Taylor, importance
from lightning_eff.surgery import ChannelGraph


def by_hand(model: nn.Module, graph: ChannelGraph, name: str, x: Tensor, y: Tensor) -> Tensor:
    """``sum a_j dL/da_j`` over all readers of the group, for the mean loss of ``(x, y)``: float64 ``[C]``."""
    group, inputs = graph.groups[name], {}

    def watch(path: str):
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            inputs[path] = args[0] * 1  # what this reader sees, apart from what others do with it
            inputs[path].retain_grad()
            return (inputs[path],)

        return hook

    paths = {m.path for m in group.consumers}
    handles = [model.get_submodule(path).register_forward_pre_hook(watch(path)) for path in paths]
    cross_entropy(model, (x, y)).backward()
    total = torch.zeros(group.size, dtype=torch.float64)
    for m in group.consumers:
        layer, a = model.get_submodule(m.path), inputs[m.path]
        product = (a * a.grad).detach().double()
        axes = product.flatten(0, -2).sum(0) if isinstance(layer, nn.Linear) else product.sum((0, 2, 3))
        total.index_add_(0, m.root, axes[m.index])
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return total


CASES = [
    ("ResNet-18", "layer2.0.conv1"),
    ("ResNet-18", "layer2.0.conv2"),  # a residual stream: several producers and readers
    ("MobileNetV2", "features.2.conv.0.0"),  # depthwise
    ("ViT", "encoder.layers.encoder_layer_0.mlp.0"),  # [B, T, C]
    ("LeNet", "c3.0"),  # linear after flatten
    ("grouped", "a"),
]


@pytest.mark.parametrize(("net", "name"), CASES)
def test_scores_are_squares_of_activation_times_gradient(net: str, name: str) -> None:
    model, graph, x, y = network(net, count=6)
    graph = only(graph, name)
    samples = [by_hand(model, graph, name, x[i : i + 1], y[i : i + 1]) for i in range(6)]
    expected = torch.stack(samples).square().mean(0)
    scores = importance(model, graph, "taylor", [(x[:4], y[:4]), (x[4:], y[4:])], cross_entropy)[name]
    assert expected.max() > 0
    # samples one by one take other kernels than batches do: rounding of float32
    assert torch.allclose(scores, expected, rtol=2e-3, atol=1e-4 * float(expected.max()))


def test_batch_granularity_squares_the_sum_of_a_batch() -> None:
    model, graph, x, y = network("SmallCNN", count=6)
    name = "layers.conv3"
    parts = [(x[:4], y[:4]), (x[4:], y[4:])]
    expected = torch.stack([by_hand(model, graph, name, *part) for part in parts]).square().mean(0)
    scores = importance(model, graph, Taylor(granularity="batch"), parts, cross_entropy)[name]
    assert torch.allclose(scores, expected, rtol=1e-4, atol=1e-5 * float(expected.max()))


def test_scores_are_the_loss_differences_that_a_small_change_of_a_channel_makes() -> None:
    model, graph, x, y = network("SmallCNN", count=2)
    model, x, step = model.double(), x.double(), 1e-6
    scores = importance(model, graph, "taylor", [(x, y)], cross_entropy)["layers.conv4"]
    for j in (0, 5):
        squares = []
        for i in range(2):
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    gate = torch.ones(16, dtype=torch.float64)
                    gate[j] += sign * step
                    model.layers.conv5.weight.data *= gate[None, :, None, None]  # its reader
                    ends.append(float(cross_entropy(model, (x[i : i + 1], y[i : i + 1]))))
                    model.layers.conv5.weight.data /= gate[None, :, None, None]
            squares.append(((ends[0] - ends[1]) / (2 * step)) ** 2)
        assert scores[j].item() == pytest.approx(sum(squares) / 2, rel=1e-5)


def test_frozen_layers_score_as_trainable_ones() -> None:
    model, graph, x, y = network("SmallCNN", count=4)
    free = importance(model, graph, "taylor", [(x, y)], cross_entropy)
    model.requires_grad_(False)
    frozen = importance(model, graph, "taylor", [(x, y)], cross_entropy)
    assert all(torch.equal(free[name], frozen[name]) for name in free)
    assert all(bool(scores.any()) for scores in frozen.values())


def test_batches_of_one_sample_make_no_difference() -> None:
    model, graph, x, y = network("LeNet", count=4)
    together = importance(model, graph, "taylor", [(x, y)], cross_entropy)
    singly = importance(model, graph, "taylor", [(x[i : i + 1], y[i : i + 1]) for i in range(4)], cross_entropy)
    for name, scores in together.items():
        assert torch.allclose(scores, singly[name], rtol=1e-3, atol=1e-5 * float(scores.max()))


def test_loss_that_is_no_scalar_is_refused() -> None:
    model, graph, x, y = network("SmallCNN", count=4)
    with pytest.raises(ValueError, match=r"expected loss_fn\(model, batch\) to give one number.*got \[4\]"):
        importance(
            model, graph, "taylor", [(x, y)], lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1], reduction="none")
        )


def test_loss_that_does_not_run_the_model_is_refused() -> None:
    model, graph, x, y = network("SmallCNN", count=4)
    with pytest.raises(ValueError, match=r"does not depend on any prunable channel, or is detached"):
        importance(model, graph, "taylor", [(x, y)], lambda m, b: m(b[0]).sum().detach())


class Folded(nn.Module):
    """Rows of an image as samples: the first dimension is not the batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x.flatten(0, 1)).relu()).reshape(*x.shape[:2], -1).mean(1)


def test_network_that_folds_its_batch_is_told_to_use_whole_batches() -> None:
    model, x, y = Folded(), torch.randn(3, 7, 5), torch.tensor([0, 1, 2])
    graph = ChannelGraph.from_model(model, x)
    with pytest.raises(ValueError, match=r'b: 3 gates per sample for a batch of 21.*use Taylor\(granularity="batch"\)'):
        importance(model, graph, "taylor", [(x, y)], cross_entropy)
    assert importance(model, graph, Taylor(granularity="batch"), [(x, y)], cross_entropy)["a"].any()
    singly = [(x[i : i + 1], y[i : i + 1]) for i in range(3)]
    assert importance(model, graph, "taylor", singly, cross_entropy)["a"].any()
