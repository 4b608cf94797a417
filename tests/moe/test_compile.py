"""One graph under torch.compile, and the same numbers."""

import pytest
import torch

from lightning_eff.moe import FineGrainedMoE, total_aux_loss


def results(layer: FineGrainedMoE, forward, x: torch.Tensor) -> list[torch.Tensor]:
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = forward(x)
    ((y.float() * torch.linspace(-1, 1, y.numel()).view_as(y)).mean() + total_aux_loss(layer)).backward()
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters()), layer.last_load]


def assert_compiled_equals_eager(options: dict, backend: str, autocast: bool = False) -> None:
    torch.manual_seed(0)
    layer = FineGrainedMoE(16, expansion_rate=4, granularity=2, **options)
    x = torch.randn(16, 3, 16, generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected, found = results(layer, layer, x), results(layer, compiled, x)
    tolerance = 1e-2 if autocast else 1e-5
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    if layer.balance_bias is not None:
        assert layer._load_since_step.sum() == 2 * 16 * 3 * 2


@pytest.mark.parametrize(
    "options",
    [
        {"activation": "swiglu", "bias": True, "n_shared": 1},
        {"routing": {"capacity_factor": 0.75, "normalize_weights": True}},
        {"balance": {"method": "bias"}},
        {"router": "expert_choice"},
    ],
)
def test_layer_is_one_graph(options) -> None:
    assert_compiled_equals_eager(options, "aot_eager")


@pytest.mark.parametrize("experts", ["fused", "grouped"])  # torch traces grouped products in low precision alone
def test_layer_is_one_graph_under_autocast(experts) -> None:
    assert_compiled_equals_eager({"activation": "swiglu", "backend": experts}, "aot_eager", autocast=True)


@pytest.mark.slow
def test_compiled_code_gives_the_same_numbers() -> None:
    assert_compiled_equals_eager({"activation": "swiglu", "bias": True}, "inductor")


def test_batches_of_other_sizes_need_no_other_graph_after_the_second() -> None:
    layer = FineGrainedMoE(16, expansion_rate=4, granularity=2)
    torch._dynamo.reset()
    graphs = []
    compiled = torch.compile(layer, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    for size in (5, 7, 11, 20):
        torch.testing.assert_close(compiled(torch.ones(size, 16)), layer(torch.ones(size, 16)))
    assert len(graphs) <= 2
