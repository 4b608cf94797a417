"""Exits on any backbone: attaching, all outputs, and leaving by hooks."""

from __future__ import annotations

import copy
import math
import pickle
import threading
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torchvision
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
from torch.utils.flop_counter import FlopCounterMode

from lightning_eff.batch import call_model, take
from lightning_eff.early_exit.calibration import Calibration
from lightning_eff.early_exit.inference.leaving import ExitOutput, select_from_all
from lightning_eff.early_exit.network import MultiExitNetwork

INPUTS = torch.randn(64, 4, generator=torch.Generator().manual_seed(3))


def small(**options: Any) -> MultiExitNetwork:
    torch.manual_seed(0)
    return MultiExitNetwork(chain(), ["1", "3"], CLASSES, example_input=INPUTS[:2], **options)


def predict(network: MultiExitNetwork, inputs: Any) -> ExitOutput:
    return network.predict(**inputs) if isinstance(inputs, dict) else network.predict(inputs)


def outputs(network: MultiExitNetwork, inputs: Any) -> list[Tensor]:
    with torch.no_grad():
        return call_model(network.eval(), inputs)


def leave_some(network: MultiExitNetwork, inputs: Any, share: float = 0.5) -> None:
    """Set thresholds half-way between two scores, so that rounding decides nothing."""
    thresholds = []
    for logits in outputs(network, inputs)[:-1]:
        scores = logits.softmax(-1).amax(-1).sort().values
        at = int((1 - share) * len(scores))
        thresholds.append(scores[at - 1 : at + 1].mean().item())
    network.set_thresholds(thresholds)


def assert_answers_are_those_of_the_full_network(network: MultiExitNetwork, inputs: Any, batches: Any) -> None:
    full = outputs(network, inputs)
    for batch in batches:
        expected = select_from_all(network.rule, [logits[:batch] for logits in full])
        got = predict(network, take(inputs, slice(0, batch)))
        assert got.exit_index.tolist() == expected.exit_index.tolist()
        # reductions of other batch sizes round differently, hence not bit for bit
        torch.testing.assert_close(got.logits, expected.logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got.confidence, expected.confidence, rtol=1e-5, atol=1e-5)


# Attaching


class FixedHead(nn.Module):
    """A head that draws no random weights."""

    def forward(self, feature: Tensor) -> Tensor:
        return feature[:, :CLASSES]


def test_backbone_keeps_identity_keys_and_values():
    backbone = chain()
    before = copy.deepcopy(backbone.state_dict())
    generator = torch.random.get_rng_state()
    network = MultiExitNetwork(backbone, ["1", "3"], CLASSES, head=lambda shape, classes: FixedHead())
    network.build(INPUTS)
    assert network.backbone is backbone
    assert torch.equal(torch.random.get_rng_state(), generator)
    inside = {k.removeprefix("backbone."): v for k, v in network.state_dict().items() if k.startswith("backbone.")}
    assert list(inside) == list(before)
    assert all(torch.equal(inside[k], before[k]) for k in before)
    assert torch.equal(backbone(INPUTS), chain()(INPUTS))


def test_dry_runs_leave_modes_buffers_and_norm_statistics_alone():
    backbone = SmallNormNet().train()
    backbone.body.eval()
    before = copy.deepcopy(backbone.state_dict())
    MultiExitNetwork(backbone, ["stem"], CLASSES, example_input=torch.randn(4, 1, 8, 8))
    assert all(torch.equal(backbone.state_dict()[k], before[k]) for k in before)
    assert backbone.training
    assert backbone.stem.training
    assert not backbone.body.training
    assert all(p.grad is None for p in backbone.parameters())


def test_exits_are_sorted_by_execution_and_said_so(caplog):
    with caplog.at_level("INFO"):
        network = MultiExitNetwork(chain(), ["3", "1"], CLASSES, example_input=INPUTS)
    assert network.exits == ("1", "3")
    assert "exits in the order in which they run: 1, 3" in caplog.text


def test_number_of_exits_spreads_them_over_the_cost():
    # multiply-adds: 32, 64, 64, 40 of 200; targets 1/3 and 2/3 are nearest to 96 and 160 of 200
    network = MultiExitNetwork(chain(), 2, CLASSES, example_input=INPUTS)
    assert [f"{f:.2f}" for f in network.costs.backbone] == ["192.00", "320.00", "400.00"]


