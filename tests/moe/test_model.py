"""The language model: counts of the paper from its own tensors, causality, positions, the dense twin."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lightning_eff.moe import DecoderConfig, DecoderLM, DenseFFN, FineGrainedMoE, Initialisation, MoEConfig

SMALL = {"vocab_size": 17, "d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 8}
EXPERT_CHOICE = {"expansion_rate": 2, "granularity": 2, "router": "expert_choice"}


def built(**overrides) -> DecoderLM:
    torch.manual_seed(0)
    return DecoderLM({**SMALL, **overrides})


def unit_weights(model: DecoderLM) -> DecoderLM:
    """Give all matrices a scale at which every path through the network shows."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model


def test_smallest_network_of_the_paper_has_its_parameters_and_flops() -> None:
    with torch.device("meta"):
        model = DecoderLM(d_model=256, n_layers=4, moe={"expansion_rate": 64, "granularity": 1})
    assert (model.n_total, model.n_active, model.flops_per_token) == (135266304, 3145728, 19791872)


def test_finer_and_larger_network_of_the_paper_has_its_parameters_and_flops() -> None:
    with torch.device("meta"):
        model = DecoderLM(d_model=512, n_layers=8, n_heads=8, moe={"expansion_rate": 64, "granularity": 8})
    assert (model.n_total, model.flops_per_token) == (1082130432, 180355072)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"activation": "swiglu", "d_ff": 24},
        {"moe": {"expansion_rate": 1, "granularity": 1}},
        {"moe": {"expansion_rate": 1, "granularity": 4}},
        {"moe": {"expansion_rate": 4, "granularity": 2, "top_k": 3, "activation": "swiglu", "n_shared": 2}, "d_ff": 24},
        {"moe": {"expansion_rate": 8, "granularity": 16, "bias": True}, "tie_embeddings": True},
        {"moe": EXPERT_CHOICE, "moe_every": 2, "n_layers": 5, "activation": "swiglu"},
        {"moe": {"activation": "swiglu"}, "moe_every": 3, "n_layers": 3, "activation": "relu"},
    ],
)
def test_closed_form_counts_are_those_of_the_tensors(overrides) -> None:
    model = built(**overrides)
    shape = model.config.shape
    assert (model.n_total, model.n_active, model.n_router) == (shape.n_total, shape.n_active, shape.n_router)
    assert model.flops_per_token == shape.flops_per_token()
    # and these are all matrices there are, but for embeddings, head and routers nobody consults
    others = {id(p) for layer in (model.embedding, model.positions, model.head) if layer for p in layer.parameters()}
    idle = sum(layer.router.numel() for layer in model.mixtures if layer.config.n_experts == 1)
    biases = {id(layer.b1) for layer in model.mixtures}
    matrices = sum(p.numel() for p in model.parameters() if p.ndim > 1 and id(p) not in others | biases)
    assert model.n_total + model.n_router + idle == matrices


@pytest.mark.parametrize("backend", ["fused", "grouped"])
@pytest.mark.parametrize("granularity", [1, 4])
def test_flop_counter_sees_the_experts(backend: str, granularity: int) -> None:
    moe = {"expansion_rate": 4, "granularity": granularity, "backend": backend}
    model = built(d_model=16, moe=moe)
    tokens = torch.randint(17, (4, 8))
    with FlopCounterMode(display=False) as counter:
        model(tokens).sum().backward()
    weights = model.n_active + model.n_router + 16 * 17
    attention = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "scaled_dot" in str(op))
    assert counter.get_total_flops() - attention == 6 * weights * tokens.numel()


@pytest.mark.parametrize("positions", ["learned", "rope"])
@pytest.mark.parametrize(
    "moe", [None, {"expansion_rate": 2, "granularity": 2}, EXPERT_CHOICE], ids=["dense", "tc", "ec"]
)
def test_no_logit_depends_on_a_later_token(moe, positions: str) -> None:
    model = unit_weights(built(moe=moe, positions=positions))
    sequences, length = 4, 6
    x = torch.randn(sequences, length, 16, requires_grad=True)
    model.embedding.register_forward_hook(lambda *_: x)  # tokens have no gradient, what stands for them has
    logits = model(torch.zeros(sequences, length, dtype=torch.long))
    for position in range(length):
        (gradient,) = torch.autograd.grad(logits[:, position].square().sum(), x, retain_graph=True)
        assert gradient[:, position + 1 :].eq(0).all()
        assert gradient[:, : position + 1].abs().amax((0, 2)).gt(0).all()  # but on every one before


