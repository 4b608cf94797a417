"""Counts of parameters and FLOPs; numbers of the runs of arXiv 2402.07871."""

import pytest

from lightning_eff.moe.scaling import DecoderShape


def test_smallest_network_of_the_paper() -> None:
    shape = DecoderShape(256, 4, expansion_rate=64, granularity=1)
    assert (shape.n_total, shape.n_active, shape.flops_per_token()) == (135266304, 3145728, 19791872)


def test_finer_experts_cost_only_their_router() -> None:
    shape = DecoderShape(512, 8, expansion_rate=64, granularity=8)
    assert (shape.n_total, shape.flops_per_token()) == (1082130432, 180355072)
    assert shape.routing_share == pytest.approx(0.1628, abs=5e-5)
    coarse = DecoderShape(512, 8, expansion_rate=64, granularity=1)
    assert (coarse.n_total, coarse.n_active) == (shape.n_total, shape.n_active)
    assert shape.n_router == 8 * coarse.n_router == 8 * 512 * 512
    assert (shape.n_experts, shape.d_expert) == (512, 256)


def test_counts_are_those_of_the_matrices() -> None:
    d, layers, rate, granularity, width = 96, 3, 4, 8, 256
    shape = DecoderShape(d, layers, rate, granularity, top_k=2, d_ff=width, gated=True)
    attention, expert = 4 * d * d, 3 * d * (width // granularity)
    assert shape.n_total == layers * (attention + 32 * expert)
    assert shape.n_active == layers * (attention + 2 * expert)
    assert shape.n_router == layers * 32 * d


def test_shared_experts_and_dense_blocks_are_counted() -> None:
    shape = DecoderShape(96, 7, 4, 8, d_ff=256, gated=True, n_shared=2, moe_every=3, dense_gated=False)
    attention, expert, dense = 4 * 96**2, 3 * 96 * 32, 2 * 96 * 256
    assert shape.n_moe_layers == 2  # the third and the sixth
    assert shape.n_total == 7 * attention + 2 * 34 * expert + 5 * dense
    assert shape.n_active == 7 * attention + 2 * 10 * expert + 5 * dense
    assert shape.n_router == 2 * 32 * 96


def test_one_expert_needs_no_router() -> None:
    dense = DecoderShape(256, 4)
    assert dense.n_router == dense.routing_share == 0
    assert dense.flops_per_token() == 6 * dense.n_total == 6 * 12 * 256**2 * 4


def test_full_convention_counts_head_router_and_attention() -> None:
    shape = DecoderShape(256, 4, expansion_rate=8, granularity=2)
    weights = 12 * 256**2 * 4 + 256 * 16 * 4 + 256 * 50257
    full = shape.flops_per_token("full", vocab_size=50257, seq_len=1024)
    assert full == 6 * weights + 12 * 1024 * 256 * 4
    causal = shape.flops_per_token("full", vocab_size=50257, seq_len=1024, causal=True)
    assert full - causal == 6 * 1024 * 256 * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"d_model": 0}, "d_model must be > 0"),
        ({"n_layers": -1}, "n_layers must be > 0"),
        ({"expansion_rate": 0.5}, "expansion_rate must be >= 1"),
        ({"granularity": 0}, "granularity must be >= 1"),
        ({"d_ff": float("inf")}, "d_ff must be > 0"),
        ({"n_shared": -1}, "n_shared must be >= 0"),
        ({"moe_every": 0}, "moe_every must be >= 1"),
        ({"expansion_rate": 2, "granularity": 2, "top_k": 5}, "top_k from 1 to the 4 experts, got 5"),
    ],
)
def test_values_out_of_range_are_named(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecoderShape(**{"d_model": 256, "n_layers": 4, **arguments})


def test_full_convention_says_what_it_lacks() -> None:
    with pytest.raises(ValueError, match="needs vocab_size and seq_len"):
        DecoderShape(256, 4).flops_per_token("full")
    with pytest.raises(ValueError, match="convention must be one of paper, full, got"):
        DecoderShape(256, 4).flops_per_token("half")