def test_fractions_of_the_cost_choose_the_nearest_blocks():
    network = MultiExitNetwork(torchvision.models.resnet18(num_classes=CLASSES), [0.3, 0.8], CLASSES)
    network.build(torch.randn(2, 3, 64, 64))
    shares = [cost / network.costs.base for cost in network.costs.backbone[:2]]
    assert network.exits == ("layer1", "layer3")
    assert shares == pytest.approx([0.3, 0.8], abs=0.05)


def test_more_exits_than_places_is_an_error():
    with pytest.raises(ValueError, match="found 3 places for 9 exits"):
        MultiExitNetwork(chain(), 9, CLASSES, example_input=INPUTS)


def test_a_layer_without_work_before_it_is_no_place_for_a_spread_exit():
    network = MultiExitNetwork(nn.Sequential(nn.Identity(), *chain()), 1, CLASSES, example_input=INPUTS)
    assert network.exits != ("0",)


@pytest.mark.parametrize(
    ("exits", "message"),
    [
        ([], "expected names of layers"),
        ("layer1", "expected names of layers"),
        (0, "expected a number of exits >= 1"),
        (True, "expected a number of exits >= 1"),
        (["1", "1"], "expected every exit once, got 1 more than once"),
        ([0.5, 1.0], r"fractions of the cost in \(0, 1\)"),
        (["1", 0.5], "not both"),
        (["11"], "no layer '11'; close names: 1"),
        (["1@2"], "layer '1' is executed 1 times"),
    ],
)
def test_exits_that_cannot_be_are_told(exits, message):
    with pytest.raises(ValueError, match=message):
        MultiExitNetwork(chain(), exits, CLASSES, example_input=INPUTS)


