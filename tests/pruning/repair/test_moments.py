"""Moments are collected once, within memory, and nested factors give what separate solves give."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from networks import build
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_eff.batch import BatchKeys
from lightning_eff.pruning.repair import Moments, RepairError
from lightning_eff.pruning.repair.least_squares import Penalty, checked, substituted_back
from lightning_eff.pruning.repair.scatter import Scatter
from lightning_eff.surgery import ChannelGraph


def kept(order: Tensor, count: int) -> Tensor:
    mask = torch.zeros(len(order), dtype=torch.bool)
    mask[order[:count]] = True
    return mask


def inputs(x: Tensor, count: int = 64) -> Tensor:
    return torch.randn(count, *x.shape[1:], generator=torch.Generator().manual_seed(3))


def spread(graph: ChannelGraph, masks: dict[str, Tensor], path: str, length: int) -> Tensor:
    """Kept positions of a layer's input axis."""
    mask = torch.ones(length, dtype=torch.bool)
    for name, keep in masks.items():
        for m in graph.groups[name].consumers:
            if m.path == path:
                mask[m.index] = keep[m.root]
    return mask


@pytest.mark.parametrize("name", ["SmallCNN", "LeNet", "grouped", "squeeze-excite", "transposed", "ViT"])
@pytest.mark.parametrize("fit_bias", [True, False])
@pytest.mark.filterwarnings("ignore:fewer calibration rows")
def test_nested_factors_equal_direct_solves_for_every_number_of_channels(name: str, fit_bias: bool) -> None:
    model, x = build(name)
    graph = ChannelGraph.from_model(model, x)
    moments = Moments.collect(model, graph, [(inputs(x), None)])
    generator = torch.Generator().manual_seed(0)
    rankings = {group: torch.randperm(graph.groups[group].size, generator=generator) for group in graph.prunable}
    nested = moments.nested(rankings)
    for path, layer in moments.layers.items():
        group = next(n for n in graph.prunable if any(m.path == path for m in graph.groups[n].consumers))
        for count in range(1, graph.groups[group].size, 3):
            keep_in = spread(graph, {group: kept(rankings[group], count)}, path, layer.layout.inputs)
            expected = moments.solve(path, keep_in, fit_bias=fit_bias)
            found = nested.solve(path, keep_in, fit_bias=fit_bias)
            assert torch.allclose(found.weight, expected.weight, rtol=1e-5, atol=1e-5)
            assert found.relative_error == pytest.approx(expected.relative_error, abs=1e-6)
            if expected.bias is not None:
                assert torch.allclose(found.bias, expected.bias, rtol=1e-5, atol=1e-5)
    assert len(nested._factors) == len(moments.layers)  # one factor a layer


def test_kept_sets_that_are_not_the_best_of_the_ranking_are_solved_on_their_own() -> None:
    model, x = build("SmallCNN")
    graph = ChannelGraph.from_model(model, x)
    moments = Moments.collect(model, graph, [(inputs(x), None)])
    nested = moments.nested({"layers.conv1": torch.arange(8)})
    keep_in = kept(torch.tensor([7, 2, 0, 1, 3, 4, 5, 6]), 3)
    assert torch.equal(nested.solve("layers.conv2", keep_in).weight, moments.solve("layers.conv2", keep_in).weight)
    assert not nested._factors
    with pytest.raises(ValueError, match="expected a ranking to hold every channel once"):
        moments.nested({"layers.conv1": torch.zeros(8, dtype=torch.int64)})


def test_layer_that_reads_two_ranked_groups_is_solved_on_its_own() -> None:
    model, x = build("concat-flatten")
    graph = ChannelGraph.from_model(model, x)
    moments = Moments.collect(model, graph, [(inputs(x), None)])
    both = moments.nested({"a": torch.tensor([1, 0]), "b": torch.tensor([2, 0, 1])})
    keep_in = torch.tensor([False, True, False, False, True])
    expected = moments.solve("c", keep_in)
    assert torch.equal(both.solve("c", keep_in).weight, expected.weight)
    assert not both._factors
    one = moments.nested({"b": torch.tensor([2, 0, 1])})  # a stays whole: its columns come first
    keep_in = torch.tensor([True, True, False, False, True])
    expected = moments.solve("c", keep_in)
    assert torch.allclose(one.solve("c", keep_in).weight, expected.weight, atol=1e-6)
    assert len(one._factors) == 1


