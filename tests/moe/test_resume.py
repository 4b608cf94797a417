"""A run that was killed goes on to the weights, counts and losses of the one that was not."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from helpers import REPOSITORY, run_and_kill
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_eff.data import ByteTextDataModule
from lightning_eff.moe import MoEScalingModule

TEXT = str(REPOSITORY / "LICENSE")
# everything that a run remembers: loss-free bias, dropout, a window that has come round, batches that are accumulated
SCRIPT = """
import sys
import torch
import lightning.pytorch as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_eff.data import ByteTextDataModule
from lightning_eff.moe import MoEScalingModule

DECODER = {
    "d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 16,
    "moe": {"expansion_rate": 4, "granularity": 2, "balance": {"method": "bias", "bias_rate": 0.01}},
}

class Announce(L.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        print(f"step {trainer.global_step}", flush=True)

def run(folder, ckpt_path=None, **options):
    torch.manual_seed(0)
    module = MoEScalingModule(DECODER, lambda p: torch.optim.AdamW(p, lr=1e-2), loss_window=7)
    trainer = L.Trainer(
        accelerator="cpu", max_steps=30, max_epochs=-1, accumulate_grad_batches=2, log_every_n_steps=5,
        check_val_every_n_epoch=None, val_check_interval=14, limit_val_batches=1, logger=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        callbacks=[ModelCheckpoint(folder, filename="{step}", every_n_train_steps=5, save_top_k=-1), Announce()],
        **options,
    )
    trainer.fit(module, datamodule=ByteTextDataModule(TEXT, seq_len=16, batch_size=16), ckpt_path=ckpt_path)
    return module, trainer
"""
PREAMBLE = f"TEXT = {TEXT!r}\n"


def run(folder: Path, ckpt_path: Path | None = None, **options) -> tuple[MoEScalingModule, L.Trainer]:
    names: dict = {}
    exec(PREAMBLE + SCRIPT, names)
    return names["run"](str(folder), ckpt_path, **options)


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> tuple[MoEScalingModule, L.Trainer]:
    return run(tmp_path_factory.mktemp("straight"))


def assert_same(one: MoEScalingModule, other: MoEScalingModule) -> None:
    for name, weights in one.state_dict().items():
        assert torch.equal(weights, other.state_dict()[name]), name
    assert one.model.blocks[0].ffn.balance_bias.abs().max() > 0
    assert (one.tokens_seen, one.flops_seen) == (other.tokens_seen, other.flops_seen)
    assert one.smoothed_loss() == other.smoothed_loss()


def test_killed_run_goes_on_to_the_same_end(straight, tmp_path) -> None:
    module, trainer = straight
    run_and_kill(f"{PREAMBLE}{SCRIPT}\nrun(sys.argv[1])", "step 18", str(tmp_path))
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["step=10.ckpt", "step=15.ckpt", "step=5.ckpt"]
    resumed, again = run(tmp_path, tmp_path / "step=15.ckpt")
    assert_same(module, resumed)
    for name, value in trainer.callback_metrics.items():
        assert again.callback_metrics[name] == value, name


def test_every_checkpoint_of_an_epoch_and_of_the_next_goes_on(straight, tmp_path) -> None:
    module, trainer = straight
    folder = Path(trainer.checkpoint_callback.dirpath)
    assert trainer.current_epoch > 0
    assert_same(module, run(tmp_path, folder / "step=25.ckpt")[0])


def test_checkpoint_gives_the_module_back_without_its_options(straight) -> None:
    module, trainer = straight
    path = Path(trainer.checkpoint_callback.dirpath) / "step=30.ckpt"
    loaded = MoEScalingModule.load_from_checkpoint(path, weights_only=True)
    assert_same(module, loaded)
    assert (loaded.decoder, loaded.hparams["loss_window"]) == (module.decoder, 7)
    tokens = torch.randint(256, (4, 16))
    with torch.no_grad():
        assert torch.equal(loaded.eval()(tokens), module.eval()(tokens))


def test_validation_from_a_checkpoint_needs_no_training(straight) -> None:
    module, trainer = straight
    path = Path(trainer.checkpoint_callback.dirpath) / "step=30.ckpt"
    data = ByteTextDataModule(TEXT, seq_len=16, batch_size=16)
    fresh = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    fresh.validate(MoEScalingModule(module.decoder), datamodule=data, ckpt_path=path, verbose=False, weights_only=True)
    expected = dict(fresh.callback_metrics)
    fresh.validate(module, datamodule=data, verbose=False)
    assert fresh.callback_metrics == expected


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"moe": {"expansion_rate": 4, "granularity": 4}}, "moe.granularity: 2 there, 4 here"),
        ({"moe": {"expansion_rate": 8, "granularity": 2}}, "moe.expansion_rate: 4 there, 8 here"),
        ({"moe": None}, "moe: .*there, None here"),
        ({"d_model": 32}, "d_model: 16 there, 32 here"),
        ({"n_layers": 3}, "n_layers: 2 there, 3 here"),
    ],
)
def test_checkpoint_of_another_network_is_told_by_options(straight, tmp_path, other, told: str) -> None:
    module, trainer = straight
    path = Path(trainer.checkpoint_callback.dirpath) / "step=30.ckpt"
    different = MoEScalingModule({**module.decoder.to_dict(), **other})
    with pytest.raises(ValueError, match=f"the checkpoint is of another decoder: .*{told}"):
        L.Trainer(accelerator="cpu", logger=False, max_epochs=-1, max_steps=31, default_root_dir=tmp_path).fit(
            different, datamodule=ByteTextDataModule(TEXT, seq_len=16), ckpt_path=path
        )
    with pytest.raises(ValueError, match=f"the checkpoint is of another decoder: .*{told}"):
        MoEScalingModule.load_from_checkpoint(path, decoder=different.decoder)


def test_options_that_shapes_do_not_show_may_change_on_the_way(straight, tmp_path) -> None:
    module, trainer = straight
    path = Path(trainer.checkpoint_callback.dirpath) / "step=30.ckpt"
    changed = {"moe": {"balance": {"weight": 0.5}}, "dropout": 0.1}
    loaded = MoEScalingModule.load_from_checkpoint(
        path,
        decoder={
            **module.decoder.to_dict(),
            **changed,
            "moe": {**module.decoder.to_dict()["moe"], "balance": {"method": "bias", "weight": 0.5}},
        },
    )
    assert (loaded.decoder.dropout, loaded.decoder.moe.balance.weight) == (0.1, 0.5)


def test_best_checkpoints_are_found_by_what_is_logged(tmp_path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="val/loss", filename="best")
    trainer = L.Trainer(
        accelerator="cpu", max_steps=4, val_check_interval=2, limit_val_batches=1, logger=False, callbacks=[best],
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    decoder = {"d_model": 16, "n_layers": 1, "n_heads": 2, "max_seq_len": 16}
    trainer.fit(MoEScalingModule(decoder), datamodule=ByteTextDataModule(TEXT, seq_len=16, batch_size=8))
    assert best.best_model_score == trainer.callback_metrics["val/loss"]