class Odd(nn.Module):
    """Layers that return what no head can read."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.words, self.table, self.folded, self.scalar = Say("word"), Say("table"), Say("folded"), Say("scalar")
        self.out = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        self.words(x), self.table(x), self.folded(x), self.scalar(x)
        return self.out(x)


class Say(nn.Module):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> Any:
        made = {"word": "text", "table": torch.ones(3, 3), "folded": x.repeat(2, 1), "scalar": x.sum(1)}
        return made[self.what]


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("words", "returns no tensor"),
        ("table", r"no batch dimension, its shape is \(3, 3\) for a batch of 2 and \(3, 3\) for a batch of 3"),
        ("folded", "2 rows a sample"),
        ("scalar", "has no features"),
    ],
)
def test_layers_no_head_can_read_are_refused_with_their_shapes(layer, message):
    with pytest.raises(ValueError, match=f"no exit can stand on layer '{layer}'.*{message}"):
        MultiExitNetwork(Odd(), [layer], CLASSES, example_input=INPUTS)


def test_reused_layer_needs_the_number_of_the_call():
    with pytest.raises(ValueError, match="executed 3 times in one forward: say which, for example 'block@2'"):
        MultiExitNetwork(Reused(), ["block"], CLASSES, example_input=INPUTS)
    network = MultiExitNetwork(Reused(), ["block@2", "block@1"], CLASSES, example_input=INPUTS)
    assert network.exits == ("block@1", "block@2")
    leave_some(network, INPUTS)
    assert_answers_are_those_of_the_full_network(network, INPUTS, (1, 7, 64))
    first, second = network.features(INPUTS)[:2]
    assert torch.equal(first, network.backbone.block(INPUTS))
    assert torch.equal(second, network.backbone.block(first))


def test_layer_that_does_not_run_is_refused():
    with pytest.raises(ValueError, match="'idle' is not executed"):
        MultiExitNetwork(Reused(), ["idle"], CLASSES, example_input=INPUTS)


def test_other_number_of_classes_than_the_backbone_is_told_with_both():
    with pytest.raises(ValueError, match=r"num_classes=7\], for a batch of two it returned \(2, 5\)"):
        MultiExitNetwork(chain(), ["1"], 7, example_input=INPUTS)


def test_exit_behind_all_work_is_allowed_with_a_warning():
    backbone = nn.Sequential(nn.Linear(4, CLASSES), nn.Identity())
    with pytest.warns(UserWarning, match="nothing is computed behind exit '0'"):
        MultiExitNetwork(backbone, ["0"], CLASSES, example_input=INPUTS)


def test_network_without_exits_built_says_what_to_do():
    network = MultiExitNetwork(chain(), ["1"], CLASSES)
    for call in (network, network.predict, network.features, network.forward_heads):
        with pytest.raises(ValueError, match="give example_input, or call build"):
            call(INPUTS)
    network.build(INPUTS)
    with pytest.raises(ValueError, match="built already"):
        network.build(INPUTS)


def test_removed_exits_leave_the_backbone_as_it_came():
    network = small()
    backbone = network.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in backbone.modules())
    assert not network.built
    assert network.build(INPUTS).exits == ("1", "3")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "fast"}, "engine must be one of auto, hooks, staged, off, got 'fast'"),
        ({"clone_features": "no"}, "clone_features must be one of True, False, auto, got"),
        ({"thresholds": [0.5]}, "expected 2 thresholds, one an exit, got 1"),
        ({"thresholds": math.nan}, "threshold"),
        ({"policy": "sure"}, "policy"),
    ],
)
def test_options_that_cannot_be_are_told_before_anything_runs(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


# Structure, copies, threads


def test_structure_puts_a_network_together_without_data():
    network = small(head="mlp")
    again = MultiExitNetwork(chain(), 2, CLASSES, head="mlp").build_from(network.structure())
    again.load_state_dict(network.state_dict())
    assert again.exits == network.exits
    assert again.costs == network.costs
    assert all(torch.equal(a, b) for a, b in zip(again(INPUTS), network(INPUTS), strict=True))
    again.set_thresholds(0.25)
    network.set_thresholds(0.25)
    assert torch.equal(again.predict(INPUTS).exit_index, network.predict(INPUTS).exit_index)


def test_structure_of_other_exits_or_classes_is_refused_with_their_names():
    structure = small().structure()
    with pytest.raises(ValueError, match=r"missing here are \['3'\], only here are \['5'\]"):
        MultiExitNetwork(chain(), ["1", "5"], CLASSES).build_from(structure)
    with pytest.raises(ValueError, match="2 exits were saved, this network has 1"):
        MultiExitNetwork(chain(), 1, CLASSES).build_from(structure)
    with pytest.raises(ValueError, match="5 classes were saved, this network has 6"):
        MultiExitNetwork(chain(), 2, 6).build_from(structure)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network))])
def test_copies_have_hooks_of_their_own(copied):
    network = small(thresholds=0.25)
    other = copied(network)
    other.heads[0].layers.weight.data.zero_()
    other.heads[0].layers.bias.data.copy_(torch.tensor([9.0, 0, 0, 0, 0]))
    assert set(other.predict(INPUTS).exit_index.tolist()) == {0}
    assert set(network.predict(INPUTS).exit_index.tolist()) != {0}
    network.remove()
    assert set(other.predict(INPUTS).exit_index.tolist()) == {0}


def test_two_threads_predict_at_once_and_each_gets_its_own_answers():
    network = small(thresholds=0.25)
    parts = INPUTS.split(32)
    expected = [network.predict(part) for part in parts]
    found: list[list[ExitOutput]] = [[], []]
    start = threading.Barrier(2)

    def work(index: int) -> None:
        start.wait()
        found[index] = [network.predict(parts[index]) for _ in range(50)]

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, many in zip(expected, found, strict=True):
        assert len(many) == 50
        assert all(torch.equal(one.exit_index, got.exit_index) for got in many)
        assert all(torch.equal(one.logits, got.logits) for got in many)


def test_an_exception_in_a_head_leaves_nothing_behind():
    network = small(thresholds=0.25)
    expected = network.predict(INPUTS)
    good = network.heads[1].forward

    def broken(feature: Tensor) -> Tensor:
        raise ZeroDivisionError("mine")

    network.train()
    network.heads[1].forward = broken
    with pytest.raises(ZeroDivisionError, match="mine"):
        network.predict(INPUTS)
    assert network.training
    network.heads[1].forward = good
    assert torch.equal(network.predict(INPUTS).logits, expected.logits)
    assert torch.equal(network.backbone(INPUTS), chain()(INPUTS))


# All outputs


def test_forward_gives_the_logits_of_every_head_on_its_layer():
    network = small()
    first, second, last = network(INPUTS)
    backbone = network.backbone
    torch.testing.assert_close(first, network.heads[0](backbone[:2](INPUTS)), rtol=0, atol=0)
    torch.testing.assert_close(second, network.heads[1](backbone[:4](INPUTS)), rtol=0, atol=0)
    torch.testing.assert_close(last, backbone(INPUTS), rtol=0, atol=0)


def test_gradients_of_all_outputs_reach_backbone_and_heads():
    network = small()
    sum(logits.square().sum() for logits in network(INPUTS)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_forward_heads_trains_heads_alone_and_stops_after_the_last_exit():
    network = small()
    calls = []
    network.backbone[4].register_forward_hook(lambda *_: calls.append(1))
    logits = network.forward_heads(INPUTS)
    assert not calls
    for ours, all_of_them in zip(logits, network(INPUTS), strict=False):
        torch.testing.assert_close(ours, all_of_them, rtol=0, atol=0)
    sum(one.sum() for one in logits).backward()
    assert all(p.grad is None for p in network.backbone.parameters())
    assert all(p.grad is not None for p in network.heads.parameters())


@pytest.mark.parametrize("scaling", ["none", "equilibrium"])
def test_forward_compiles_to_one_graph(scaling):
    network = small()
    network.gradient_scaling = scaling
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(compiled(INPUTS), network(INPUTS), strict=True):
        torch.testing.assert_close(ours, eager)


def test_features_that_are_written_into_are_copied_for_the_head():
    x = INPUTS[:8]
    network = MultiExitNetwork(Overwrites(), ["a"], CLASSES, example_input=x)
    first = network(x)[0]
    torch.testing.assert_close(first, network.heads[0](network.backbone.a(x)), rtol=0, atol=0)
    sum(logits.sum() for logits in network(x)).backward()
    leave_some(network, INPUTS)
    assert_answers_are_those_of_the_full_network(network, INPUTS, (1, 64))


def test_features_first_written_into_in_training_are_found_there_too():
    class InTraining(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            x = self[0](x)
            return self[1](x.mul_(2) if self.training else 2 * x)

    backbone = InTraining(nn.Linear(4, 4), nn.Linear(4, CLASSES))
    network = MultiExitNetwork(backbone, ["0"], CLASSES, example_input=INPUTS).train()
    torch.testing.assert_close(network(INPUTS)[0], network.heads[0](backbone[0](INPUTS)), rtol=0, atol=0)
    sum(logits.square().sum() for logits in network(INPUTS)).backward()


# Leaving

NETWORKS: dict[str, Any] = {
    "sequential": (chain, ["1", "3"], INPUTS),
    "sequence first": (SequenceFirst, ["layers.0", "layers.1"], torch.randn(64, 2, 3)),
    "masks by keyword, tuples, dict output": (Masked, ["embed", "blocks.0", "blocks.1"], masked_inputs(64)),
    "batch norm": (SmallNormNet, ["stem", "body.0"], torch.randn(64, 1, 8, 8)),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_predict_equals_choosing_from_all_outputs(name, share):
    torch.manual_seed(0)
    build, exits, inputs = NETWORKS[name]
    network = MultiExitNetwork(build(), exits, CLASSES, example_input=take(inputs, slice(0, 4)))
    assert network.engine == "hooks"
    leave_some(network, inputs, share)
    counts = predict(network, inputs).exit_index.bincount(minlength=network.num_outputs)
    assert counts[0] > 0
    assert share > 0.5 or counts[-1] > 0
    assert_answers_are_those_of_the_full_network(network, inputs, (1, 2, 7, 64))


def vit() -> nn.Module:
    net = torchvision.models.VisionTransformer(
        image_size=16, patch_size=8, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=CLASSES
    )
    nn.init.normal_(net.heads.head.weight)  # zero at first, which would hide everything
    return net


MODELS = torchvision.models
VISION: dict[str, Any] = {
    "resnet18": (lambda: MODELS.resnet18(num_classes=CLASSES), ["layer1", "layer2", "layer3"], 32),
    "vit": (vit, ["encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1"], 16),
    "mobilenet_v3_small": (lambda: MODELS.mobilenet_v3_small(num_classes=CLASSES), 2, 32),
}
SLOW_VISION: dict[str, Any] = {
    "efficientnet_b0": (lambda: MODELS.efficientnet_b0(num_classes=CLASSES), 3, 32),
    "densenet121": (lambda: MODELS.densenet121(num_classes=CLASSES), 3, 32),
    "googlenet": (lambda: MODELS.googlenet(num_classes=CLASSES, aux_logits=False, init_weights=False), 2, 64),
    "convnext_tiny": (lambda: MODELS.convnext_tiny(num_classes=CLASSES), ["features.1", "features.3"], 32),
    "swin_t": (lambda: MODELS.swin_t(num_classes=CLASSES), ["features.1", "features.3"], 32),
    "resnet50": (lambda: MODELS.resnet50(num_classes=CLASSES), 4, 32),
}


@pytest.mark.parametrize("name", [*VISION, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_VISION)])
def test_samples_leave_torchvision_networks(name):
    torch.manual_seed(0)
    build, exits, side = {**VISION, **SLOW_VISION}[name]
    images = torch.randn(9, 3, side, side)
    network = MultiExitNetwork(build(), exits, CLASSES, example_input=images[:2])
    assert network.engine == "hooks"
    leave_some(network, images)
    assert_answers_are_those_of_the_full_network(network, images, (1, 2, 9))


@pytest.mark.parametrize("policy", ["max_prob", "entropy", "margin", "patience"])
def test_every_policy_leaves_as_it_would_choose_from_all(policy):
    network = small(policy=policy)
    network.set_thresholds({"max_prob": 0.25, "entropy": 1.55, "margin": 0.03, "patience": 1}[policy])
    got = network.predict(INPUTS).exit_index
    assert len(set(got.tolist())) > 1
    expected = select_from_all(network.rule, outputs(network, INPUTS))
    assert torch.equal(got, expected.exit_index)


def test_state_of_a_policy_travels_with_the_samples():
    def once_more(logits: Tensor, exit_index: int, state: Any) -> tuple[Tensor, Any]:
        seen = {"best": logits.amax(-1)} if state is None else {"best": torch.maximum(state["best"], logits.amax(-1))}
        return seen["best"], seen

    network = small(policy=once_more)
    network.set_thresholds([0.35, 0.3])
    expected = select_from_all(network.rule, outputs(network, INPUTS))
    assert len(set(expected.exit_index.tolist())) == 3
    assert torch.equal(network.predict(INPUTS).exit_index, expected.exit_index)


@pytest.mark.parametrize("fraction", [0.3, 0.7, 1.0])
def test_putting_off_the_copy_changes_no_answer(fraction):
    network = small()
    leave_some(network, INPUTS)
    expected = network.predict(INPUTS)
    rows = []
    network.backbone[2].register_forward_hook(lambda m, a, out: rows.append(len(out)))
    network.compact_min_fraction = fraction
    got = network.predict(INPUTS)
    assert rows == [64 if fraction > 0.5 else 32]
    assert torch.equal(got.exit_index, expected.exit_index)
    torch.testing.assert_close(got.logits, expected.logits)


def test_work_behind_an_exit_is_done_for_survivors_only():
    network = small()
    leave_some(network, INPUTS)
    rows: dict[str, int] = {"2": 0, "4": 0}
    for name in rows:
        network.backbone.get_submodule(name).register_forward_hook(
            lambda m, a, out, name=name: rows.__setitem__(name, len(out))
        )
    where = network.predict(INPUTS).exit_index
    assert rows == {"2": int((where > 0).sum()), "4": int((where > 1).sum())}
    assert 0 < rows["4"] < rows["2"] < 64


def test_operations_done_are_the_sum_of_the_costs_of_the_exits_taken():
    network = small()
    leave_some(network, INPUTS)
    with FlopCounterMode(display=False) as counter:
        where = network.predict(INPUTS).exit_index
    totals = network.costs.totals()
    assert counter.get_total_flops() == sum(totals[k] for k in where.tolist())


def test_all_leave_at_once_and_the_rest_does_not_run():
    network = small(thresholds=-math.inf)
    calls = []
    network.backbone[2].register_forward_hook(lambda *_: calls.append(1))
    for batch in (1, 5):
        answer = network.predict(INPUTS[:batch])
        assert answer.exit_index.tolist() == [0] * batch
        torch.testing.assert_close(answer.logits, outputs(network, INPUTS)[0][:batch])
    assert len(calls) == 2  # of the two passes that computed all outputs


def test_disabled_exits_are_not_computed():
    network = small()
    calls = []
    network.heads[0].register_forward_hook(lambda *_: calls.append(1))
    assert network.thresholds == [None, None]
    answer = network.predict(INPUTS)
    assert set(answer.exit_index.tolist()) == {2}
    assert torch.equal(answer.logits, network.backbone(INPUTS))
    network.set_thresholds([None, 0.25])
    assert set(network.predict(INPUTS).exit_index.tolist()) == {1, 2}
    assert not calls


def test_threshold_out_of_reach_disables_and_says_so(caplog):
    network = small()
    with caplog.at_level("INFO"):
        network.set_thresholds([1.5, 0.9])
    assert network.thresholds == [None, pytest.approx(0.9)]
    assert "these exits are disabled" in caplog.text


def test_thresholds_travel_in_the_state_dict_and_take_effect_at_once():
    network, other = small(thresholds=0.25), small()
    assert set(other.predict(INPUTS).exit_index.tolist()) == {2}
    other.load_state_dict(network.state_dict())
    assert other.thresholds == network.thresholds
    assert torch.equal(other.predict(INPUTS).exit_index, network.predict(INPUTS).exit_index)


def test_empty_batch_does_not_call_the_backbone():
    network = small(thresholds=0.25)
    network.backbone[0].register_forward_hook(lambda *_: pytest.fail("called"))
    answer = network.predict(INPUTS[:0])
    assert answer.logits.shape == (0, CLASSES)
    assert answer.exit_index.shape == answer.confidence.shape == (0,)


def test_predict_is_in_evaluation_mode_and_gives_the_modes_back():
    x = torch.randn(16, 1, 8, 8)
    network = MultiExitNetwork(SmallNormNet(), ["stem"], CLASSES, example_input=x)
    network.train()
    network.backbone.stem.eval()
    modes = [module.training for module in network.modules()]
    statistics = copy.deepcopy(dict(network.named_buffers()))
    first = network.predict(x)
    assert torch.equal(first.logits, network.predict(x).logits)  # no dropout
    assert not first.logits.requires_grad
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in network.named_buffers())


def test_not_finite_logits_never_leave_early_and_come_back_as_they_are():
    network = small(thresholds=0.0)
    x = INPUTS[:3].clone()
    x[1] = math.nan
    answer = network.predict(x)
    assert answer.exit_index.tolist() == [0, 2, 0]
    assert answer.logits[1].isnan().all()


def test_bfloat16_backbone_is_scored_in_float32():
    network = MultiExitNetwork(chain().bfloat16(), ["1"], CLASSES, example_input=INPUTS[:2].bfloat16())
    answer = network.predict(INPUTS.bfloat16())
    assert answer.logits.dtype == torch.bfloat16
    assert answer.confidence.dtype == torch.float32


# Self-check and engines


def test_skip_connection_around_an_exit_is_found_and_named():
    with pytest.raises(ValueError, match=r'engine="hooks" does not work.*exit \'b\'.*engine="staged" or "auto"'):
        MultiExitNetwork(SkipAround(), ["b"], CLASSES, example_input=INPUTS, engine="hooks")


def test_skip_that_broadcasts_with_one_survivor_is_found():
    class Broadcasts(SkipAround):
        def forward(self, x: Tensor) -> Tensor:
            before = torch.relu(self.a(x))
            after = torch.relu(self.b(before))
            return self.c(after + (before if len(after) in (1, len(x)) else before[: len(after)]))

    with pytest.raises(ValueError, match="exit 'b'"):
        MultiExitNetwork(Broadcasts(), ["b"], CLASSES, example_input=INPUTS, engine="hooks")


def test_wrong_rows_behind_a_last_layer_of_zeros_are_found():
    class Shifts(SkipAround):
        def forward(self, x: Tensor) -> Tensor:
            before = torch.relu(self.a(x))
            after = torch.relu(self.b(before))
            return self.c(torch.relu(self.a(after + before[: len(after)])))

    backbone = Shifts()
    nn.init.zeros_(backbone.c.weight)
    with pytest.raises(ValueError, match="exit 'b': the output of 'a' differs from that of a full batch"):
        MultiExitNetwork(backbone, ["b"], CLASSES, example_input=INPUTS, engine="hooks")


def test_self_check_reports_the_largest_difference():
    report = small().self_check(INPUTS)
    assert report.passed
    assert report.exits == ("1", "3")
    assert report.error < 1e-5


def test_spread_exits_avoid_places_samples_cannot_leave():
    backbone = nn.Sequential(nn.Linear(4, 4), SkipAround(), nn.Linear(CLASSES, CLASSES))
    network = MultiExitNetwork(backbone, 1, CLASSES, example_input=INPUTS)
    assert network.engine == "hooks"
    assert network.exits[0] in {"0", "1"}


def test_engine_off_computes_everything_and_answers_the_same():
    network, off = small(thresholds=0.25), small(thresholds=0.25, engine="off")
    assert off.engine == "off"
    rows = []
    off.backbone[4].register_forward_hook(lambda m, a, out: rows.append(len(out)))
    ours, reference = network.predict(INPUTS), off.predict(INPUTS)
    assert rows == [64]
    assert torch.equal(ours.exit_index, reference.exit_index)
    torch.testing.assert_close(ours.logits, reference.logits)


# What lies around


class OptionalMask(nn.Module):
    """Blocks that multiply by a mask if there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.b1, self.b2, self.out = MaskedBlock(), MaskedBlock(), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.out(self.b2(self.b1(x, mask), mask).mean(1))


class MaskedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, h: Tensor, mask: Tensor | None = None) -> Tensor:
        h = torch.tanh(self.linear(h))
        return h if mask is None else h * mask[..., None]


def test_inputs_the_example_had_not_are_refused_and_optional_ones_may_be_left_out():
    torch.manual_seed(0)
    x, mask = torch.randn(8, 3, 4), (torch.rand(8, 3) > 0.3).float()
    without = MultiExitNetwork(OptionalMask(), ["b1"], CLASSES, example_input=x, thresholds=0.25)
    with pytest.raises(ValueError, match=r"predict got mask, which the example had not .*\(x\)"):
        without.predict(x, mask)
    both = MultiExitNetwork(OptionalMask(), ["b1"], CLASSES, example_input=(x, mask))
    for inputs in ((x, mask), (x,)):
        full = [logits.detach() for logits in both.eval()(*inputs)]
        both.set_thresholds(float(full[0].softmax(-1).amax(-1).mean()))
        expected = select_from_all(both.rule, full)
        assert set(expected.exit_index.tolist()) == {0, 1}
        got = both.predict(*inputs)
        assert torch.equal(got.exit_index, expected.exit_index)
        torch.testing.assert_close(got.logits, expected.logits)


def test_rows_that_met_a_tensor_of_the_whole_batch_are_an_error():
    network = small()
    leave_some(network, INPUTS)
    whole = torch.zeros(64, 8)
    network.backbone[2].register_forward_hook(lambda m, a, out: out[:1] + whole)
    with pytest.raises(RuntimeError, match="64 rows came where 32 samples are left"):
        network.predict(INPUTS)


