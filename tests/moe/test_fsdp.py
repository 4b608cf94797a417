"""Two processes that share the weights out (FSDP2, ``ModelParallelStrategy``): what one process does."""

import csv
from pathlib import Path

import pytest
import torch
from helpers import run_ddp
from lightning.pytorch.loggers import CSVLogger
from moe_parallel import AUX, BIAS, Replacing, fit, module_of, state
from torch import Tensor, nn

from lightning_eff.moe import ExpertLoadMonitor, MoEScalingModule, shard_model

SCRIPT = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch, torch.distributed as dist
from moe_parallel import *
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.loggers import CSVLogger
from torch.distributed.fsdp import FSDPModule
from lightning_eff.moe import ExpertLoadMonitor


def run(balance, *callbacks, distributed=False, **settings):
    strategy = ModelParallelStrategy(
        data_parallel_size=devices(), tensor_parallel_size=1, save_distributed_checkpoint=distributed
    )
    module = module_of(balance)
    fit(module, *callbacks, devices=devices(), strategy=strategy, **settings)
    return module


found = {{}}
module = run(AUX, ExpertLoadMonitor(every_n_steps=1), gradient_clip_val=0.3, logger=CSVLogger("logs"))
found["aux"] = state(module)
for part in module.modules():
    if isinstance(part, FSDPModule):
        part.reshard()
found["parts"] = {{name: torch.tensor(p.to_local().shape) for name, p in module.named_parameters()}}
for distributed in (False, True):
    name = "distributed" if distributed else "whole"
    path = name + ".ckpt"
    found[name] = state(run(BIAS, SaveHalfWay(path), distributed=distributed))
    found[name + ", resumed"] = state(run(BIAS, distributed=distributed, ckpt_path=path))

module = Replacing()
strategy = ModelParallelStrategy(data_parallel_size=devices(), tensor_parallel_size=1)
fit(module, devices=devices(), strategy=strategy)
found["replaced"] = state(module)

try:
    fit(module_of(AUX), devices=devices(), strategy=ModelParallelStrategy(1, 2))
except ValueError as error:
    print(error)

if dist.get_rank() == 0:
    torch.save(found, "found.pt")
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("fsdp")
    return folder, run_ddp(SCRIPT, folder).stdout


@pytest.fixture(scope="module")
def found(run) -> dict[str, dict[str, Tensor]]:
    return torch.load(run[0] / "found.pt", weights_only=True)


def logged(folder: Path) -> dict[str, float]:
    """Last value of everything that was logged."""
    with next(folder.rglob("metrics.csv")).open() as file:
        return {name: float(value) for row in csv.DictReader(file) for name, value in row.items() if value}


def assert_equal(given: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert given.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(given[key], value, rtol=1e-6, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}")


def test_shared_out_weights_become_those_of_one_process_also_when_clipped(run, found, tmp_path) -> None:
    module, unclipped = module_of(AUX), module_of(AUX)
    fit(module, ExpertLoadMonitor(every_n_steps=1), gradient_clip_val=0.3, logger=CSVLogger(tmp_path))
    fit(unclipped)
    assert_equal(found["aux"], state(module))
    assert not torch.allclose(state(module)["model.head.weight"], state(unclipped)["model.head.weight"], atol=1e-3)
    expected, given = logged(tmp_path), logged(run[0] / "logs")
    assert {"moe/router_entropy", "moe/load_cv", "train/loss", "train/aux_z", "val/loss"} <= set(expected)
    assert given == pytest.approx(expected, rel=1e-5)
    assert found["parts"]["model.blocks.0.ffn.w1"].tolist() == [4, 16, 16]  # of 8 experts


def test_runs_with_loss_free_biases_end_as_one_process_does_also_when_resumed(found) -> None:
    module = module_of(BIAS)
    fit(module)
    assert module.model.mixtures[0].balance_bias.any()
    for checkpoint in ("whole", "distributed"):
        assert_equal(found[checkpoint], state(module))
        assert_equal(found[f"{checkpoint}, resumed"], state(module))


def test_any_model_that_replaces_and_is_shared_out_ends_as_in_one_process(found) -> None:
    module = Replacing()
    fit(module)
    assert_equal(found["replaced"], state(module))


def test_whole_checkpoint_loads_in_one_process(run) -> None:
    module = MoEScalingModule.load_from_checkpoint(run[0] / "whole.ckpt", weights_only=True)
    assert module.tokens_seen == 2 * 8 * 12
    module(torch.zeros(1, 4, dtype=torch.long))


def test_nobody_is_warned_of_views_that_layers_return(run) -> None:
    assert "MoE) returned a view tensor" not in run[1]


def test_tensor_parallelism_is_refused(run) -> None:
    assert "use ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)" in run[1]


def test_options_that_do_not_exist_are_told() -> None:
    with pytest.raises(ValueError, match="experts must be 'gather' or 'stay', got 'move'"):
        shard_model(nn.Linear(2, 2), mesh=None, experts="move")
    with pytest.raises(ValueError, match="experts must be one of gather, stay, got 'move'"):
        module_of(AUX, experts="move")
