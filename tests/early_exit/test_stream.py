"""Survivors of several batches are put together; nobody's answer changes by it, and nothing is computed twice."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from exit_networks import CLASSES, Masked, SequenceFirst, SkipAround, SmallNormNet, chain, masked_inputs
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from lightning_eff.batch import BatchKeys, call_model, take
from lightning_eff.early_exit.attaching.attachment import as_arguments
from lightning_eff.early_exit.inference.leaving import ExitOutput, select_from_all
from lightning_eff.early_exit.inference.policies import policy_from
from lightning_eff.early_exit.inference.stages import CutError, Stages
from lightning_eff.early_exit.inference.stream import CUTS, stream
from lightning_eff.early_exit.network import MultiExitNetwork

N = 60
VECTORS = torch.randn(N, 4, generator=torch.Generator().manual_seed(5))
SEQUENCES = torch.randn(N, 5, 3, generator=torch.Generator().manual_seed(6))
CASES: dict[str, Any] = {
    "chain": (chain, ["1", "3"], VECTORS),
    "skip around an exit": (SkipAround, ["a", "b"], VECTORS),
    "sequence first": (SequenceFirst, ["layers.0", "layers.1"], SEQUENCES),
    "masks by keyword": (Masked, ["blocks.0", "blocks.1"], masked_inputs(N)),
}
_networks: dict[str, tuple[MultiExitNetwork, Any, list[Tensor]]] = {}


def network(name: str, policy: str = "max_prob") -> tuple[MultiExitNetwork, Any, list[Tensor]]:
    """A network made once, its inputs, and the logits of all its outputs; half of the samples leave at each exit."""
    if name not in _networks:
        torch.manual_seed(3)
        build, exits, inputs = CASES[name]
        net = MultiExitNetwork(build(), exits, CLASSES, example_input=take(inputs, slice(0, 2)), engine="auto")
        with torch.no_grad():
            _networks[name] = net, inputs, call_model(net.eval(), inputs)
            net.stages(as_arguments(take(inputs, slice(0, 2))))  # cut, so that tests count what a stream does alone
    net, inputs, full = _networks[name]
    net.policy, state = policy_from(policy), None
    for k, logits in enumerate(full[:-1]):
        scores, state = net.rule.score(logits, k, state)
        middle = scores.sort().values[N // 2 - 1 : N // 2 + 1].mean()
        net.score_thresholds[k] = 1.0 if policy == "patience" else middle
    return net, inputs, full


def batches(inputs: Any, size: int) -> list[Any]:
    return [take(inputs, slice(i, i + size)) for i in range(0, N, size)]


def assert_same(got: ExitOutput, expected: ExitOutput) -> None:
    assert got.exit_index.tolist() == expected.exit_index.tolist()
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.confidence, expected.confidence, rtol=1e-5, atol=1e-5)


class Watch:
    """Samples and memory formats that each stage is given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: dict[int, list[int]] = defaultdict(list)
        self.channels_last: set[bool] = set()
        plain = Stages.__getitem__

        def getitem(stages: Stages, k: int) -> Any:
            def run(*live: Tensor) -> Any:
                tensor, where = next(pair for pair in zip(live, stages.batch_dims[k], strict=True) if pair[1])
                self.sizes[k].append(tensor.size(where.dim) // where.factor)
                if tensor.ndim == 4:
                    self.channels_last.add(tensor.is_contiguous(memory_format=torch.channels_last))
                return plain(stages, k)(*live)

            return run

        monkeypatch.setattr(Stages, "__getitem__", getitem)


@pytest.mark.parametrize("policy", ["max_prob", "entropy", "patience"])
@pytest.mark.parametrize("name", list(CASES))
def test_answers_are_those_chosen_from_all_outputs_in_the_order_of_the_loader(name, policy):
    net, inputs, full = network(name, policy)
    expected = select_from_all(net.rule, full)
    assert len(set(expected.exit_index.tolist())) > 1
    for size, merge in ((1, 1), (1, 7), (7, 4), (7, 16), (16, None), (16, 1000), (N, 11), (N, None)):
        assert_same(net.stream(batches(inputs, size), merge), expected)


def test_random_thresholds_change_nothing_but_who_leaves():
    net, inputs, full = network("skip around an exit")
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        for k, logits in enumerate(full[:-1]):
            scores = net.rule.score(logits, k, None)[0].sort().values
            between = [-math.inf, *((scores[1:] + scores[:-1]) / 2).tolist(), math.inf]
            net.score_thresholds[k] = between[int(torch.randint(N + 1, (), generator=generator))]
        size, merge = (int(torch.randint(1, 30, (), generator=generator)) for _ in range(2))
        assert_same(net.stream(batches(inputs, size), merge), select_from_all(net.rule, full))


@pytest.mark.parametrize(("size", "merge"), [(4, 16), (16, 16), (16, 10), (1, 8)])
def test_every_stage_runs_on_full_groups_but_for_the_last(monkeypatch, size, merge):
    net, inputs, full = network("skip around an exit")
    expected, watch = select_from_all(net.rule, full).exit_index, Watch(monkeypatch)
    net.stream(batches(inputs, size), merge)
    for k, sizes in watch.sizes.items():
        assert sum(sizes) == int((expected >= k).sum())
        *groups, rest = sizes
        assert set(groups) <= {merge if k or size < merge else size}
        assert rest <= max(merge, size)
    assert len(watch.sizes) == 3


def test_few_samples_wait_while_the_loader_runs(monkeypatch):
    net, inputs, full = network("skip around an exit")
    first, watch = select_from_all(net.rule, full).exit_index, Watch(monkeypatch)
    merge, size = 8, 5
    waiting = []

    def loader() -> Iterator[Tensor]:
        for i in range(0, N, size):
            yield inputs[i : i + size]
            ran = [sum(watch.sizes[k]) for k in range(3)]
            come = [i + size, *(int((first[: ran[k]] > k).sum()) for k in range(1))]
            waiting.append([come[0] - ran[0], come[1] - ran[1]])

    net.stream(loader(), merge)
    assert len(waiting) == N // size
    assert max(max(pair) for pair in waiting) < merge
    assert max(pair[1] for pair in waiting) > 0


def test_by_default_groups_are_as_large_as_the_first_batch_and_at_least_64(monkeypatch):
    net, _, _ = network("chain")
    net.score_thresholds.fill_(math.inf)
    for size, merge in ((8, 64), (100, 100)):
        with monkeypatch.context() as patch:
            watch = Watch(patch)
            net.stream(torch.randn(200, 4).split(size))
            assert {sizes[0] for sizes in watch.sizes.values()} == {merge}


def test_operations_are_the_sum_of_what_each_sample_should_cost():
    net, inputs, _ = network("skip around an exit")
    net.stream(batches(inputs, 10))  # cuts
    for thresholds in (net.score_thresholds.tolist(), [math.inf, net.score_thresholds[1].item()]):
        net.score_thresholds.copy_(torch.tensor(thresholds))
        costs = net.costs.totals([net.rule.enabled(k) for k in range(2)])
        with FlopCounterMode(display=False) as counter:
            answer = net.stream(batches(inputs, 10), 16)
        assert counter.get_total_flops() == sum(costs[k] for k in answer.exit_index.tolist())


def test_batches_are_inputs_or_inputs_and_target():
    net, inputs, full = network("chain")
    expected, target = select_from_all(net.rule, full), torch.arange(N)
    for loader in (
        DataLoader(TensorDataset(inputs, target), 8),
        DataLoader(TensorDataset(inputs), 8),
        DataLoader(list(inputs), 8),
        [(inputs[:30], target[:30]), [inputs[30:], target[30:]]],
        iter([{"input": inputs}]),
    ):
        assert_same(net.stream(loader), expected)
    keyed = [{"image": inputs[i : i + 8], "label": target[i : i + 8]} for i in range(0, N, 8)]
    assert_same(net.stream(keyed, split_batch=BatchKeys("image", "label")), expected)


def test_last_groups_may_be_empty_of_survivors():
    net, inputs, full = network("chain")
    net.score_thresholds[0] = -math.inf
    assert net.stream(batches(inputs, 7)).exit_index.tolist() == [0] * N
    net.score_thresholds.fill_(math.inf)
    assert_same(net.stream(batches(inputs, 7)), select_from_all(net.rule, full))


def test_nothing_in_nothing_out():
    net, inputs, full = network("chain")
    nothing = net.stream([])
    assert nothing.logits.shape == (0, CLASSES)
    assert nothing.exit_index.dtype == torch.int64
    assert_same(net.stream([inputs[:0], inputs, inputs[:0]]), select_from_all(net.rule, full))


def test_group_sizes_below_one_are_refused_before_anything_is_read():
    def loader() -> Iterator[Tensor]:
        pytest.fail("was read")
        yield torch.zeros(0)

    net, _, _ = network("chain")
    with pytest.raises(ValueError, match="merge_batch must be a whole number >= 1, got 0"):
        net.stream(loader(), 0)


class Scaled(nn.Module):
    """Takes a table that all samples of a batch share."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, CLASSES), nn.Linear(CLASSES, CLASSES)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return self.b(self.a(x * table) * table.sum())


def test_batches_with_other_tables_do_not_meet():
    torch.manual_seed(0)
    tables = [torch.ones(4), torch.full((4,), 2.0), torch.full((4,), 2.0)]
    loader = [(VECTORS[20 * i : 20 * i + 20], table) for i, table in enumerate(tables)]
    net = MultiExitNetwork(Scaled(), ["a"], CLASSES, example_input=loader[0], thresholds=0.3)
    got = net.stream(loader, 16, split_batch=lambda batch: (batch, None))
    expected = [net.predict(*batch) for batch in loader]
    assert_same(got, ExitOutput(*(torch.cat(parts) for parts in zip(*map(tuple_of, expected), strict=True))))
    assert len(set(got.exit_index.tolist())) == 2


def tuple_of(answer: ExitOutput) -> tuple[Tensor, Tensor, Tensor]:
    return answer.logits, answer.exit_index, answer.confidence


def test_memory_that_is_used_again_is_not_in_the_answers():
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(4, CLASSES), nn.Identity())
    with pytest.warns(UserWarning, match="nothing is computed behind exit '0'"):
        net = MultiExitNetwork(
            backbone, ["0"], CLASSES, head=lambda shape, classes: nn.Identity(), example_input=VECTORS, engine="staged"
        )
    for threshold in (math.inf, -math.inf, 0.35):
        net.score_thresholds.fill_(threshold)
        with torch.no_grad():
            expected = select_from_all(net.rule, net(VECTORS))
        assert_same(net.stream(batches(VECTORS, 4), 8), expected)


def test_images_keep_their_memory_format_while_they_wait(monkeypatch):
    torch.manual_seed(0)
    images = torch.randn(N, 1, 8, 8)
    net = MultiExitNetwork(SmallNormNet(), ["stem"], CLASSES, example_input=images[:2])
    net.backbone.to(memory_format=torch.channels_last)
    with torch.no_grad():
        scores = net.eval()(images)[0].softmax(-1).amax(-1)
    net.set_thresholds(scores.median().item())
    net.stream(batches(images, 7), 16)
    watch = Watch(monkeypatch)
    net.stream([batch.contiguous(memory_format=torch.channels_last) for batch in batches(images, 7)], 16)
    assert watch.channels_last == {True}
    assert len(watch.sizes) == 2


def test_modes_come_back_also_after_an_error(monkeypatch):
    net, inputs, full = network("chain")
    net.train()
    net.heads[0].eval()
    before = [module.training for module in net.modules()]
    answer = net.stream(batches(inputs, 8))
    with monkeypatch.context() as patch:
        patch.setattr(net.heads[1], "forward", lambda feature: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            net.stream(batches(inputs, 8))
    assert [module.training for module in net.modules()] == before
    assert_same(answer, select_from_all(net.rule, full))


def test_sequences_of_several_lengths_each_have_their_stages():
    net, _, _ = network("sequence first")
    lengths = [5, 3, 5, 3, 4]
    loader = [torch.randn(9, length, 3) for length in lengths]
    expected = [net.predict(batch) for batch in loader]
    got = net.stream(loader, 8)
    assert_same(got, ExitOutput(*(torch.cat(parts) for parts in zip(*map(tuple_of, expected), strict=True))))


def test_too_many_shapes_are_told_and_answered_batch_by_batch():
    net, _, _ = network("sequence first")
    loader = [torch.randn(6, length, 3) for length in (5, *range(6, 7 + CUTS))]
    expected = [net.predict(batch) for batch in loader]
    with pytest.warns(UserWarning, match=f"one by one.*more than {CUTS} different shapes"):
        got = net.stream(loader, 8)
    assert_same(got, ExitOutput(*(torch.cat(parts) for parts in zip(*map(tuple_of, expected), strict=True))))


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x)
        return self.b(hidden if hidden.isfinite().all() else hidden.nan_to_num())


def test_a_backbone_that_cannot_be_cut_answers_batch_by_batch_and_says_why():
    torch.manual_seed(0)
    net = MultiExitNetwork(Branches(), ["a"], CLASSES, example_input=VECTORS, thresholds=0.25)
    with torch.no_grad():
        expected = select_from_all(net.rule, net.eval()(VECTORS))
    with pytest.warns(UserWarning, match=r"answered one by one.*Branches cannot be cut.*hidden\.isfinite") as told:
        got = net.stream(batches(VECTORS, 8))
    assert len(told) == 1
    assert_same(got, expected)
    with pytest.raises(CutError):
        net.stages(((VECTORS,), {}))


def test_engine_off_answers_batch_by_batch():
    net, inputs, full = network("chain")
    net.engine = "off"
    try:
        assert_same(stream(net, batches(inputs, 8)), select_from_all(net.rule, full))
    finally:
        net.engine = "hooks"