@pytest.mark.parametrize("part", ["", "1"])
def test_a_compiled_part_that_hides_an_exit_is_an_error_and_not_a_full_pass(part):
    network = small(thresholds=0.25)
    network.backbone.get_submodule(part).compile(backend="eager")
    with pytest.raises(RuntimeError, match="compiled alone"):
        network.predict(INPUTS)


def test_compiled_predict_answers_as_it_is():
    network = small(thresholds=0.25)
    expected = network.predict(INPUTS)
    assert torch.equal(torch.compile(network.predict, backend="eager")(INPUTS).exit_index, expected.exit_index)


@pytest.mark.parametrize(
    "move", [lambda n: n.bfloat16(), lambda n: n.half().float(), lambda n: nn.Sequential(n).double()]
)
def test_thresholds_and_temperatures_stay_float32_whatever_the_precision(move):
    network = small(thresholds=0.999)
    network.temperatures.fill_(1.001)
    move(network)
    assert network.score_thresholds.dtype == network.temperatures.dtype == torch.float32
    assert network.thresholds == [pytest.approx(0.999, abs=1e-7)] * 2
    assert network.rule.temperatures == [pytest.approx(1.001, abs=1e-7)] * 3


@pytest.mark.parametrize("policy", ["max_prob", "entropy"])
def test_what_calibration_found_is_put_in_as_it_is(policy):
    network = small(policy=policy)
    found = Calibration(
        (-1.2, math.inf) if policy == "entropy" else (0.4, math.inf), 1.0, 0.5, True, (1.0, 0, 0), "uniform"
    )
    network.set_thresholds(found)
    assert network.score_thresholds.tolist() == [pytest.approx(found.thresholds[0]), math.inf]
    assert network.thresholds[1] is None


