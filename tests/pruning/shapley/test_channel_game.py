"""The value of a coalition is the value of the network that is really cut down to it."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from channel_networks import NETWORKS, coalitions, network, randomised, samples
from magnitude import digits
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_eff.batch import call_model, take
from lightning_eff.models import LeNet
from lightning_eff.pruning import Accuracy, ChannelGame, GameOptions, NegativeLoss, Samples
from lightning_eff.shapley import ExactShapley, GroupedGame
from lightning_eff.surgery import ChannelGraph, PruningPlan, apply_plan


def cut_down(model: nn.Module, graph: ChannelGraph, name: str, coalition: Tensor, x: Tensor) -> nn.Module:
    smaller = copy.deepcopy(model)
    apply_plan(smaller, PruningPlan({name: coalition.nonzero().flatten().tolist()}), x, graph=graph)
    return smaller.eval()


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return sum(int(row.argmax()) == int(label) for row, label in zip(logits, labels, strict=True)) / len(labels)


def negative_loss(logits: Tensor, labels: Tensor) -> float:
    rows = zip(logits.double(), labels, strict=True)
    return float(sum(row[label] - row.logsumexp(0) for row, label in rows)) / len(labels)


@pytest.mark.parametrize("value", ["accuracy", "neg_loss"])
@pytest.mark.parametrize(("name", "group"), NETWORKS)
def test_value_of_a_coalition_is_that_of_the_cut_network(name: str, group: str, value: Any) -> None:
    model, graph, inputs, labels = network(name)
    game = ChannelGame(model, graph, group, samples(inputs, labels), value=value)
    some = coalitions(game.n_players)
    expected = []
    for coalition in some:
        with torch.no_grad():
            logits = cut_down(model, graph, group, coalition, inputs)(inputs)
        expected.append(accuracy(logits, labels) if value == "accuracy" else negative_loss(logits, labels))
    # float32: logits of cut and masked network differ by rounding
    assert game(some).tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert len(set(expected)) > 1


@pytest.mark.parametrize(("name", "group"), NETWORKS)
def test_prefix_changes_no_bit(name: str, group: str) -> None:
    model, graph, inputs, labels = network(name)
    given = samples(inputs, labels)
    games = [
        ChannelGame(model, graph, group, given, value="neg_loss", options=GameOptions(accelerate=how))
        for how in ("prefix", "off")
    ]
    some = coalitions(games[0].n_players)
    assert torch.equal(games[0](some), games[1](some))


def test_without_memory_the_values_are_the_same() -> None:
    model, graph, inputs, labels = network("LeNet")
    given = samples(inputs, labels, groups=3)
    plenty, none = (
        ChannelGame(model, graph, "c3.0", given, value="neg_loss", options=GameOptions("remove", "prefix", None, size))
        for size in (512, 0)
    )
    some = coalitions(20)
    assert torch.equal(plenty(some), none(some))
    assert torch.equal(plenty(some), none(some))  # from tapes, and recorded once more
    assert (len(plenty._known), len(none._known)) == (3, 0)


def test_nobody_left_is_the_network_with_zeros() -> None:
    model, graph, inputs, labels = network("LeNet")
    game = ChannelGame(model, graph, "f6", samples(inputs, labels), value="neg_loss")
    nothing = model.out.bias.detach().expand(len(labels), -1)
    assert game(torch.zeros(1, 25, dtype=torch.bool)).item() == pytest.approx(negative_loss(nothing, labels), rel=1e-6)


def test_weighted_mean_over_groups_is_the_value() -> None:
    model, graph, inputs, labels = network("LeNet", count=13)
    game = ChannelGame(model, graph, "c1.0", samples(inputs, labels, groups=4), value="neg_loss")
    some = coalitions(10)
    assert isinstance(game, GroupedGame)
    assert game.group_weights.sum().item() == pytest.approx(1)
    assert sorted((13 * game.group_weights).tolist()) == pytest.approx([3, 3, 3, 4])
    by_group = torch.stack([game.call_group(g, some) for g in range(game.n_groups)])
    assert torch.allclose(game.group_weights @ by_group, game(some), rtol=1e-12)
    assert not torch.allclose(by_group[0], by_group[1])


def test_a_group_sees_its_samples_only() -> None:
    model, graph, inputs, labels = network("LeNet", count=12)
    game = ChannelGame(model, graph, "c1.0", samples(inputs, labels, groups=3), value="neg_loss")
    alone = ChannelGame(model, graph, "c1.0", samples(inputs[4:8], labels[4:8], groups=1), value="neg_loss")
    assert torch.allclose(game.call_group(1, coalitions(10)), alone(coalitions(10)), rtol=1e-6)


def test_pre_norm_equals_zeroed_weight_and_bias_before_the_norm() -> None:
    model, graph, inputs, labels = network("ResNet-18")
    options = GameOptions(removal="pre_norm")
    game = ChannelGame(model, graph, "layer1.0.conv1", samples(inputs, labels), value="neg_loss", options=options)
    some = coalitions(64)
    expected = []
    for coalition in some:
        zeroed = copy.deepcopy(model)
        zeroed.layer1[0].conv1.weight.data[~coalition] = 0
        with torch.no_grad():
            expected.append(negative_loss(zeroed(inputs), labels))
    assert game(some).tolist() == pytest.approx(expected, rel=1e-5)


def test_mean_puts_the_calibration_mean_in_the_place_of_a_channel() -> None:
    model, graph, inputs, labels = network("LeNet", count=13)
    options = GameOptions(removal="mean")
    game = ChannelGame(model, graph, "c3.0", samples(inputs, labels, groups=3), value="neg_loss", options=options)
    some = torch.cat([coalitions(20), torch.zeros(1, 20, dtype=torch.bool)])
    with torch.no_grad():
        maps = model.c3(model.c1(inputs))  # [B, C, 4, 4]; every position is an input of its own of the next layer
        expected = [
            negative_loss(
                model.out(model.f6(model.c5(torch.where(one[:, None, None], maps, maps.mean(0)).flatten(1)))), labels
            )
            for one in some
        ]
    assert game(some).tolist() == pytest.approx(expected, rel=1e-5)


def test_mean_of_a_convolution_is_over_samples_and_positions() -> None:
    model, graph, inputs, labels = network("LeNet")
    options = GameOptions(removal="mean")
    game = ChannelGame(model, graph, "c1.0", samples(inputs, labels, groups=3), value="neg_loss", options=options)
    some = coalitions(10)
    with torch.no_grad():
        maps = model.c1(inputs)
        means = maps.mean((0, 2, 3))[:, None, None].expand(maps.shape[1:])
        expected = []
        for one in some:
            x = model.c3(torch.where(one[:, None, None], maps, means)).flatten(1)
            expected.append(negative_loss(model.out(model.f6(model.c5(x))), labels))
    assert game(some).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("removal", ["remove", "pre_norm", "mean"])
def test_scoring_leaves_no_trace(removal: Any) -> None:
    model, graph, inputs, labels = network("ResNet-18")
    model.train()
    model.layer1.eval()
    model.layer3[0].conv1.weight.requires_grad_(False)
    before = copy.deepcopy(model)
    modes = [m.training for m in model.modules()]
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    expected = torch.rand(3), np.random.rand(), random.random()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    game = ChannelGame(model, graph, "layer2.0.conv1", samples(inputs, labels), options=GameOptions(removal=removal))
    game(coalitions(128))
    found = torch.rand(3), np.random.rand(), random.random()
    assert torch.equal(found[0], expected[0])
    assert found[1:] == expected[1:]
    assert [m.training for m in model.modules()] == modes
    for key, value in before.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in before.parameters()]
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in model.modules())


def test_interrupted_scoring_leaves_no_trace() -> None:
    model, graph, inputs, labels = network("LeNet")
    model.train()

    def interrupt(outputs: Tensor, target: Tensor) -> Tensor:
        raise KeyboardInterrupt

    game = ChannelGame(model, graph, "c3.0", samples(inputs, labels), value=interrupt)
    with pytest.raises(KeyboardInterrupt):
        game(coalitions(20))
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in model.modules())


def test_dropout_and_batch_statistics_have_no_part() -> None:
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(6, 4, 3)]
    model = randomised(nn.Sequential(*body, nn.Flatten(), nn.Linear(64, 4))).train()
    x, y = torch.randn(8, 3, 8, 8), torch.randint(0, 4, (8,))
    game = ChannelGame(model, ChannelGraph.from_model(model, x), "0", samples(x, y), value="neg_loss")
    everybody = torch.ones(2, 6, dtype=torch.bool)
    with torch.no_grad():
        expected = negative_loss(copy.deepcopy(model).eval()(x), y)
    assert game(everybody).tolist() == pytest.approx([expected, expected], rel=1e-6)


class TwoInputs(nn.Module):
    """Takes two tensors by name, gives a dict."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right, self.head = nn.Linear(4, 6), nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.left(image).relu() * self.right(text).sigmoid())}


