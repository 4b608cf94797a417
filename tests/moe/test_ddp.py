"""Two processes under plain DDP on gloo: what one process does with the joined batch."""

from pathlib import Path

import pytest
import torch
from helpers import run_ddp
from moe_parallel import AUX, BIAS, EXPERTS, NeverChosen, Somebodys, fit, module_of, state, windows
from torch import Tensor
from torch.nn import functional as F

from lightning_eff.moe import ReplaceFFN

SCRIPT = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch, torch.distributed as dist
from moe_parallel import *
from lightning_eff.moe import FineGrainedMoE, ReplaceFFN, total_aux_loss

never_chosen = NeverChosen()
found = {{}}


def both(tensor):
    parts = [torch.empty_like(tensor) for _ in range(2)]
    dist.all_gather(parts, tensor.contiguous())
    return torch.stack(parts)


for name, balance, callbacks, settings in (
    ("aux", AUX, [], {{}}),
    ("bias", BIAS, [never_chosen], {{"accumulate_grad_batches": 2}}),
):
    module = module_of(balance)
    fit(module, *callbacks, devices=devices(), strategy="ddp", **settings)
    found[name] = {{key: both(value) for key, value in state(module).items()}}
module = Somebodys()
replacing = ReplaceFFN("ffn", EXPERTS, "upcycle")
fit(module, replacing, devices=devices(), strategy="ddp", accumulate_grad_batches=2)
found["replaced"] = {{key: both(value) for key, value in state(module).items()}}

# one process has no target that counts
quiet = {{"logger": False, "enable_progress_bar": False, "enable_model_summary": False}}
validating = L.Trainer(accelerator="cpu", devices=devices(), strategy="ddp", use_distributed_sampler=False, **quiet)
tokens, targets = windows()[:4]
targets = targets if dist.get_rank() == 0 else torch.full_like(targets, -100)
torch.manual_seed(0)
validating.validate(module_of(AUX), DataLoader(TensorDataset(tokens, targets), 2), verbose=False)
found["validated"] = {{"loss": validating.callback_metrics["val/loss"]}}

# each process has half of the tokens and the gradient of its own loss; DDP takes the mean
rank = dist.get_rank()
alone = [dist.new_group([i]) for i in range(2)][rank]
x = torch.randn(40, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
for scope in ("global", "local"):
    layers = []
    for tokens, group in ((x[rank::2], None), (x, alone)):
        torch.manual_seed(0)
        layer = FineGrainedMoE(16, 32, expansion_rate=4, granularity=2, balance={{**AUX, "scope": scope}}).double()
        layer.process_group = group
        layer(tokens)
        total_aux_loss(layer).backward()
        layers.append(layer.router.grad)
    found[scope] = {{"processes": both(layers[0]).mean(0), "joined": layers[1]}}

if rank == 0:
    torch.save({{**found, "before": never_chosen.before}}, "found.pt")
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("ddp")
    run_ddp(SCRIPT, folder)
    return torch.load(folder / "found.pt", weights_only=True)


def test_gradient_of_the_global_balance_loss_is_that_of_the_joined_batch(found) -> None:
    torch.testing.assert_close(found["global"]["processes"], found["global"]["joined"], rtol=1e-6, atol=1e-12)
    assert not torch.allclose(found["local"]["processes"], found["local"]["joined"], rtol=1e-2)


@pytest.mark.parametrize(
    ("name", "balance", "callbacks", "settings"),
    [("aux", AUX, [], {}), ("bias", BIAS, [NeverChosen()], {"accumulate_grad_batches": 2})],
)
def test_processes_end_with_the_weights_of_one_process(found, name, balance, callbacks, settings) -> None:
    module = module_of(balance)
    fit(module, *callbacks, **settings)
    assert_equal(found[name], state(module))


def test_injected_losses_of_processes_are_those_of_one_process(found) -> None:
    module = Somebodys()
    fit(module, ReplaceFFN("ffn", EXPERTS, "upcycle"), accumulate_grad_batches=2)
    assert_equal(found["replaced"], state(module))


def test_process_without_a_target_that_counts_holds_nobody_up(found) -> None:
    torch.manual_seed(0)
    module = module_of(AUX)
    tokens, targets = windows()[:4]
    expected = F.cross_entropy(module.eval()(tokens).flatten(0, 1), targets.flatten())
    assert found["validated"]["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def assert_equal(given: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert given.keys() == expected.keys()
    for key, value in expected.items():
        one, other = given[key]
        assert torch.equal(one, other), key
        torch.testing.assert_close(one, value, rtol=1e-6, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}")


def test_expert_that_nobody_chooses_neither_stops_nor_changes(found) -> None:
    for name, before in found["before"].items():
        if name.endswith((".w1", ".w2")):
            same = [torch.equal(one, other) for one, other in zip(found["bias"][name][0], before, strict=True)]
            assert same == [expert == 3 for expert in range(8)], name