def test_a_plain_object_with_logits_is_a_fine_output():
    @dataclass
    class Answer:
        logits: Tensor

    class Says(nn.Sequential):
        def forward(self, x: Tensor) -> Answer:
            return Answer(super().forward(x))

    network = MultiExitNetwork(Says(*chain()), ["1"], CLASSES, example_input=INPUTS)
    leave_some(network, INPUTS)
    assert_answers_are_those_of_the_full_network(network, INPUTS, (1, 64))


def test_names_of_first_calls_are_one_name():
    head = nn.Linear(8, CLASSES)
    network = MultiExitNetwork(chain(), {"1@1": head}, CLASSES, example_input=INPUTS)
    assert network.heads[0] is head
    again = MultiExitNetwork(chain(), ["1@1"], CLASSES).build_from(network.structure())
    assert again.exits == ("1",)
    with pytest.raises(ValueError, match="two names of one call"):
        MultiExitNetwork(chain(), ["1", "1@1"], CLASSES, example_input=INPUTS)
    with pytest.raises(ValueError, match="map names of layers to heads"):
        MultiExitNetwork(chain(), {0.5: "mlp"}, CLASSES, example_input=INPUTS)


def test_a_network_inside_of_another_leaves_the_exits_of_both_alone():
    class Last(nn.Module):
        def __init__(self, inner: MultiExitNetwork) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)[-1]

    inner = small()
    outer = MultiExitNetwork(Last(inner), ["inner.backbone.1"], CLASSES, example_input=INPUTS, engine="off")
    first, last = outer(INPUTS)
    torch.testing.assert_close(first, outer.heads[0](chain()[:2](INPUTS)))
    torch.testing.assert_close(last, chain()(INPUTS))