def test_expert_choice_does_not_depend_on_the_order_of_sequences() -> None:
    model = unit_weights(built(moe=EXPERT_CHOICE))
    tokens, order = torch.randint(17, (6, 8)), torch.randperm(6)
    torch.testing.assert_close(model(tokens)[order], model(tokens[order]))


def test_later_tokens_and_padding_change_nothing_before_them() -> None:
    model = unit_weights(built(moe={"expansion_rate": 4, "granularity": 2})).eval()
    tokens = torch.randint(17, (3, 8))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, 5:] = False
    torch.testing.assert_close(model(tokens, mask)[:, :5], model(tokens[:, :5]))
    assert model.mixtures[0].last_load.sum() == 3 * 5 * 2  # the short pass is the last one
    model(tokens, mask)
    assert model.mixtures[0].last_load.sum() == 3 * 5 * 2  # and padding is counted nowhere


def test_rotary_positions_see_distances_only() -> None:
    model = unit_weights(built(positions="rope", max_seq_len=64, n_layers=1))
    attention = model.blocks[0].attention
    x = torch.randn(1, 12, 16)
    cos, sin = model._turns(torch.zeros(1, 40, 16))
    near = attention(x, (cos[:12], sin[:12]))
    torch.testing.assert_close(attention(x, (cos[28:], sin[28:])), near, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(attention(x), near, atol=1e-2)


def test_order_of_tokens_matters_with_either_kind_of_positions() -> None:
    for positions in ("learned", "rope"):
        model = unit_weights(built(positions=positions, n_layers=1))
        tokens = torch.tensor([[1, 2, 3, 4]])
        assert not torch.allclose(model(tokens)[0, 3], model(tokens[:, [1, 0, 2, 3]])[0, 3], atol=1e-3)


def test_attention_is_that_of_torch() -> None:
    attention = unit_weights(built()).blocks[0].attention
    theirs = nn.MultiheadAttention(16, 2, bias=False, batch_first=True)
    theirs.in_proj_weight, theirs.out_proj.weight = attention.qkv.weight, attention.out.weight
    x = torch.randn(3, 8, 16)
    hidden = nn.Transformer.generate_square_subsequent_mask(8)
    expected = theirs(x, x, x, attn_mask=hidden, is_causal=True, need_weights=False)[0]
    torch.testing.assert_close(attention(x), expected)


def test_one_expert_without_norm_is_the_dense_twin() -> None:
    moe = MoEConfig(expansion_rate=1, granularity=1)
    mixed, dense = built(moe=moe), built()
    for block, twin in zip(mixed.blocks, dense.blocks, strict=True):
        with torch.no_grad():
            block.ffn.w1.copy_(twin.ffn.up.weight.t()[None])
            block.ffn.w2.copy_(twin.ffn.down.weight.t()[None])
    rest = {
        name: value for name, value in dense.state_dict().items() if "ffn.up" not in name and "ffn.down" not in name
    }
    mixed.load_state_dict(rest, strict=False)
    tokens = torch.randint(17, (2, 8))
    torch.testing.assert_close(mixed(tokens), dense(tokens))


def test_dense_twin_has_activation_and_output_norm_of_the_experts() -> None:
    config = DecoderConfig(**SMALL, d_ff=32, moe={"activation": "swiglu", "granularity": 4})
    twin = config.dense_twin()
    assert (twin.moe, twin.activation, twin.ffn_output_norm) == (None, "swiglu", "layernorm")
    assert twin.shape.n_active == config.shape.n_active
    assert config.dense_twin().dense_twin() == twin
    assert DecoderConfig(moe={"granularity": 1}).dense_twin().ffn_output_norm == "none"
    block = DecoderLM(twin).blocks[0]
    assert isinstance(block.ffn, DenseFFN)
    assert isinstance(block.ffn_output_norm, nn.LayerNorm)


def test_every_second_block_has_experts_when_asked() -> None:
    model = built(moe={"granularity": 2}, moe_every=2, n_layers=4)
    assert [isinstance(block.ffn, FineGrainedMoE) for block in model.blocks] == [False, True, False, True]


def test_tied_head_is_the_embedding() -> None:
    model = built(tie_embeddings=True)
    assert model.head is None
    seen = []
    model.norm.register_forward_hook(lambda _, __, y: seen.append(y))
    logits = model(torch.randint(17, (2, 8)))
    torch.testing.assert_close(logits, F.linear(seen[0], model.embedding.weight))
    assert logits.std() < 1  # a first loss near ln V


def test_first_loss_is_that_of_guessing() -> None:
    for moe in (None, {"granularity": 2}):
        model = built(vocab_size=256, d_model=64, moe=moe)
        tokens = torch.randint(256, (8, 8))
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        assert loss.item() == pytest.approx(5.545, abs=0.15)  # ln 256


def test_weights_made_on_the_meta_device_begin_like_others() -> None:
    overrides = {"d_model": 64, "moe": {"granularity": 2, "n_shared": 1}, "moe_every": 2, "init": {"scale": 0.2}}
    with torch.device("meta"):
        late = DecoderLM(DecoderConfig.of(SMALL, **overrides))
    late.to_empty(device="cpu")
    for module in late.modules():  # as Lightning's and torch's sharding do, from the outside inwards
        if any(True for _ in module.parameters(recurse=False)):
            module.reset_parameters()
    others = built(**overrides).state_dict()
    for name, weights in late.state_dict().items():
        assert weights.std().item() == pytest.approx(others[name].std().item(), rel=0.15, abs=1e-6), name
        assert weights.mean().item() == pytest.approx(others[name].mean().item(), abs=0.06), name


def test_dropout_acts_in_training_alone() -> None:
    model = built(dropout=0.5)
    tokens = torch.randint(17, (2, 8))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_options_come_back_from_a_plain_dict() -> None:
    config = DecoderConfig.of(SMALL, moe={"granularity": 2}, init=Initialisation(scale=0.2), positions="rope")
    assert DecoderConfig.of(config.to_dict()) == config
    changed = DecoderConfig.of(config, moe={"top_k": 3}, init={"truncation": "scale"})
    assert (changed.moe.granularity, changed.moe.top_k) == (2, 3)  # what is not named stays
    assert changed.init == Initialisation(scale=0.2, truncation="scale")
    assert DecoderConfig.of(config, moe=None).moe is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be a whole number >= 1, got 0"),
        ({"n_layers": 2.0}, "n_layers must be a whole number"),
        ({"d_ff": -1}, "d_ff must be a whole number"),
        ({"n_heads": 3}, "n_heads must divide d_model = 256, got 3"),
        ({"d_model": 6, "n_heads": 2, "positions": "rope"}, "heads of an even width, got d_model / n_heads = 3"),
        ({"positions": "sinus"}, "positions must be one of learned, rope, got 'sinus'"),
        ({"ffn_output_norm": "batch"}, "ffn_output_norm must be one of layernorm, rmsnorm, none"),
        ({"activation": "tanh"}, "activation must be one of"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"moe": {"granularity": 3}}, "granularity must divide d_ff = 1024, got 3; the nearest that does is 2"),
        ({"moe": {"granulariti": 3}}, "MoEConfig has no granulariti; it has"),
        ({"moe": 8}, "moe must be a MoEConfig, a dict of its fields or None, got 8"),
        ({"init": 0.1}, "init must be an Initialisation or a dict of its fields, got 0.1"),
        ({"init": {"std": 0.1}}, "Initialisation has no std"),
        ({"width": 8}, "DecoderConfig has no width; it has"),
        ({"moe_every": 2}, "moe_every = 2 needs moe"),
        ({"moe": {}, "moe_every": 5}, "moe_every must be at most n_layers = 4, got 5"),
        ({"moe": {}, "activation": "swiglu"}, "of which there are none; use moe={'activation'"),
        ({"moe": {}, "ffn_output_norm": "layernorm"}, "of which there are none; use moe={'output_norm'"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecoderConfig.of(**options)


@pytest.mark.parametrize("shape", [(8,), (2, 9), (2, 4, 1)])
def test_tokens_of_another_shape_are_refused(shape) -> None:
    with pytest.raises(ValueError, match=r"expected tokens \[B, T\] with T up to max_seq_len = 8, got"):
        built()(torch.zeros(shape, dtype=torch.long))
