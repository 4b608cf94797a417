"""Empirical sensitivity against a loop over samples, outputs, patches and signs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from channel_networks import network
from criteria_networks import only
from networks import build
from torch import Tensor, nn

from lightning_eff.pruning.criteria import EmpiricalSensitivity, importance, sensitivity
from lightning_eff.pruning.criteria.sensitivity import largest_shares
from lightning_eff.surgery import ChannelGraph


def naive(layer: nn.Module, x: Tensor, parts: list[list[int]]) -> list[float]:
    """Runs the layer itself with all inputs but those of a part set to zero, for each combination of signs."""
    layer = layer.double()
    weight, bias, x = layer.weight.detach().clone(), layer.bias, x.double()
    layer.bias = None
    largest = [0.0] * len(parts)
    channels_last = isinstance(layer, nn.Linear)
    for weight_sign in (1, -1):
        for input_sign in (1, -1):
            layer.weight.data = (weight_sign * weight).clamp(min=0)
            values = (input_sign * x).clamp(min=0)
            with torch.no_grad():
                sums = layer(values).flatten().tolist()
                for r, part in enumerate(parts):
                    alone = torch.zeros_like(values)
                    where = (..., part) if channels_last else (slice(None), part)
                    alone[where] = values[where]
                    terms = layer(alone).flatten().tolist()
                    for term, total in zip(terms, sums, strict=True):
                        if total > 0:
                            largest[r] = max(largest[r], term / total)
    layer.weight.data, layer.bias = weight, bias
    return largest


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv": (lambda: nn.Conv2d(4, 5, 3, stride=2, padding=1), (2, 4, 7, 6)),
    "dilated": (lambda: nn.Conv2d(4, 3, 3, dilation=2, padding="same"), (2, 4, 6, 6)),
    "reflect": (lambda: nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect"), (2, 4, 5, 5)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 3, 3, stride=2, output_padding=1), (2, 4, 3, 3)),
    "grouped transposed": (lambda: nn.ConvTranspose2d(4, 6, 2, groups=2), (2, 4, 3, 3)),
    "one dimension": (lambda: nn.Conv1d(4, 3, 3), (2, 4, 8)),
    "three dimensions": (lambda: nn.Conv3d(4, 2, 2), (2, 4, 3, 3, 3)),
    "linear": (lambda: nn.Linear(4, 3), (5, 4)),
    "tokens": (lambda: nn.Linear(4, 3), (2, 6, 4)),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("parts", [[[0], [1], [2], [3]], [[2], [1]], [[3, 0], [1, 2]]])
def test_shares_are_those_of_a_loop(kind: str, parts: list[list[int]]) -> None:
    torch.manual_seed(0)
    layer, x = LAYERS[kind][0](), torch.randn(LAYERS[kind][1])
    expected = naive(layer, x, parts)
    index = torch.tensor([i for part in parts for i in part])
    root = torch.tensor([r for r, part in enumerate(parts) for _ in part])
    got = largest_shares(layer, x.double(), index, root).tolist()
    assert got == pytest.approx(expected, rel=1e-9)


def test_terms_held_at_a_time_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(6, 5, 3, groups=1), torch.randn(7, 6, 5, 5).double()
    index, part = torch.tensor([5, 0, 2, 1, 4, 3]), torch.tensor([0, 1, 0, 2, 2, 3])
    whole = largest_shares(layer.double(), x, index, part)
    for terms in (1, 100, 300, 1000):
        monkeypatch.setattr(sensitivity, "_CHUNK", terms)
        assert torch.allclose(largest_shares(layer, x, index, part), whole)


def test_only_input_of_a_layer_has_a_share_of_one_and_a_dead_one_of_zero() -> None:
    torch.manual_seed(0)
    single = nn.Conv2d(1, 3, 3)
    assert largest_shares(single, torch.randn(2, 1, 5, 5), torch.tensor([0]), torch.tensor([0])).item() == 1
    layer = nn.Conv2d(3, 4, 3)
    layer.weight.data[:, 1] = 0
    index = torch.arange(3)
    assert largest_shares(layer, torch.rand(2, 3, 5, 5), index, index)[1] == 0
    silent = torch.rand(2, 3, 5, 5)
    silent[:, 2] = 0
    assert largest_shares(layer, silent, index, index).tolist()[1:] == [0, 0]
    assert largest_shares(layer, torch.zeros(2, 3, 5, 5), index, index).tolist() == [0, 0, 0]  # 0/0 counts as 0


def test_hand_example_of_two_channels() -> None:
    layer = nn.Linear(2, 1)
    layer.weight.data = torch.tensor([[1.0, 2.0]])
    # terms (3, 2) and (1, 8): shares 3/5 and 8/9
    x = torch.tensor([[3.0, 1.0], [1.0, 4.0]])
    shares = largest_shares(layer, x, torch.arange(2), torch.arange(2)).tolist()
    assert shares == pytest.approx([3 / 5, 8 / 9])


@pytest.mark.parametrize(
    ("net", "name"),
    [
        ("ResNet-18", "layer2.0.conv2"),
        ("MobileNetV2", "features.2.conv.0.0"),
        ("ViT", "encoder.layers.encoder_layer_0.mlp.0"),
        ("concat-flatten", "a"),
        ("concat-flatten", "c"),
        ("grouped", "a"),
        ("transposed", "down"),
    ],
)
def test_scores_are_the_largest_shares_over_all_readers(net: str, name: str) -> None:
    model, x = build(net)
    model.eval()
    graph = only(ChannelGraph.from_model(model, x), name)
    x = x[..., :16, :16] if net in ("ResNet-18", "MobileNetV2") else x
    group, seen = graph.groups[name], {}
    paths = {m.path for m in group.consumers}
    for path in paths:
        model.get_submodule(path).register_forward_hook(lambda m, args, out, path=path: seen.update({path: args[0]}))
    scores = importance(model, graph, "es", [(x[:2], None), (x[2:], None)])[name]
    model(x)
    expected = torch.zeros(group.size, dtype=torch.float64)
    for m in group.consumers:
        layer = model.get_submodule(m.path)
        reads = seen[m.path].detach()
        some = list(range(group.size))[:3]
        parts = [m.index[m.root == j].tolist() for j in some]
        shares = naive(layer, reads, parts)
        expected[some] = torch.maximum(expected[some], torch.tensor(shares, dtype=torch.float64))
        layer.float()
    assert scores[:3].tolist() == pytest.approx(expected[:3].tolist(), rel=1e-3)
    assert bool(((scores >= 0) & (scores <= 1)).all())
    assert scores.max() > 0


def test_readers_are_brought_together_as_asked() -> None:
    model, graph, x, y = network("squeeze-excite", count=4)
    graph = only(graph, "conv", "squeeze")
    most = importance(model, graph, "es", [(x, y)])
    mean = importance(model, graph, EmpiricalSensitivity(reduction="mean"), [(x, y)])
    assert torch.equal(most["squeeze"], mean["squeeze"])  # a single reader
    assert (mean["conv"] != most["conv"]).any()
