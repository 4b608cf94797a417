import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_ddp
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning_eff.batch import BatchKeys
from lightning_eff.cli import main
from lightning_eff.lidar.batches import LidarKeys
from lightning_eff.lidar.completion.forwarding import DepthForward
from lightning_eff.lidar.completion.hole_filling import PullPushCompletion
from lightning_eff.lidar.completion.light import LightDepthCompletionNet
from lightning_eff.lidar.completion.module import DepthCompletionModule
from lightning_eff.lidar.data import SyntheticLidarDataModule
from lightning_eff.lidar.metrics import DEVKIT, METRICS, depth_errors
from lightning_eff.lidar.synthetic import SyntheticLidarDataset


def streets() -> SyntheticLidarDataModule:
    return SyntheticLidarDataModule(train_size=4, val_size=4, test_size=2, batch_size=2, scale=16)  # 22 x 76 pixels


def trainer(tmp_path: Path, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        **quiet,
        **{"max_epochs": 1, "enable_checkpointing": "callbacks" in options, **options},
    )


class Scale(nn.Module):
    """Depth is the first channel of the image, times a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))

    def forward(self, rgb: torch.Tensor, sparse: torch.Tensor) -> torch.Tensor:
        return self.weight * rgb[:, :1]


def batch(depth: list[float], gt: list[float]) -> dict[str, torch.Tensor]:
    image = torch.tensor(depth).view(1, 1, 1, -1).expand(1, 3, 1, -1)
    target = torch.tensor(gt).view(1, 1, 1, -1)
    line_idx = torch.zeros(target.shape, dtype=torch.uint8)
    return {"rgb": image, "sparse": torch.zeros_like(target), "gt": target, "line_idx": line_idx}


def loss_of(module: DepthCompletionModule, one: dict[str, torch.Tensor]) -> torch.Tensor:
    module.log = lambda *_, **__: None
    return module.training_step(one, 0)


def test_logged_errors_are_those_of_the_whole_set(tmp_path):
    module = DepthCompletionModule(PullPushCompletion(), metrics=METRICS)
    runner = trainer(tmp_path)
    runner.validate(module, streets(), verbose=False)
    frames = [SyntheticLidarDataset(4, "val", scale=16)[i] for i in range(4)]
    gt = torch.stack([frame["gt"] for frame in frames])
    depth = PullPushCompletion()(None, torch.stack([frame["sparse"] for frame in frames]))
    for name, error in depth_errors(depth, gt, METRICS).items():
        assert runner.callback_metrics[f"val/{name}"].item() == pytest.approx(error.mean().item(), rel=1e-6), name
    assert runner.callback_metrics["val/skipped"] == 0
    assert runner.callback_metrics["val/clamped"] == 0
    runner.test(module, streets(), verbose=False)
    assert {f"test/{name}" for name in (*METRICS, "loss")} <= set(runner.callback_metrics)


def test_training_beats_what_it_starts_from(tmp_path):
    torch.manual_seed(0)
    module = DepthCompletionModule(LightDepthCompletionNet(width=8), "l1", lr=5e-3)
    runner = trainer(tmp_path, max_epochs=12)
    runner.validate(module, streets(), verbose=False)
    before = runner.callback_metrics["val/mae"].item()  # of pull-push
    runner.fit(module, streets())
    assert runner.callback_metrics["val/mae"].item() < 0.9 * before


def test_loss_reads_valid_pixels_only():
    one = batch([3.0, 7.0, 100.0], [5.0, 8.0, 0.0])
    assert loss_of(DepthCompletionModule(Scale(), "l2"), one).item() == pytest.approx((4 + 1) / 2)
    assert loss_of(DepthCompletionModule(Scale(), "l1"), one).item() == pytest.approx((2 + 1) / 2)
    assert loss_of(DepthCompletionModule(Scale(), nn.HuberLoss()), one).item() == pytest.approx((1.5 + 0.5) / 2)
    assert loss_of(DepthCompletionModule(Scale(), min_target=6.0), one).item() == pytest.approx(1)


def test_a_batch_without_ground_truth_changes_nothing():
    module = DepthCompletionModule(Scale())
    loss_of(module, batch([3.0, 7.0], [0.0, 0.0])).backward()
    assert module.net.weight.grad == 0


def test_training_free_completion_is_judged_but_not_trained(tmp_path):
    with pytest.raises(ValueError, match=r"PullPushCompletion has nothing to train: call trainer.validate"):
        trainer(tmp_path).fit(DepthCompletionModule(PullPushCompletion()), streets())


def test_prediction_needs_no_ground_truth(tmp_path):
    frames = [{k: v for k, v in SyntheticLidarDataset(2, scale=16)[i].items() if k != "gt"} for i in range(2)]
    module = DepthCompletionModule(PullPushCompletion())
    (depth,) = trainer(tmp_path).predict(module, DataLoader(frames, 2))
    assert torch.equal(depth, PullPushCompletion()(None, torch.stack([frame["sparse"] for frame in frames])))


def test_data_without_lines_are_taken_by_their_keys(tmp_path):
    frames = [{k: v for k, v in SyntheticLidarDataset(2, scale=16)[i].items() if k != "line_idx"} for i in range(2)]
    module = DepthCompletionModule(PullPushCompletion(), split_batch=BatchKeys(["rgb", "sparse"], "gt"))
    runner = trainer(tmp_path)
    runner.validate(module, DataLoader(frames, 2), verbose=False)
    assert runner.callback_metrics["val/rmse"] > 0
    (depth,) = runner.predict(module, DataLoader(frames, 2))
    assert depth.shape == (2, 1, 22, 76)
    tuples = DepthCompletionModule(PullPushCompletion(), split_batch=lambda b: ((b["rgb"], b["sparse"]), b["gt"]))
    with pytest.raises(TypeError, match=r"inputs as a dict with 'sparse' .* got a tuple: pass split_batch="):
        runner.validate(tuples, DataLoader(frames, 2), verbose=False)


def test_learning_rate_falls_by_ten(tmp_path):
    module = DepthCompletionModule(LightDepthCompletionNet(8), lr=1e-2, decay_every=2, optimizer="adam")
    runner = trainer(tmp_path, max_epochs=4, limit_train_batches=1, limit_val_batches=0)
    runner.fit(module, streets())
    (optimizer,) = runner.optimizers
    assert type(optimizer) is torch.optim.Adam
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)


def test_a_checkpoint_gives_the_module_back(tmp_path):
    torch.manual_seed(0)
    module = DepthCompletionModule(LightDepthCompletionNet(8), nn.L1Loss(), lr=2e-3, split_batch=LidarKeys())
    runner = trainer(tmp_path, callbacks=[ModelCheckpoint(tmp_path, "last")])
    runner.fit(module, streets())
    again = DepthCompletionModule.load_from_checkpoint(
        tmp_path / "last.ckpt", net=LightDepthCompletionNet(8), loss=nn.L1Loss(), weights_only=True
    )
    assert again.lr == 2e-3
    for ours, theirs in zip(module.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_module_is_a_network_itself():
    torch.manual_seed(0)
    net = LightDepthCompletionNet(8)
    nn.init.normal_(net.head.weight, std=0.1)
    frame = SyntheticLidarDataset(1, scale=16)[0]
    rgb, sparse = frame["rgb"][None], frame["sparse"].expand(2, -1, -1, -1)
    forward = DepthForward(DepthCompletionModule(net))
    assert forward.splits_image
    torch.testing.assert_close(forward.of_image(rgb)(sparse), net(rgb.expand(2, -1, -1, -1), sparse))
    assert not DepthForward(DepthCompletionModule(PullPushCompletion())).splits_image
    called = DepthCompletionModule(net, forward=lambda model, rgb, sparse: 2 * model(rgb, sparse))
    assert not DepthForward(called).splits_image  # the parts would skip the callable
    assert torch.equal(called(rgb, sparse[:1]), 2 * net(rgb, sparse[:1]))


YAML = """
seed_everything: 0
trainer:
  accelerator: cpu
  max_epochs: 1
  limit_train_batches: 2
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_eff.lidar.dropout.LineDropout
      init_args:
        mode: block
        split_batch:
          class_path: lightning_eff.lidar.batches.LidarKeys
          init_args: {sparse: sparse}
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {dirpath: kept, filename: last}
model:
  class_path: lightning_eff.lidar.completion.module.DepthCompletionModule
  init_args:
    net:
      class_path: lightning_eff.lidar.completion.light.LightDepthCompletionNet
      init_args: {width: 8}
    loss:
      class_path: torch.nn.L1Loss
    forward: positional
    split_batch:
      class_path: lightning_eff.lidar.batches.LidarKeys
