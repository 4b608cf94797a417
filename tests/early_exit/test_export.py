"""What is written answers as the network does, stops as it does, and is there whole or not at all."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision.models as zoo
from exit_networks import CLASSES, Masked, SequenceFirst, SkipAround, SmallNormNet, chain, masked_inputs
from helpers import run_python
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_eff.batch import call_model, take
from lightning_eff.early_exit.inference import export
from lightning_eff.early_exit.inference.export import export_early_exit, load_early_exit
from lightning_eff.early_exit.inference.exported import VERSION, ExportedNetwork
from lightning_eff.early_exit.inference.leaving import ExitOutput, Rule, select_from_all
from lightning_eff.early_exit.inference.policies import policy_from
from lightning_eff.early_exit.inference.stages import CutError
from lightning_eff.early_exit.network import MultiExitNetwork

N = 64
VECTORS = torch.randn(N, 4, generator=torch.Generator().manual_seed(5))
CASES: dict[str, Any] = {
    "chain": (chain, ["1", "3"], VECTORS),
    "skip around an exit": (SkipAround, ["a", "b"], VECTORS),
    "sequence first": (lambda: SequenceFirst(2), ["layers.0"], torch.randn(N, 5, 3, generator=torch.manual_seed(6))),
    "masks by keyword": (Masked, ["blocks.0", "blocks.1"], masked_inputs(N)),
    "images": (SmallNormNet, ["stem", "body"], torch.randn(N, 1, 8, 8, generator=torch.manual_seed(7))),
}
ENDING = {"single": "net.pt2", "stages": "net.zip"}
both_modes = pytest.mark.parametrize("mode", ["single", "stages"])


def network(name: str, policy: str = "max_prob") -> tuple[MultiExitNetwork, Any, list[Tensor]]:
    """A network of which about half of the samples leave at each exit, its inputs, and the logits of all outputs."""
    torch.manual_seed(3)
    build, exits, inputs = CASES[name]
    net = MultiExitNetwork(build(), exits, CLASSES, example_input=take(inputs, slice(0, 2)))
    with torch.no_grad():
        full = call_model(net.eval(), inputs)
    let_half_leave(net, full, policy)
    return net, inputs, full


def let_half_leave(net: MultiExitNetwork, full: list[Tensor], policy: str = "max_prob") -> None:
    net.policy, state = policy_from(policy), None
    for k, logits in enumerate(full[:-1]):
        scores, state = net.rule.score(logits, k, state)
        middle = scores.sort().values[len(scores) // 2 - 1 : len(scores) // 2 + 1].mean()
        net.score_thresholds[k] = 1.0 if policy == "patience" else middle


def assert_round_trip(
    net: MultiExitNetwork, loaded: ExportedNetwork, inputs: Any, full: list[Tensor], sizes: Any = (0, 1, 2, 7, N)
) -> None:
    for size in sizes:
        got = answer(loaded, take(inputs, slice(0, size)))
        expected = select_from_all(net.rule, [logits[:size] for logits in full])
        assert got.exit_index.tolist() == expected.exit_index.tolist()
        torch.testing.assert_close(got.logits, expected.logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got.confidence, expected.confidence, rtol=1e-5, atol=1e-5)


def answer(loaded: ExportedNetwork, inputs: Any) -> ExitOutput:
    return loaded(**inputs) if isinstance(inputs, dict) else loaded(inputs)


@pytest.fixture(scope="module")
def written(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., tuple[MultiExitNetwork, Any, list[Tensor], Path]]:
    """Networks and the files they were written to, each once."""
    made: dict[Any, Any] = {}

    def write(name: str, mode: Any, policy: str = "max_prob") -> Any:
        if (name, mode, policy) not in made:
            net, inputs, full = network(name, policy)
            path = tmp_path_factory.mktemp("written") / ENDING[mode]
            assert export_early_exit(net, path, take(inputs, slice(0, 4)), mode) == path
            assert list(path.parent.iterdir()) == [path]
            made[name, mode, policy] = net, inputs, full, path
        return made[name, mode, policy]

    return write


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("skip around an exit", "single"),
        ("skip around an exit", "stages"),
        ("masks by keyword", "single"),
        ("sequence first", "stages"),
        pytest.param("masks by keyword", "stages", marks=pytest.mark.slow),
        pytest.param("sequence first", "single", marks=pytest.mark.slow),
        pytest.param("images", "single", marks=pytest.mark.slow),
        pytest.param("images", "stages", marks=pytest.mark.slow),
    ],
)
def test_what_is_loaded_answers_as_the_network(written, name, mode):
    net, inputs, full, path = written(name, mode)
    expected = select_from_all(net.rule, full)
    assert len(set(expected.exit_index.tolist())) == net.num_outputs
    assert_round_trip(net, load_early_exit(path), inputs, full)


@pytest.mark.parametrize(
    ("policy", "mode"), [("patience", "single"), ("patience", "stages"), ("entropy", "single"), ("margin", "stages")]
)
def test_policies_travel_with_their_state(written, policy, mode):
    net, inputs, full, path = written("skip around an exit", mode, policy)
    assert len(set(select_from_all(net.rule, full).exit_index.tolist())) > 1
    assert_round_trip(net, load_early_exit(path), inputs, full, (1, N))


@both_modes
@pytest.mark.parametrize("thresholds", [(math.inf, 0.22), (-math.inf, 0.5)])
def test_disabled_exits_are_left_out_and_open_ones_let_all_go(tmp_path, thresholds, mode):
    net, inputs, full = network("chain")
    net.score_thresholds.copy_(torch.tensor(thresholds))
    net.temperatures[1] = 0.5
    loaded = load_early_exit(export_early_exit(net, tmp_path / ENDING[mode], inputs[:3], mode))
    assert_round_trip(net, loaded, inputs, full, (1, N))


def test_operations_of_one_program_are_those_of_the_samples_and_one_spare_row(written):
    net, inputs, _, path = written("skip around an exit", "single")
    loaded, costs = load_early_exit(path), net.costs.totals()
    with FlopCounterMode(display=False) as counter:
        where = loaded(inputs).exit_index
    assert counter.get_total_flops() == sum(costs[k] for k in where.tolist()) + costs[-1]


def test_operations_of_stages_are_those_of_the_samples(written):
    net, inputs, _, path = written("skip around an exit", "stages")
    loaded, costs = load_early_exit(path), net.costs.totals()
    with FlopCounterMode(display=False) as counter:
        where = loaded(inputs).exit_index
    assert counter.get_total_flops() == sum(costs[k] for k in where.tolist())


def test_one_program_runs_without_this_package(written, tmp_path):
    net, inputs, full, path = written("skip around an exit", "single")
    torch.save((inputs, select_from_all(net.rule, full).exit_index), tmp_path / "expected.pt")
    run_python(
        "import sys, torch\n"
        "inputs, expected = torch.load('expected.pt')\n"
        f"logits, exits, confidence = torch.export.load({str(path)!r}).module()(inputs)\n"
        "assert torch.equal(exits, expected) and logits.shape == (64, 5) and confidence.dtype == torch.float32\n"
        "assert not any(name.startswith('lightning') for name in sys.modules)\n",
        cwd=tmp_path,
        fresh=True,
    )


def test_thresholds_of_stages_can_be_changed_after_loading(written):
    net, inputs, full, path = written("skip around an exit", "stages")
    loaded = load_early_exit(path)
    assert loaded.manifest["exits"] == ["a", "b"]
    assert loaded.manifest["thresholds"] == pytest.approx(net.score_thresholds.tolist())
    loaded.manifest["thresholds"] = [0.3, 0.4]
    other = replace(net.rule, thresholds=[0.3, 0.4])
    expected = select_from_all(other, full).exit_index
    assert loaded(inputs).exit_index.tolist() == expected.tolist()
    assert expected.tolist() != select_from_all(net.rule, full).exit_index.tolist()


def test_stages_hold_every_parameter_once(tmp_path):
    torch.manual_seed(0)
    wide = nn.Sequential(*(nn.Linear(128, 128) for _ in range(6)), nn.Linear(128, CLASSES))
    inputs = torch.randn(4, 128)
    net = MultiExitNetwork(wide, ["1", "3"], CLASSES, example_input=inputs, thresholds=0.5)
    path = export_early_exit(net, tmp_path / "net.zip", inputs, "stages")
    held = sum(parameter.numel() * 4 for parameter in net.parameters())
    assert held < path.stat().st_size < 1.6 * held


def test_a_sample_on_the_threshold_does_not_spoil_the_export(tmp_path):
    net, inputs, full = network("chain")
    net.score_thresholds[0] = net.rule.score(full[0], 0, None)[0][1]
    export_early_exit(net, tmp_path / "net.pt2", inputs[:3])


def test_exporting_leaves_the_network_as_it_was(tmp_path):
    net, inputs, _ = network("images")
    net.train()
    net.heads[0].eval()
    before, modes = copy.deepcopy(net.state_dict()), [module.training for module in net.modules()]
    export_early_exit(net, tmp_path / "net.pt2", inputs[:3])
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert [module.training for module in net.modules()] == modes


def test_a_file_that_answers_otherwise_is_not_left_behind(tmp_path, monkeypatch):
    net, inputs, _ = network("chain")
    for name in ("net.pt2", "net.zip"):
        (tmp_path / name).write_text("as it was")
    score = Rule.score

    def wrong_in_programs(rule, *rest):
        scores, state = score(rule, *rest)
        return (scores * 0 if torch.compiler.is_compiling() else scores), state

    monkeypatch.setattr(Rule, "score", wrong_in_programs)
    with (
        pytest.warns(UserWarning, match=r"is written in stages .* the exported network answers"),
        pytest.raises(RuntimeError, match="answers a batch of 1 otherwise than the network"),
    ):
        export_early_exit(net, tmp_path / "net.pt2", inputs[:3])
    assert [file.read_text() for file in tmp_path.iterdir()] == ["as it was"] * 2


def test_where_one_program_is_impossible_stages_are_written_and_it_is_told(tmp_path, monkeypatch):
    net, inputs, full = network("chain")
    monkeypatch.setattr(export._OneProgram, "run", lambda self, x: x if x.sum() > 0 else -x)
    with pytest.warns(
        UserWarning, match=r"is written in stages to .*net\.zip, not as one program: torch\.export cannot"
    ):
        path = export_early_exit(net, tmp_path / "net.pt2", inputs[:3])
    assert list(tmp_path.iterdir()) == [path] == [tmp_path / "net.zip"]
    assert_round_trip(net, load_early_exit(path), inputs, full, (N,))


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x)
        return self.b(hidden if hidden.isfinite().all() else hidden.nan_to_num())


def test_what_cannot_be_exported_writes_nothing(tmp_path):
    net = MultiExitNetwork(Branches(), ["a"], CLASSES, example_input=VECTORS, thresholds=0.25)
    with pytest.raises(CutError, match=r"Branches cannot be cut.*hidden\.isfinite"):
        export_early_exit(net, tmp_path / "net.pt2", VECTORS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "mode", "message"),
    [
        ("net.zip", "single", r"ends in \.pt2 for mode='single', got 'net\.zip'"),
        ("net.pt2", "stages", r"ends in \.zip for mode='stages'"),
        ("net.pt2", "both", "mode must be one of single, stages, got 'both'"),
    ],
)
def test_other_endings_and_modes_are_refused(tmp_path, name, mode, message):
    net, inputs, _ = network("chain")
    with pytest.raises(ValueError, match=message):
        export_early_exit(net, tmp_path / name, inputs, mode)


def test_other_programs_are_not_loaded(tmp_path):
    path = Path(tmp_path / "other.pt2")
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),)), path)
    with pytest.raises(ValueError, match=r"other\.pt2 holds no .*: expected a file that export_early_exit has written"):
        load_early_exit(path)


@pytest.mark.slow
@both_modes
@pytest.mark.parametrize(
    ("build", "exits", "side"),
    [
        (zoo.resnet18, ["layer1", "layer2", "layer3"], 32),
        (zoo.convnext_tiny, ["features.1", "features.3", "features.5"], 32),
        (zoo.swin_t, ["features.1", "features.3", "features.5.2"], 64),
        (zoo.densenet121, ["features.denseblock1", "features.denseblock3.denselayer5"], 64),
        (zoo.mobilenet_v3_small, ["features.2", "features.5", "features.9"], 64),
        (zoo.efficientnet_b0, ["features.2", "features.4", "features.6.1"], 64),
    ],
)
def test_large_backbones_survive_the_round_trip(tmp_path, build, exits, side, mode):
    torch.manual_seed(0)
    images = torch.randn(12, 3, side, side)
    net = MultiExitNetwork(build(num_classes=CLASSES), exits, CLASSES, example_input=images[:2])
    with torch.no_grad():
        full = net.eval()(images)
    let_half_leave(net, full)
    loaded = load_early_exit(export_early_exit(net, tmp_path / ENDING[mode], images[:3], mode))
    for size in (1, 12):
        got, expected = loaded(images[:size]), select_from_all(net.rule, [logits[:size] for logits in full])
        assert got.exit_index.tolist() == expected.exit_index.tolist()
        torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-4)


def test_what_is_no_network_with_exits_is_not_exported(tmp_path):
    with pytest.raises(TypeError, match=r"expected a MultiExitNetwork, got Linear; of an EarlyExitModule, its"):
        export_early_exit(nn.Linear(2, 2), tmp_path / "net.pt2", torch.zeros(1, 2))
    assert not list(tmp_path.iterdir())


def test_a_file_of_a_later_version_is_refused():
    class Later(ExportedNetwork):
        def _answer(self, args, kwargs):
            raise AssertionError

    with pytest.raises(ValueError, match=rf"the file has version {VERSION + 1}, this package reads up to {VERSION}"):
        Later({"version": VERSION + 1})
