from dataclasses import dataclass

import pytest
import torch
from helpers import run_ddp
from synthesis.private_records import CountingDataset, features, records, small

from lightning_eff.accounting import PrivacyLedger
from lightning_eff.synthesis import release_mean_embedding
from lightning_eff.synthesis.processes import Processes

SCRIPT = """
import os, sys
import torch
import torch.distributed as dist
from synthesis.private_records import CountedData, records, small, trainer

what = sys.argv[1]
data = CountedData(records())
module = small(release_options={"noise_seed": 5})
run = trainer(devices=int(os.environ["DEVICES"]), strategy="ddp", max_epochs=1)
if what == "broken" and os.environ.get("LOCAL_RANK", "0") == "1":
    data.train.x[80, 2] = float("nan")
if what == "releases":  # as where a launcher sets no variable that tells of the other processes
    launched = {name: os.environ.pop(name) for name in ("WORLD_SIZE", "LOCAL_RANK") if name in os.environ}
    module = small()
    module.release(records())
    os.environ.update(launched)
problem = None
try:
    run.fit(module, datamodule=data)
except Exception as error:
    problem = f"{type(error).__name__}: {error}"
rank = run.global_rank
reads = dict(data.train.reads)
if problem is None:
    weights = torch.cat([p.detach().flatten() for p in module.generator.parameters()])
    latents = module._samples(0, 0)[0].detach()
    torch.save(
        {"embedding": module.embedding.flatten(), "counts": module.embedding.counts, "reads": reads, "latents": latents,
         "weights": weights, "epsilon": module.ledger.epsilon(), "steps": module.steps_trained}, f"rank{rank}.pt",
    )
else:
    released = module.embedding is not None
    torch.save({"problem": problem, "steps": module.ledger.steps, "released": released}, f"rank{rank}.pt")
    if dist.is_initialized():
        dist.barrier()
"""


def test_two_processes_release_what_one_would_and_train_one_generator(tmp_path):
    run_ddp(SCRIPT, tmp_path, "fit")
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    # 101 records: 50 and 51, none twice
    assert sorted([*first["reads"], *second["reads"]]) == list(range(101))
    assert set(first["reads"].values()) | set(second["reads"].values()) == {1}
    alone = small(release_options={"noise_seed": 5})
    alone.release(records())
    for rank in (first, second):
        torch.testing.assert_close(rank["embedding"], alone.embedding.flatten(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(rank["counts"], alone.embedding.counts, rtol=0, atol=1e-5)
        assert rank["epsilon"] == pytest.approx(5.0, rel=1e-9)
        assert rank["steps"] == 7  # steps of an epoch are not split among the processes
    assert torch.equal(first["embedding"], second["embedding"])
    assert torch.equal(first["weights"], second["weights"])
    assert not torch.equal(first["latents"], second["latents"])


def test_a_record_that_one_process_cannot_read_ends_all_of_them_without_a_release(tmp_path):
    run_ddp(SCRIPT, tmp_path, "broken")
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert "process 1 could not read its records: ValueError: batch 0" in first["problem"]
    assert second["problem"].startswith("ValueError: batch 0: 1 of 51 records hold NaN")
    for rank in (first, second):
        assert rank["steps"] == 0
        assert not rank["released"]


@dataclass(frozen=True)
class Beside(Processes):
    """Process 0 beside another one that answers ``other``."""

    world: int = 2
    other: object = None

    def gathered(self, value):
        return [value, value if value is None else self.other]


@pytest.mark.parametrize("other", [(80, "other records"), (79, "fewer records")])
def test_processes_that_hold_other_records_release_nothing(monkeypatch, other):
    monkeypatch.setattr(Processes, "running", lambda: Beside(other=other))
    data, ledger = CountingDataset(*records(80)), PrivacyLedger(adjacency="replace_one")
    told = rf"the processes hold other records.*their numbers: 80, {other[0]}\).*manual_seed"
    with pytest.raises(ValueError, match=told):
        release_mean_embedding(data, features(), 3, epsilon=1.0, ledger=ledger)
    assert not data.reads
    assert not ledger.history


def test_releases_that_each_process_made_for_itself_are_not_trained_on(tmp_path):
    run_ddp(SCRIPT, tmp_path, "releases")
    for rank in (0, 1):
        assert (
            "RuntimeError: the processes hold different releases" in torch.load(tmp_path / f"rank{rank}.pt")["problem"]
        )
