"""A backbone cut into stages: the answers are those of the backbone, and samples that left cost nothing more."""

from __future__ import annotations

import copy
import math
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision.models as zoo
from exit_networks import (
    CLASSES,
    Masked,
    Overwrites,
    Reused,
    SequenceFirst,
    SkipAround,
    SmallNormNet,
    chain,
    masked_inputs,
)
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from lightning_eff.batch import call_model, take
from lightning_eff.early_exit.attaching.features import BatchDim
from lightning_eff.early_exit.inference.leaving import ExitOutput, select_from_all
from lightning_eff.early_exit.inference.policies import policy_from
from lightning_eff.early_exit.inference.stages import CutError, Stages, cut_stages
from lightning_eff.early_exit.network import MultiExitNetwork


def rows(*shape: int) -> Callable[[int], Tensor]:
    return lambda batch: torch.randn(batch, *shape, generator=torch.Generator().manual_seed(7))


def vision_transformer() -> nn.Module:
    return zoo.VisionTransformer(
        image_size=32, patch_size=8, num_layers=4, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=CLASSES
    )


def torchvision_model(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(zoo, name)(num_classes=CLASSES, **options)


# name -> backbone, exits, inputs of so many samples
SMALL: dict[str, tuple[Callable[[], nn.Module], list[str], Callable[[int], Any]]] = {
    "chain": (chain, ["1", "3"], rows(4)),
    "skip around an exit": (SkipAround, ["a", "b"], rows(4)),
    "sequence first": (SequenceFirst, ["layers.0", "layers.1"], rows(5, 3)),
    "masks by keyword": (Masked, ["blocks.0", "blocks.1"], masked_inputs),
    "second call": (Reused, ["block@1", "block@2"], rows(4)),
    "overwritten feature": (Overwrites, ["a"], rows(4)),
    "norms and dropout": (SmallNormNet, ["stem", "body"], rows(1, 8, 8)),
    "vision transformer": (vision_transformer, [f"encoder.layers.encoder_layer_{i}" for i in (0, 2)], rows(3, 32, 32)),
    "resnet": (torchvision_model("resnet18"), ["layer1", "layer2", "layer3"], rows(3, 32, 32)),
}
LARGE: dict[str, tuple[Callable[[], nn.Module], list[str], Callable[[int], Any]]] = {
    "convnext": (torchvision_model("convnext_tiny"), ["features.1", "features.3", "features.5"], rows(3, 32, 32)),
    "swin": (torchvision_model("swin_t"), ["features.1", "features.3", "features.5.2"], rows(3, 64, 64)),
    "densenet": (
        torchvision_model("densenet121"),
        ["features.denseblock1", "features.denseblock3.denselayer5"],
        rows(3, 64, 64),
    ),
    "mobilenet": (torchvision_model("mobilenet_v3_small"), ["features.2", "features.5", "features.9"], rows(3, 64, 64)),
    "efficientnet": (
        torchvision_model("efficientnet_b0"),
        ["features.2", "features.4", "features.6.1"],
        rows(3, 64, 64),
    ),
    "googlenet": (
        torchvision_model("googlenet", aux_logits=False, init_weights=False),
        ["inception3a", "inception4b", "inception4d"],
        rows(3, 64, 64),
    ),
}
ALL = [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)]
_cuts: dict[str, tuple[nn.Module, Stages]] = {}
_networks: dict[str, tuple[MultiExitNetwork, Callable[[int], Any]]] = {}


def case(name: str) -> tuple[nn.Module, list[str], Callable[[int], Any]]:
    torch.manual_seed(1)
    build, exits, inputs = {**SMALL, **LARGE}[name]
    return build().eval(), exits, inputs


def cut(name: str) -> tuple[nn.Module, Stages, Callable[[int], Any]]:
    """The cut of a backbone, made once for all tests that leave it as it is."""
    backbone, exits, inputs = case(name)
    if name not in _cuts:
        _cuts[name] = backbone, cut_stages(backbone, exits, *arguments(inputs(3)))
    return *_cuts[name], inputs


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})


@torch.no_grad()
def run(stages: Stages, inputs: Any) -> Any:
    live = stages.inputs(*arguments(inputs))
    for k in range(len(stages) - 1):
        _, live = stages[k](*live)
    return stages[len(stages) - 1](*live)