def two_inputs() -> tuple[TwoInputs, ChannelGraph, dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = {"text": torch.randn(10, 5, generator=generator), "image": torch.randn(10, 4, generator=generator)}
    model = TwoInputs()
    return model, ChannelGraph.from_model(model, inputs), inputs, torch.arange(10) % 3


@pytest.mark.parametrize(("value", "by_hand"), [(Accuracy, accuracy), (NegativeLoss, negative_loss)])
def test_dict_inputs_and_dict_outputs(value: type, by_hand: Callable[[Tensor, Tensor], float]) -> None:
    model, graph, inputs, labels = two_inputs()
    game = ChannelGame(model, graph, "right", samples(inputs, labels, groups=3), value=value(output="logits"))
    some = coalitions(6)
    expected = []
    for coalition in some:
        with torch.no_grad():
            outputs = call_model(cut_down(model, graph, "left", coalition, take(inputs, slice(0, 2))), inputs)
        expected.append(by_hand(outputs["logits"], labels))
    assert game(some).tolist() == pytest.approx(expected, rel=1e-5)


def test_dict_output_without_a_key_says_what_to_do() -> None:
    model, graph, inputs, labels = two_inputs()
    game = ChannelGame(model, graph, "left", samples(inputs, labels))
    with pytest.raises(TypeError, match=r"got a dict with \['logits'\]: pass value=Accuracy\(output="):
        game(coalitions(6))


def test_autocast_is_open_during_evaluation() -> None:
    model, graph, inputs, labels = network("LeNet")
    seen = []

    def value(outputs: Tensor, target: Tensor) -> Tensor:
        seen.append(outputs.dtype)
        return outputs.sum(1)

    def autocast() -> Any:
        return torch.autocast("cpu", torch.bfloat16)

    ChannelGame(model, graph, "c3.0", samples(inputs, labels), value=value, autocast=autocast)(coalitions(20))
    assert set(seen) == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["stacked", "none", "number"])
