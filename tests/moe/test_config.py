"""Options of the layer: what is decided from them, what they refuse, how they travel."""

import copy
import dataclasses
import re

import pytest
import torch
from jsonargparse import ArgumentParser

from lightning_eff.moe import Balance, FineGrainedMoE, Initialisation, MoEConfig, Routing


def test_defaults_keep_the_active_parameters_of_the_dense_network() -> None:
    config = MoEConfig(expansion_rate=8, granularity=4)
    assert (config.n_experts, config.experts_per_token, config.d_expert(1024)) == (32, 4, 256)


@pytest.mark.parametrize(
    ("options", "norm", "scale"),
    [
        ({"granularity": 4}, "layernorm", 1),
        ({"granularity": 1}, "none", 8),
        ({"granularity": 1, "router": "expert_choice"}, "layernorm", 1),
        ({"granularity": 1, "top_k": 2}, "layernorm", 1),
        ({"granularity": 4, "output_norm": "none"}, "none", 8),
        ({"granularity": 4, "output_norm": "none", "routing": {"normalize_weights": True}}, "none", 1),
        ({"granularity": 4, "output_norm": "none", "routing": {"weight_scale": 4}}, "none", 4),
        ({"granularity": 1, "routing": {"score": "sigmoid"}}, "none", 1),
        ({"granularity": 4, "output_norm": "rmsnorm"}, "rmsnorm", 1),
    ],
)
def test_norm_and_scale_are_decided_by_what_reaches_the_router(options: dict, norm: str, scale: float) -> None:
    config = MoEConfig.of(options)
    assert (config.norm, config.weight_scale) == (norm, scale)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expansion_rate": 0}, "expansion_rate must be a whole number >= 1, got 0"),
        ({"granularity": 2.5}, "granularity must be a whole number >= 1, got 2.5"),
        ({"granularity": True}, "granularity must be a whole number >= 1, got True"),
        ({"top_k": 0}, "top_k must be a whole number >= 1, got 0"),
        ({"expansion_rate": 2, "granularity": 2, "top_k": 5}, "top_k must be at most expansion_rate .* = 4 .* got 5"),
        ({"n_shared": -1}, "n_shared must be a whole number >= 0, got -1"),
        ({"router": "hash"}, "router must be one of token_choice, expert_choice, got 'hash'"),
        ({"activation": None}, "activation must be one of relu, gelu, gelu_tanh, silu, swiglu, got None"),
        ({"granularity": 1, "routing": {"normalize_weights": True}}, "one expert a token makes every weight 1"),
        ({"routing": {"capacity_factor": 0}}, "capacity_factor must be > 0, got 0"),
        ({"routing": {"capacity_factor": float("nan")}}, "capacity_factor must be > 0, got nan"),
        ({"routing": {"weight_scale": "E"}}, "weight_scale must be one of auto, got 'E'"),
        ({"routing": {"jitter": 1.0}}, r"jitter must lie in \[0, 1\), got 1.0"),
        ({"routing": {"group_size": 4}}, "belong to router='expert_choice'"),
        ({"routing": {"group": 4}}, "Routing has no group; it has capacity_factor, evaluation"),
        ({"routing": 4}, "routing must be a Routing or a dict of its fields, got 4"),
        ({"balance": {"weight": -1}}, "weight must be >= 0, got -1"),
        ({"init": {"scale": -0.1}}, "scale must be > 0, got -0.1"),
        ({"experts": 4}, "MoEConfig has no experts; it has activation, backend"),
        ({"router": "expert_choice", "routing": {"capacity_factor": 1.0, "jitter": 0.1}}, "capacity_factor, jitter: "),
        ({"router": "expert_choice", "balance": {"method": "bias"}}, "balance method 'bias' is for token choice"),
        (
            {"router": "expert_choice", "routing": {"softmax_over": "tokens", "evaluation": "token_choice"}},
            "softmax_over='tokens' needs",
        ),
    ],
)
def test_bad_options_are_told(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoEConfig.of(options)


def test_granularity_that_does_not_divide_names_the_nearest_that_does() -> None:
    with pytest.raises(ValueError, match="must divide d_ff = 96, got 5; the nearest that does is 4"):
        FineGrainedMoE(24, 96, granularity=5)


def test_norm_after_one_expert_a_token_warns() -> None:
    with pytest.warns(UserWarning, match="output_norm='layernorm' with one expert a token cancels the only weight"):
        MoEConfig(granularity=1, output_norm="layernorm")


def test_router_larger_than_the_active_experts_warns() -> None:
    with pytest.warns(UserWarning, match="router of 128 experts is larger than the 64 rows of active experts"):
        FineGrainedMoE(8, 32, expansion_rate=8, granularity=16)


def test_dict_form_is_plain_and_gives_the_config_back() -> None:
    config = MoEConfig(routing=Routing(jitter=0.1), balance=Balance("bias"), init=Initialisation(truncation="scale"))
    told = config.to_dict()
    assert MoEConfig.of(told) == config
    assert {type(value) for group in told.values() if isinstance(group, dict) for value in group.values()} <= {
        str, int, float, bool, type(None),
    }  # fmt: skip
    assert MoEConfig.of(config, granularity=2) == dataclasses.replace(config, granularity=2)
    assert MoEConfig.of(config, routing={"score": "sigmoid"}).routing == Routing(jitter=0.1, score="sigmoid")
    assert MoEConfig.of(config) is config
    told_before = copy.deepcopy(told)
    MoEConfig.of(told, routing={"score": "sigmoid"})
    assert told == told_before


def test_yaml_reaches_every_option() -> None:
    parser = ArgumentParser()
    parser.add_argument("--moe", type=MoEConfig)
    yaml = "moe: {granularity: 2, router: expert_choice, routing: {group_size: 16, evaluation: token_choice}}"
    parsed = MoEConfig.of(parser.parse_string(yaml).moe.as_dict())
    assert parsed == MoEConfig(
        2 * 4, 2, None, "expert_choice", routing=Routing(group_size=16, evaluation="token_choice")
    )
    options = "\n".join(re.findall(r"--moe\.\S+", parser.format_help()))
    for group, owner in ((MoEConfig, ""), (Routing, "routing."), (Balance, "balance."), (Initialisation, "init.")):
        for field in dataclasses.fields(group):
            assert f"--moe.{owner}{field.name}" in options


def test_yaml_builds_the_layer() -> None:
    parser = ArgumentParser()
    parser.add_argument("--layer", type=torch.nn.Module)
    parsed = parser.parse_string(
        "layer: {class_path: lightning_eff.moe.FineGrainedMoE, init_args: {d_model: 16, config: {granularity: 2}}}"
    ).layer.init_args
    layer = FineGrainedMoE(parsed.d_model, parsed.d_ff, parsed.config.as_dict())
    assert (layer.config.granularity, layer.d_ff) == (2, 64)


@pytest.mark.parametrize(("truncation", "limit"), [("std", 2 * 0.025), ("scale", 0.2)])
def test_weights_start_as_the_paper_has_them(truncation: str, limit: float) -> None:
    torch.manual_seed(0)
    layer = FineGrainedMoE(160, 640, expansion_rate=4, granularity=2, init={"truncation": truncation})
    # sqrt(0.1 / 160) = 0.025, and sqrt(0.1 / 640) = 0.0125 as of the dense network; a normal distribution cut at two
    # standard deviations has 0.880 of the standard deviation
    shrink = 0.880 if truncation == "std" else 1.0
    for weight, std in ((layer.router, 0.025), (layer.w1, 0.025), (layer.w2, 0.0125)):
        assert weight.std().item() == pytest.approx(shrink * std, rel=0.05 if weight is layer.router else 0.01)
        assert weight.abs().max() <= (2 * std if truncation == "std" else limit)
    wide = FineGrainedMoE(160, 640, expansion_rate=4, granularity=2, init={"w2_fan_in": "all"})
    assert wide.w2.std().item() == pytest.approx(0.880 * 0.0125 / 2, rel=0.01)