def network(name: str) -> tuple[MultiExitNetwork, Callable[[int], Any]]:
    """A network on stages, made once: tests set policy and thresholds as they want them."""
    if name not in _networks:
        backbone, exits, inputs = case(name)
        net = MultiExitNetwork(backbone, exits, CLASSES, example_input=inputs(3), engine="staged")
        net.stages(arguments(inputs(3)))
        _networks[name] = net, inputs
    net, inputs = _networks[name]
    net.policy = policy_from("max_prob")
    return net, inputs


def predict(network: MultiExitNetwork, inputs: Any) -> ExitOutput:
    args, kwargs = arguments(inputs)
    return network.predict(*args, **kwargs)


@torch.no_grad()
def outputs(network: MultiExitNetwork, inputs: Any) -> list[Tensor]:
    return call_model(network.eval(), inputs)


def draw_thresholds(network: MultiExitNetwork, full: list[Tensor], generator: torch.Generator) -> None:
    """Set each threshold half-way between two scores of the samples, to what fires always, or to what never does."""
    thresholds, state = [], None
    for k, logits in enumerate(full[:-1]):
        scores, state = network.rule.score(logits, k, state)
        scores = scores.unique()
        between = [-math.inf, *((scores[1:] + scores[:-1]) / 2).tolist(), math.inf]
        thresholds.append(between[int(torch.randint(len(between), (), generator=generator))])
    network.score_thresholds.copy_(torch.tensor(thresholds))


# What stages compute


@pytest.mark.parametrize("name", ALL)
def test_stages_one_after_the_other_give_what_the_backbone_gives(name):
    backbone, stages, inputs = cut(name)
    for batch in (1, 2, 7):
        with torch.no_grad():
            expected = call_model(backbone, inputs(batch))
        torch.testing.assert_close(run(stages, inputs(batch)), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["resnet", "norms and dropout", *(c for c in ALL if not isinstance(c, str))])
def test_stages_take_images_with_channels_last(name):
    backbone, stages, inputs = cut(name)
    images = inputs(4).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        torch.testing.assert_close(run(stages, images), backbone(images), rtol=1e-4, atol=1e-4)


def test_cuts_carry_what_later_stages_read_and_know_its_batch_dimension():
    first = BatchDim(0, 1)
    assert cut("chain")[1].batch_dims == [[first]] * 3
    assert cut("skip around an exit")[1].batch_dims == [[first], [first], [first, first]]
    assert cut("sequence first")[1].batch_dims == [[first], [BatchDim(1, 1)], [BatchDim(1, 1)]]
    carried = cut("masks by keyword")[1].batch_dims[1]  # hidden states, padding, and a mask with two rows a sample
    assert sorted(carried) == [first, first, BatchDim(0, 2)]


def test_features_come_with_the_batch_first():
    _, stages, inputs = cut("sequence first")
    feature, (carried,) = stages[0](*stages.inputs((inputs(4),)))
    assert feature.shape == (4, 5, 8)
    assert torch.equal(feature, carried.transpose(0, 1))