def test_heads_built_in_inference_mode_can_be_trained():
    backbone = chain()
    with torch.inference_mode():
        network = MultiExitNetwork(backbone, ["1", "3"], CLASSES, example_input=INPUTS.clone())
    sum(logits.sum() for logits in network(INPUTS)).backward()
    assert all(p.grad is not None for p in network.heads.parameters())


def test_state_of_a_policy_may_hold_more_than_tensors():
    def counted(logits: Tensor, exit_index: int, state: Any) -> tuple[Tensor, Any]:
        seen = 0 if state is None else state["seen"]
        return logits.softmax(-1).amax(-1), {"seen": seen + 1, "rows": logits[:, 0]}

    network = small(policy=counted)
    network.set_thresholds(0.3)
    expected = select_from_all(network.rule, outputs(network, INPUTS))
    assert torch.equal(network.predict(INPUTS).exit_index, expected.exit_index)


@pytest.mark.parametrize("example", [torch.zeros(8, 1, 6, 6), torch.ones(3, 1, 6, 6)])
def test_an_example_of_equal_samples_hides_no_mixing_of_samples(example):
    backbone = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten(), nn.Linear(64, CLASSES)
    )
    with pytest.raises(ValueError, match="exit '0'"):
        MultiExitNetwork(backbone, ["0"], CLASSES, example_input=example, engine="hooks")


@pytest.mark.parametrize("fraction", [-0.1, 1.1])
def test_fraction_of_deferred_copies_is_checked(fraction):
    with pytest.raises(ValueError, match=r"compact_min_fraction must lie in \[0, 1\]"):
        small(compact_min_fraction=fraction)


def test_summary_tells_where_exits_are_what_they_cost_and_how_samples_leave():
    line = small().summary()
    assert line == "2 exits: 1 (8,) at 36%, 3 (8,) at 88% of the cost; heads 90 parameters; engine hooks"
    one = MultiExitNetwork(chain(), ["1"], CLASSES, example_input=INPUTS[:2])
    assert one.summary().startswith("1 exit: 1 (8,)")


def test_a_head_of_another_width_than_the_classes_is_refused():
    with pytest.raises(ValueError, match=r"the head on '1' returned \(2, 8\) for a batch of two, expected \(2, 5\)"):
        small(head=lambda shape, classes: nn.Flatten())
