"""The layer as a whole: what it computes, what it refuses, what it leaves behind."""

import copy
import doctest
import io
import math
import pickle
import re
from importlib import import_module

import pytest
import torch
from helpers import REPOSITORY
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_eff.moe import DenseFFN, FineGrainedMoE, collect_aux_losses, moe_ffn, total_aux_loss

VARIANTS = [
    {},
    {"granularity": 1},
    {"activation": "swiglu", "bias": True, "n_shared": 2, "output_norm": "rmsnorm"},
    {"output_norm": "none", "routing": {"normalize_weights": True}},
    {"routing": {"score": "sigmoid", "capacity_factor": 0.75}, "top_k": 3, "backend": "grouped"},
    {"router": "expert_choice", "activation": "gelu"},
    {"router": "expert_choice", "routing": {"group_size": 8, "softmax_over": "tokens"}},
    {"balance": {"method": "bias"}, "activation": "silu"},
]


def make(d: int = 16, *, seed: int = 0, dtype=torch.float32, **options) -> FineGrainedMoE:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layer = FineGrainedMoE(d, **{"expansion_rate": 4, "granularity": 2, "init": {"scale": 1.0}} | options).to(dtype)
        for bias in (layer.b1, layer.b2):
            if bias is not None:
                nn.init.normal_(bias)
    return layer