def test_what_has_no_batch_is_carried_whole():
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.a, self.b = nn.Parameter(torch.randn(4)), nn.Linear(4, 4), nn.Linear(4, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            table = self.scale.exp()
            return self.b(self.a(x * table) * table)

    backbone, inputs = Table().eval(), rows(4)(6)
    stages = cut_stages(backbone, ["a"], (inputs,))
    assert stages.batch_dims[1] == [None, BatchDim(0, 1)]
    torch.testing.assert_close(run(stages, inputs), backbone(inputs).detach())


def test_sizes_computed_from_the_batch_size_are_those_of_who_is_left():
    class Means(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(2, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            batch, half = x.shape[0], x.shape[0] * 2
            return self.b(self.a(x).reshape(half, 2).reshape(batch, 2, -1).mean(1))

    backbone, inputs = Means().eval(), rows(4)(6)
    stages = cut_stages(backbone, ["a"], (inputs,))
    _, live = stages[0](*stages.inputs((inputs,)))
    got = stages[1](*stages.select(1, live, torch.tensor([4])))
    torch.testing.assert_close(got, backbone(inputs)[4:5])


def test_memory_shared_by_two_carried_tensors_may_be_written_into():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.a(x)
            left = hidden[:, :2]
            out = self.b(hidden)
            left.add_(1)  # seen through hidden too
            return self.c(out + hidden + left.sum(1, keepdim=True))

    backbone, inputs = Shared().eval(), rows(4)(6)
    stages = cut_stages(backbone, ["b"], (inputs,))
    _, live = stages[0](*stages.inputs((inputs,)))
    keep = torch.tensor([1, 3])
    torch.testing.assert_close(stages[1](*stages.select(1, live, keep)), backbone(inputs)[keep])


def test_training_and_loading_need_no_new_cut():
    backbone, exits, inputs = case("norms and dropout")
    stages = cut_stages(backbone, exits, (inputs(3),))
    backbone.train()
    optimizer = torch.optim.SGD(backbone.parameters(), 0.1)
    backbone(inputs(8)).square().sum().backward()  # statistics of the norms move too
    optimizer.step()
    backbone.eval()
    torch.testing.assert_close(run(stages, inputs(3)), backbone(inputs(3)).detach())
    for assign in (False, True):
        torch.manual_seed(5 + assign)
        backbone.load_state_dict(SmallNormNet().state_dict(), assign=assign)
        torch.testing.assert_close(run(stages, inputs(3)), backbone(inputs(3)).detach())
    with torch.no_grad(), pytest.raises(CutError, match=r"cut for an input .*float32.* got .*float64"):
        run(stages, inputs(3).double())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_copies_read_their_own_parameters(copied):
    backbone, exits, inputs = case("skip around an exit")
    stages = cut_stages(backbone, exits, (inputs(3),))
    before = run(stages, inputs(3))
    other, other_stages = copied((backbone, stages))
    with torch.no_grad():
        other.c.bias.add_(1)
    torch.testing.assert_close(run(other_stages, inputs(3)), before + 1)
    assert torch.equal(run(stages, inputs(3)), before)


def test_cutting_leaves_the_backbone_as_it_was():
    backbone = SmallNormNet().train()
    backbone.body.eval()
    before, generator = copy.deepcopy(backbone.state_dict()), torch.random.get_rng_state()
    cut_stages(backbone, ["stem"], (rows(1, 8, 8)(2),))
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    assert [module.training for module in (backbone, backbone.stem, backbone.body)] == [True, True, False]
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert all(not module._forward_hooks for module in backbone.modules())


# What cannot be cut, and why


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x)
        if hidden.sum() > 0:
            hidden = -hidden
        return self.b(hidden)


class Centred(Branches):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x)
        return self.b(hidden - hidden.mean(0))


class Noisy(Branches):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(nn.functional.dropout(self.a(x), 0.5, training=True))


class Pairs(Branches):
    def forward(self, x: Tensor) -> Tensor:
        similar = x @ x.T
        return self.b(self.a(x) * similar.sum(1, keepdim=True))


class FixedSize(Branches):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).view(5, 4))


class Closed(Branches):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            hidden = self.a(x)
        return self.b(hidden)


@pytest.mark.parametrize(
    ("backbone", "exits", "message"),
    [
        (
            Branches,
            ["a"],
            "Branches cannot be cut into stages: torch.export cannot write it as one graph.*if hidden.sum",
        ),
        (FixedSize, ["a"], "FixedSize cannot be cut"),
        (Centred, ["a"], "answer differs from the backbone's by .*: a layer mixes samples"),
        (Noisy, ["a"], "or is random in evaluation mode"),
        (Pairs, ["a"], r"a tensor of shape .* goes around an exit: samples.* cannot be told apart"),
        (Closed, ["a"], "found none of them.*under autocast"),
        (SkipAround, ["b", "a"], "pass the exits b, a once and in this order, found a, b"),
        (Reused, ["block"], "found block, block, block"),
        (Reused, ["idle"], "found none of them: what is missing does not run"),
    ],
)
def test_what_cannot_be_cut_is_an_error_with_the_reason(backbone, exits, message):
    torch.manual_seed(0)
    with pytest.raises(CutError, match=f"(?s){message}"):
        cut_stages(backbone(), exits, (rows(4)(3),))


def test_inputs_of_another_kind_are_refused():
    _, stages, inputs = cut("masks by keyword")
    good = inputs(3)
    assert stages.fit((), good)
    assert stages.fit((), inputs(9))
    for other, message in (
        ({"tokens": good["tokens"]}, r"cut for arguments \(\(\), {'tokens': '...', 'mask': '...'}\), got others"),
        ({**good, "mask": good["mask"][:2]}, r"expected one batch size in all inputs, got \[2, 3\]"),
        ({**good, "tokens": good["tokens"][:, :5]}, r"cut for an input \[6\] of torch.int64 on cpu .*, got \[5\]"),
    ):
        assert not stages.fit((), other)
        with pytest.raises(CutError, match=message):
            stages.inputs((), other)
    with pytest.raises(CutError, match="got an empty batch"):
        cut_stages(chain(), ["1"], (torch.zeros(0, 4),))