def test_value_that_is_not_one_per_sample_is_refused(kind: str) -> None:
    model, graph, inputs, labels = network("LeNet")
    wrong = {"stacked": lambda o, t: o, "none": lambda o, t: None, "number": lambda o, t: o.mean()}[kind]
    game = ChannelGame(model, graph, "c3.0", samples(inputs, labels), value=wrong)
    with pytest.raises(ValueError, match=r"one value per sample \[6\], got"):
        game(coalitions(20))


def test_unknown_names_are_refused() -> None:
    model, graph, inputs, labels = network("LeNet")
    with pytest.raises(KeyError, match=r"c3\.0"):
        ChannelGame(model, graph, "c3", samples(inputs, labels))
    with pytest.raises(ValueError, match='expected value "accuracy", "neg_loss" or a callable'):
        ChannelGame(model, graph, "c3.0", samples(inputs, labels), value="f1")  # type: ignore[arg-type]


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="groups must be a whole number >= 1, got 0"):
        GameOptions(groups=0)
    with pytest.raises(ValueError, match="max_memory_mb must be >= 0, got -1"):
        GameOptions(max_memory_mb=-1)


def test_shapley_values_share_out_what_the_layer_is_worth() -> None:
    train, _ = digits()
    images, labels = next(iter(train))
    torch.manual_seed(0)
    model = LeNet(channels=(6, 6, 12, 8), image_size=16)
    x = F.interpolate(images, 16)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(15):
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
    model.eval()
    graph = ChannelGraph.from_model(model, x)
    for value in ("accuracy", "neg_loss"):
        game = ChannelGame(model, graph, "c1.0", samples(x, labels, groups=2), value=value)  # type: ignore[arg-type]
        worth = game(torch.tensor([[True] * 6, [False] * 6]))
        phi = ExactShapley().estimate(game).values
        assert float(phi.sum()) == pytest.approx(float(worth[0] - worth[1]), abs=1e-9)
        assert float(worth[0] - worth[1]) > 0.3


