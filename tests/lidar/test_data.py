"""Data modules of lidar frames, through their loaders, a Trainer and YAML."""

import lightning.pytorch as L
import pytest
import torch
import yaml
from kitti_tree import real_frames, synthetic_frames, write_tree
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_eff.cli import main
from lightning_eff.lidar.batches import LidarKeys
from lightning_eff.lidar.data import KittiDepthDataModule, SyntheticLidarDataModule


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp("kitti"), synthetic_frames())


def ids(loader):
    return [name for batch in loader for name in batch["sample_id"]]


def test_calibration_frames_and_the_others_share_none(tree):
    data = KittiDepthDataModule(tree, num_calibration=1, scale=4)
    data.setup()
    drawn, rest = ids(data.train_dataloader()), ids(data.val_dataloader())
    assert (len(drawn), len(rest), set(drawn) & set(rest)) == (1, 1, set())
    assert ids(data.test_dataloader()) == ids(data.predict_dataloader()) == rest


def test_the_seed_decides_which_frames_are_drawn(tree):
    def drawn(seed):
        data = KittiDepthDataModule(tree, num_calibration=1, scale=4, seed=seed)
        data.setup()
        return ids(data.train_dataloader())[0]

    assert drawn(0) == drawn(0)
    assert len({drawn(seed) for seed in range(5)}) == 2


def test_another_split_can_be_evaluated_on(tree):
    data = KittiDepthDataModule(tree, "train", num_calibration=None, eval_split="val_select", batch_size=2, scale=4)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    inputs, target = LidarKeys()(batch)
    assert (inputs["line_idx"].shape, target.shape) == ((2, 1, 88, 304), (2, 1, 88, 304))
    assert len(ids(data.val_dataloader())) == 2


def test_frames_of_the_object_benchmark_are_a_split(kitti):
    data = KittiDepthDataModule(kitti, "object", num_calibration=1, scale=4)
    data.setup()
    assert sorted(ids(data.train_dataloader()) + ids(data.val_dataloader())) == ["000000", "000001"]


