"""Every kind of checkpoint Lightning writes goes on with the batches the uninterrupted run would have seen."""

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_eff.data import DigitsDataModule

RUNS = {
    "epochs": {"max_epochs": 2},
    "shortened epochs": {"max_epochs": 2, "limit_train_batches": 3},
    "steps": {"max_steps": 8, "max_epochs": -1},
    "validation within the epoch": {"max_epochs": 2, "val_check_interval": 2},
}
CHECKPOINTS = {
    "every step": {"every_n_train_steps": 1},
    "end of validation": {"monitor": "val"},
    "end of epoch": {"save_on_train_epoch_end": True},
}


class Recorder(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer, self.seen = torch.nn.Linear(64, 10), []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch[0].sum().item())
        return self.layer(batch[0].flatten(1)).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val", self.layer(batch[0].flatten(1)).square().mean(), batch_size=len(batch[0]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


def batches_seen(tmp_path, ckpt_path=None, **options):
    model = Recorder()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    keeps = "callbacks" in options
    trainer = L.Trainer(default_root_dir=tmp_path, limit_val_batches=1, enable_checkpointing=keeps, **quiet, **options)
    trainer.fit(model, datamodule=DigitsDataModule(batch_size=256), ckpt_path=ckpt_path)  # five batches an epoch
    return model.seen


@pytest.mark.parametrize("when", CHECKPOINTS)
@pytest.mark.parametrize("run", RUNS)
def test_resumed_run_sees_the_batches_that_were_left(tmp_path, run, when):
    keep = ModelCheckpoint(tmp_path / "kept", filename="{step}", save_top_k=-1, **CHECKPOINTS[when])
    straight = batches_seen(tmp_path, callbacks=[keep], **RUNS[run])
    steps = sorted(int(path.stem.removeprefix("step=")) for path in (tmp_path / "kept").iterdir())
    assert steps[0] < len(straight)
    for step in steps:
        path = tmp_path / "kept" / f"step={step}.ckpt"
        assert batches_seen(tmp_path, path, **RUNS[run]) == straight[step:], f"resumed after step {step}"
