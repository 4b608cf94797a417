"""One recorded pass serves the gates of many groups, each as its own recording would."""

from __future__ import annotations

import pytest
import torch
from networks import build

from lightning_eff.surgery import ChannelGraph, PrefixCache, record_together
from lightning_eff.surgery.prefix import tape_bytes


@pytest.mark.parametrize("name", ["LeNet", "ResNet-18", "concat-flatten", "squeeze-excite"])
def test_one_pass_keeps_for_every_group_what_its_own_pass_keeps(name: str) -> None:
    model, x = build(name)
    model.eval()
    graph = ChannelGraph.from_model(model, x)

    def run() -> torch.Tensor:
        return model(x)

    generator = torch.Generator().manual_seed(0)
    values = {group: torch.rand(graph.sizes[group], generator=generator) for group in graph.prunable}
    gates = {group: graph.gate(model, {group: value}) for group, value in values.items()}
    caches = []
    for group, gate in gates.items():
        with gate:
            caches.append(PrefixCache(model, run, gate, group, graph.sizes[group]))
        gate.set(group, values[group])
    with torch.no_grad():
        tapes = record_together(caches, run)
        for (group, gate), cache, tape in zip(gates.items(), caches, tapes, strict=True):
            own = cache.record(run)
            assert tape.keys() == own.keys()
            assert tape_bytes(tape) == tape_bytes(own)
            with gate:
                assert torch.allclose(cache.replay(tape, run), run(), rtol=1e-4, atol=1e-6), group


def test_results_on_several_tapes_are_stored_once() -> None:
    model, x = build("LeNet")
    model.eval()
    graph = ChannelGraph.from_model(model, x)
    group = graph.prunable[-1]
    gate = graph.gate(model, {group: torch.ones(graph.sizes[group])})
    with gate:
        cache = PrefixCache(model, lambda: model(x), gate, group, graph.sizes[group])
    with torch.no_grad():
        first, second = record_together([cache, cache], lambda: model(x))
    shared = [key for key in first if first[key] is second[key]]
    assert max(shared, key=lambda key: first[key].numel())  # what is read is one tensor, not two copies
    assert all(first[key] is second[key] for key in first if key in cache._live)


def test_nothing_is_recorded_without_caches_but_the_run_happens() -> None:
    ran = []
    assert record_together([], lambda: ran.append(1)) == []
    assert ran == [1]