def test_lines_in_the_loaders_are_those_of_the_real_frames(kitti, tmp_path):
    frames = real_frames(kitti)
    data = KittiDepthDataModule(write_tree(tmp_path, frames), num_calibration=1)
    data.setup()
    lines = {}
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for batch in loader:
            lines[batch["sample_id"][0]] = batch["line_idx"][0]
    for frame in frames:
        found = next(found for name, found in lines.items() if name.startswith(frame.drive))
        truth = frame.lines[:, -352:, (frame.lines.shape[2] - 1216) // 2 :][..., :1216]
        assert (found == truth)[truth != 255].float().mean() >= 0.999


def test_augmentation_changes_training_frames_only(tree):
    plain = KittiDepthDataModule(tree, num_calibration=1, scale=8)
    augmented = KittiDepthDataModule(tree, num_calibration=1, scale=8, augment=True)
    plain.setup(), augmented.setup()
    torch.manual_seed(0)
    before = plain.train_set[0]
    seen = [augmented.train_set[0] for _ in range(8)]
    mirrored = [torch.equal(sample["line_idx"], before["line_idx"].flip(-1)) for sample in seen]
    straight = [torch.equal(sample["line_idx"], before["line_idx"]) for sample in seen]
    assert any(mirrored)
    assert any(straight)
    assert all(m != s for m, s in zip(mirrored, straight, strict=True))
    for sample, flipped in zip(seen, mirrored, strict=True):
        assert torch.equal(sample["sparse"], before["sparse"].flip(-1) if flipped else before["sparse"])
        assert not torch.equal(sample["rgb"], before["rgb"].flip(-1) if flipped else before["rgb"])
    assert torch.equal(augmented.val_set[0]["rgb"], plain.val_set[0]["rgb"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_calibration": 0}, "num_calibration must be a whole number >= 1, got 0"),
        ({"split": "all"}, "split must be one of object, train, val, val_select, test, got 'all'"),
        ({"split": "test"}, "expected a split with truth"),
        ({"num_calibration": None}, "num_calibration=None takes all frames of split: pass eval_split="),
        ({"crop": None, "batch_size": 2}, "expected batch_size 1 with crop=None"),
        ({"batch_size": 0}, "batch_size must be a whole number >= 1, got 0"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        KittiDepthDataModule("nowhere", **arguments)


def test_drawing_every_frame_leaves_none_to_evaluate_on(tree):
    with pytest.raises(ValueError, match=r"expected num_calibration < 2, .* got 2: none is left to evaluate on"):
        KittiDepthDataModule(tree, num_calibration=2).setup()
    with pytest.raises(ValueError, match=r"expected num_calibration <= 2, the frames of 'train' in .*, got 3$"):
        KittiDepthDataModule(tree, "train", num_calibration=3, eval_split="val_select").setup()


def test_synthetic_parts_have_their_sizes_and_no_frame_in_common():
    data = SyntheticLidarDataModule(5, 3, 2, batch_size=2, scale=16)
    data.setup()
    parts = [ids(loader) for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())]
    assert [len(part) for part in parts] == [5, 3, 2]
    assert len(set().union(*parts)) == 10
    assert parts[1] == ["val/000000", "val/000001", "val/000002"]


def test_synthetic_options_reach_the_frames():
    sparse, dense = (SyntheticLidarDataModule(2, 1, 1, scale=2, dropout=dropout) for dropout in (0.9, 0.0))
    sparse.setup(), dense.setup()
    assert (sparse.train_set[0]["sparse"] > 0).sum() < (dense.train_set[0]["sparse"] > 0).sum() / 4
    with pytest.raises(TypeError, match="unexpected keyword argument 'skale'"):
        SyntheticLidarDataModule(2, skale=4)
    with pytest.raises(ValueError, match=r"val_size must be a whole number >= 1, got 2\.5"):
        SyntheticLidarDataModule(2, 2.5)


class Recorder(L.LightningModule):
    """Remembers which frames it saw."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(1, 1, 1)
        self.seen = []

    def training_step(self, batch, batch_idx):
        inputs, target = LidarKeys()(batch)
        self.seen.append((self.current_epoch, tuple(inputs["sample_id"])))
        return (self.layer(inputs["sparse"]) - target).square().mean()

    def validation_step(self, batch, batch_idx):
        LidarKeys()(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-6)


def fit(tmp_path, ckpt_path=None, **trainer):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    model, trainer = Recorder(), L.Trainer(default_root_dir=tmp_path, max_epochs=3, **quiet, **trainer)
    trainer.fit(model, datamodule=SyntheticLidarDataModule(6, 2, 2, batch_size=2, scale=32), ckpt_path=ckpt_path)
    return model


def test_a_resumed_run_sees_the_frames_the_uninterrupted_one_sees(tmp_path):
    every_step = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    straight = fit(tmp_path, callbacks=[every_step])
    rest = fit(tmp_path, ckpt_path=tmp_path / "step=4.ckpt")  # the first batch of the second epoch was its last
    assert rest.seen == straight.seen[4:]
    assert len({names for _, names in straight.seen}) > 3  # epochs are shuffled differently


NETWORK = """
import torch
import lightning.pytorch as L

class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer, self.seen = torch.nn.Conv2d(1, 1, 1), []
    def validation_step(self, batch, batch_idx):
        self.seen += [(name, tuple(batch["line_idx"].shape)) for name in batch["sample_id"]]
"""


@pytest.mark.parametrize(
    ("module", "options", "seen"),
    [
        (
            "SyntheticLidarDataModule",
            {"val_size": 1, "scale": 16, "num_boxes": 3, "noise": 0.0},
            [("val/000000", (1, 1, 22, 76))],
        ),
        (
            "KittiDepthDataModule",
            {
                "split": "train",
                "num_calibration": None,
                "eval_split": "val_select",
                "line_source": "scan_order",
                "crop": [320, 1152],
                "scale": 8,
            },
            [(f"{day}_drive_0001_sync/image_02/0000000005", (1, 1, 40, 144)) for day in ("2011_09_26", "2011_09_28")],
        ),
    ],
)
def test_yaml_reaches_every_option(tree, tmp_path, monkeypatch, module, options, seen):
    (tmp_path / "lidar_net.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sys.argv", ["lightning-eff"])  # Lightning warns when the shell's arguments differ
    if module.startswith("Kitti"):
        options = {"root": str(tree), **options}
    config = {
        "seed_everything": False,
        "model": {"class_path": "lidar_net.Net"},
        "data": {"class_path": f"lightning_eff.lidar.data.{module}", "init_args": options},
        "trainer": {"logger": False, "accelerator": "cpu", "enable_progress_bar": False},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    run = main(["validate", "--config", str(tmp_path / "config.yaml")])
    assert run.model.seen == seen