@pytest.mark.parametrize("columns", [1, 192, 193, 500])
def test_half_of_a_product_of_rows_with_themselves_gives_all_of_it(columns: int) -> None:
    rows = torch.randn(2, 300, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
    scatter = Scatter(torch.float64)
    for part in rows.split(100, 1):
        scatter.add(part, part)
    found = scatter.covariance()
    for block, expected in zip(found, (each.T.cov(correction=0) for each in rows), strict=True):
        assert torch.allclose(block, expected, atol=1e-12)


@pytest.mark.parametrize("count", [1, 192, 193, 500])
def test_part_of_a_factor_is_substituted_back_in_blocks(count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    lower = torch.randn(2, 512, 512, generator=generator, dtype=torch.float64).tril() / 32
    lower.diagonal(dim1=1, dim2=2).add_(2)
    part, right = lower[:, :count, :count], torch.randn(2, count, 7, generator=generator, dtype=torch.float64)
    found = substituted_back(part, right.clone())
    assert torch.allclose(part.transpose(1, 2) @ found, right, atol=1e-12)


def test_removed_outputs_are_left_out() -> None:
    model, x = build("grouped")
    graph = ChannelGraph.from_model(model, x)
    moments = Moments.collect(model, graph, [(inputs(x), None)])
    keep_in, keep_out = (
        torch.tensor([True, False, True, True] * 4),
        torch.tensor([False, True, True, False, True, True] * 4),
    )
    whole, part = moments.solve("b", keep_in), moments.solve("b", keep_in, keep_out)
    assert torch.allclose(part.weight, whole.weight[keep_out], atol=1e-6)
    assert torch.allclose(part.bias, whole.bias[keep_out], atol=1e-6)


def test_moments_do_not_depend_on_how_samples_are_batched_or_named() -> None:
    model, x = build("SmallCNN")
    graph = ChannelGraph.from_model(model, x)
    samples = inputs(x)
    one = Moments.collect(model, graph, [(samples, None)], positions=10**6)
    batches = [{"image": samples[:40], "label": None}, {"image": samples[40:], "label": None}]
    split = BatchKeys("image", "label")
    other = Moments.collect(model, graph, batches, split_batch=split, positions=10**6)
    for path, layer in one.layers.items():
        assert torch.allclose(other.layers[path].covariance, layer.covariance, rtol=1e-4, atol=1e-5)
        assert other.layers[path].count == layer.count
    fewer = Moments.collect(model, graph, [(samples, None)], positions=10**6, samples=40)
    half = Moments.collect(model, graph, [(samples[:40], None)], positions=10**6)
    assert torch.equal(fewer.layers["layers.conv3"].covariance, half.layers["layers.conv3"].covariance)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.b(input=F.relu(self.a(left + right)))  # the argument by its name


def test_dict_inputs_are_handed_over_by_keyword() -> None:
    torch.manual_seed(0)
    model, x = TwoInputs(), {"left": torch.randn(20, 3), "right": torch.randn(20, 3)}
    graph = ChannelGraph.from_model(model, x)
    split = BatchKeys(["left", "right"], "target")
    moments = Moments.collect(model, graph, [{**x, "target": torch.zeros(20)}], split_batch=split)
    seen = F.relu(model.a(x["left"] + x["right"])).detach()
    assert torch.allclose(moments.layers["b"].covariance[0].float(), seen.T.cov(correction=0), atol=1e-5)
    assert torch.allclose(moments.layers["b"].mean[0].float(), seen.mean(0), atol=1e-5)


def test_nothing_is_left_on_the_model() -> None:
    model, x = build("SmallCNN")
    model.train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    graph = ChannelGraph.from_model(model, x)
    state = torch.get_rng_state()
    Moments.collect(model, graph, [(inputs(x), None)])
    with pytest.raises(RuntimeError):
        Moments.collect(model, graph, [(torch.zeros(4, 2, 8, 8), None)])
    assert all(m.training and not m._forward_hooks for m in model.modules())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_depthwise_convolutions_have_nothing_to_solve() -> None:
    model, x = build("MobileNetV2")
    graph = ChannelGraph.from_model(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        moments = Moments.collect(model, graph, [(inputs(x, 8), None)])
    assert "features.2.conv.2" in moments.layers
    assert "features.2.conv.1.0" not in moments.layers  # the depthwise one
    assert not moments.skipped


class CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.c(torch.tanh(self.b(torch.tanh(self.b(x)))))


def hand_graph(model: nn.Module, x: Any, size: int, consumers: list[str]) -> ChannelGraph:
    members = [{"path": "a", "axis": "out", "index": list(range(size))}]
    members += [{"path": path, "axis": "in", "index": list(range(size))} for path in consumers]
    return ChannelGraph.from_dict({"groups": [{"name": "a", "size": size, "members": members}]}, model, x)


def test_every_call_of_a_layer_counts() -> None:
    torch.manual_seed(0)
    model, x = CalledTwice().double(), torch.randn(20, 3, dtype=torch.float64)
    moments = Moments.collect(model, hand_graph(model, x, 6, ["b"]), [(x, None)])
    with torch.no_grad():
        first = model.a(x)
        rows = torch.cat([first, torch.tanh(model.b(first))])
    assert moments.layers["b"].count == 40
    assert torch.allclose(moments.layers["b"].covariance[0], rows.T.cov(correction=0))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(self.a(x)), self.b.weight, self.b.bias)


class Standardised(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight / self.weight.std(1, keepdim=True), self.bias)


def test_layers_whose_output_is_not_what_their_weight_gives_are_skipped_and_named() -> None:
    torch.manual_seed(0)
    x = torch.randn(20, 3)
    model: nn.Module = Functional()
    with pytest.warns(UserWarning, match="some layers that lose inputs are not corrected: b: it was not called"):
        moments = Moments.collect(model, hand_graph(model, x, 6, ["b"]), [(x, None)])
    assert moments.skipped == {"b": "it was not called"}
    model = nn.Sequential()
    model.a, model.relu, model.b = nn.Linear(3, 6), nn.ReLU(), Standardised(6, 2)
    with pytest.warns(UserWarning, match="b: its output is not what its weight gives"):
        moments = Moments.collect(model, hand_graph(model, x, 6, ["b"]), [(x, None)])
    with pytest.raises(KeyError, match="no layer with moments named 'b'"):
        moments.solve("b", torch.ones(6, dtype=torch.bool))


def test_moments_that_do_not_fit_into_memory_are_taken_by_channel_largest_first() -> None:
    model, x = build("SmallCNN")
    graph = ChannelGraph.from_model(model, x)
    with pytest.warns(
        UserWarning, match=r"max_memory_mb=0\.3: layers\.conv5, layers\.conv4 are corrected channel by channel"
    ) as caught:
        moments = Moments.collect(model, graph, [(inputs(x), None)], max_memory_mb=0.3)
    assert len(caught) == 1
    assert moments.layers["layers.conv5"].layout.mode == "channel"
    assert moments.layers["layers.conv3"].layout.mode == "kernel"
    held = sum(layer.covariance.nbytes + layer.cross.nbytes for layer in moments.layers.values())
    assert held <= 0.3 * 2**20
    with pytest.warns(UserWarning, match="layers.conv5: its moments do not fit into 1e-06 MB"):
        Moments.collect(model, graph, [(inputs(x), None)], max_memory_mb=1e-6)


def test_too_few_rows_are_told_once_with_the_layers() -> None:
    model, x = build("SmallCNN")
    graph = ChannelGraph.from_model(model, x)
    with pytest.warns(
        UserWarning, match=r"fewer calibration rows than weights per output in layers\.conv2, layers\.conv3"
    ) as caught:
        Moments.collect(model, graph, [(inputs(x, 16), None)], positions=4)
    assert len(caught) == 1


def test_inputs_that_are_not_finite_are_told_with_the_layer() -> None:
    model, x = build("SmallCNN")
    graph = ChannelGraph.from_model(model, x)
    samples = inputs(x)
    samples[5, 0, 3, 3] = float("nan")
    moments = Moments.collect(model, graph, [(samples, None)])
    with pytest.raises(RepairError, match=r"layers\.conv2: its inputs are not all finite on the calibration samples"):
        moments.solve("layers.conv2", kept(torch.arange(8), 4))


def test_singular_moments_are_solved_without_a_ridge() -> None:
    """Two kept channels are the same: any split of the weight is right, a finite one must come out."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 2))
    model[0].weight.data[1], model[0].bias.data[1] = model[0].weight.data[0], model[0].bias.data[0]
    x = torch.randn(50, 3)
    moments = Moments.collect(model, ChannelGraph.from_model(model, x), [(x, None)])
    found = moments.solve("1", kept(torch.arange(6), 5), ridge=0)  # three inputs span all six channels
    output = model[0](x)[:, :5] @ found.weight.T + found.bias
    assert torch.allclose(output, model(x), atol=1e-3)


def test_inputs_that_are_all_zero_give_weights_of_zero() -> None:
    model = nn.Sequential(nn.Linear(3, 6, bias=False), nn.ReLU(), nn.Linear(6, 2))
    x = torch.zeros(50, 3)
    moments = Moments.collect(model, ChannelGraph.from_model(model, x), [(x, None)])
    found = moments.solve("2", kept(torch.arange(6), 3))
    assert torch.equal(found.weight, torch.zeros(2, 3))
    assert torch.allclose(found.bias, model[2].bias)
    assert found.relative_error == 0


@pytest.mark.parametrize(
    ("keep_in", "keep_out"), [(torch.ones(7), None), (torch.zeros(8), None), (torch.ones(8), torch.ones(1))]
)
def test_masks_that_do_not_fit_the_layer_are_refused(keep_in: Tensor, keep_out: Tensor | None) -> None:
    model, x = build("SmallCNN")
    moments = Moments.collect(model, ChannelGraph.from_model(model, x), [(inputs(x), None)])
    with pytest.raises(ValueError, match=r"layers.conv2: expected keep_(in|out) to be bool \[8\] that keeps at least"):
        moments.solve("layers.conv2", keep_in.bool(), None if keep_out is None else keep_out.bool())


def test_no_sample_is_an_error() -> None:
    model, x = build("SmallCNN")
    with pytest.raises(ValueError, match="expected at least one calibration sample, got none"):
        Moments.collect(model, ChannelGraph.from_model(model, x), [])


def test_moments_that_no_ridge_makes_positive_definite_name_the_layer() -> None:
    gram = torch.diag(torch.tensor([1.0, -1e6])).expand(1, 2, 2)
    with pytest.raises(RepairError, match=r"body: the second moments .* not positive definite, even .* ridge=0\.1"):
        Penalty(0.1, 1.0, torch.float32).factor(gram, "body")
    with pytest.raises(RepairError, match="body: the corrected weights are not finite; raise ridge"):
        checked(torch.tensor([1.0, torch.inf]), "body")