data:
  class_path: lightning_eff.lidar.data.SyntheticLidarDataModule
  init_args: {train_size: 4, val_size: 2, batch_size: 2}
  dict_kwargs: {scale: 16}
"""


def test_yaml_trains_and_its_checkpoint_needs_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lightning-eff"])
    Path("run.yaml").write_text(YAML)
    cli = main(["fit", "--config", "run.yaml"])
    assert set(cli.trainer.callback_metrics) >= {"train/loss", "val/loss", *(f"val/{name}" for name in DEVKIT)}
    again = DepthCompletionModule.load_from_checkpoint("kept/last.ckpt", weights_only=True)
    assert isinstance(again.loss, nn.L1Loss)
    assert torch.equal(again.net.head.weight, cli.model.net.head.weight)


DDP = """
import json, os
from lightning.pytorch import Trainer
from lightning_eff.lidar.completion.hole_filling import PullPushCompletion
from lightning_eff.lidar.completion.module import DepthCompletionModule
from lightning_eff.lidar.data import SyntheticLidarDataModule

trainer = Trainer(accelerator="cpu", devices=int(os.environ["DEVICES"]), strategy="ddp", logger=False)
data = SyntheticLidarDataModule(val_size=4, batch_size=1, scale=16)
values, = trainer.validate(DepthCompletionModule(PullPushCompletion()), data, verbose=False)
if trainer.is_global_zero:
    open("values.json", "w").write(json.dumps(values))