# Values on outputs, by hand


def test_accuracy_and_loss_of_classes_by_hand() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 1.0]])
    labels = torch.tensor([0, 0, 0])
    assert Accuracy()(logits, labels).tolist() == [1, 0, 1]
    # log(1 + exp(other - right))
    expected = [-np.log1p(np.exp(d)) for d in (-2.0, 1.0, -2.0)]
    assert NegativeLoss()(logits, labels).tolist() == pytest.approx(expected, rel=1e-6)


def test_accuracy_and_loss_of_pixels_are_means_over_the_image() -> None:
    logits = torch.zeros(2, 3, 2, 2)
    logits[0, 1], logits[1, 2] = 1.0, 1.0
    labels = torch.tensor([[[1, 1], [1, 0]], [[0, 0], [0, 2]]])
    assert Accuracy()(logits, labels).tolist() == [0.75, 0.25]
    whole = np.log(2 + np.e)  # the sum of exp over the three classes
    assert NegativeLoss()(logits, labels).tolist() == pytest.approx([0.75 - whole, 0.25 - whole], rel=1e-6)


@pytest.mark.parametrize("value", [Accuracy, NegativeLoss])
def test_output_names_a_key_or_a_position(value: type) -> None:
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    plain = value()(logits, labels)
    assert torch.equal(value(output="y")({"x": 1, "y": logits}, labels), plain)
    assert torch.equal(value(output=1)((None, logits), labels), plain)


@pytest.mark.parametrize("value", [Accuracy(), NegativeLoss()])
def test_outputs_that_are_no_tensor_are_refused(value: Callable[[Any, Tensor], Tensor]) -> None:
    with pytest.raises(TypeError, match=r"got a tuple: pass value=Accuracy\(output=...\) or NegativeLoss"):
        value((torch.randn(2, 3),), torch.tensor([0, 1]))


@pytest.mark.parametrize("target", [(4, 1), (4, 3), (3,), (4, 2, 2)])
def test_accuracy_refuses_labels_that_do_not_fit(target: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected logits \[B, K, ...\] and labels \[B, ...\], got \[4, 3\]"):
        Accuracy()(torch.randn(4, 3), torch.zeros(target, dtype=torch.int64))


def test_accuracy_refuses_logits_without_classes() -> None:
    with pytest.raises(ValueError, match=r"got \[4\] and \[4\]"):
        Accuracy()(torch.randn(4), torch.zeros(4))


class Hungry(nn.Module):
    """Runs out of memory on batches above a size."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.a, self.b, self.most = nn.Linear(4, 6), nn.Linear(6, 3), most

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.most:
            raise torch.OutOfMemoryError(f"no room for {len(x)}")
        return self.b(torch.relu(self.a(x)))


def test_batches_are_halved_when_memory_runs_out_and_the_error_comes_through_after_five_times() -> None:
    torch.manual_seed(0)
    model = Hungry(most=1000)
    x, y = torch.randn(128, 4), torch.randint(0, 3, (128,))
    graph = ChannelGraph.from_model(model, x[:2])
    coalitions = torch.rand(5, 6) < 0.5
    samples = Samples.collect([(x, y)], 128, lambda batch: batch, groups=1)
    expected = ChannelGame(model, graph, "a", samples)(coalitions)
    model.most = 20  # 128 -> 16
    assert torch.equal(ChannelGame(model, graph, "a", samples)(coalitions), expected)
    model.most = 3  # 128 -> 4
    with pytest.raises(torch.OutOfMemoryError, match="no room for 4"):
        ChannelGame(model, graph, "a", samples)(coalitions)
    assert not any(module._forward_pre_hooks for module in model.modules())
