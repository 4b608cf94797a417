"""Experts that stay on their process while tokens travel: what one process with all experts does."""

from pathlib import Path

import pytest
import torch
from helpers import run_ddp
from moe_parallel import AUX, fit, module_of, state
from torch import Tensor

OPTIONS = {
    "plain": {},
    "gated, with biases": {"activation": "swiglu", "bias": True, "n_shared": 1},
    "expert choice": {"router": "expert_choice", "routing": {"group_size": 4}},
    "nobody has tokens for the second process": {"balance": {"method": "bias", "z_weight": 0.1}},
    "a process without tokens": {},
    "bfloat16": {},
}
SCRIPT = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch, torch.distributed as dist
from moe_parallel import *
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint
from lightning_eff.moe import FineGrainedMoE, shard_experts, shard_model, total_aux_loss

found = {{}}
strategy = ModelParallelStrategy(
    data_parallel_size=devices(), tensor_parallel_size=1, save_distributed_checkpoint=False
)
module = module_of(AUX, experts="stay")
fit(module, SaveHalfWay("half.ckpt"), devices=devices(), strategy=strategy, gradient_clip_val=0.3)
found["straight"] = state(module)
strategy = ModelParallelStrategy(
    data_parallel_size=devices(), tensor_parallel_size=1, save_distributed_checkpoint=False
)
module = module_of(AUX, experts="stay")
fit(module, devices=devices(), strategy=strategy, gradient_clip_val=0.3, ckpt_path="half.ckpt")
found["resumed"] = state(module)
found["part"] = torch.tensor(module.model.mixtures[0].w1.to_local().shape)

rank = dist.get_rank()
mesh = init_device_mesh("cpu", (2,))
alone = [dist.new_group([i]) for i in range(2)][rank]


def gradients(layer, tokens, target, scale):
    tokens = tokens.clone().requires_grad_()
    y = layer(tokens)
    loss = (y.float() * target).sum() * scale + total_aux_loss(layer)
    loss.backward()
    named = {{name: getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for name, p in layer.named_parameters()}}
    return {{"y": y.detach(), "x": tokens.grad, **named}}


for name, options in {OPTIONS!r}.items():
    torch.manual_seed(0)
    layers = []
    for group in (alone, None):
        torch.manual_seed(0)
        layer = FineGrainedMoE(16, 32, expansion_rate=4, granularity=2, init={{"scale": 1.0}}, **options)
        layer.process_group = group
        if layer.balance_bias is not None:
            layer.balance_bias[4:] = -1e9
        layers.append(layer if name == "bfloat16" else layer.double())
    one, two = layers
    shard_experts(two, mesh)
    dtype = torch.float32 if name == "bfloat16" else torch.float64
    x, target = torch.randn(2, 16, 3, 16, generator=torch.Generator().manual_seed(1), dtype=dtype)
    mine = slice(8 * rank, 8 * rank + 8)
    if name == "a process without tokens":
        mine = (slice(0, 16), slice(16, 16))[rank]
    with torch.autocast("cpu", torch.bfloat16, enabled=name == "bfloat16"):
        joined = gradients(one, x, target, 0.5)  # the mean over the two of sums
        given = gradients(two, x[mine], target[mine], 1.0)
    for key in given:
        if key in ("y", "x"):
            joined[key] = joined[key][mine] * (2 if key == "x" else 1)
        elif key not in ("w1", "w2", "b1"):  # those of experts are the mean already
            dist.all_reduce(given[key])
            given[key] /= 2
    if name == "a process without tokens":
        # balance and z-losses are means over tokens, and one of two processes has none: their mean is another
        joined.pop("router"), given.pop("router"), joined.pop("x"), given.pop("x")
    for key in given:
        gathered = [None, None]
        dist.all_gather_object(gathered, (given[key], joined[key]))
        found[name + ": " + key] = {{"given": [g for g, _ in gathered], "joined": [j for _, j in gathered]}}

torch.manual_seed(0)
layer = FineGrainedMoE(16, 32, expansion_rate=4, granularity=2).double()
shard_experts(layer, mesh)
x = torch.randn(24, 16, dtype=torch.float64)
grads = []
for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
    layer.zero_grad()
    run(x).square().sum().backward()
    grads.append(layer.w1.grad.full_tensor())
found["checkpointed"] = {{"given": grads[1], "joined": grads[0]}}

for wrong in (
    lambda: shard_experts(FineGrainedMoE(16, 32, expansion_rate=3, granularity=1), mesh),
    lambda: shard_experts(layer, mesh),
    lambda: shard_model(layer, init_device_mesh("cpu", (1, 2), mesh_dim_names=("a", "b"))),
):
    try:
        wrong()
    except ValueError as error:
        print(error)

if rank == 0:
    torch.save(found, "found.pt")
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("expert_parallel")
    return folder, run_ddp(SCRIPT, folder).stdout


@pytest.fixture(scope="module")
def found(run) -> dict[str, dict[str, Tensor]]:
    return torch.load(run[0] / "found.pt", weights_only=True)


@pytest.mark.parametrize("name", OPTIONS)
def test_outputs_and_gradients_are_those_of_one_process(found, name) -> None:
    tolerance = {"rtol": 2e-2, "atol": 5e-2} if name == "bfloat16" else {"rtol": 1e-9, "atol": 1e-12}
    keys = [key.removeprefix(f"{name}: ") for key in found if key.startswith(f"{name}: ")]
    assert {"y", "w1", "w2"} <= set(keys)
    for key in keys:
        both = found[f"{name}: {key}"]
        for one, other in zip(both["given"], both["joined"], strict=True):
            torch.testing.assert_close(one, other, **tolerance, msg=lambda text, key=key: f"{key}: {text}")
    assert all(gradient.any() for gradient in found[f"{name}: w1"]["given"])


def test_trained_clipped_and_resumed_weights_are_those_of_one_process(found) -> None:
    module = module_of(AUX)
    fit(module, gradient_clip_val=0.3)
    for run in ("straight", "resumed"):
        for key, expected in state(module).items():
            torch.testing.assert_close(found[run][key], expected, rtol=1e-6, atol=1e-9)
    assert found["part"].tolist() == [4, 16, 16]  # of 8 experts


def test_checkpointed_layers_give_the_same_gradient(found) -> None:
    torch.testing.assert_close(found["checkpointed"]["given"], found["checkpointed"]["joined"])


def test_experts_that_cannot_be_shared_out_are_told(run) -> None:
    assert "2 processes must divide the number of experts, got 3" in run[1]
    assert "the experts are shared out already" in run[1]
    assert "expected the mesh of data parallelism, of one dimension, got 2: ('a', 'b')" in run[1]