def tokens(*shape: int, seed: int = 1, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gradients(layer: FineGrainedMoE, x: torch.Tensor, forward=None) -> list[torch.Tensor]:
    """Output, then gradients by tokens and parameters of a loss with auxiliary losses."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = (forward or layer)(x)
    # a norm makes the sum of squares nearly constant, and its gradient noise: hence a linear loss
    ((y.float() * tokens(*y.shape, seed=3)).mean() + total_aux_loss(layer)).backward()
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters())]


def test_layer_sums_the_chosen_experts_of_each_token() -> None:
    layer = make(activation="swiglu", bias=True, n_shared=1, output_norm="layernorm", dtype=torch.float64, top_k=3)
    x = tokens(20, 16, dtype=torch.float64)
    expected = []
    for token in x:
        scores = (layer.router @ token).softmax(0)
        y = layer.b2.clone()
        for expert in scores.topk(3).indices.tolist():
            gate, up = (token @ layer.w1[expert] + layer.b1[expert]).chunk(2)
            y = y + scores[expert] * ((F.silu(gate) * up) @ layer.w2[expert])
        expected.append(layer.norm(y + layer.shared(token)))
    torch.testing.assert_close(layer(x), torch.stack(expected), rtol=1e-12, atol=1e-12)


def test_one_expert_is_the_dense_network() -> None:
    layer, dense = make(expansion_rate=1, granularity=1), DenseFFN(16)
    with torch.no_grad():
        dense.up.weight.copy_(layer.w1[0].t())
        dense.down.weight.copy_(layer.w2[0].t())
    torch.testing.assert_close(layer(tokens(3, 5, 16)), dense(tokens(3, 5, 16)))


def test_all_experts_are_the_dense_mixture() -> None:
    layer, x = make(top_k=8, output_norm="none", routing={"weight_scale": 1}), tokens(9, 16)
    every = torch.einsum("tnh,nhd->tnd", F.relu(torch.einsum("td,ndh->tnh", x, layer.w1)), layer.w2)
    expected = ((x @ layer.router.t()).softmax(1)[..., None] * every).sum(1)
    torch.testing.assert_close(layer(x), expected)


def test_order_of_tokens_does_not_matter() -> None:
    layer, x, order = make(), tokens(30, 16), torch.randperm(30, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(layer(x[order]), layer(x)[order])


@pytest.mark.parametrize("router", ["token_choice", "expert_choice"])
def test_names_of_experts_do_not_matter(router) -> None:
    layer, x = make(router=router, bias=True), tokens(12, 3, 16)
    expected = layer(x)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for parameter in (layer.router, layer.w1, layer.w2, layer.b1):
            parameter.copy_(parameter[order])
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("shape", [(16,), (5, 16), (3, 4, 16), (2, 3, 2, 16)])
def test_any_leading_dimensions(shape) -> None:
    layer, x = make(), tokens(*shape)
    y = layer(x)
    assert y.shape == shape
    torch.testing.assert_close(y.reshape(-1, 16), layer(x.reshape(-1, 16)))
    strided = x.movedim(-1, 0).contiguous().movedim(0, -1)
    torch.testing.assert_close(layer(strided), y)


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("shape", [(0, 16), (0, 4, 16), (16, 0, 16)])
def test_empty_batch_gives_zero_losses_and_gradients(shape, options) -> None:
    layer = make(**options)
    x = torch.empty(shape).requires_grad_()
    y = layer(x)
    (y.sum() + total_aux_loss(layer)).backward()
    assert y.shape == shape
    assert not any(tensor.grad.any() for tensor in (x, *layer.parameters()))
    assert not any(loss.item() for loss in layer.aux_losses.values())


def test_shapes_that_do_not_fit_are_told() -> None:
    with pytest.raises(ValueError, match="d_model must be a whole number >= 1, got 0"):
        make(0)
    with pytest.raises(ValueError, match=r"d_ff must be a whole number >= 1, got 6.5"):
        make(d_ff=6.5)
    layer = make()
    with pytest.raises(ValueError, match=r"expected tokens of d_model = 16 features, got shape \[3, 8\]"):
        layer(torch.zeros(3, 8))
    with pytest.raises(ValueError, match=r"token_mask of bool and shape \[3\], got torch.bool and \[4\]"):
        layer(torch.zeros(3, 16), torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"token_mask of bool and shape \[3\], got torch.float32 and \[3\]"):
        layer(torch.zeros(3, 16), torch.ones(3))


@pytest.mark.parametrize("options", VARIANTS)
def test_padding_may_be_anything(options) -> None:
    layer, x = make(**options), tokens(16, 4, 16)
    mask = torch.ones(16, 4, dtype=torch.bool)
    mask[3:, 2] = mask[::4, 3] = False
    results = []
    for padding in (0.0, math.nan):
        layer.zero_grad()
        y = layer(x.masked_fill(~mask[..., None], padding), mask)
        (y.square().sum() + total_aux_loss(layer)).backward()
        results.append([y.detach(), *(p.grad.clone() for p in layer.parameters())])
        assert not y[~mask].any()
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert all(torch.isfinite(result).all() for result in results[0])


@pytest.mark.parametrize("options", VARIANTS)
def test_nothing_but_padding_gives_zeros(options) -> None:
    layer = make(**options)
    y = layer(tokens(16, 2, 16), torch.zeros(16, 2, dtype=torch.bool))
    (y.sum() + total_aux_loss(layer)).backward()
    assert not y.any()
    assert total_aux_loss(layer) == 0
    assert not layer.last_load.any()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


def test_not_a_number_goes_through() -> None:
    layer, x = make(output_norm="none"), tokens(6, 16)
    x[2, 5] = math.nan
    y = layer(x)
    assert y[2].isnan().all()
    assert y[[0, 1, 3, 4, 5]].isfinite().all()
    assert layer.last_load.sum() == 12


def test_expert_choice_lets_nothing_flow_from_later_positions() -> None:
    layer = make(router="expert_choice")
    x = tokens(8, 3, 16).requires_grad_()
    for position in range(3):
        (grad,) = torch.autograd.grad(layer(x)[:, position].square().sum(), x)
        assert grad[:, position].abs().sum() > 0
        assert not grad[:, torch.arange(3) != position].any()


def test_expert_choice_chooses_at_a_position_by_that_position_alone() -> None:
    layer, x = make(router="expert_choice"), tokens(8, 3, 16)
    changed = x.clone()
    changed[:, 1:] = tokens(8, 2, 16, seed=5)
    torch.testing.assert_close(layer(changed)[:, 0], layer(x)[:, 0])


def test_expert_choice_does_not_depend_on_the_order_of_sequences() -> None:
    layer, x, order = make(router="expert_choice"), tokens(8, 3, 16), torch.tensor([3, 1, 7, 5, 0, 2, 6, 4])
    torch.testing.assert_close(layer(x[order]), layer(x)[order])


def test_groups_of_expert_choice_are_on_their_own() -> None:
    options = {"router": "expert_choice", "bias": True}
    layer, x = make(routing={"group_size": 8}, **options), tokens(16, 3, 16)
    torch.testing.assert_close(layer(x), torch.cat([make(**options)(half) for half in x.split(8)]))
    assert layer.last_load.tolist() == [2 * 3 * 2] * 8


def test_token_that_no_expert_takes_becomes_the_bias() -> None:
    layer, x = make(router="expert_choice", output_norm="none", bias=True), tokens(8, 1, 16)
    taken = torch.zeros(8, dtype=torch.bool)
    taken[layer.route(x).assignment.token_index] = True
    assert not taken.all()
    torch.testing.assert_close(layer(x)[~taken, 0], layer.b2.expand(int((~taken).sum()), 16))


def test_expert_choice_refuses_batches_that_it_cannot_share_out() -> None:
    layer = make(router="expert_choice", expansion_rate=16)
    with pytest.raises(ValueError, match=r"group of 8 sequences leaves no token .* 32 experts .*rate 16\); use 9 seq"):
        layer(tokens(8, 3, 16))
    assert layer(tokens(9, 3, 16)).shape == (9, 3, 16)
    layer = make(router="expert_choice", routing={"group_size": 8})
    with pytest.raises(ValueError, match=r"group_size = 8 must divide the batch, got 12 sequences; .* above is 16"):
        layer(tokens(12, 3, 16))


def test_expert_choice_can_score_single_sequences() -> None:
    layer = make(router="expert_choice", routing={"evaluation": "token_choice"}).eval()
    same = make(output_norm="layernorm").eval()
    x = tokens(1, 3, 16)
    torch.testing.assert_close(layer(x), same(x))
    with pytest.raises(ValueError, match="leaves no token"):
        layer.train()(x)


@pytest.mark.parametrize(("granularity", "rms"), [(1, 1.0e-2), (4, 2.6e-3)])
def test_output_without_norm_and_scale_is_small(granularity, rms) -> None:
    # figures of a prototype: why weights are scaled by E unless there is a norm
    options = {"expansion_rate": 8, "granularity": granularity, "init": {}, "output_norm": "none"}
    x = tokens(512, 64)
    small = make(64, routing={"weight_scale": 1}, **options)(x)
    assert small.square().mean().sqrt().item() == pytest.approx(rms, rel=0.25)
    torch.testing.assert_close(make(64, **options)(x), 8 * small)


def test_norm_after_one_expert_a_token_starves_the_router() -> None:
    def router_gradient(**options) -> float:
        layer, x = make(64, expansion_rate=8, **options), tokens(256, 64)
        (layer(x) * tokens(256, 64, seed=3)).mean().backward()
        return layer.router.grad.norm().item()

    plain = router_gradient(granularity=1, routing={"weight_scale": 1})
    with pytest.warns(UserWarning, match="cancels the only weight"):
        assert router_gradient(granularity=1, output_norm="layernorm") < 0.02 * plain
    four = router_gradient(granularity=4, output_norm="none", routing={"weight_scale": 1})
    assert router_gradient(granularity=4, output_norm="layernorm") > 5 * four


def test_loss_free_bias_relieves_a_busy_expert() -> None:
    layer, x = make(balance={"method": "bias", "bias_rate": 1e-2}), tokens(128, 16)
    x = x + 3 * layer.router[3].detach()  # every token leans towards expert 3
    layer(x)
    before = layer.last_load[3].item()
    for _ in range(100):
        layer.update_balance_bias()
        layer(x)
    assert before > 80
    assert layer.last_load[3] < 48  # the mean is 32
    assert layer.balance_bias.mean().item() == pytest.approx(0, abs=1e-6)


def test_loss_free_bias_counts_all_batches_since_the_last_step_in_training_alone() -> None:
    layer = make(balance={"method": "bias"})
    layer(tokens(10, 16))
    layer(tokens(20, 16))
    layer.eval()(tokens(40, 16))
    assert layer._load_since_step.sum() == 2 * 30
    layer.update_balance_bias()
    assert not layer._load_since_step.any()
    before = layer.balance_bias.clone()
    layer.update_balance_bias()
    torch.testing.assert_close(layer.balance_bias, before)


def test_loss_free_bias_stays_in_float32() -> None:
    layer = make(balance={"method": "bias"})
    with torch.no_grad():
        layer.balance_bias.fill_(0.1234567)
    before = layer.balance_bias.clone()
    for moved in (layer.bfloat16(), layer.to(torch.float64), layer.half().to("cpu")):
        assert moved.balance_bias.dtype == torch.float32
        assert torch.equal(moved.balance_bias, before)


def test_losses_are_those_of_the_options() -> None:
    names = {
        ("token_choice", "aux", 1e-3): ["balance", "z"],
        ("token_choice", "aux", 0.0): ["balance"],
        ("token_choice", "bias", 1e-3): ["z"],
        ("token_choice", "none", 0.0): [],
        ("expert_choice", "aux", 1e-3): ["z"],
    }
    for (router, method, z_weight), expected in names.items():
        layer = make(router=router, balance={"method": method, "z_weight": z_weight})
        layer(tokens(8, 3, 16))
        assert list(layer.aux_losses) == expected == list(layer.aux_weights)


def test_total_loss_is_the_weighted_mean_over_layers() -> None:
    x = tokens(20, 16)
    first, second = make(), make(seed=4, balance={"weight": 0.1, "z_weight": 0.0})
    model = nn.Sequential(first, nn.Linear(16, 16), second)
    model(x)
    (b1, z1), b2 = first.aux_losses.values(), second.aux_losses["balance"]
    assert collect_aux_losses(model) == {"balance": (b1 + b2) / 2, "z": z1}
    assert collect_aux_losses(model, "sum") == {"balance": b1 + b2, "z": z1}
    torch.testing.assert_close(total_aux_loss(model), (0.01 * b1 + 0.1 * b2) / 2 + 1e-3 * z1)
    torch.testing.assert_close(total_aux_loss(model, "sum"), 0.01 * b1 + 0.1 * b2 + 1e-3 * z1)
    assert total_aux_loss(nn.Linear(2, 2)) == 0
    with pytest.raises(ValueError, match="reduce must be 'mean' or 'sum', got 'max'"):
        total_aux_loss(model, "max")


@pytest.mark.parametrize("options", [*VARIANTS, {"routing": {"jitter": 0.3}}])
def test_activation_checkpointing_changes_nothing(options) -> None:
    layer, x = make(**options), tokens(16, 4, 16)
    torch.manual_seed(0)
    expected = gradients(layer, x)
    counted, load = layer._load_since_step.sum(), layer.last_load
    torch.manual_seed(0)
    found = gradients(layer, x, lambda z: checkpoint(layer, z, use_reentrant=False))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert torch.equal(layer.last_load, load)
    assert layer._load_since_step.sum() == 2 * counted


@pytest.mark.parametrize("options", VARIANTS)
def test_autocast_keeps_the_choice_and_stays_near(options) -> None:
    layer, x = make(**options), tokens(16, 4, 16)
    expected, load = gradients(layer, x), layer.last_load
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(layer, x)
        assert layer.route(x).logits.dtype == torch.float32
    assert torch.equal(layer.last_load, load)
    for ours, exact in zip(found, expected, strict=True):
        assert (ours - exact).norm() < 3e-2 * exact.norm()  # single hidden units near 0 may change their sign


def test_half_precision_weights_route_in_float32() -> None:
    layer, x = make(output_norm="none").bfloat16(), tokens(20, 16).bfloat16()
    y = layer(x)
    assert (y.dtype, layer.aux_losses["z"].dtype, layer.route(x).scores.dtype) == (
        torch.bfloat16, torch.float32, torch.float32,
    )  # fmt: skip
    exact = copy.deepcopy(layer).float()(x.float())
    torch.testing.assert_close(y.float(), exact, rtol=0, atol=2e-2 * exact.abs().max().item())


@pytest.mark.parametrize("frozen", [["router"], ["w1", "w2"], ["router", "w1", "w2"]])
def test_frozen_parts_stay_without_gradient(frozen) -> None:
    layer, x = make(), tokens(20, 16)
    expected = gradients(layer, x)
    names = ["output", "x", *(name for name, _ in layer.named_parameters())]
    for name in frozen:
        getattr(layer, name).grad = None
        getattr(layer, name).requires_grad_(False)
    found = dict(zip(names, gradients(layer, x), strict=True))
    assert all(found.pop(name) is None for name in frozen)
    for name, value in found.items():
        torch.testing.assert_close(value, dict(zip(names, expected, strict=True))[name])


def test_jitter_acts_in_training_alone_and_nothing_else_draws() -> None:
    layer, x = make(routing={"jitter": 0.5}), tokens(200, 16)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    state = torch.get_rng_state()
    assert torch.equal(layer(x), layer(x))
    make().train()(x)
    assert torch.equal(torch.get_rng_state(), state)


def test_layer_that_has_run_can_be_copied_and_pickled() -> None:
    layer, x = make(balance={"method": "bias"}), tokens(20, 16)
    expected = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.aux_losses == {}
        torch.testing.assert_close(twin(x), expected)
    assert layer.aux_losses


def test_state_loads_with_weights_only_and_holds_the_loss_free_bias() -> None:
    layer = make(balance={"method": "bias"})
    layer(tokens(20, 16))
    layer.update_balance_bias()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    twin = make(seed=9, balance={"method": "bias"})
    twin.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(twin(tokens(7, 16)), layer(tokens(7, 16)))
    assert twin.balance_bias.any()


def test_checkpoint_of_another_granularity_is_told_by_both() -> None:
    other = nn.Sequential(make(expansion_rate=4, granularity=4)).state_dict()
    with pytest.raises(RuntimeError) as raised:
        nn.Sequential(make(expansion_rate=4, granularity=2)).load_state_dict(other)
    assert (
        "0.: the checkpoint holds 16 experts of width 16 (d_model 16; with d_ff 64: expansion_rate 4, granularity 4), "
        "but the layer 8 experts of width 32 (d_model 16; with d_ff 64: expansion_rate 4, granularity 2)"
    ) in str(raised.value)
    assert "size mismatch" not in str(raised.value)


def test_layer_is_built_on_the_meta_device_and_filled_later() -> None:
    with torch.device("meta"):
        layer = FineGrainedMoE(16, granularity=2, bias=True, n_shared=1, balance={"method": "bias"})
    assert {t.device.type for t in layer.state_dict().values()} == {"meta"}
    layer.to_empty(device="cpu")
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    layer(tokens(20, 16)).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


def test_layer_tells_what_it_is() -> None:
    told = repr(make(router="expert_choice"))
    assert (
        "d_model=16, d_ff=64, 2 of 8 experts of width 32, router=expert_choice, activation=relu, backend=fused" in told
    )
    assert "backend=grouped" in repr(make(backend="grouped"))


def test_layer_and_function_agree() -> None:
    layer, x = make(output_norm="none"), tokens(20, 16)
    token_index, weights, counts, _ = layer.route(x).assignment
    torch.testing.assert_close(layer(x), moe_ffn(x, layer.w1, layer.w2, weights, token_index, counts))


def test_block_of_the_readme_runs(capsys) -> None:
    readme = (REPOSITORY / "lightning_eff" / "moe" / "README.md").read_text()
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "FineGrainedMoE(" in b)
    with torch.random.fork_rng():
        exec(block, {})
    loads = eval(capsys.readouterr().out, {"tensor": torch.tensor})
    assert loads.shape == (32,)
    assert loads.sum() == 2 * 128 * 4


@pytest.mark.parametrize("module", ["config", "layer"])
def test_examples_of_docstrings_hold(module) -> None:
    result = doctest.testmod(import_module(f"lightning_eff.moe.{module}"))
    assert result.attempted > 0
    assert result.failed == 0
