"""Depth completion networks that are cut, asked by the line selector, or trained privately."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from private_runs import private
from together import same_state, trainer
from torch import Tensor, nn

from lightning_eff import BatchKeys, Calibration, DirichletPruneCallback, Layers, ShapleyPruningCallback, load_pruned
from lightning_eff.lidar.completion.light import LightDepthCompletionNet
from lightning_eff.lidar.completion.module import DepthCompletionModule
from lightning_eff.lidar.completion.sparse_to_dense import SparseToDenseResNet
from lightning_eff.lidar.data import SyntheticLidarDataModule
from lightning_eff.lidar.lines import KITTI_HDL64E, LaserTable
from lightning_eff.lidar.selector import LidarSaSSelector
from lightning_eff.lidar.values import EstimationOptions

pytestmark = [
    pytest.mark.filterwarnings("ignore:channels of .* pass a norm that takes statistics over them"),
    pytest.mark.filterwarnings("ignore:.*the switches of all channels are equal"),
    pytest.mark.filterwarnings("ignore:.*lightning_eff.lidar.lines.LidarWarning"),
]

EVERY_FOURTH = LaserTable(KITTI_HDL64E.elevations[::4], KITTI_HDL64E.heights[::4])


def streets() -> SyntheticLidarDataModule:
    """Streets of 22 x 76 pixels seen by a sensor of sixteen lines."""
    sizes = {"train_size": 4, "val_size": 2, "test_size": 2, "batch_size": 2}
    return SyntheticLidarDataModule(**sizes, scale=16, table=EVERY_FOURTH)


def closeness(depth: Tensor, target: Tensor) -> Tensor:
    """Minus the mean absolute error of every frame, in metres."""
    valid = target > 0
    return -((depth - target).abs() * valid).flatten(1).sum(1) / valid.flatten(1).sum(1).clamp(min=1)


def light() -> LightDepthCompletionNet:
    torch.manual_seed(0)
    net = LightDepthCompletionNet(4)
    nn.init.normal_(net.head.weight, std=0.1)  # it begins at zero, where no channel counts
    return net


def cut(net: nn.Module, first: str, callback: Any = ShapleyPruningCallback, **options: Any) -> DepthCompletionModule:
    """Prune one group of a network while it is trained for an epoch."""
    module = DepthCompletionModule(net)
    pruning = callback(
        0.5,
        layers=Layers(include=[first], coupled="all", allow_norm_coupled=True),
        split_batch=BatchKeys(["rgb", "sparse"], "gt"),
        value=closeness,
        verbose=False,
        **options,
    )
    trainer(pruning).fit(module, streets())
    return module


def selector(model: nn.Module, **options: Any) -> LidarSaSSelector:
    made = LidarSaSSelector(model, k=[3], num_lines=16, estimation=EstimationOptions(budget=60, rounds=1), **options)
    trainer(limit_val_batches=0).fit(made, streets())
    return made


def check_selection(module: DepthCompletionModule, build: Any, tmp_path: Path) -> None:
    """The pruned network, its checkpoint and the network loaded from it select the same lines for the same values."""
    run = trainer()
    run.strategy.connect(module)
    run.save_checkpoint(tmp_path / "pruned.ckpt", weights_only=True)
    loaded = load_pruned(DepthCompletionModule, tmp_path / "pruned.ckpt", net=build())
    assert same_state(loaded, module)
    by_object = selector(module)
    by_file = selector(build(), checkpoint_path=tmp_path / "pruned.ckpt")
    assert same_state(by_file.model, module.net)
    assert by_file.result.selected == by_object.result.selected
    trainer_of_selector = trainer()
    trainer_of_selector.strategy.connect(by_object)
    trainer_of_selector.save_checkpoint(tmp_path / "selector.ckpt", weights_only=True)
    again = LidarSaSSelector.load_from_checkpoint(
        tmp_path / "selector.ckpt", model=DepthCompletionModule(build()), weights_only=True
    )
    assert again.result.selected == by_object.result.selected


def test_lines_are_selected_for_a_pruned_network_and_by_its_checkpoint(tmp_path: Path) -> None:
    module = cut(light(), "net.image_encoder.1.0", calibration=Calibration(samples=2), budget=6)
    assert module.net.image_encoder[1][0].out_channels == 4
    check_selection(module, light, tmp_path)


@pytest.mark.slow
def test_lines_are_selected_for_a_pruned_resnet_and_by_its_checkpoint(tmp_path: Path) -> None:
    module = cut(SparseToDenseResNet(), "net.conv1_d.0", DirichletPruneCallback)
    check_selection(module, SparseToDenseResNet, tmp_path)


def test_dirichlet_switches_judge_depth_by_the_modules_own_loss() -> None:
    module = cut(light(), "net.image_encoder.1.0", DirichletPruneCallback)
    assert module.net.image_encoder[1][0].out_channels == 4


def test_the_selector_trains_nothing_that_could_be_cut_or_trained_privately() -> None:
    made = LidarSaSSelector(light(), k=[3])
    with pytest.raises(MisconfigurationException, match="in a fit of LidarSaSSelector: it asks its network"):
        trainer(ShapleyPruningCallback(0.5, verbose=False)).fit(made, streets())
    with pytest.raises(ValueError, match=r"in a fit of LidarSaSSelector: it trains nothing.*privately before"):
        trainer(strategy=private()).fit(made, streets())


def test_depth_is_learnt_privately_frame_by_frame() -> None:
    strategy = private(isolation_check="error", max_physical_batch_size=2)
    trainer(strategy=strategy).fit(DepthCompletionModule(light(), reduction="frames"), streets())
    assert strategy.ledger.steps == 2
    assert strategy.ledger.caveats == []


def test_a_mean_over_pixels_of_all_frames_is_not_private() -> None:
    module = DepthCompletionModule(light())
    depth, target = torch.rand(2, 1, 2, 2), torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1]]).view(2, 1, 2, 2)
    pixels = (depth[target > 0] - 1).square().mean()
    frames = torch.stack([(one[its > 0] - 1).square().mean() for one, its in zip(depth, target, strict=True)]).mean()
    assert torch.isclose(module._loss(depth, target), pixels)
    assert torch.isclose(DepthCompletionModule(light(), reduction="frames")._loss(depth, target), frames)
    with pytest.raises(ValueError, match="depends on the other samples of its batch"):
        trainer(strategy=private(noise_multiplier=0.5, isolation_check="error", poisson_sampling=True)).fit(
            module, SyntheticLidarDataModule(train_size=4, val_size=2, test_size=2, batch_size=4, scale=16)
        )