def test_arguments_may_be_given_in_any_order():
    backbone, stages, inputs = cut("masks by keyword")
    tokens, mask = inputs(4)["tokens"], inputs(4)["mask"]
    with torch.no_grad():
        torch.testing.assert_close(run(stages, {"mask": mask, "tokens": tokens}), backbone(tokens, mask))
    again = cut_stages(backbone, ["blocks.0"], (), {"mask": mask, "tokens": tokens})
    with torch.no_grad():
        torch.testing.assert_close(run(again, {"tokens": tokens, "mask": mask}), backbone(tokens, mask))


# Samples leave between stages


@pytest.mark.parametrize("policy", ["max_prob", "entropy", "margin", "patience"])
@pytest.mark.parametrize("name", ["chain", "skip around an exit", "sequence first", "masks by keyword", "second call"])
def test_answers_are_those_chosen_from_all_outputs(name, policy):
    net, inputs = network(name)
    net.policy = policy_from(policy)
    everything, generator = inputs(64), torch.Generator().manual_seed(0)
    full = outputs(net, everything)
    seen = set()
    for batch in (0, 1, 2, 7, 64):
        for _ in range(6):
            draw_thresholds(net, full, generator)
            expected = select_from_all(net.rule, [logits[:batch] for logits in full])
            got = predict(net, take(everything, slice(0, batch)))
            assert got.exit_index.tolist() == expected.exit_index.tolist()
            torch.testing.assert_close(got.logits, expected.logits, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(got.confidence, expected.confidence, rtol=1e-5, atol=1e-5)
            seen |= set(got.exit_index.tolist())
    assert seen == set(range(net.num_outputs))


@pytest.mark.parametrize("name", ["resnet", "vision transformer", *(c for c in ALL if not isinstance(c, str))])
def test_answers_of_large_backbones_are_those_chosen_from_all_outputs(name):
    net, inputs = network(name)
    images, generator = inputs(12), torch.Generator().manual_seed(1)
    full = outputs(net, images)
    for batch in (1, 12):
        draw_thresholds(net, full, generator)
        expected = select_from_all(net.rule, [logits[:batch] for logits in full])
        got = predict(net, images[:batch])
        assert got.exit_index.tolist() == expected.exit_index.tolist()
        torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["chain", "skip around an exit", "resnet"])
def test_operations_are_the_sum_of_what_each_sample_should_cost(name):
    net, inputs = network(name)
    everything, generator = inputs(32), torch.Generator().manual_seed(3)
    full = outputs(net, everything)
    seen = set()
    for _ in range(4):
        draw_thresholds(net, full, generator)
        with FlopCounterMode(display=False) as counter:
            answer = predict(net, everything)
        costs = net.costs.totals([net.rule.enabled(k) for k in range(net.num_exits)])
        assert counter.get_total_flops() == sum(costs[k] for k in answer.exit_index.tolist())
        seen |= set(answer.exit_index.tolist())
    assert len(seen) > 1


def let_some_leave(net: MultiExitNetwork, inputs: Any) -> None:
    """Half of the samples leave at each exit."""
    for k, logits in enumerate(outputs(net, inputs)[:-1]):
        net.score_thresholds[k] = net.rule.score(logits, k, None)[0].median() + 1e-6


def test_a_failing_head_leaves_nothing_behind(monkeypatch):
    net, inputs = network("skip around an exit")
    let_some_leave(net, inputs(8))
    expected = predict(net, inputs(8))
    with monkeypatch.context() as patch:
        patch.setattr(net.heads[1], "forward", lambda feature: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            predict(net, inputs(8))
    assert torch.equal(predict(net, inputs(8)).logits, expected.logits)


def test_threads_get_their_own_answers():
    net, inputs = network("skip around an exit")
    everything = inputs(64)
    let_some_leave(net, everything)
    parts = [everything[i::4] for i in range(4)]
    expected = [predict(net, part) for part in parts]
    wrong = []

    def work(i: int) -> None:
        for _ in range(20):
            if not torch.equal(predict(net, parts[i]).logits, expected[i].logits):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len({k for answer in expected for k in answer.exit_index.tolist()}) > 1


def test_dict_results_keep_their_structure():
    backbone, stages, inputs = cut("masks by keyword")
    got = run(stages, inputs(2))
    assert list(got) == ["logits", "hidden"]
    assert all(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(got))
    assert backbone is stages.backbone