"""


@pytest.mark.slow
def test_two_processes_log_the_errors_of_one(tmp_path):
    run_ddp(DDP, tmp_path)
    values = json.loads((tmp_path / "values.json").read_text())
    runner = trainer(tmp_path)
    data = SyntheticLidarDataModule(val_size=4, batch_size=1, scale=16)
    (expected,) = runner.validate(DepthCompletionModule(PullPushCompletion()), data, verbose=False)
    assert values.pop("val/loss") == pytest.approx(expected.pop("val/loss"))  # a mean of means in float32
    assert values == expected


def test_mistakes_are_told():
    with pytest.raises(ValueError, match="expected loss 'l1' or 'l2' or a module, got 'rmse'"):
        DepthCompletionModule(PullPushCompletion(), "rmse")
    with pytest.raises(ValueError, match="lr must be > 0, got 0"):
        DepthCompletionModule(PullPushCompletion(), lr=0)
    with pytest.raises(ValueError, match="optimizer must be one of adam, adamw, sgd, got 'lion'"):
        DepthCompletionModule(PullPushCompletion(), optimizer="lion")
    with pytest.raises(ValueError, match="decay_every must be a whole number >= 1"):
        DepthCompletionModule(PullPushCompletion(), decay_every=0)
    with pytest.raises(ValueError, match="expected names out of"):
        DepthCompletionModule(PullPushCompletion(), metrics=["RMSE"])
    with pytest.raises(ValueError, match=r"expected a model that takes \(rgb, sparse\) or one dict"):
        DepthCompletionModule(nn.MultiheadAttention(4, 1))
