"""Two processes on gloo hold the same agent and the same backbone."""

import pytest
from helpers import run_ddp

SCRIPT = """
import os, sys, torch
from glimpse_runs import *
from lightning.pytorch import seed_everything
strategy, update = sys.argv[1:]
seed_everything(1, verbose=False)
module = make_module(pretrain_epochs=1, rl_only_epochs=1, update=update, stop_threshold=0.5)
trainer = make_trainer(".", 3, devices=int(os.environ["DEVICES"]), strategy=strategy, use_distributed_sampler=True)
trainer.fit(module, make_data(64))
trainer.save_checkpoint("ddp.ckpt")
buffer = module.sac.replay_buffer
for name, value in module.state_dict().items():
    both = [torch.zeros_like(value) for _ in range(2)]
    torch.distributed.all_gather(both, value)
    assert torch.equal(*both), name
actions = buffer.draw(16).actions
both = [torch.zeros_like(actions) for _ in range(2)]
torch.distributed.all_gather(both, actions)
assert not torch.equal(*both), "processes are to explore on their own"
losses = torch.tensor([float(trainer.callback_metrics[name]) for name in ("val/accuracy", "val/random/accuracy")])
both = [torch.zeros_like(losses) for _ in range(2)]
torch.distributed.all_gather(both, losses)
assert torch.equal(*both)
# and they go on together
resumed = make_module(seed=3, pretrain_epochs=1, rl_only_epochs=1, update=update)
trainer = make_trainer(".", 4, devices=2, strategy=strategy, use_distributed_sampler=True)
trainer.fit(resumed, make_data(64), ckpt_path="ddp.ckpt", weights_only=True)
for name, value in resumed.state_dict().items():
    both = [torch.zeros_like(value) for _ in range(2)]
    torch.distributed.all_gather(both, value)
    assert torch.equal(*both), name
assert any(not torch.equal(value, module.state_dict()[name]) for name, value in resumed.state_dict().items())
print("equal")
"""

REFUSED = """
import sys
from glimpse_runs import *
try:
    make_trainer(".", 1, devices=2, strategy="ddp").fit(make_module(), make_data())
except ValueError as error:
    assert "ddp_find_unused_parameters_true" in str(error), error
    print("refused")
"""


@pytest.mark.parametrize("update", ["fused", pytest.param("sb3", marks=pytest.mark.slow)])
def test_two_processes_end_with_the_same_networks_and_go_on_with_them(tmp_path, update):
    output = run_ddp(SCRIPT, tmp_path, "ddp_find_unused_parameters_true", update).stdout
    assert "equal" in output


@pytest.mark.slow
def test_plain_ddp_is_refused_with_the_name_of_the_strategy_to_use(tmp_path):
    assert "refused" in run_ddp(REFUSED, tmp_path).stdout
